"""Held-out prompts with graders: pure functions, standard library only.

The same tasks are run in process (`evaluate.py`) and over HTTP, where they price quantization,
pruning and distillation: a task knows what to ask and whether an answer is right, not how it
was produced.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

from .corpus import (
    arithmetic,
    extraction,
    geography,
    ordering,
    smalltalk,
    stories,
    units,
    words,
)
from .corpus.chatml import TOOL_CALL, TOOL_CALL_END, Message
from .corpus.exchange import Exchange, Family, draw
from .corpus.storytelling import storytelling
from .corpus.toolcalls import conversation

Grade = Callable[[str], bool]


@dataclass(frozen=True)
class Task:
    """One prompt: chat `messages` (with `tools`) or, for plain completion, a `prompt` text.

    `grade` takes the generated text, without end tokens, and says whether it is right. For a
    completion it is the continuation alone. `max_tokens` leaves room for any right answer.
    """

    kind: str
    grade: Grade
    messages: list[Message] = field(default_factory=list)
    prompt: str | None = None
    tools: list[dict[str, Any]] | None = None
    max_tokens: int = 96


def last_number(expected: str) -> Grade:
    """Right if the last whole number of the answer is `expected`."""

    def grade(text: str) -> bool:
        numbers = re.findall(r"-?\d+", text)
        return bool(numbers) and numbers[-1] == expected

    return grade


def mentions(expected: str) -> Grade:
    """Right if `expected` occurs in the answer as whole words."""
    return lambda text: re.search(rf"(?<!\w){re.escape(expected)}(?!\w)", text) is not None


def says(answer: str) -> Grade:
    """Right if the answer is `answer` to the letter, but for surrounding space."""
    return lambda text: text.strip() == answer


def valid_json(text: str) -> bool:
    """Right if the answer is one JSON object, whatever is in it."""
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def equals_json(expected: str) -> Grade:
    """Right if the answer is the JSON object `expected` (in any key order)."""
    return lambda text: valid_json(text) and json.loads(text) == json.loads(expected)


def calls(expected: dict[str, Any]) -> Grade:
    """Right if the answer is exactly one tool call with this name and these arguments."""

    def grade(text: str) -> bool:
        body = text.strip()
        if not (body.startswith(TOOL_CALL) and body.endswith(TOOL_CALL_END)):
            return False
        inner = body.removeprefix(TOOL_CALL).removesuffix(TOOL_CALL_END)
        return equals_json(json.dumps(expected))(inner)

    return grade


def tells(expected: str) -> Grade:
    """Right if the text parses as a story and binds every "slot=value" line of `expected`."""

    def grade(text: str) -> bool:
        found = stories.bindings(text.strip())
        wanted = dict(line.split("=", 1) for line in expected.splitlines())
        return found is not None and wanted.items() <= found.items()

    return grade


def continues(opening: str) -> Grade:
    """Right if `opening` and the text together are one whole story."""
    return lambda text: stories.parses((opening + text).strip())


@dataclass(frozen=True)
class _Kind:
    family: Family
    grader: Callable[[Exchange], Grade]
    max_tokens: int = 96


def _number(exchange: Exchange) -> Grade:
    return last_number(exchange.expected)


def _name(exchange: Exchange) -> Grade:
    return mentions(exchange.expected)


def _exact(exchange: Exchange) -> Grade:
    return says(exchange.answer)


_CHAT: dict[str, _Kind] = {
    "addition": _Kind(arithmetic.addition, _number),
    "subtraction": _Kind(arithmetic.subtraction, _number),
    "multiplication": _Kind(arithmetic.multiplication, _number),
    "capitals": _Kind(geography.capitals, _name),
    "continents": _Kind(geography.continents, _name),
    "units": _Kind(units.units, _name),
    "calendar": _Kind(ordering.calendar, _exact),
    "sorting": _Kind(ordering.sorting, _exact),
    "comparing": _Kind(ordering.comparing, _exact),
    "spelling": _Kind(words.spelling, _name),
    "reversing": _Kind(words.reversing, _exact),
    "repeating": _Kind(words.repeating, _exact),
    "extraction": _Kind(extraction.extraction, lambda e: equals_json(e.expected)),
    "valid_json": _Kind(extraction.extraction, lambda e: valid_json),
    "emoji": _Kind(smalltalk.emoji, lambda e: lambda text: e.expected in text),
    "languages": _Kind(smalltalk.languages, _name),
    "stories": _Kind(storytelling, lambda e: tells(e.expected), 512),
}


def _chat(kind: str, rng: Random) -> Task:
    spec = _CHAT[kind]
    exchange = draw(spec.family, rng, held_out=True)
    message = {"role": "user", "content": exchange.question}
    return Task(kind, spec.grader(exchange), [message], max_tokens=spec.max_tokens)


def _tool_call(kind: str, rng: Random) -> Task:
    talk = conversation(rng, held_out=True)
    return Task(kind, calls(talk.call), talk.messages[:1], tools=talk.tools)


def _tool_answer(kind: str, rng: Random) -> Task:
    talk = conversation(rng, held_out=True)
    return Task(kind, says(talk.messages[3]["content"]), talk.messages[:3], tools=talk.tools)


def _story_completion(kind: str, rng: Random) -> Task:
    opening = stories.story(rng, 0).split(".")[0]
    return Task(kind, continues(opening), prompt=opening, max_tokens=512)


_OTHER: dict[str, Callable[[str, Random], Task]] = {
    "tool_call": _tool_call,
    "tool_answer": _tool_answer,
    "story_completion": _story_completion,
}

KINDS: tuple[str, ...] = (*_CHAT, *_OTHER)


def prompts(kind: str, n: int, seed: int = 0) -> list[Task]:
    """`n` held-out tasks of `kind` (one of `KINDS`), the same for the same seed.

    Raises KeyError for an unknown kind.
    """
    make = _OTHER.get(kind, _chat)
    if kind not in KINDS:
        raise KeyError(kind)
    rng = Random(f"{kind}-{seed}")
    return [make(kind, rng) for _ in range(n)]
