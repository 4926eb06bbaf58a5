"""What an engine may rely on, whichever worker it drives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from batching.core.types import (
    Request,
    SamplingParams,
    SequencePlan,
    SlotInit,
    StepPlan,
    StepResult,
)
from batching.worker.protocol import Capabilities, Worker, WorkerConfig, WorkerError
from batching.worker.simulated import SimulatedWorker
from batching.worker.torch_worker import TorchWorker
from tests.worker import tiny_models
from tests.worker.harness import Harness, request

BLOCK = 4
SEQUENCES = 6
LIMITS = {"num_blocks": 64, "block_size": BLOCK, "max_sequences": SEQUENCES, "max_step_tokens": 64}
PROMPT = [5, 9, 77, 3, 60, 61]
SAMPLED = {"temperature": 1.0, "top_p": 0.9, "frequency_penalty": 0.4, "logprobs": 2}


@pytest.fixture(scope="module", params=["simulated", "torch"])
def worker(request: Any, tmp_path_factory: Any) -> Iterator[Worker]:
    built: Worker
    if request.param == "simulated":
        built = SimulatedWorker(
            Capabilities(
                model="m",
                architecture="simulated",
                vocab_size=tiny_models.VOCAB,
                max_model_len=tiny_models.MAX_LEN,
                dtype="none",
                device="none",
                attention="none",
                **LIMITS,
            )
        )
    else:
        folder = tiny_models.save("mistral", tmp_path_factory.mktemp("mistral"))
        config = WorkerConfig(model=str(folder), device="cpu", **LIMITS)
        built = TorchWorker(config)
    yield built
    built.close()
    built.close()  # idempotent


def run(worker: Worker, plan: StepPlan) -> StepResult:
    return worker.wait(worker.submit(plan))


def begin(
    slot: int, tokens: list[int], prompt_length: int | None = None, **params: Any
) -> SlotInit:
    asked = SamplingParams(**{"max_tokens": 50, "temperature": 0.0, **params})
    return SlotInit(slot, f"r{slot}", tokens, prompt_length or len(tokens), asked)


def test_capabilities_survive_the_wire(worker: Worker) -> None:
    capabilities = worker.capabilities()
    sent = msgspec.msgpack.decode(msgspec.msgpack.encode(capabilities), type=Capabilities)
    assert sent == capabilities
    assert capabilities.vocab_size == tiny_models.VOCAB


def test_results_come_in_plan_order(worker: Worker) -> None:
    inits = tuple(begin(slot, [*PROMPT, slot], seed=slot) for slot in range(4))
    together = StepPlan(
        7, inits, tuple(SequencePlan(s, 0, 7, s != 2, (2 * s, 2 * s + 1)) for s in (3, 1, 2, 0))
    )
    result = run(worker, together)
    assert result.step == 7
    assert len(result.tokens) == 3
    assert result.logprobs == ()
    assert result.seconds >= 0.0
    for slot, token in zip((3, 1, 0), result.tokens, strict=True):
        alone = StepPlan(8, (inits[slot],), (SequencePlan(slot, 0, 7, True, (20, 21)),))
        assert run(worker, alone).tokens == (token,)


def test_sampled_tokens_need_not_be_sent_back(worker: Worker) -> None:
    plan = StepPlan(0, (begin(0, PROMPT),), (SequencePlan(0, 0, 6, True, (9, 8)),))
    tokens = list(run(worker, plan).tokens)
    for position in range(6, 10):
        new = (7,) if position == 8 else ()
        plan = StepPlan(0, (), (SequencePlan(0, position, 1, True, new),))
        tokens += run(worker, plan).tokens
    # A restart that is told all tokens computes the same next one.
    known = PROMPT + tokens[:-1]
    init = begin(3, known, len(PROMPT))
    again = StepPlan(0, (init,), (SequencePlan(3, 0, len(known), True, (30, 31, 32)),))
    assert run(worker, again).tokens == (tokens[-1],)


def test_a_slot_forgets_its_former_sequence(worker: Worker) -> None:
    first = StepPlan(0, (begin(0, [1] * 12),), (SequencePlan(0, 0, 12, True, (1, 2, 3)),))
    second = StepPlan(1, (begin(0, PROMPT),), (SequencePlan(0, 0, 6, True, (5, 6)),))
    elsewhere = StepPlan(2, (begin(4, PROMPT),), (SequencePlan(4, 0, 6, True, (11, 12)),))
    run(worker, first)
    assert run(worker, second).tokens == run(worker, elsewhere).tokens


def test_logprobs_only_where_asked(worker: Worker) -> None:
    inits = (begin(0, PROMPT, logprobs=0), begin(1, PROMPT))
    shares = tuple(SequencePlan(s, 0, 6, True, (2 * s, 2 * s + 1)) for s in (1, 0))
    result = run(worker, StepPlan(0, inits, shares))
    assert result.logprobs[0] is None
    assert result.logprobs[1] is not None
    assert result.logprobs[1].token == result.tokens[1]


def test_prompt_logprobs_cover_each_chunk(worker: Worker) -> None:
    init = begin(2, [*PROMPT, 99], prompt_length=6, prompt_logprobs=0)
    chunks = [(0, 2, (1, 2)), (2, 3, ()), (5, 2, ())]
    got = []
    for step, (start, count, new) in enumerate(chunks):
        sample = start + count == 7
        share = SequencePlan(2, start, count, sample, new)
        result = run(worker, StepPlan(step, (init,) if step == 0 else (), (share,)))
        got.append([entry.token for entry in result.prompt_logprobs.get(2, [])])
    assert got == [PROMPT[1:3], PROMPT[3:6], []]


@pytest.mark.parametrize("params", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_company_chunks_and_shortage_change_nothing(worker: Worker, params: dict[str, Any]) -> None:
    requests = [
        request(f"r{i}", [5 + i, 9, 77, 3][: 1 + i % 4] * (1 + i), max_tokens=14, seed=i, **params)
        for i in range(SEQUENCES)
    ]
    alone = [Harness(worker).run([one])[one.id] for one in requests]
    for limits in ({}, {"max_step_tokens": 7}, {"num_blocks": 14}, {"prefix_caching": False}):
        harness = Harness(worker, **limits)
        together = harness.run(requests)
        assert [together[one.id].tokens for one in requests] == [o.tokens for o in alone]
        assert all(len(o.tokens) == 14 for o in together.values())
        if "num_blocks" in limits:
            assert harness.preemptions > 0


@pytest.mark.parametrize("params", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_a_resumed_request_continues_exactly(worker: Worker, params: dict[str, Any]) -> None:
    whole = request("r", PROMPT, max_tokens=12, seed=3, **params)
    tokens = Harness(worker).run([whole])["r"].tokens
    resumed: Request = msgspec.structs.replace(whole, generated=tokens[:5])
    assert Harness(worker).run([resumed])["r"].tokens == tokens[5:]


def test_a_failed_step_raises_worker_error(tmp_path: Any) -> None:
    folder = tiny_models.save("llama", tmp_path)
    worker = TorchWorker(WorkerConfig(model=str(folder), device="cpu", attention="reference"))
    unknown_slot = StepPlan(4, (), (SequencePlan(99, 0, 1, True),))
    with pytest.raises(WorkerError, match="step 4"):
        run(worker, unknown_slot)
    worker.close()
