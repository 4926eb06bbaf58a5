"""Why was this slow? Whole lives of requests on a virtual clock, and what is told of them."""

from __future__ import annotations

import gc
import re
import tracemalloc
from collections import deque

import pytest

from app.flights.record import MAX_CHUNKS, MAX_NAMED
from app.flights.words import amount, duration
from batching.core.types import FinishReason, Request, SamplingParams
from batching.worker.simulated import StepCost
from tests.app.flight_deck import FlightDeck


def test_an_idle_server_decodes() -> None:
    deck = FlightDeck()
    deck.fly("a", prompt=6, tokens=5)
    deck.land()
    told = deck.told("cmpl-a")
    assert told.verdict == "69 % of 58 ms went into generating 5 tokens, 10 ms each"
    assert told.stages == pytest.approx(
        {"receiving": 0.002, "prefill": 0.016, "decode": 0.04}
    )  # fmt: skip
    assert sum(told.stages.values()) == pytest.approx(told.seconds)
    assert told.time_to_first_token == pytest.approx(0.018)
    (sequence,) = told.sequences
    assert (sequence.prompt_tokens, sequence.output_tokens, sequence.finish) == (6, 5, "length")
    assert told.state == sequence.state == "ended"


def test_every_name_finds_it() -> None:
    deck = FlightDeck()
    flight = deck.fly("a")
    assert [deck.recorder.find(name, "") for name in ("cmpl-a", "x-a", "a")] == [flight] * 3
    assert deck.recorder.find("b", "") is None
    deck.land()
    assert deck.recorder.find("x-a", "") is flight


def test_queued_behind_others() -> None:
    deck = FlightDeck(max_sequences=1)
    for name in "abc":
        deck.fly(name, prompt=20, tokens=20)
        deck.step()
    waiting = deck.told("cmpl-c")
    assert waiting.state == "queued"
    assert "so far were spent queued behind 1 request (20 prompt tokens)" in waiting.verdict
    deck.land()
    told = deck.told("cmpl-c")
    assert told.verdict == (
        "64 % of 622 ms were spent queued behind 1 request (20 prompt tokens); "
        "all sequence slots were taken"
    )
    queue = told.sequences[0].queue
    assert (queue.behind, queue.behind_requests, queue.running) == (["cmpl-b"], 1, 1)
    assert queue.prompt_tokens_computed == 20
    assert queue.lacked_slots_seconds == pytest.approx(queue.seconds)
    assert [span.what for span in told.spans] == ["receiving", "queued", "prefill", "decode"]


def test_only_the_first_of_those_ahead_are_named() -> None:
    deck = FlightDeck(max_sequences=1)
    for i in range(30):
        deck.fly(f"r{i}")
    queue = deck.told("cmpl-r29").sequences[0].queue
    assert (queue.behind_requests, queue.behind_tokens) == (29, 29 * 4)
    assert queue.behind == [f"cmpl-r{i}" for i in range(MAX_NAMED)]


def test_a_long_prompt_is_told_in_chunks_and_delays_others() -> None:
    deck = FlightDeck(StepCost(fixed=0.01, prefill_token=0.004), max_step_tokens=33)
    deck.fly("a", prompt=4, tokens=20)
    deck.step(8)
    deck.fly("b", prompt=100, tokens=2)
    deck.land()
    told = deck.told("cmpl-b")
    chunks = [span for span in told.spans if span.what == "prefill"]
    assert sum(int(span.note.split()[0]) for span in chunks) == 100
    assert len({span.step for span in chunks}) == len(chunks) == told.sequences[0].prefill_steps > 1
    assert "went into computing 100 prompt tokens in" in told.verdict
    decode = deck.told("cmpl-a").sequences[0].decode
    assert decode is not None and decode.worst_gap is not None
    gap = decode.worst_gap
    assert gap.step in {span.step for span in chunks}
    assert gap.why.startswith(f"step {gap.step} took {duration(gap.seconds)} because cmpl-b")
    assert "prefilled" in gap.why
    assert gap.why in deck.told("cmpl-a").verdict
    assert decode.prompt_tokens_beside == 100
    assert 1 < decode.mean_batch < 2


