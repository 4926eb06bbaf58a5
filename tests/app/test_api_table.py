"""`docs/api.md` has a row for every field, and says of each what the schemas do."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

from app.schemas import chat, completions, messages, pooling, responses, tokenization
from app.schemas.common import INERT_COMMON, REFUSED_COMMON, SamplingFields

DOCUMENT = Path(__file__).parents[2] / "docs" / "api.md"
BOTH, COMPLETIONS, CHAT = "both endpoints", "`/v1/completions`", "`/v1/chat/completions`"
POOLING = "pooling models"


def documented(section: str) -> dict[str, str]:
    """Field to honoured, inert or refused, as one section of the document has it."""
    text = DOCUMENT.read_text(encoding="utf-8")
    (body,) = re.findall(rf"## Fields of {re.escape(section)}\n(.*?)(?=\n## |\Z)", text, re.DOTALL)
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \|", body, re.MULTILINE)
    assert len(rows) == len(dict(rows)), "a field has two rows"
    return dict(rows)


@pytest.mark.parametrize(
    ("module", "schema", "section"),
    [
        (completions, completions.CompletionRequest, COMPLETIONS),
        (chat, chat.ChatRequest, CHAT),
    ],
    ids=["completions", "chat"],
)
def test_the_tables_are_the_schemas(module: object, schema: type, section: str) -> None:
    inert: dict[str, str] = module.INERT  # type: ignore[attr-defined]
    refused: dict[str, str] = module.REFUSED  # type: ignore[attr-defined]
    fields = {field.name for field in msgspec.structs.fields(schema)}
    assert set(inert) <= fields
    assert not set(refused) & fields
    expected = {name: "inert" if name in inert else "honoured" for name in fields}
    expected |= dict.fromkeys(refused, "refused")
    assert documented(BOTH) | documented(section) == expected


@pytest.mark.parametrize(
    ("schema", "refused", "section"),
    [
        (pooling.EmbeddingRequest, pooling.REFUSED_EMBEDDING, "`/v1/embeddings`"),
        (pooling.ClassifyRequest, pooling.REFUSED_CLASSIFY, "`/classify`"),
        (pooling.ScoreRequest, pooling.REFUSED_SCORE, "`/score`"),
        (pooling.RerankRequest, pooling.REFUSED_RERANK, "`/rerank`"),
    ],
    ids=["embeddings", "classify", "score", "rerank"],
)
def test_pooling(schema: type, refused: dict[str, str], section: str) -> None:
    fields = {field.name for field in msgspec.structs.fields(schema)}
    expected = {name: "inert" if name in pooling.INERT else "honoured" for name in fields}
    expected |= dict.fromkeys(refused, "refused")
    assert documented(POOLING) | documented(section) == expected
    common = {field.name for field in msgspec.structs.fields(pooling.PoolFields)}
    assert set(documented(POOLING)) == common | set(pooling.REFUSED_COMMON)


@pytest.mark.parametrize(
    ("schema", "refused", "section"),
    [
        (tokenization.TokenizeRequest, tokenization.REFUSED_BY_TOKENIZE, "`/tokenize`"),
        (tokenization.DetokenizeRequest, {}, "`/detokenize`"),
    ],
    ids=["tokenize", "detokenize"],
)
def test_tokenization(schema: type, refused: dict[str, str], section: str) -> None:
    fields = {field.name for field in msgspec.structs.fields(schema)}
    expected = dict.fromkeys(fields, "honoured") | dict.fromkeys(refused, "refused")
    assert documented(section) == expected


@pytest.mark.parametrize(
    ("module", "schema", "section"),
    [
        (responses, responses.ResponsesRequest, "`/v1/responses`"),
        (messages, messages.MessagesRequest, "`/v1/messages`"),
    ],
    ids=["responses", "messages"],
)
def test_other_apis(module: object, schema: type, section: str) -> None:
    inert: dict[str, str] = module.INERT  # type: ignore[attr-defined]
    refused: dict[str, str] = module.REFUSED  # type: ignore[attr-defined]
    fields = {field.name for field in msgspec.structs.fields(schema)}
    if issubclass(schema, SamplingFields):
        common = {field.name for field in msgspec.structs.fields(SamplingFields)}
        assert all(documented(BOTH)[name] == "honoured" for name in common)
        assert common <= named_before_the_table(section)
        fields -= common
    assert set(inert) <= fields and not set(refused) & fields
    expected = {name: "inert" if name in inert else "honoured" for name in fields}
    assert documented(section) == expected | dict.fromkeys(refused, "refused")


def test_counted_tokens() -> None:
    fields = {field.name for field in msgspec.structs.fields(messages.CountTokensRequest)}
    text = DOCUMENT.read_text(encoding="utf-8")
    (listed,) = re.findall(r"count_tokens` takes .*?prompt: (.*?)\.\n", text)
    assert set(re.findall(r"`(\w+)`", listed)) == fields


def named_before_the_table(section: str) -> set[str]:
    text = DOCUMENT.read_text(encoding="utf-8")
    (body,) = re.findall(rf"## Fields of {re.escape(section)}\n(.*?)\n\|", text, re.DOTALL)
    return set(re.findall(r"`(\w+)`", body))


def test_what_is_common_is_common() -> None:
    both = documented(BOTH)
    assert {n for n, what in both.items() if what == "inert"} == set(INERT_COMMON)
    assert {n for n, what in both.items() if what == "refused"} == set(REFUSED_COMMON)
    assert not set(both) & (set(documented(COMPLETIONS)) | set(documented(CHAT)))
