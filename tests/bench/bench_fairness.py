"""How long one key waits for first tokens, alone and beside another that sends ten times as much.

    python -m tests.bench.bench_fairness [--seconds N] [--rate R] [--tokens N] [SERVE-FLAGS…]

Starts `slipstream serve` with two keys and the given flags. The modest key sends R requests a
second (Poisson), first alone, then beside a greedy key that sends 10 R: with `--policy fair`, and
for comparison with fcfs. Prints medians and their ratios, as this client saw them and, from
`/debug/requests`, as the server did. The flood has a process of its own, which yields to all others
on this machine: it stands for another machine.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import random
import tempfile
import time
from pathlib import Path
from statistics import median

import httpx

from tests.e2e.server_process import ServerProcess

FLOOD = 10
_FLOOD_SECONDS = 3.0  # until its queue has grown
_WORDS = "the a story of one who was and then did not see that she had been there once".split()


class Client:
    """One key's requests."""

    def __init__(self, url: str, key: str, tokens: int) -> None:
        limits = httpx.Limits(max_connections=None)
        headers = {"authorization": f"Bearer {key}"}
        self._http = httpx.AsyncClient(base_url=url, headers=headers, limits=limits, timeout=600)
        self._tokens = tokens
        self._random = random.Random(key)
        self._seen: set[str] = set()
        self.waited: list[float] = []  # seconds to each first token

    async def run(self, rate: float, seconds: float) -> None:
        """Open loop: requests are sent when they are due, whatever became of others."""
        tasks, end = [], time.monotonic() + seconds
        while (now := time.monotonic()) < end:
            tasks.append(asyncio.create_task(self._ask()))
            await asyncio.sleep(min(self._random.expovariate(rate), end - now))
        await asyncio.gather(*tasks)

    async def _ask(self) -> None:
        # Words, since random tokens are answered with bytes that make no character until the end.
        prompt = " ".join(self._random.choices(_WORDS, k=self._random.randrange(20, 150)))
        fields = {"prompt": prompt, "max_tokens": self._tokens, "ignore_eos": True, "stream": True}
        began = first = time.monotonic()
        async with self._http.stream("POST", "/v1/completions", json=fields) as answer:
            answer.raise_for_status()
            async for _ in answer.aiter_raw():
                if first == began:
                    first = time.monotonic()
        self.waited.append(first - began)

    async def waits(self) -> tuple[list[float], list[float]]:
        """Seconds to first token of all requests since this was last called: the client's, and
        the server's."""
        answer = await self._http.get("/debug/requests", params={"limit": 1000})
        new = [r for r in answer.json()["data"] if r["id"] not in self._seen]
        self._seen |= {r["id"] for r in new}
        waited, self.waited = self.waited, []
        return waited, [r["time_to_first_token"] for r in new]


def flood(url: str, rate: float, seconds: float, tokens: int) -> None:
    """Send the greedy key's requests."""
    os.nice(19)
    asyncio.run(Client(url, "greedy", tokens).run(rate, seconds))


async def measure(
    url: str, rate: float, seconds: float, tokens: int
) -> tuple[tuple[list[float], list[float]], tuple[list[float], list[float]]]:
    """The modest key's times to first token, alone and beside a flood."""
    modest = Client(url, "modest", tokens)
    await modest.run(rate, seconds)
    alone = await modest.waits()
    greedy = (url, FLOOD * rate, seconds + _FLOOD_SECONDS, tokens)
    process = multiprocessing.get_context("spawn").Process(target=flood, args=greedy)
    process.start()
    await asyncio.sleep(_FLOOD_SECONDS)
    await modest.run(rate, seconds)
    process.kill()
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
        for side, less, more in zip(("client", "server"), alone, beside, strict=True):
            before, after = median(less), median(more)
            print(
                f"{policy}, by the {side}: median time to first token {before * 1e3:.0f} ms alone, "
                f"{after * 1e3:.0f} ms beside {FLOOD} times the load: {after / before:.2f} times "
                f"({len(less)} and {len(more)} requests)",
                flush=True,
            )


if __name__ == "__main__":
    main()
