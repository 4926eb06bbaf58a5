"""When a request's first token will come, from what the scheduler last said of itself.

Prompts are computed by the step: each adds its own work (`cost_model`), and as much of it as a step
may take decides over how many steps it is spread, each of which costs its decodes as well. Whoever
lacks a slot waits until others have ended. No step is simulated, so this costs the same under any
load.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from batching.core.policy import POLICIES
from batching.core.types import Coefficients, EngineStats, Outlook, Request


class Ahead(NamedTuple):
    """Requests without a first token, and their prompt tokens."""

    requests: int = 0
    tokens: int = 0


class Room(NamedTuple):
    """The engine's bounds."""

    max_sequences: int
    max_step_tokens: int


def ahead_of(request: Request, waiting: Iterable[Request], policy: str) -> Ahead:
    """Those of `waiting` that the scheduler would take before `request`, which came last."""
    order = POLICIES[policy]
    if policy != "fair":
        place = order(request)
        return _sum(other for other in waiting if order(other) <= place)
    by_tenant: dict[str, list[Request]] = {}
    for other in waiting:
        by_tenant.setdefault(other.tenant, []).append(other)
    own = _sum(by_tenant.pop(request.tenant, ()))
    share = own.tokens + len(request.prompt)
    requests, tokens = own
    for others in map(_sum, by_tenant.values()):
        # While this tenant gets its share, another gets no more than the same.
        part = min(1.0, share / others.tokens)
        requests += round(part * others.requests)
        tokens += round(part * others.tokens)
    return Ahead(requests, tokens)


def first_token_seconds(tokens: int, ahead: Ahead, stats: EngineStats, room: Room) -> float | None:
    """Seconds until a new prompt of `tokens` has its first token; None if nothing is known yet."""
    outlook = stats.outlook
    if outlook is None:
        return None
    missed = 1.0 - (stats.prefix_hits / stats.prefix_queries if stats.prefix_queries else 0.0)
    before = max(ahead.tokens - outlook.prefilled_tokens, 0) * missed
    work = _prefill_seconds(outlook.cost, before, ahead.requests)
    work += _prefill_seconds(outlook.cost, tokens * missed, 1)
    decodes = max(stats.running - outlook.prefilling, 0)
    steps = (before + tokens * missed) / max(room.max_step_tokens - decodes, 1)
    if decodes or ahead.requests:
        steps = max(steps, work / outlook.prefill_seconds)
    steps = max(math.ceil(steps), _steps_to_a_slot(ahead, outlook, stats, room))
    rest_of_this_step = stats.step_seconds / 2 if stats.running else 0.0
    return rest_of_this_step + work + steps * outlook.decode_seconds


def _prefill_seconds(cost: Coefficients, tokens: float, prompts: int) -> float:
    """What computing prompts adds to steps; they are taken to be of equal length."""
    each = tokens / max(prompts, 1)
    token = cost.prefill_token + cost.context_token + cost.prefill_pair * each / 2
    return prompts * cost.sequence + tokens * token


def _steps_to_a_slot(ahead: Ahead, outlook: Outlook, stats: EngineStats, room: Room) -> float:
    """Steps until enough running sequences have ended, if some must."""
    free = 0 if outlook.blocked else room.max_sequences - stats.running
    ends = max(ahead.requests - outlook.prefilling, 0) + 1 - free
    if ends <= 0 or not stats.running:
        return 0.0
    # One that is met on its way has as much behind it as ahead: it lasts twice what it has left.
    length = 2 * outlook.output_tokens / stats.running
    return ends * length / stats.running


def _sum(requests: Iterable[Request]) -> Ahead:
    lengths = [len(request.prompt) for request in requests]
    return Ahead(len(lengths), sum(lengths))
