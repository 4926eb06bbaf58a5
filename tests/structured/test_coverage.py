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
    {"type": "number", "exclusiveMinimum": 3},
    {"type": "number", "exclusiveMaximum": -1000000},
    {"type": "number", "exclusiveMinimum": 0.1, "exclusiveMaximum": 0.1000001},
    {"type": "number", "exclusiveMinimum": 1e6, "exclusiveMaximum": 1000001},
    {"type": "integer", "exclusiveMinimum": -2, "exclusiveMaximum": 2},
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


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "height": {"type": ["number", "null"]},
        "tags": {"type": "array", "items": {"type": "string"}},
        "kind": {"enum": ["one", "other"]},
        "next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]},
    },
    "required": ["name", "age", "height", "tags", "kind"],
}


@pytest.mark.parametrize("name", [*list(CORPUS)[::6], "person"])
def test_tokens_are_tried_as_masks_have_them(driver: Driver, name: str) -> None:
    schema = PERSON if name == "person" else CORPUS[name]
    grammar = msgspec.structs.replace(schema_grammar(schema, "schema"), free_keys=False)
    random_one = random.Random(name)
    closing = np.array([bool(set(piece) & set(b'",]}')) for piece in driver.pieces])
    row, other = np.zeros((2, -(-VOCAB // 32)), dtype=np.int32)
    for _ in range(8):  # what one text has learned helps the next
        masked, tried = driver.matcher(grammar), driver.matcher(grammar)
        for step in range(60):
            assert masked.fill(row)
            may_come = allowed(row, VOCAB)
            if may_come.sum() > 1:  # of a text that is forced the mask has one spelling
                banned = random_one.choice(np.flatnonzero(may_come == 0).tolist())
                assert not tried.try_accept(banned)
            if step % 7 == 0:
                assert tried.fill(other) and (other == row).all()
            if random_one.random() < 0.4 and (may_come & closing).any():
                may_come = may_come & closing
            token = random_one.choice(np.flatnonzero(may_come).tolist())
            if not tried.try_accept(token):
                # The length of a number is the mask's to know.
                assert driver.pieces[token][:1].isdigit()
                assert tried.fill(other) and (other == row).all()
                tried.accept(token)
            masked.accept(token)
            if token in ENDS:
                break


ONE_PERSON = '{"name": "Anna", "age": 20, "height": 1.75, "tags": ["a", "bc"], "kind": "one"}'
ANOTHER = '{"name": "\\n 日本", "age": 7, "height": 33.1, "tags": ["", "xyz"], "kind": "one"}'


def test_what_texts_have_in_common_is_asked_once(driver: Driver) -> None:
    grammar = schema_grammar(PERSON, "schema")
    matcher = driver.matcher(grammar)
    for token in [*spell(driver, ONE_PERSON), ENDS[0]]:
        assert matcher.try_accept(token)
    matcher = driver.matcher(grammar)
    asked: Any = Asked(matcher.inner)
    matcher.inner = asked
    for token in [*spell(driver, ANOTHER), ENDS[0]]:
        assert matcher.try_accept(token)
    said = "".join(chr(driver.pieces[token][0]) for token in asked.tokens)
    assert set(said) <= set("\\n0123456789") | {chr(byte) for byte in "日本".encode()}


def test_within_a_free_string_every_plain_token_may_come(driver: Driver) -> None:
    grammar = schema_grammar(PERSON, "schema")
    row = np.zeros(-(-VOCAB // 32), dtype=np.int32)
    for begun in (ONE_PERSON[:10], ONE_PERSON[:13], ONE_PERSON[:54], ONE_PERSON[:59]):
        matcher = driver.matcher(grammar)
        for token in spell(driver, begun):
            assert matcher.try_accept(token)
        assert matcher._place is not None
        plain = np.frombuffer(matcher._place.plain, dtype=np.uint8)
        assert plain.sum() > VOCAB / 2
        assert matcher.fill(row) and (allowed(row, VOCAB) >= plain).all()


class Asked:
    """A matcher of llguidance's, and the tokens that it was asked about."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.tokens: list[int] = []

    def try_consume_tokens(self, tokens: list[int]) -> int:
        self.tokens += tokens
        return int(self._inner.try_consume_tokens(tokens))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def spell(driver: Driver, text: str) -> list[int]:
    """Tokens of a text: one a byte."""
    return [driver.pieces.index(bytes([byte])) for byte in text.encode()]
