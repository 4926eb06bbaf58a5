"""`slipstream bench`: measure an OpenAI-style server with streamed completions."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from typing import Any

from loadtest.bench import Bench
from loadtest.client import Client
from loadtest.flags import bench_parser
from loadtest.report import render, write


def main(arguments: Sequence[str]) -> int:
    """Run one measurement. Returns 0; 1 if a request or a check failed or no rate met the SLO; 2
    for wrong usage or no server."""
    options = bench_parser(__doc__).parse_args(arguments)
    try:
        result = _run(_bench(options))
        print(render(result))
        write(result, options.out, options.html)
    except (OSError, ValueError) as error:
        print(f"slipstream bench: error: {error}", file=sys.stderr)
        return 2
    failed = bool(result["summary"]["errors"])
    if result.get("chaos"):
        failed = any(not check["passed"] for check in result["chaos"])
    if "find_rate" in result:
        failed = result["find_rate"]["rate"] is None
    return int(failed)


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
        return await Bench(options, client).run()
    finally:
        client.close()
