"""Planning a step before the last one's tokens are known changes no token."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import pytest

from batching.core.scheduler import Scheduler
from batching.core.types import Limits, Request, StepPlan, StepResult, TokenEvent
from batching.engine.loop import EngineLoop
from batching.engine.messages import FromEngine, StepOutput, Submit
from batching.worker.protocol import Capabilities, WorkerConfig
from batching.worker.torch_worker import TorchWorker
from tests.worker import tiny_models
from tests.worker.harness import Harness, request

LIMITS = {"num_blocks": 64, "block_size": 4, "max_sequences": 4, "max_step_tokens": 32}
SCARCE = {"num_blocks": 10, "prefix_caching": False}
SAMPLED = {"temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.3, "logprobs": 2}


class LateWorker:
    """A device as late as one may be: a step is computed when its result is waited for, after the
    next one was planned and submitted."""

    def __init__(self, worker: TorchWorker) -> None:
        self._worker = worker
        self._queue: deque[StepPlan] = deque()
        self.most_queued = 0

    def capabilities(self) -> Capabilities:
        return self._worker.capabilities()

    def submit(self, plan: StepPlan) -> StepPlan:
        self._queue.append(plan)
        self.most_queued = max(self.most_queued, len(self._queue))
        return plan

    def wait(self, handle: StepPlan) -> StepResult:
        assert self._queue.popleft() is handle, "steps are computed in their order"
        return self._worker.wait(self._worker.submit(handle))

    def close(self) -> None:
        self._worker.close()


@pytest.fixture(scope="module")
def worker(tmp_path_factory: Any) -> Iterator[LateWorker]:
    folder = tiny_models.save("mistral", tmp_path_factory.mktemp("mistral"))
    built = LateWorker(TorchWorker(WorkerConfig(str(folder), device="cpu", **LIMITS)))
    yield built
    built.close()


def requests(repeats: int, **params: Any) -> list[Request]:
    """Prompts that share beginnings; some end by a stop token."""
    made = []
    for i in range(9):
        prompt = [7, 9, 77, 3, 60, 61, 62, i][: 1 + i % 8] * (1 + i % 3 * repeats)
        stops = tuple(range(0, tiny_models.VOCAB, 16)) if i % 2 else ()
        rest = {**params, "max_tokens": 20 + i % 7, "stop_token_ids": stops, "seed": i}
        made.append(request(f"r{i}", prompt, **rest))
    return made


@pytest.mark.parametrize("params", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("limits", [{}, SCARCE], ids=["room", "preemptions"])
def test_both_depths_give_the_same(
    worker: LateWorker, params: dict[str, Any], limits: dict[str, Any]
) -> None:
    asked = requests(0 if limits else 2, **params)
    worker.most_queued = 0
    normal = Harness(worker, overlap=0, **limits)
    expected = normal.run(asked)
    assert worker.most_queued == 1
    overlapped = Harness(worker, overlap=1, **limits)
    got = overlapped.run(asked)
    assert worker.most_queued == 2
    if limits:
        assert normal.preemptions and overlapped.preemptions
    for name, outcome in expected.items():
        assert got[name].tokens == outcome.tokens
        assert got[name].finish == outcome.finish
        assert [entry.token for entry in got[name].logprobs] == [
            entry.token for entry in outcome.logprobs
        ]
    assert {outcome.finish for outcome in expected.values()} == {"stop", "length"}


@pytest.mark.parametrize("overlap", [0, 1])
def test_slots_and_blocks_of_aborted_requests_are_used_again(
    worker: LateWorker, overlap: int
) -> None:
    """Requests abort while a step that has them is in flight, and others take their place."""
    asked = requests(2, **SAMPLED)
    alone = {one.id: Harness(worker).run([one])[one.id].tokens for one in asked}
    known = {name: LIMITS[name] for name in LIMITS} | {"num_blocks": 20}
    scheduler = Scheduler(Limits(max_model_len=tiny_models.MAX_LEN, overlap=overlap, **known))
    script = {
        0: Submit(asked[:4]),
        4: Submit(asked[4:7], aborts=["r2", "r3"]),
        7: Submit(asked[7:], aborts=["r4"]),
    }
    turn = iter(range(1000))
    events: list[TokenEvent] = []

    def receive(timeout: float) -> list[Submit]:
        submit = script.get(next(turn))
        return [submit] if submit else []

    def send(message: FromEngine) -> None:
        if isinstance(message, StepOutput):
            events.extend(message.events)

    loop = EngineLoop(scheduler, worker, receive, send, overlap, clock=lambda: 0.0)
    loop.run_once()
    while scheduler.has_work or len([e for e in events if e.finish]) < len(asked):
        loop.run_once()
        scheduler.check_integrity()
    got: dict[str, list[int]] = {}
    for event in events:
        got.setdefault(event.id, []).extend(event.tokens)
    aborted = {event.id for event in events if event.finish == "abort"}
    assert aborted == {"r2", "r3", "r4"}
    for name, tokens in got.items():
        assert tokens == alone[name][: len(tokens)]
        assert name in aborted or tokens == alone[name]
    assert scheduler.stats().blocks_used == 0
