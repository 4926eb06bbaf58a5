"""`slipstream bench`: measure an OpenAI-style server with streamed completions."""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from loadtest.arrivals import poisson
from loadtest.client import Client
from loadtest.events import Outcome
from loadtest.measure import client_warnings, summarize
from loadtest.report import SCHEMA, render
from loadtest.run import closed_loop, open_loop
from loadtest.workloads import COMPLETIONS, Workload, completion_body


def main(arguments: Sequence[str]) -> int:
    """Run one measurement. Returns 0, 1 if any request failed, 2 for wrong usage or no server."""
    options = _parser().parse_args(arguments)
    try:
        result = _run(_bench(options))
    except (OSError, ValueError) as error:
        print(f"slipstream bench: error: {options.url}: {error}", file=sys.stderr)
        return 2
    print(render(result))
    if options.out:
        options.out.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")
    return 0 if not result["summary"]["errors"] else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="slipstream bench",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="server")
    parser.add_argument("--model", help="model name; the server's first one if not given")
    parser.add_argument("--api-key", help="bearer token")
    load = parser.add_mutually_exclusive_group()
    load.add_argument("--rate", type=_positive(float), help="open loop: Poisson requests/s")
    load.add_argument(
        "--concurrency", type=_positive(int), default=8, help="closed loop: requests in flight"
    )
    parser.add_argument("--requests", type=_positive(int), default=100, help="requests measured")
    parser.add_argument("--warmup", type=int, default=4, help="requests before, not measured")
    prompt = parser.add_argument_group("workload")
    prompt.add_argument("--input-tokens", type=_positive(int), default=128, help="prompt length")
    prompt.add_argument("--output-tokens", type=_positive(int), default=64, help="max_tokens")
    prompt.add_argument("--spread", type=_share, default=0.0, help="lengths vary by this share")
    prompt.add_argument("--prefix-tokens", type=int, default=0, help="of the prompt, shared")
    prompt.add_argument(
        "--groups", type=_positive(int), default=1, help="different shared prefixes"
    )
    prompt.add_argument("--words", action="store_true", help="send words, not exact token ids")
    prompt.add_argument("--vocab-size", type=int, default=2000, help="token ids are below this")
    prompt.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    prompt.add_argument(
        "--ignore-eos",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="always generate the whole output, end tokens as text (not OpenAI fields)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of prompts and arrivals")
    parser.add_argument("--max-connections", type=_positive(int), default=1024, help="cap")
    parser.add_argument("--timeout", type=_positive(float), default=600.0, help="seconds a request")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    return parser


def _positive(kind: type[int] | type[float]) -> Any:
    def parse(text: str) -> float:
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"{text} is not above 0")
        return value

    return parse


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 1)")
    return value


def _run(main: Any) -> dict[str, Any]:
    try:
        import uvloop
    except ImportError:
        return asyncio.run(main)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)


async def _bench(options: argparse.Namespace) -> dict[str, Any]:
    client = Client(
        options.url,
        api_key=options.api_key,
        max_connections=options.max_connections,
        timeout=options.timeout,
    )
    try:
        model = options.model or (await client.get("/v1/models"))["data"][0]["id"]
        prompts = _workload(options).generate(options.warmup + options.requests, options.seed)
        messages = [
            client.message(
                COMPLETIONS,
                completion_body(model, *pair, options.temperature, ignore_eos=options.ignore_eos),
            )
            for pair in prompts
        ]
        warmup, measured = messages[: options.warmup], messages[options.warmup :]
        await closed_loop(client.stream, warmup, options.concurrency)
        began, wall, cpu = datetime.now(UTC), time.perf_counter(), time.process_time()
        outcomes = await _load(client, options, measured)
        cpu_share = (time.process_time() - cpu) / (time.perf_counter() - wall)
    finally:
        client.close()
    for outcome, (prompt, output) in zip(outcomes, prompts[options.warmup :], strict=True):
        outcome.asked_input = len(prompt) if isinstance(prompt, list) else None
        outcome.asked_output = output
    summary = summarize(outcomes)
    return {
        "schema": SCHEMA,
        "started": began.isoformat(timespec="seconds"),
        "url": options.url,
        "model": model,
        "load": _describe(options),
        "options": {
            name: str(value) if isinstance(value, Path) else value
            for name, value in vars(options).items()
            if name != "api_key"
        },
        "client": {
            "cpu_share": cpu_share,
            "cores": os.cpu_count(),
            "machine": platform.machine(),
            "python": platform.python_version(),
        },
        "connections": {"cap": options.max_connections, "peak": client.peak_connections},
        "warnings": client_warnings(summary, cpu_share),
        "summary": summary,
    }


async def _load(
    client: Client, options: argparse.Namespace, messages: Sequence[bytes]
) -> list[Outcome]:
    if options.rate is None:
        return await closed_loop(client.stream, messages, options.concurrency)
    offsets = poisson(options.rate, len(messages), options.seed)
    return await open_loop(client.stream, messages, offsets)


def _workload(options: argparse.Namespace) -> Workload:
    return Workload(
        input_tokens=options.input_tokens,
        output_tokens=options.output_tokens,
        spread=options.spread,
        prefix_tokens=options.prefix_tokens,
        groups=options.groups if options.prefix_tokens else 0,
        form="words" if options.words else "ids",
        vocab_size=options.vocab_size,
    )


def _describe(options: argparse.Namespace) -> str:
    if options.rate is not None:
        load = f"open loop, Poisson {options.rate:g} requests/s"
    else:
        load = f"closed loop, {options.concurrency} at once"
    prefix = f" ({options.prefix_tokens} shared)" if options.prefix_tokens else ""
    return f"{load}, {options.input_tokens}{prefix} tokens in, {options.output_tokens} out"
