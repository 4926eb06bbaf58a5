"""The workloads of the side-by-side table, and how each is sent to a server that is up."""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median
from typing import Any, Literal

from loadtest.client import Client
from loadtest.events import Outcome
from loadtest.measure import client_warnings, summarize
from loadtest.run import closed_loop
from loadtest.workloads import COMPLETIONS, Workload, completion_body
from tests.bench.servers import Server, descriptions

# Of every 20 ms the disturbing process computes 10, always on the same core.
_HALF_BUSY = """
import os, time
os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
while True:
    end = time.perf_counter() + 0.01
    while time.perf_counter() < end:
        pass
    time.sleep(0.01)
"""
_SETTLED_TOKENS = 16  # that are streamed before the long prompt arrives


@dataclass(frozen=True)
class Case:
    """One row of the table. `kind` long sends `shape` as streams, then one `long_prompt`."""

    key: str
    model: str
    title: str
    requests: int
    concurrency: int
    shape: Workload
    kind: Literal["plain", "busy", "long"] = "plain"
    long_prompt: int = 4000

    @property
    def request_tokens(self) -> int:
        """Tokens of the longest request."""
        longest = self.shape.input_tokens + self.shape.output_tokens
        return max(longest, self.long_prompt + 8) if self.kind == "long" else longest

    @property
    def computed_prompt_tokens(self) -> int:
        """Prompt tokens that must be computed when shared beginnings are computed once."""
        shape = self.shape
        own = self.requests * (shape.input_tokens - shape.prefix_tokens)
        return own + shape.groups * shape.prefix_tokens

    def shortened(self) -> Case:
        """A quarter of the requests, but two rounds of the concurrency where there were."""
        fewer = max(self.requests // 4, min(self.requests, 2 * self.concurrency), 2)
        return self if self.kind == "long" else replace(self, requests=fewer)


_SHORT = Workload(input_tokens=128, output_tokens=64)
_PREFIX = Workload(input_tokens=576, output_tokens=32, prefix_tokens=512, groups=1)
_STREAMS = Workload(input_tokens=128, output_tokens=192)

CASES = (
    Case("M-16", "M", "M: 64 × (128 in, 64 out), 16 concurrent", 64, 16, _SHORT),
    Case("M-1", "M", "M: single stream 128/64", 8, 1, _SHORT),
    Case("M-prefix", "M", "M: 48 × (512 shared + 64, 32 out), 16 concurrent", 48, 16, _PREFIX),
    Case("M-busy", "M", "M: 16 concurrent, one core 50 % busy", 64, 16, _SHORT, kind="busy"),
    Case("M-long", "M", "M: 4,000-token prompt among 8 streams", 8, 8, _STREAMS, kind="long"),
    Case("S-16", "S", "S: 64 × (128 in, 64 out), 16 concurrent", 64, 16, _SHORT),
    Case("S-1", "S", "S: single stream 128/64", 8, 1, _SHORT),
    Case("S-64", "S", "S: 256 × (32 in, 64 out), 64 concurrent", 256, 64, Workload(32, 64)),
)


async def first_token(client: Client, model: str) -> None:
    """Return when a small request is answered. Raises `RuntimeError` if it fails."""
    outcome = await client.stream(_message(client, model, list(range(400, 416)), 2))
    if outcome.error is not None:
        raise RuntimeError(f"the first request failed: {outcome.error} {outcome.detail}")


async def warm_up(client: Client, model: str, concurrency: int) -> None:
    """Two waves of short requests that share nothing with what is measured."""
    prompts = Workload(64, 16).generate(2 * concurrency, seed=999)
    messages = [_message(client, model, *pair) for pair in prompts]
    await closed_loop(client.stream, messages, concurrency)


@asynccontextmanager
async def warmed_up(
    options: argparse.Namespace, name: str, model: str, cases: Sequence[Case]
) -> AsyncIterator[tuple[Server, Client, dict[str, Any]]]:
    """A server of servers.yaml that is ready for `cases`, a client to it, and a run to fill.

    `options` have models, prefix and out. Raises as `Server` does.
    """
    prefix = dict(entry.split("=", 1) for entry in options.prefix).get(name, "")
    log = options.out.with_name(f"{name}-{model}.log")
    server = Server(descriptions()[name], model, options.models / model, prefix, log)
    client = Client(server.url)
    run: dict[str, Any] = {"server": name, "model": model, "cases": {}}
    try:
        await server.wait_healthy(client)
        await first_token(client, model)
        run["start_seconds"] = time.perf_counter() - server.began
        print(f"{name}, {model}: first token after {run['start_seconds']:.1f} s", flush=True)
        await warm_up(client, model, max(case.concurrency for case in cases))
        yield server, client, run
    finally:
        client.close()
        server.stop()


async def run_case(client: Client, case: Case, seed: int) -> dict[str, Any]:
    """The figures of one run. Raises `RuntimeError` if any request failed."""
    pairs = case.shape.generate(case.requests, seed)
    messages = [_message(client, case.model, *pair) for pair in pairs]
    wall, cpu = time.perf_counter(), time.process_time()
    with _half_busy_core() if case.kind == "busy" else nullcontext():
        if case.kind == "long":
            extra, outcomes = await _with_long_prompt(client, case, messages, seed)
        else:
            outcomes = await closed_loop(client.stream, messages, case.concurrency)
    share = (time.process_time() - cpu) / (time.perf_counter() - wall)
    for outcome, (prompt, output) in zip(outcomes, pairs, strict=True):
        outcome.asked_input, outcome.asked_output = len(prompt), output
    summary = summarize(outcomes)
    if summary["errors"]:
        raise RuntimeError(f"{summary['errors']} {summary['error_examples']}")
    latency = summary["latency_ms"]
    figures = {
        "output_rate": summary["throughput"]["output_tokens_per_second"],
        "ttft_ms": latency["ttft"]["p50"],
        "tpot_ms": latency["tpot"]["p50"],
        "cached_tokens": summary["tokens"]["cached"],
        "client_cpu_share": share,
        "doubts": [*summary["disagreements"], *client_warnings(summary, share)],
    }
    return figures | (gaps_around(outcomes, extra) if case.kind == "long" else {})


async def _with_long_prompt(
    client: Client, case: Case, messages: list[bytes], seed: int
) -> tuple[Outcome, list[Outcome]]:
    """(the long request, the streams)."""
    (prompt, _), *_ = Workload(case.long_prompt, 8).generate(1, seed + 1)
    streams = asyncio.ensure_future(closed_loop(client.stream, messages, case.concurrency))
    # A short request beside the streams tells when they are under way.
    (other, _), *_ = case.shape.generate(1, seed + 2)
    await client.stream(_message(client, case.model, other, _SETTLED_TOKENS))
    extra = await client.stream(_message(client, case.model, prompt, 8))
    if extra.error is not None:
        streams.cancel()
        raise RuntimeError(f"the long prompt failed: {extra.error} {extra.detail}")
    return extra, await streams


def gaps_around(outcomes: list[Outcome], extra: Outcome) -> dict[str, float]:
    """Gaps between tokens of the streams, in ms; the worst is of those that end after `extra` left.

    Raises `RuntimeError` if there were none before or none after.
    """
    gaps = [(b, (b - a) * 1e3) for o in outcomes for a, b in pairwise(o.chunk_times)]
    before = [gap for end, gap in gaps if end < extra.sent]
    after = [gap for end, gap in gaps if end >= extra.sent]
    if not before or not after:
        raise RuntimeError("the long prompt did not arrive while the streams ran")
    usual = median(before + after)
    return {
        "worst_gap_ms": max(after),
        "median_gap_ms": usual,
        "median_gap_before_ms": median(before),
        "gap_ratio": max(after) / usual,
        "long_ttft_ms": (extra.chunk_times[0] - extra.sent) * 1e3,
    }


@contextmanager
def _half_busy_core() -> Iterator[None]:
    process = subprocess.Popen([sys.executable, "-c", _HALF_BUSY])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def _message(client: Client, model: str, prompt: Any, output: int) -> bytes:
    return client.message(COMPLETIONS, completion_body(model, prompt, output))
