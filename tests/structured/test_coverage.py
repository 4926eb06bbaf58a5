"""Whatever a model prefers, and whatever the schema: text under it ends, and is valid."""

from __future__ import annotations

import json
import math
import random
import re
from importlib import resources
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from app.inputs.tokenizer import Tokenizer
from app.structured.request import schema_grammar
from batching.worker.grammar import Grammars, allowed
from tests.structured.corpus import corpus
from tests.structured.drive import Driver
from tests.structured.validity import fault

VOCAB, ENDS = 3824, (2, 0)
CORPUS = dict(corpus())
RUNS = 2  # of each adversary


@pytest.fixture(scope="module")
def driver() -> Driver:
    folder = Path(str(resources.files("batching") / "builtin/model"))
    return Driver(Tokenizer.load(folder), Grammars(str(folder), VOCAB, ENDS), VOCAB, ENDS)


def test_the_corpus_is_large() -> None:
    assert len({json.dumps(schema) for schema in CORPUS.values()}) == len(CORPUS) >= 200


def test_coverage(driver: Driver, capsys: pytest.CaptureFixture[str]) -> None:
    faults: dict[str, str] = {}
    for name, schema in CORPUS.items():
        grammar = schema_grammar(schema, "schema")
        for seed in range(RUNS):
            for adversary, logits in driver.adversaries(seed).items():
                wrong = fault(driver.generate(driver.matcher(grammar), logits), schema)
                if wrong is not None:
                    faults.setdefault(name, f"{adversary}: {wrong}")
    with capsys.disabled():
        print(f"\nJSON schemas kept: {len(CORPUS) - len(faults)}/{len(CORPUS)}")
    assert faults == {}


NUMBERS = [
    {"type": "integer"},
    {"type": "number"},
    {"type": "integer", "minimum": 1000},
    {"type": "number", "exclusiveMinimum": 0},
    {"type": "number", "minimum": 0.5, "maximum": 0.75},
    {"type": ["string", "number"], "maxLength": 3},
    {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2},
    {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]},
    {"const": 1e22},
    {"enum": [10**20, 10**20 + 10**4]},
    {"type": "string", "pattern": "^[0-9]{30}$"},
    {"type": "string", "pattern": "^[0-9a-f]{64}$"},
]


@pytest.mark.parametrize("favourite", ["0", "9", "5", "e", ".", "-", "123", "00", "99"])
@pytest.mark.parametrize("schema", NUMBERS, ids=json.dumps)
def test_a_model_in_love_with_a_digit_comes_to_an_end(
    driver: Driver, schema: Any, favourite: str
) -> None:
    scores = np.zeros(VOCAB)
    scores[list(ENDS)] = -1.0
    for token, piece in enumerate(driver.pieces):
        if piece and set(piece) <= set(favourite.encode()):
            scores[token] = 2.0 + len(piece) / 10
        elif piece.isdigit():
            scores[token] = 1.0
    text = driver.generate(
        driver.matcher(schema_grammar(schema, "schema")), lambda step: scores, None
    )
    assert text is not None and fault(text, schema) is None
    assert all(math.isfinite(float(number)) for number in re.findall(r"-?\d[\d.eE+-]*", text))


@pytest.mark.parametrize("name", list(CORPUS)[::6])
def test_tokens_are_tried_as_masks_have_them(driver: Driver, name: str) -> None:
    grammar = msgspec.structs.replace(schema_grammar(CORPUS[name], "schema"), free_keys=False)
    masked, tried = driver.matcher(grammar), driver.matcher(grammar)
    row, other = np.zeros((2, -(-VOCAB // 32)), dtype=np.int32)
    choose = random.Random(name).choice
    for _ in range(60):
        assert masked.fill(row)
        may_come = allowed(row, VOCAB)
        if may_come.sum() > 1:  # of a text that is forced the mask has one spelling
            assert not tried.try_accept(choose(np.flatnonzero(may_come == 0).tolist()))
        token = choose(np.flatnonzero(may_come).tolist())
        if not tried.try_accept(token):
            # The length of a number and the end of all is the mask's to know.
            assert driver.pieces[token][:1].isdigit() or token in ENDS
            assert tried.fill(other) and (other == row).all()
            tried.accept(token)
        masked.accept(token)
        if token in ENDS:
            break
