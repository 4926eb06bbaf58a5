"""How long one key waits for first tokens, alone and beside another that sends ten times as much.

    python -m tests.bench.bench_fairness [--seconds N] [--rate R] [--tokens N] [SERVE-FLAGS…]

Starts `slipstream serve` with two keys and the given flags. The modest key sends R requests a
second (Poisson), first alone, then beside a greedy key that sends 10 R: with `--policy fair`, and
for comparison with fcfs. Prints medians and their ratios. The times are the server's, from
`/debug/requests`: this client shares its cores, and is itself late under such a flood.
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
_FLOOD_SECONDS = 3.0  # until its queue has grown


class Client:
    """One key's requests."""

    def __init__(self, url: str, key: str, tokens: int) -> None:
        limits = httpx.Limits(max_connections=None)
        headers = {"authorization": f"Bearer {key}"}
        self._http = httpx.AsyncClient(base_url=url, headers=headers, limits=limits, timeout=600)
        self._tokens = tokens
        self._random = random.Random(key)
        self._seen: set[str] = set()

    async def run(self, rate: float, seconds: float) -> None:
        """Open loop: requests are sent when they are due, whatever became of others."""
        tasks, end = [], time.monotonic() + seconds
        while (now := time.monotonic()) < end:
            tasks.append(asyncio.create_task(self._ask()))
            await asyncio.sleep(min(self._random.expovariate(rate), end - now))
        await asyncio.gather(*tasks)

    async def _ask(self) -> None:
        prompt = [self._random.randrange(300) for _ in range(self._random.randrange(50, 400))]
        fields = {"prompt": prompt, "max_tokens": self._tokens, "ignore_eos": True, "stream": True}
        async with self._http.stream("POST", "/v1/completions", json=fields) as answer:
            answer.raise_for_status()
            async for _ in answer.aiter_raw():
                pass

    async def waits(self) -> list[float]:
        """Seconds to first token of all requests since this was last called."""
        answer = await self._http.get("/debug/requests", params={"limit": 1000})
        new = [r for r in answer.json()["data"] if r["id"] not in self._seen]
        self._seen |= {r["id"] for r in new}
        return [r["time_to_first_token"] for r in new if r["time_to_first_token"] is not None]


async def measure(
    url: str, rate: float, seconds: float, tokens: int
) -> tuple[list[float], list[float]]:
    """The modest key's times to first token, alone and beside a flood."""
    modest, greedy = Client(url, "modest", tokens), Client(url, "greedy", tokens)
    await modest.run(rate, seconds)
    alone = await modest.waits()
    flood = asyncio.create_task(greedy.run(FLOOD * rate, seconds + _FLOOD_SECONDS))
    await asyncio.sleep(_FLOOD_SECONDS)
    await modest.run(rate, seconds)
    flood.cancel()
    return alone, await modest.waits()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.bench_fairness")
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--rate", type=float, default=3.0, help="requests a second")
    parser.add_argument("--tokens", type=int, default=128, help="of each answer")
    chosen, flags = parser.parse_known_args()
    for policy in ("fair", "fcfs"):
        with tempfile.TemporaryDirectory() as folder:
            keys = ("--api-keys", "modest,greedy", "--policy", policy)
            server = ServerProcess(Path(folder) / "log", *keys, *flags)
            try:
                server.wait_ready()
                alone, beside = asyncio.run(
                    measure(server.url, chosen.rate, chosen.seconds, chosen.tokens)
                )
            finally:
                server.process.kill()
                server.process.wait()
        before, after = median(alone), median(beside)
        print(
            f"{policy}: median time to first token {before * 1e3:.0f} ms alone, "
            f"{after * 1e3:.0f} ms beside {FLOOD} times the load: {after / before:.2f} times "
            f"({len(alone)} and {len(beside)} requests)",
            flush=True,
        )


if __name__ == "__main__":
    main()