def test_a_step_that_took_longer_than_it_should_is_told_as_such() -> None:
    deck = FlightDeck(StepCost(fixed=0.01, prefill_token=0.001))
    deck.fly("w", prompt=40, tokens=100)
    deck.land()
    deck.fly("a", prompt=4, tokens=60)
    deck.step(30)
    deck.cost_of_worker(StepCost(fixed=0.2, prefill_token=0.001))  # the machine is busy elsewhere
    deck.fly("b", prompt=20, tokens=2)
    deck.step()
    deck.cost_of_worker(StepCost(fixed=0.01, prefill_token=0.001))
    deck.land()
    decode = deck.told("cmpl-a").sequences[0].decode
    assert decode is not None and decode.worst_gap is not None
    why = r"step 130 took 220 ms, where \d+ ms were forecast; cmpl-b prefilled 20 tokens"
    assert re.fullmatch(why, decode.worst_gap.why)


def test_others_requests_have_no_names() -> None:
    deck = FlightDeck(StepCost(fixed=0.01, prefill_token=0.004))
    deck.fly("a", tokens=20, tenant="mine")
    deck.step(8)
    deck.fly("b", prompt=40, tenant="theirs")
    queue = deck.told("cmpl-b", "theirs").sequences[0].queue
    assert queue.running == 1
    deck.fly("c", tenant="mine")
    assert deck.told("cmpl-c", "mine").sequences[0].queue.behind == ["another key's request"]
    deck.land()
    decode = deck.told("cmpl-a", "mine").sequences[0].decode
    assert decode is not None and decode.worst_gap is not None
    assert "another key's request prefilled 40 tokens" in decode.worst_gap.why
    assert deck.recorder.find("cmpl-a", "theirs") is None
    assert [f.answer_id for f in deck.recorder.newest("theirs")] == ["cmpl-b"]


def test_preemptions() -> None:
    deck = FlightDeck(num_blocks=12, block_size=2, prefix_caching=False)
    deck.expect_short_outputs()
    deck.fly("a", prompt=8, tokens=12)
    deck.fly("b", prompt=8, tokens=12)
    deck.land()
    told = deck.told("cmpl-b")
    assert told.sequences[0].preemptions == 1
    assert told.stages["preempted"] > 0
    assert sum(told.stages.values()) == pytest.approx(told.seconds)
    again = [span for span in told.spans if span.what == "recomputed"]
    assert [int(span.note.split()[0]) for span in again] == [8 + told_before(told)]
    decode = told.sequences[0].decode
    assert decode is not None and decode.worst_gap is not None
    assert "gave its place to others" in decode.worst_gap.why


def told_before(told: object) -> int:
    """Tokens that the preempted request had been given: it decoded in as many steps, less one."""
    spans = told.spans  # type: ignore[attr-defined]
    first = next(span for span in spans if span.what == "decode")
    return round(first.seconds / 0.01) + 1


def test_an_engine_restart_in_the_middle() -> None:
    deck = FlightDeck()
    deck.fly("a", prompt=6, tokens=9)
    deck.step(4)
    generated = deck.recorder.open["a"].lanes[0].tokens
    deck.now += 3.0  # it dies, and another comes up
    deck.start()
    deck.restarts = 1
    params = SamplingParams(max_tokens=9)
    deck.send(Request("a-0", [1] * 6, params, deck.now, generated=[7] * generated))
    deck.land()
    told = deck.told("cmpl-a")
    assert told.sequences[0].restarts == 1
    assert told.stages["engine restart"] == pytest.approx(3.0)
    assert told.verdict.endswith("passed while the engine was restarted") is False  # a gap follows
    assert "of 3.1 s passed while the engine was restarted" in told.verdict
    assert [span.what for span in told.spans].count("recomputed") == 1
    assert sum(told.stages.values()) == pytest.approx(told.seconds)


def test_a_client_that_does_not_read() -> None:
    deck = FlightDeck()
    flight = deck.fly("a", tokens=4)
    deck.step(2)
    flight.stall(deck.now)
    flight.stall(deck.now)
    deck.now += 0.5
    assert deck.told("cmpl-a").client_stalled_seconds == pytest.approx(0.5)
    flight.unstall(deck.now)
    flight.unstall(deck.now)
    deck.recorder.clock = lambda: deck.now + 9.0  # the last bytes leave late
    deck.land()
    told = deck.told("cmpl-a")
    assert (told.client_stalls, told.client_stalled_seconds) == (1, pytest.approx(0.5))
    assert told.stages["delivering"] == pytest.approx(9.0)
    assert "passed until the client had read the answer" in told.verdict
    flight.stall(deck.now)
    assert flight.stalled_since is None


