"""How long this server takes from its launch to the first streamed token, in turns with another.

    python -m tests.bench.bench_start MODEL [MODEL ...] [--beside CHECKOUT] [--starts 5]

MODEL is a folder, such as batching/builtin/model. CHECKOUT is another one of this project, such
as an older commit's worktree; it runs with the same installed packages. The first start of each is
not counted: it may compile kernels and fills the page cache.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from pathlib import Path

from loadtest.client import Client
from tests.bench.servers import Description, Server
from tests.bench.workloads import first_token

_HERE = Path(__file__).resolve().parents[2]
_NAME = "model"


def main() -> None:
    """Start, stop, and print medians."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.bench_start",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL")
    parser.add_argument("--beside", type=Path, help="another checkout")
    parser.add_argument("--starts", type=int, default=5, help="of each that count")
    options = parser.parse_args()
    checkouts = [_HERE] if options.beside is None else [options.beside.resolve(), _HERE]
    for model in options.models:
        seconds: dict[Path, list[float]] = {checkout: [] for checkout in checkouts}
        for turn in range(options.starts + 1):
            for checkout in checkouts if turn % 2 else reversed(checkouts):
                passed = asyncio.run(_start(checkout, model.resolve()))
                if turn:
                    seconds[checkout].append(passed)
        for checkout, found in seconds.items():
            spread = f"({min(found):.2f}–{max(found):.2f})"
            print(f"{model}, {checkout}: {statistics.median(found):.2f} s {spread}", flush=True)


async def _start(checkout: Path, folder: Path) -> float:
    """Seconds from launch to first token of one server, which is stopped then."""
    description = Description(
        command=["python", "-m", "app.cli", "serve", "{folder}", "--served-model-name", _NAME,
                 "--port", "{port}", "--log-level", "warning"],
        health="/ready",
        # Also in the engine child: that checkout's modules, and not the working directory's.
        environment={"PYTHONPATH": str(checkout), "PYTHONSAFEPATH": "1"},
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as logs:
        server = Server(description, _NAME, folder, "", Path(logs) / "log")
        client = Client(server.url)
        try:
            await server.wait_healthy(client)
            await first_token(client, _NAME)
            return time.perf_counter() - server.began
        finally:
            client.close()
            server.stop()


if __name__ == "__main__":
    main()
