"""What the front end costs when the model costs nothing.

    python -m tests.bench.bench_front_end

Streams from `slipstream serve` with a simulated model. First each step takes 20 ms, as a model's
would: "added" is what TTFT and TPOT have beyond one step, and the CPU columns are the cost of a
token that travels in an event of its own. 512 streams then ask for 25,600 tokens per second. Then
steps take no time: the rate is the most that passes on these cores, which client and engine use
too, and events carry several tokens. Last, where the front end's time goes, by cProfile, at 20 ms.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import pstats
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from loadtest.client import Client
from loadtest.measure import summarize
from loadtest.run import closed_loop
from loadtest.workloads import COMPLETIONS, Workload, completion_body
from tests.bench.make_models import tokenizer
from tests.bench.servers import Description, Server, cpu_seconds, tree
from tests.bench.workloads import first_token

_NAME = "simulated"
_SHAPE = Workload(input_tokens=32, output_tokens=128)


@dataclass(frozen=True)
class Load:
    """What one number of streams cost."""

    streams: int
    tokens: int
    seconds: float
    front_seconds: float  # CPU time of the front end
    engine_seconds: float
    ttft_ms: float
    tpot_ms: float
    events: int

    def row(self, step_ms: float) -> str:
        """One line of the table."""
        return (
            f"{step_ms:>7.0f}{self.streams:>9}{self.tokens / self.seconds:>12,.0f}"
            f"{self.tokens / self.front_seconds:>16,.0f}"
            f"{self.front_seconds / self.tokens * 1e6:>10.1f}"
            f"{self.engine_seconds / self.tokens * 1e6:>11.1f}"
            f"{self.ttft_ms - step_ms:>15.2f}{self.tpot_ms - step_ms:>15.3f}"
            f"{self.tokens / self.events:>14.2f}"
        )


_HEAD = (
    "step ms  streams    tokens/s  per core tok/s  front µs  engine µs  added TTFT ms"
    "  added TPOT ms  tokens/event"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all parts. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.bench_front_end",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 64, 512])
    parser.add_argument("--step-ms", type=float, nargs="+", default=[20.0, 0.0])
    parser.add_argument("--seconds", type=float, default=8.0, help="of streaming, about, a row")
    parser.add_argument("--out", type=Path, help="JSON file for the rows")
    parser.add_argument("--functions", type=int, default=25, help="of the profile; 0: no profile")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, _NAME)
        model.mkdir()
        (model / "config.json").write_text('{"vocab_size": 32000, "max_position_embeddings": 4096}')
        tokenizer(32000).save_pretrained(model)
        print(_HEAD)
        rows = {
            step_ms: asyncio.run(_loads(model, options.streams, step_ms, options.seconds))
            for step_ms in options.step_ms
        }
        if options.out:
            options.out.write_bytes(msgspec.json.format(msgspec.json.encode(rows)) + b"\n")
        if options.functions:
            stats = Path(folder, "stats")
            print(f"\n64 streams under cProfile, which itself slows:\n{_HEAD}")
            (load,) = asyncio.run(_loads(model, [64], 20.0, options.seconds, stats))
            _print_profile(stats, load, options.functions)
    return 0


async def _loads(
    model: Path, streams: list[int], step_ms: float, seconds: float, stats: Path | None = None
) -> list[Load]:
    """Start a server, measure and print every number of streams."""
    serve = [
        "python", "-m", "tests.bench.paced_server", "serve", "{folder}",
        "--served-model-name", "{name}", "--port", "{port}", "--worker", "simulated",
        "--max-sequences", str(max(streams)), "--num-blocks", str(8 * max(streams) + 64),
        "--log-level", "warning",
    ]  # fmt: skip
    environment = {"BENCH_STEP_MS": str(step_ms), "BENCH_PROFILE": str(stats)}
    description = Description(serve, health="/ready", environment=environment)
    server = Server(description, _NAME, model, "", model.parent / "log")
    client = Client(server.url)
    loads = []
    try:
        await server.wait_healthy(client)
        await first_token(client, _NAME)
        for number in streams:
            # A step gives every stream a token; without a pace, guess what two cores manage.
            rate = number / step_ms * 1e3 if step_ms else 8000
            requests = max(number, round(seconds * rate / _SHAPE.output_tokens), 3)
            loads.append(await _measure(client, server.pid, number, requests, stats))
            print(loads[-1].row(step_ms), flush=True)
        await first_token(client, _NAME)  # answered after the last signal was handled
    finally:
        client.close()
        server.stop()
    return loads


async def _measure(
    client: Client, front: int, streams: int, requests: int, stats: Path | None
) -> Load:
    messages = [
        client.message(COMPLETIONS, completion_body(_NAME, *pair))
        for pair in _SHAPE.generate(requests + streams, seed=streams)
    ]
    await closed_loop(client.stream, messages[requests:], streams)  # opens the connections
    if stats is not None:
        os.kill(front, signal.SIGUSR1)
    before, began = _cpu(front), time.perf_counter()
    outcomes = await closed_loop(client.stream, messages[:requests], streams)
    seconds, after = time.perf_counter() - began, _cpu(front)
    if stats is not None:
        os.kill(front, signal.SIGUSR1)
    summary = summarize(outcomes)
    if summary["errors"]:
        raise RuntimeError(f"{summary['errors']} {summary['error_examples']}")
    return Load(
        streams=streams,
        tokens=summary["tokens"]["output"],
        seconds=seconds,
        front_seconds=after[0] - before[0],
        engine_seconds=after[1] - before[1],
        ttft_ms=summary["latency_ms"]["ttft"]["p50"],
        tpot_ms=summary["latency_ms"]["tpot"]["p50"],
        events=sum(len(outcome.chunk_times) for outcome in outcomes),
    )


def _cpu(front: int) -> tuple[float, float]:
    """CPU seconds of the front end, and of the processes below it."""
    return cpu_seconds(front), sum(cpu_seconds(pid) for pid in tree(front)[1:])


def _print_profile(stats: Path, load: Load, functions: int) -> None:
    """The functions with the most time of their own, as microseconds per streamed token."""
    profile: dict[Any, Any] = pstats.Stats(str(stats)).stats  # type: ignore[attr-defined]
    rows = [
        (own / load.tokens * 1e6, calls / load.tokens, place)
        for place, (_, calls, own, _, _) in profile.items()
    ]
    print(f"{'own µs':>8}{'calls':>8}  per token")
    for own, calls, (file, line, name) in sorted(rows, reverse=True)[:functions]:
        where = f"{os.path.basename(file)}:{line}" if line else ""
        print(f"{own:>8.2f}{calls:>8.2f}  {name} {where}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the server is stopped too
    sys.exit(main())
