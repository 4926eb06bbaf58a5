"""How long one key waits for first tokens, alone and beside another that sends ten times as much.

    python -m tests.bench.bench_fairness [--seconds N] [--rate R] [SERVE-FLAGS…]

Starts `slipstream serve` with two keys and the given flags. The modest key sends R requests a
second (Poisson), first alone, then beside a greedy key that sends 10 R: with `--policy fair`, and
for comparison with fcfs. Prints medians and their ratios.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import tempfile
import time
from pathlib import Path
from statistics import median

import httpx

from tests.e2e.server_process import ServerProcess

FLOOD = 10


class Client:
    """One key's requests; `waits` are its seconds to first token."""

    def __init__(self, url: str, key: str, tokens: int) -> None:
        limits = httpx.Limits(max_connections=None)
        headers = {"authorization": f"Bearer {key}"}
        self._http = httpx.AsyncClient(base_url=url, headers=headers, limits=limits, timeout=600)
        self._tokens = tokens
        self._random = random.Random(key)
        self.waits: list[float] = []
        self.refused = 0

    async def run(self, rate: float, seconds: float) -> None:
        """Open loop: requests are sent when they are due, whatever became of others."""
        tasks, end = [], time.monotonic() + seconds
        while (now := time.monotonic()) < end:
            tasks.append(asyncio.create_task(self._ask()))
            await asyncio.sleep(min(self._random.expovariate(rate), end - now))
        await asyncio.gather(*tasks)

    async def _ask(self) -> None:
        prompt = [self._random.randrange(300) for _ in range(self._random.randrange(50, 400))]
        fields = {
            "prompt": prompt, "max_tokens": self._tokens, "stream": True, "ignore_eos": True,
        }  # fmt: skip
        sent, first = time.monotonic(), None
        async with self._http.stream("POST", "/v1/completions", json=fields) as answer:
            self.refused += answer.status_code != 200
            async for line in answer.aiter_lines():
                if first is None and line.startswith("data: {"):
                    first = time.monotonic() - sent
                    self.waits.append(first)


async def measure(url: str, rate: float, seconds: float) -> tuple[float, float, int]:
    """Medians alone and beside a flood, and how many requests that was."""
    alone, beside, greedy = (Client(url, key, 64) for key in ("modest", "modest", "greedy"))
    await alone.run(rate, seconds)
    flood = asyncio.create_task(greedy.run(FLOOD * rate, seconds + 3))
    await asyncio.sleep(3)  # its queue has grown
    await beside.run(rate, seconds)
    flood.cancel()
    return median(alone.waits), median(beside.waits), len(beside.waits)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.bench_fairness")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--rate", type=float, default=2.0, help="requests a second")
    chosen, flags = parser.parse_known_args()
    for policy in ("fair", "fcfs"):
        with tempfile.TemporaryDirectory() as folder:
            keys = ("--api-keys", "modest,greedy", "--policy", policy)
            server = ServerProcess(Path(folder) / "log", *keys, *flags)
            try:
                server.wait_ready()
                alone, beside, count = asyncio.run(measure(server.url, chosen.rate, chosen.seconds))
            finally:
                server.process.kill()
                server.process.wait()
        print(
            f"{policy:>5}: median time to first token {alone * 1e3:.0f} ms alone, "
            f"{beside * 1e3:.0f} ms beside {FLOOD} times the load ({beside / alone:.2f} times; "
            f"{count} requests)",
            flush=True,
        )


if __name__ == "__main__":
    main()
