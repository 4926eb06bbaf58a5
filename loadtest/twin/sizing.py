"""How much of what hardware a model and its traffic need, from the twin."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Sequence
from functools import partial
from typing import Any

import msgspec

from batching.core.types import Limits
from loadtest.arrivals import Arrivals
from loadtest.events import Outcome
from loadtest.figures import figures
from loadtest.find_rate import find_rate
from loadtest.slo import Slo, meets
from loadtest.traces import TraceRequest
from loadtest.twin.fleet import Fleet, Job
from loadtest.twin.hardware import (
    Hardware,
    estimated_limits,
    estimated_step_time,
    kv_memory,
    usual_sizes,
)
from loadtest.twin.jobs import trace_jobs
from loadtest.twin.model_card import ModelCard
from loadtest.twin.routing import ROUTERS

DEVICES = (1, 2, 4, 8)  # that may share a model
MOST_REPLICAS = 1024
_PROBE_REQUESTS = 200
_PROBE_SECONDS = 120.0  # long enough for a queue that only grows to outgrow patience


class Shape(msgspec.Struct, frozen=True):
    """Typical requests: mean tokens in and out, each uniform within half around its mean."""

    input_tokens: int = 1000
    output_tokens: int = 200

    def jobs(self, count: int, offsets: Sequence[float] | None, seed: int) -> list[Job]:
        """Requests that share nothing."""
        source = random.Random(seed)

        def around(mean: int) -> int:
            return max(1, round(mean * source.uniform(0.5, 1.5)))

        return [
            Job(
                partial(_prompt, number, around(self.input_tokens)),
                around(self.output_tokens),
                "all",
                0.0 if offsets is None else offsets[number],
            )
            for number in range(count)
        ]


def _prompt(number: int, length: int) -> list[int]:
    return [number] * length


class Server(msgspec.Struct, frozen=True):
    """One replica of a model on some devices."""

    model: ModelCard
    hardware: Hardware
    devices: int
    limits: Limits

    @property
    def price_per_hour(self) -> float:
        return self.hardware.price_per_hour * self.devices

    def fleet(self, replicas: int = 1, routing: str = "least-loaded") -> Fleet:
        """Simulated replicas; first and last token of each request are kept."""
        step_time = estimated_step_time(self.model, self.hardware, self.devices)
        router = ROUTERS[routing]()
        return Fleet(self.limits, step_time, router, replicas, every_token=False)

    def concurrent(self, tokens: int) -> int:
        """Requests of so many tokens that the KV cache holds at once (slots may be fewer)."""
        return self.limits.num_blocks // -(-tokens // self.limits.block_size)


def smallest_server(
    model: ModelCard, hardware: Hardware, context: int | None = None, devices: int | None = None
) -> Server | None:
    """On the fewest devices it fits on (or exactly `devices`); None if it does not."""
    for count in DEVICES if devices is None else (devices,):
        limits = estimated_limits(model, hardware, count, max_model_len=context)
        if limits is not None:
            return Server(model, hardware, count, limits)
        if hardware.kind == "cpu":
            return None  # a machine is one device
    return None


def shortage(model: ModelCard, hardware: Hardware, context: int, devices: int) -> float:
    """Bytes that one sequence of the whole context lacks; negative if it fits."""
    left = kv_memory(model, hardware, devices, usual_sizes(hardware).max_step_tokens)
    return context * model.kv_bytes_per_token - left


def alone(server: Server, shape: Shape) -> dict[str, float]:
    """Latency figures of one request at a time."""
    fleet = server.fleet()
    return figures(fleet.summary(fleet.closed_loop(shape.jobs(8, None, 0), 1, math.inf)))


def saturated(server: Server, shape: Shape) -> dict[str, float]:
    """Figures at twice as many requests as run at once: the most it can do."""
    tokens = shape.input_tokens + shape.output_tokens
    running = max(1, min(server.limits.max_sequences, server.concurrent(tokens)))
    fleet = server.fleet()
    jobs = shape.jobs(4 * running, None, 0)
    return figures(fleet.summary(fleet.closed_loop(jobs, 2 * running, math.inf)))


def goodput(server: Server, shape: Shape, slo: Slo) -> dict[str, float] | None:
    """Figures at the highest Poisson rate that keeps the promises; None if no rate does."""
    best: dict[str, float] = {}

    async def probe(rate: float) -> tuple[bool, dict[str, Any]]:
        nonlocal best
        count = max(_PROBE_REQUESTS, min(round(rate * _PROBE_SECONDS), 20 * _PROBE_REQUESTS))
        jobs = shape.jobs(count, Arrivals(rate).times(count, 0), 0)
        fleet = server.fleet()
        outcomes = fleet.open_loop(jobs, math.inf)
        met = meets(outcomes, slo)
        found = figures(fleet.summary(outcomes, slo))
        if met and rate > best.get("rate", 0.0):
            best = found | {"rate": rate}
        return met, found

    most = saturated(server, shape)["requests/s"]
    asyncio.run(find_rate(probe, most / 8))
    return best or None


def cost_per_million(server: Server, tokens_per_second: float) -> float:
    """Dollars for a million output tokens at a rate."""
    return server.price_per_hour / (tokens_per_second * 3600) * 1e6


class Plan(msgspec.Struct, frozen=True):
    """Replicas of a server that carry a trace."""

    server: Server
    replicas: int
    outcomes: list[Outcome]
    figures: dict[str, float]
    busy_share: float

    @property
    def price_per_day(self) -> float:
        return self.replicas * self.server.price_per_hour * 24


def fewest_replicas(
    server: Server, trace: Sequence[TraceRequest], slo: Slo, routing: str
) -> Plan | None:
    """By doubling and bisection over the twin; None if no number up to the most does."""

    def tried(replicas: int) -> Plan | None:
        fleet = server.fleet(replicas, routing)
        outcomes = fleet.open_loop(trace_jobs(trace), math.inf)
        if not meets(outcomes, slo):
            return None
        busy = sum(r.busy_seconds for r in fleet.replicas) / max(fleet.now * replicas, 1e-9)
        return Plan(server, replicas, outcomes, figures(fleet.summary(outcomes, slo)), busy)

    low, high = 0, 1
    best = tried(high)
    while best is None:
        low, high = high, 2 * high
        if high > MOST_REPLICAS or low >= len(trace):
            return None  # every request had a replica of its own
        best = tried(high)
    while high - low > 1:
        middle = (low + high) // 2
        found = tried(middle)
        if found is None:
            low = middle
        else:
            high, best = middle, found
    return best
