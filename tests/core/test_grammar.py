"""What the scheduler does for sequences whose text a grammar constrains."""

from __future__ import annotations

import msgspec

from batching.core.types import FinishReason, Grammar
from tests.core.harness import Harness, expected, limits, request

ANY = Grammar("start: /.*/")


def test_overlap_waits_for_each_token_of_a_constrained_sequence() -> None:
    run = Harness(limits(overlap=1))
    run.add(request("a", [2, 1], 6, grammar=ANY))
    run.add(request("b", [3, 1], 6))
    while run.scheduler.has_work:
        while len(run.results) < 2 and run.plan() is not None:
            pass
        in_flight = [{s.slot for s in plan.sequences} for plan in run.plans[-len(run.results) :]]
        assert sum(0 in slots for slots in in_flight) < 2
        run.commit()
    run.drain()  # checks what came out
    assert all(1 in {s.slot for s in plan.sequences} for plan in run.plans[:6]), "nobody else waits"


def test_a_grammar_that_gives_up_ends_its_sequence_without_the_token() -> None:
    run = Harness(limits())
    run.add(request("a", [2, 1], 6, grammar=ANY))
    run.add(request("b", [3, 1], 6))
    run.plan()
    run.commit()
    run.plan()
    result = run.results[0]
    run.results[0] = msgspec.structs.replace(result, gave_up=(run.plans[0].sequences[0].slot,))
    first = run.commit()[0]
    assert (first.id, first.tokens, first.finish) == ("a", (), FinishReason.LENGTH)
    while run.scheduler.has_work:
        run.step()
    run.check_outcome("b")


def test_the_mask_says_when_a_stop_token_is_too_early() -> None:
    tokens, _ = expected(request("x", [2, 1], 9), limits())
    run = Harness(limits())
    stop = (tokens[0],)
    run.add(request("a", [2, 1], 9, stop_token_ids=stop, min_tokens=5, grammar=ANY))
    while run.scheduler.has_work:
        run.step()
    assert run.tokens("a") == tokens[:1]
