"""Grammars in the workers: whatever the model would rather say, and however steps are cut."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from batching.core.types import FinishReason, Grammar
from batching.worker.protocol import Capabilities, Worker, WorkerConfig
from batching.worker.simulated import SimulatedWorker
from batching.worker.torch_worker import TorchWorker
from tests.worker import tiny_models
from tests.worker.harness import Harness, Outcome, request
from tests.worker.tiny_tokenizer import END, PIECES, save_tokenizer

LIMITS = {"num_blocks": 64, "block_size": 4, "max_sequences": 6, "max_step_tokens": 64}
PROMPT = [5, 9, 77, 3, 60, 61]

SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "maximum": 99, "minimum": -5}, "b": {"enum": ["x", 1]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
OBJECT = Grammar(
    "start: %json " + json.dumps({**SCHEMA, "x-guidance": {"whitespace_flexible": False}})
)
HOSTILE = {
    "logit_bias": tuple((PIECES.index(c), bias) for c, bias in (("{", -100.0), ("z", 100.0))),
    "repetition_penalty": 1.5,
    "frequency_penalty": 1.0,
    "logprobs": 2,
}
PARAMS = [{}, {"temperature": 1.5, "top_k": 5}, {"temperature": 1.0, "top_p": 0.3, **HOSTILE}]


@pytest.fixture(scope="module", params=["simulated", "torch"])
def worker(request: Any, tmp_path_factory: Any) -> Iterator[Worker]:
    folder = tiny_models.save("mistral", tmp_path_factory.mktemp("mistral"))
    save_tokenizer(Path(folder))
    built: Worker
    if request.param == "simulated":
        built = SimulatedWorker(
            Capabilities(
                model=str(folder),
                architecture="simulated",
                vocab_size=tiny_models.VOCAB,
                max_model_len=tiny_models.MAX_LEN,
                dtype="none",
                device="none",
                attention="none",
                eos_token_ids=(END,),
                **LIMITS,
            )
        )
    else:
        built = TorchWorker(WorkerConfig(model=str(folder), device="cpu", **LIMITS))
    yield built
    built.close()


def constrained(name: str, grammar: Grammar = OBJECT, **params: Any) -> Any:
    fields = {"max_tokens": 60, "stop_token_ids": (END,), "grammar": grammar, **params}
    return request(name, [*PROMPT, int(name) + 10], **fields)


def text(outcome: Outcome) -> str:
    """What was said, without the end token."""
    ended = outcome.finish is FinishReason.STOP
    tokens = outcome.tokens[:-1] if ended else outcome.tokens
    return "".join(PIECES[token] for token in tokens).replace("Ġ", " ")


def check(outcome: Outcome) -> None:
    assert outcome.finish is FinishReason.STOP
    value = json.loads(text(outcome))
    assert list(value) == ["a", "b"]
    assert -5 <= value["a"] <= 99 and value["b"] in ("x", 1)


@pytest.mark.parametrize("params", PARAMS, ids=["greedy", "sampled", "hostile"])
def test_the_grammar_wins_alone_and_in_any_company(worker: Worker, params: dict[str, Any]) -> None:
    requests = [constrained(str(i), seed=i, **params) for i in range(4)]
    free = [request(f"free{i}", [*PROMPT, i], max_tokens=30, seed=i) for i in range(2)]
    alone = [Harness(worker).run([one])[one.id] for one in requests]
    unconstrained = Harness(worker).run(free)
    for outcome in alone:
        check(outcome)
    for limits in ({}, {"max_step_tokens": 7}, {"num_blocks": 18}):
        harness = Harness(worker, **limits)
        together = harness.run(requests + free)
        assert [together[one.id].tokens for one in requests] == [o.tokens for o in alone]
        assert all(together[o.id].tokens == unconstrained[o.id].tokens for o in free)


@pytest.mark.parametrize("params", PARAMS, ids=["greedy", "sampled", "hostile"])
def test_a_resumed_request_goes_on_in_its_grammar(worker: Worker, params: dict[str, Any]) -> None:
    whole = constrained("0", seed=3, **params)
    tokens = Harness(worker).run([whole])["0"].tokens
    for given in range(len(tokens)):
        resumed = msgspec.structs.replace(whole, generated=tokens[:given])
        assert Harness(worker).run([resumed])["0"].tokens == tokens[given:]


def test_overlap_gives_the_same_tokens(worker: Worker) -> None:
    requests = [constrained(str(i), seed=i, temperature=1.0) for i in range(3)]
    expected = Harness(worker).run(requests)
    harness = Harness(worker, overlap=1)
    outcomes = {one.id: Outcome() for one in requests}
    for one in requests:
        harness.scheduler.add(one, 0.0)
    handles: deque[Any] = deque()
    while harness.scheduler.has_work:
        plan = harness.scheduler.plan(0.0)
        if plan is not None:
            handles.append(worker.submit(plan))
        if plan is None or len(handles) > 1:
            for event in harness.scheduler.commit(worker.wait(handles.popleft()), 0.0):
                outcomes[event.id].tokens += event.tokens
    assert {i: o.tokens for i, o in outcomes.items()} == {i: o.tokens for i, o in expected.items()}


def test_a_stop_token_waits_for_min_tokens_but_not_after_the_end(worker: Worker) -> None:
    digits = Grammar("start: /[0-9]{1,9}/")
    for minimum, most in ((0, 9), (6, 9), (30, 9)):
        outcome = Harness(worker).run([constrained("0", digits, min_tokens=minimum)])["0"]
        assert outcome.finish is FinishReason.STOP
        assert min(minimum, most) - 1 <= len(text(outcome)) <= most
    to_the_end = msgspec.structs.replace(digits, to_the_end=True)
    outcome = Harness(worker).run([constrained("0", to_the_end)])["0"]
    assert len(text(outcome)) == 9 and outcome.tokens[-1] == END


def test_max_tokens_cuts(worker: Worker) -> None:
    outcome = Harness(worker).run([constrained("0", max_tokens=5)])["0"]
    assert outcome.finish is FinishReason.LENGTH
    assert text(outcome).startswith('{"a":')


@pytest.mark.parametrize(
    ("source", "said"),
    [('start: "ab" "é"', "ab"), ('start: "b" a\na: "c" a', None), ("start: [", "")],
    ids=["not in the vocabulary", "endless", "faulty"],
)
def test_a_grammar_without_a_way_on_ends_with_length(
    worker: Worker, source: str, said: str | None
) -> None:
    outcome = Harness(worker).run([constrained("0", Grammar(source))])["0"]
    assert outcome.finish is FinishReason.LENGTH
    if said is not None:
        assert text(outcome) == said
