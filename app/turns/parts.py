"""The parts of a turn, in the order in which the model writes them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple


class Text(NamedTuple):
    """A piece of the answer."""

    text: str


class Reasoning(NamedTuple):
    """A piece of what the model thought before it answered."""

    text: str


class CallBegin(NamedTuple):
    """A tool call begins: `call` counts a turn's calls from 0, `id` is unique."""

    call: int
    id: str
    name: str


class CallArguments(NamedTuple):
    """A piece of the arguments, which are JSON text. A call without any has none of these."""

    call: int
    text: str


Part = Text | Reasoning | CallBegin | CallArguments


@dataclass
class Call:
    """A whole tool call. `arguments` is a JSON object's text, unless the output was cut."""

    id: str
    name: str
    arguments: str = ""


@dataclass
class Turn:
    """A turn's parts put together."""

    text: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)

    @classmethod
    def of(cls, parts: Iterable[Part]) -> Turn:
        turn = cls()
        for part in merged(parts):
            match part:
                case Text(text):
                    turn.text += text
                case Reasoning(text):
                    turn.reasoning += text
                case CallBegin(_, id, name):
                    turn.calls.append(Call(id, name))
                case CallArguments(call, text):
                    turn.calls[call].arguments += text
        return turn


def merged(parts: Iterable[Part]) -> list[Part]:
    """The same with neighbours of one kind joined and empty pieces left out."""
    result: list[Part] = []
    told = (part for part in parts if isinstance(part, CallBegin) or part.text)
    for _, run in groupby(told, lambda part: (type(part), getattr(part, "call", 0))):
        first, *more = run
        if not isinstance(first, CallBegin) and more:
            text = "".join([first.text, *(part.text for part in more)])  # type: ignore[union-attr]
            first = first._replace(text=text)
        result.append(first)
    return result
