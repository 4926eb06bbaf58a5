"""Runs of the load generator: one, several for confidence, or many to find a rate."""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from loadtest.chaos import Chaos, verdict
from loadtest.client import Client
from loadtest.conversations import Common
from loadtest.events import Outcome
from loadtest.figures import confidence, figures
from loadtest.find_rate import find_rate
from loadtest.measure import client_warnings, summarize
from loadtest.progress import Progress
from loadtest.report import SCHEMA, course
from loadtest.run import Player, closed_loop, open_loop
from loadtest.scenario import Scenario, describe, scenario
from loadtest.scrape import Watch, against_server
from loadtest.slo import Slo, load_slo

PROBE_SECONDS = 10.0


class Bench:
    """Measures one server as flags say."""

    def __init__(self, options: argparse.Namespace, client: Client) -> None:
        self._options = options
        self._client = client
        self._slo: Slo | None = load_slo(options.slo) if options.slo else None
        self._common = Common("")
        self._context: int | None = None
        self._cpu_shares: list[float] = []
        self._notes: list[str] = []

    async def run(self) -> dict[str, Any]:
        """The result, as it is written. Raises `OSError`, `ValueError`."""
        options = self._options
        if options.find_rate is not None and self._slo is None:
            raise ValueError("--find-rate needs --slo")
        card = await self._card()
        self._context = card.get("max_model_len")
        self._common = Common(options.model or card["id"], options.temperature, options.ignore_eos)
        began = datetime.now(UTC)
        if options.find_rate is not None:
            found = await self._find_rate(options.find_rate)
        elif options.chaos:
            found = await self._with_chaos()
        else:
            found = await self._repeated()
        cpu_share = max(self._cpu_shares)
        warnings = client_warnings(found["summary"], cpu_share) + self._notes
        if (found.get("steady") or {}).get("growing"):
            warnings.append("requests in flight grew to the end: more came than were served")
        return {
            "schema": SCHEMA,
            "started": began.isoformat(timespec="seconds"),
            "url": options.url,
            "model": self._common.model,
            "load": describe(options),
            "options": {
                name: str(value) if isinstance(value, Path) else value
                for name, value in vars(options).items()
                if name != "api_key" and value is not None
            },
            "client": {
                "cpu_share": cpu_share,
                "cores": os.cpu_count(),
                "machine": platform.machine(),
                "python": platform.python_version(),
            },
            "connections": {
                "cap": options.max_connections,
                "peak": self._client.peak_connections,
            },
            "warnings": warnings,
        } | found

    async def _card(self) -> dict[str, Any]:
        """What the server says of its first model, or of the one that was asked for."""
        url, wanted = self._options.url, self._options.model
        try:
            cards = (await self._client.get("/v1/models"))["data"]
            return next((c for c in cards if c["id"] == wanted), cards[0])
        except (OSError, ValueError) as error:
            raise ValueError(f"{url}: {error}") from error
        except (LookupError, TypeError) as error:
            raise ValueError(f"{url}: /v1/models lists no model") from error

    async def _once(
        self, seed: int, rate: float | None = None
    ) -> tuple[list[Outcome], dict[str, Any]]:
        """One run: its outcomes, and its part of a result."""
        options = self._options
        if rate is not None:  # a probe must last, or a burst would pass for a rate
            count = max(options.requests, round(rate * PROBE_SECONDS))
            options = argparse.Namespace(**vars(options) | {"rate": rate, "requests": count})
        plan = scenario(options, self._common, self._context, seed)
        self._notes += [note for note in plan.notes if note not in self._notes]
        await self._warm_up(plan)
        total = sum(len(c.turns) for c in plan.measured)
        title = f"{rate:.3g} requests/s" if rate else self._common.model
        async with Watch(self._client) as watch:
            with Progress(total, title) as progress:
                player = Player(self._client, progress.seen)
                player.render(plan.measured)
                wall, cpu = time.perf_counter(), time.process_time()
                if plan.offsets is None:
                    first = await closed_loop(player.play, plan.measured, plan.concurrency)
                else:
                    first = await open_loop(player.play, plan.measured, plan.offsets)
                passed = time.perf_counter() - wall
                self._cpu_shares.append((time.process_time() - cpu) / passed)
        outcomes = first + player.later
        summary = summarize(outcomes, self._slo)
        if not self._options.chaos:  # the server counts bad clients' tokens too
            summary["disagreements"] |= against_server(outcomes, watch.tokens())
        return outcomes, {"summary": summary} | course(outcomes, watch.samples)

    async def _warm_up(self, plan: Scenario) -> None:
        player = Player(self._client)
        player.render(plan.warmup)
        await closed_loop(player.play, plan.warmup, plan.concurrency)

    async def _repeated(self) -> dict[str, Any]:
        """`--repeat` runs with different seeds: the one of median throughput, and intervals."""
        count, seed = self._options.repeat, self._options.seed
        runs = [(await self._once(seed + number))[1] for number in range(count)]
        if count == 1:
            return runs[0]
        summaries = [run["summary"] for run in runs]

        def rate(run: dict[str, Any]) -> float:
            throughput: dict[str, float] = run["summary"]["throughput"]
            return throughput["output_tokens_per_second"]

        return sorted(runs, key=rate)[count // 2] | {
            "confidence": confidence(summaries),
            "repetitions": [figures(summary) for summary in summaries],
        }

    async def _find_rate(self, first: float) -> dict[str, Any]:
        best: dict[str, Any] = {}
        last: dict[str, Any] = {}
        seed = self._options.seed

        async def probe(rate: float) -> tuple[bool, dict[str, Any]]:
            nonlocal best, last, seed
            seed += 1  # new prompts: nothing may come from the prefix cache by accident
            _, last = await self._once(seed, rate)
            if not last["summary"]["requests"]["completed"]:
                kinds = ", ".join(last["summary"]["errors"])
                raise ValueError(f"at {rate:g} requests/s none completed: {kinds}")
            kept = last["summary"]["goodput"]
            if kept["met"] and rate >= best.get("rate", 0.0):
                best = {"rate": rate, "run": last}
            return kept["met"], {"share": kept["share"]} | figures(last["summary"])

        found = await find_rate(probe, first)
        shown: dict[str, Any] = best.get("run", last)
        return shown | {"find_rate": found}

    async def _with_chaos(self) -> dict[str, Any]:
        options = self._options
        chaos = Chaos(options.url, self._common.model, options.api_key, options.seed)
        bad = asyncio.ensure_future(chaos.run())
        try:
            outcomes, found = await self._once(options.seed)
            for kind in chaos.kinds:  # each at least once, however short the run
                await chaos.once(kind)
        finally:
            bad.cancel()
            with suppress(asyncio.CancelledError):
                await bad
        errors = _errors(outcomes)
        return found | {"chaos": await verdict(chaos, self._client, errors)}


def _errors(outcomes: Sequence[Outcome]) -> dict[str, int]:
    kinds = [o.error for o in outcomes if o.error is not None]
    return {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}
