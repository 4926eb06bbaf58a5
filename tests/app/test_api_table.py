"""`docs/api.md` has a row for every field, and says of each what the schemas do."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

from app.schemas import chat, completions, tokenization
from app.schemas.common import INERT_COMMON, REFUSED_COMMON

DOCUMENT = Path(__file__).parents[2] / "docs" / "api.md"
BOTH, COMPLETIONS, CHAT = "both endpoints", "`/v1/completions`", "`/v1/chat/completions`"


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
        (tokenization.TokenizeRequest, tokenization.REFUSED_BY_TOKENIZE, "`/tokenize`"),
        (tokenization.DetokenizeRequest, {}, "`/detokenize`"),
    ],
    ids=["tokenize", "detokenize"],
)
def test_other_endpoints(schema: type, refused: dict[str, str], section: str) -> None:
    fields = {field.name for field in msgspec.structs.fields(schema)}
    expected = dict.fromkeys(fields, "honoured") | dict.fromkeys(refused, "refused")
    assert documented(section) == expected


def test_what_is_common_is_common() -> None:
    both = documented(BOTH)
    assert {n for n, what in both.items() if what == "inert"} == set(INERT_COMMON)
    assert {n for n, what in both.items() if what == "refused"} == set(REFUSED_COMMON)
    assert not set(both) & (set(documented(COMPLETIONS)) | set(documented(CHAT)))
