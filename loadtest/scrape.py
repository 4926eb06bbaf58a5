"""What the server says of itself in `/metrics`, under vLLM's names, read while it is measured."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Sequence
from typing import Any

from loadtest.client import Client
from loadtest.events import Outcome

_SAMPLE = re.compile(r"^([A-Za-z_:][\w:]*)(?:\{[^}]*\})? (\S+)", re.MULTILINE)
GAUGES = {
    "running": "vllm:num_requests_running",
    "waiting": "vllm:num_requests_waiting",
    "kv": "vllm:kv_cache_usage_perc",
}
_COUNTERS = {
    "input": "vllm:prompt_tokens_total",
    "output": "vllm:generation_tokens_total",
}
_SETTLE_SECONDS = 0.3  # counters of some servers lag behind their last byte


def parse(text: str) -> dict[str, float]:
    """Sample names to the sum of their values over labels."""
    totals: dict[str, float] = {}
    for name, value in _SAMPLE.findall(text):
        try:
            totals[name] = totals.get(name, 0.0) + float(value)
        except ValueError:
            continue
    return totals


async def scrape(client: Client) -> dict[str, float] | None:
    """All samples now; None if the server has no metrics."""
    try:
        return parse((await client.get_bytes("/metrics")).decode(errors="replace"))
    except (OSError, ValueError):
        return None


class Watch:
    """Samples a server's gauges during a run, and its counters before and after it."""

    def __init__(self, client: Client, every: float = 0.5) -> None:
        self._client = client
        self._every = every
        self._before: dict[str, float] | None = None
        self._after: dict[str, float] | None = None
        self._task: asyncio.Task[None] | None = None
        self.samples: list[dict[str, float]] = []  # time on the client's clock as "t", gauges

    async def __aenter__(self) -> Watch:
        self._before = await scrape(self._client)
        if self._before is not None:
            self._task = asyncio.ensure_future(self._sample())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task is None:
            return
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        await asyncio.sleep(_SETTLE_SECONDS)
        self._after = await scrape(self._client)

    async def _sample(self) -> None:
        while True:
            found = await scrape(self._client)
            if found is not None:
                gauges = {key: found[name] for key, name in GAUGES.items() if name in found}
                self.samples.append({"t": time.perf_counter(), **gauges})
            await asyncio.sleep(self._every)

    def tokens(self) -> dict[str, int] | None:
        """Input and output tokens that the server counted during the run, if it says."""
        before, after = self._before, self._after
        if before is None or after is None or not all(n in after for n in _COUNTERS.values()):
            return None
        return {key: round(after[name] - before.get(name, 0.0)) for key, name in _COUNTERS.items()}


def against_server(outcomes: Sequence[Outcome], counted: dict[str, int] | None) -> dict[str, Any]:
    """The server's token counters beside the sums of `usage`.

    Only where no request failed: what a server counts of failed ones is its own business.
    """
    if counted is None or any(o.error is not None for o in outcomes):
        return {}
    ours = {
        "input": sum(o.input_tokens or 0 for o in outcomes),
        "output": sum(o.output_tokens or 0 for o in outcomes),
    }
    return {
        f"/metrics counts {counted[key]} {key} tokens, usage {ours[key]}": 1
        for key in ours
        if counted[key] != ours[key]
    }