def test_several_samples_are_told_by_the_slowest() -> None:
    deck = FlightDeck(max_sequences=2)
    deck.fly("a", tokens=6, n=3)
    deck.land()
    told = deck.told("cmpl-a")
    assert [sequence.finish for sequence in told.sequences] == ["length"] * 3
    assert {span.sequence for span in told.spans if span.what == "decode"} == {0, 1, 2}
    assert told.stages["queued"] > 0.06
    assert [sequence.queue.behind_requests for sequence in told.sequences] == [0, 0, 0]
    assert sum(told.stages.values()) == pytest.approx(told.seconds)


def test_aborted_while_waiting() -> None:
    deck = FlightDeck(max_sequences=1)
    deck.fly("a", tokens=50)
    flight = deck.fly("b")
    deck.step(3)
    deck.recorder.lane_ended("b-0", "abort", 0)
    deck.recorder.arrive(flight)
    deck.recorder.arrive(flight)
    told = deck.told("cmpl-b")
    assert (told.state, told.finish, told.time_to_first_token) == ("ended", "abort", None)
    assert told.stages["queued"] > told.stages["receiving"]
    deck.fly("c")
    assert deck.told("cmpl-c").sequences[0].queue.behind_requests == 0
    deck.land()


def test_a_prompt_of_very_many_chunks_is_summed_up() -> None:
    deck = FlightDeck(max_step_tokens=4)
    deck.fly("a", prompt=4 * (MAX_CHUNKS + 5), tokens=2)
    deck.land()
    lane = deck.recorder.ended[0].lanes[0]
    assert (len(lane.chunks), lane.later_chunks, lane.later_tokens) == (MAX_CHUNKS, 5, 20)
    told = deck.told("cmpl-a")
    assert told.sequences[0].prefill_steps == MAX_CHUNKS + 5
    assert "20 tokens in 5 more steps" in [span.note for span in told.spans]


def test_memory_is_flat() -> None:
    deck = FlightDeck(kept=20)

    recorder = deck.recorder
    recorder.steps = deque(maxlen=64)

    def fly(rounds: int) -> int:
        for i in range(rounds):
            deck.fly(f"{i}-{deck.now}", n=2)
            if i % 4 == 3:
                deck.land()
                deck.forget()
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        before = fly(60)
        assert fly(400) - before < 20_000
    finally:
        tracemalloc.stop()
    assert sum(len(flight.lanes) for flight in recorder.ended) == 20
    assert len(recorder._names) == 3 * len(recorder.ended) == 3 * len(recorder._flights)
    assert not (recorder.open or recorder._lanes or recorder._waiting)
    assert recorder._waiting_tokens == recorder._waiting_flights == 0


def test_a_name_used_again_is_the_newest_ones() -> None:
    deck = FlightDeck(kept=1)
    deck.fly("a")
    deck.land()
    flight = deck.fly("b")
    flight.request_id = "x-a"
    deck.recorder._names["", "x-a"] = flight
    deck.land()  # the first is forgotten
    assert deck.recorder.find("cmpl-a", "") is None
    assert deck.recorder.find("x-a", "") is flight


def test_nobody_can_take_anothers_name() -> None:
    deck = FlightDeck()
    theirs = deck.fly("a", tenant="theirs")
    thief = deck.fly("b", tenant="thief")
    thief.request_id = "cmpl-a"
    deck.recorder._names["thief", "cmpl-a"] = thief
    assert deck.recorder.find("cmpl-a", "theirs") is theirs
    assert deck.recorder.find("cmpl-a", "thief") is thief
    assert deck.recorder.find("x-a", None) is theirs
    assert deck.recorder.find("x-a", "thief") is None
    deck.land()


def test_events_of_requests_that_nobody_knows_are_ignored() -> None:
    deck = FlightDeck()
    flight = deck.fly("a")
    deck.step()
    deck.recorder.lane_ended("a-0", FinishReason.ABORT.value, 1)
    deck.recorder.arrive(flight)
    deck.step(5)
    assert deck.told("cmpl-a").sequences[0].output_tokens == 1


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.00012, "0.1 ms"), (0.182, "182 ms"), (2.44, "2.4 s"), (9.97, "10 s"), (1234.0, "1,234 s")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_amounts() -> None:
    assert [amount(1, "token"), amount(1024, "token")] == ["1 token", "1,024 tokens"]
