"""Whatever a model prefers, and whatever the schema: text under it ends, and is valid."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

import pytest

from app.inputs.tokenizer import Tokenizer
from app.structured.request import schema_grammar
from batching.worker.grammar import Grammars
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
