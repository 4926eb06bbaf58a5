"""Guilt, suspicion and acquittal, without an engine."""

from __future__ import annotations

from itertools import count

import pytest

from batching.core.types import Request, SamplingParams, TokenEvent
from batching.engine.open_request import OpenRequest
from batching.engine.quarantine import PROVEN_TOKENS, Quarantine
from batching.engine.restart_policy import WINDOW_SECONDS, RestartPolicy
from batching.engine.stream import RequestStream

TIMES = count(1.0)


def opened(name: str) -> OpenRequest:
    request = Request(name, [1, 2], SamplingParams(max_tokens=100), 0.0)
    return OpenRequest(RequestStream(request, lambda _: None))


def run(requests: list[OpenRequest], tokens: int = 0, admitted: bool = True) -> None:
    """An engine gets the requests and generates some tokens for each."""
    for request in requests:
        request.interrupt()
        request.to_send()
        request.admitted = admitted
        if tokens:
            request.take(TokenEvent(request.id, tokens=(7,) * tokens))


def test_one_death_accuses_but_condemns_nobody() -> None:
    alone, quarantine = opened("a"), Quarantine()
    run([alone])
    assert quarantine.engine_died([alone], killed=False, when=next(TIMES)) is None
    assert quarantine.may_go([alone]) == [alone]


def test_who_was_alone_with_the_engine_twice_is_guilty() -> None:
    poison, quarantine = opened("p"), Quarantine()
    for _ in range(2):
        run([poison])
        verdict = quarantine.engine_died([poison], killed=False, when=next(TIMES))
    assert verdict is poison


@pytest.mark.parametrize("guilty", [False, True])
def test_the_only_one_accused_twice_is_tried(guilty: bool) -> None:
    late, other, quarantine = opened("l"), opened("o"), Quarantine()
    for _ in range(2):
        run([late])
        run([other], PROVEN_TOKENS)
        assert quarantine.engine_died([late, other], killed=False, when=next(TIMES)) is None
    late.interrupt()
    assert quarantine.may_go([late, other]) == (late,)
    run([late], 0 if guilty else PROVEN_TOKENS)
    if guilty:
        assert quarantine.engine_died([late], killed=False, when=next(TIMES)) is late
    else:
        assert quarantine.acquit(late)
    assert quarantine.may_go([other]) == [other]


def test_progress_between_deaths_clears() -> None:
    stream, quarantine = opened("s"), Quarantine()
    for tokens in [PROVEN_TOKENS, 0] * 6:
        run([stream], tokens)
        assert quarantine.engine_died([stream], killed=True, when=next(TIMES)) is None


def test_who_crashes_engines_now_and_then_is_found_too() -> None:
    stream, quarantine = opened("s"), Quarantine()
    verdicts = []
    for _ in range(6):
        run([stream], 20)
        verdicts.append(quarantine.engine_died([stream], killed=False, when=next(TIMES)))
    assert verdicts == [None, None, None, None, None, stream]


def test_a_killed_engine_is_half_the_evidence() -> None:
    stream, quarantine = opened("s"), Quarantine()
    verdicts = []
    for _ in range(4):
        run([stream])
        verdicts.append(quarantine.engine_died([stream], killed=True, when=next(TIMES)))
    assert verdicts == [None, None, None, stream]


def test_suspects_are_tried_one_at_a_time() -> None:
    a, poison, c, late = (opened(name) for name in ("a", "p", "c", "late"))
    quarantine = Quarantine()
    for _ in range(2):
        run([a, poison, c])
        assert quarantine.engine_died([a, poison, c], killed=False, when=next(TIMES)) is None
    waiting = [a, poison, c, late]
    for request in waiting:
        request.interrupt()
    assert quarantine.may_go(waiting) == (a,)
    run([a], PROVEN_TOKENS - 1)
    assert not quarantine.acquit(a)
    assert quarantine.may_go([poison, c, late]) == ()
    a.take(TokenEvent("a", tokens=(7,)))
    assert quarantine.acquit(a)
    assert quarantine.may_go([poison, c, late]) == (poison,)
    run([poison])
    assert quarantine.engine_died([a, poison], killed=False, when=next(TIMES)) is poison
    assert quarantine.may_go([a, c, late]) == (c,)
    assert quarantine.forget(c)  # its client went away
    assert quarantine.may_go([a, late]) == [a, late]


def test_requests_that_only_waited_are_not_accused() -> None:
    poison, waiting, quarantine = opened("p"), opened("w"), Quarantine()
    for _ in range(2):
        run([poison])
        run([waiting], admitted=False)
        assert quarantine.engine_died([waiting, poison], killed=False, when=next(TIMES)) is None
    poison.interrupt()
    assert quarantine.may_go([waiting, poison]) == (poison,)
    assert not waiting.deaths


def test_a_request_that_fails_before_it_is_computed_is_found() -> None:
    poison, quarantine = opened("p"), Quarantine()
    for _ in range(2):
        run([poison], admitted=False)
        verdict = quarantine.engine_died([poison], killed=False, when=next(TIMES))
    assert verdict is poison


def test_restarts_back_off_and_end() -> None:
    policy = RestartPolicy(limit=10)
    delays = [policy.delay(0.0) for _ in range(11)]
    assert delays == [0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, None]
    assert policy.delay(WINDOW_SECONDS - 1) is None
    assert policy.delay(WINDOW_SECONDS + 1) == 0.0
    assert RestartPolicy(limit=0).delay(0.0) is None


def test_restarts_whose_cause_is_gone_back_off_without_end() -> None:
    policy = RestartPolicy(limit=1)
    assert [policy.delay(0.0, counts=False) for _ in range(3)] == [0.0, 0.25, 0.5]
    assert policy.delay(0.0) == 1.0
    assert policy.delay(0.0) is None
    assert policy.delay(0.0, counts=False) == 2.0


def test_deaths_are_excused_when_their_cause_is_found_afterwards() -> None:
    policy = RestartPolicy(limit=2)
    for when in range(0, 15, 3):  # five culprits in a row, each found at its third death
        assert None not in [policy.delay(when), policy.delay(when + 1)]
        policy.excuse({when, when + 1})
        assert policy.delay(when + 2, counts=False) is not None
