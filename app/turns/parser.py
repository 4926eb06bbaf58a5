"""Text that a model writes, in pieces, to the parts of its turn."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, Protocol

import msgspec
import regex

from app.turns.formats import HEAD, OBJECT, CallFormat, Think, compiled
from app.turns.json_span import JsonSpan
from app.turns.parts import CallArguments, CallBegin, Part, Reasoning, Text, merged

# White space in front of a marker that is held back with it. More of it is part of the text.
_SPACE = r"\s{0,16}"


class TurnParser(Protocol):
    """Takes one turn's text as it comes.

    How it is split into pieces makes no difference to the parts, joined.
    """

    @property
    def reasoning(self) -> bool:
        """What comes next is reasoning, as far as one can tell."""

    @property
    def done(self) -> bool:
        """Nothing that comes is wanted."""

    def feed(self, text: str) -> list[Part]:
        """The parts that are certain now."""

    def finish(self) -> list[Part]:
        """The end of generation: what was held back."""


class MarkerParser:
    """Reads reasoning between markers and calls in a `CallFormat`.

    A call begins when its name, one of `names`, and the opening brace of its arguments are there;
    what looks like one before and then is none was text. From then on the arguments are passed on
    as they are written. White space around markers belongs to them.
    """

    def __init__(
        self,
        calls: CallFormat | None,
        think: Think | None,
        *,
        names: Collection[str] = (),
        in_reasoning: bool = False,
        one_call: bool = False,
        only_calls: bool = False,
    ) -> None:
        """`in_reasoning`: the prompt ends in an opened `think`. `one_call`: further are dropped.

        `only_calls`: no text is expected; what there is belongs to a call that was cut.
        """
        self._format = calls if calls is not None and names else None
        self._think = think
        self._names = names
        self._one_call = one_call
        self._only_calls = only_calls
        self._buffer = ""
        self._parts: list[Part] = []
        self._state: Callable[[bool], bool] = self._reasoning if in_reasoning else self._start
        self._strip = in_reasoning  # white space that comes next belongs to a marker
        self._taken = ""  # what was read as the beginning of a call, and may turn out to be text
        self._calls = 0
        self._span = JsonSpan()
        self._floor = 0  # open brackets where the arguments end
        self._scanned = 0
        self.done = False
        self._compile()

    def _compile(self) -> None:
        openers = () if self._format is None else self._format.openers
        self._opener = compiled(_SPACE + _any_of(openers)) if openers else None
        self._close = compiled(_SPACE + _any_of((self._think.close,))) if self._think else None
        if (form := self._format) is not None:
            heads = [form.before + HEAD] + ([form.named] if form.named else [])
            self._heads = [compiled(head) for head in heads]
            self._object = compiled(form.before + OBJECT)
            self._next = compiled(form.next) if form.next else None
            self._end = compiled(form.end) if form.end else None

    @property
    def reasoning(self) -> bool:
        return self._state == self._reasoning

    def feed(self, text: str) -> list[Part]:
        self._buffer += text
        return self._run(final=False)

    def finish(self) -> list[Part]:
        return self._run(final=True)

    def _run(self, final: bool) -> list[Part]:
        while self._state(final):
            pass
        parts, self._parts = self._parts, []
        return merged(parts)

    # Each state takes what it can from the buffer and says whether the next may go on.

    def _start(self, final: bool) -> bool:
        """Before the turn's first character that is no white space."""
        text = self._buffer.lstrip()
        if not text and not final:
            return False
        think = self._think
        if think is not None and text.startswith(think.open):
            self._begin_reasoning(text[len(think.open) :])
        elif think is not None and think.open.startswith(text) and not final:
            return False
        elif self._format is not None and self._format.at_start and text.startswith("{"):
            self._taken, self._state = "", self._before
        else:
            self._state = self._text
        return True

    def _begin_reasoning(self, rest: str) -> None:
        self._buffer, self._strip, self._state = rest, True, self._reasoning

    def _reasoning(self, final: bool) -> bool:
        assert self._close is not None
        if self._pass_to(self._close, Reasoning, final) is None:
            return False
        self._think, self._strip, self._state = None, True, self._start
        return True

    def _text(self, final: bool) -> bool:
        if self._opener is None:
            self._give(Text, len(self._buffer))
            return False
        opener = self._pass_to(self._opener, Text, final)
        if opener is None:
            return False
        self._taken, self._state = opener, self._before
        return True

    def _before(self, final: bool) -> bool:
        """Behind an opener, in front of a call."""
        waiting = False
        for head in self._heads:
            match = head.match(self._buffer, partial=not final)
            if match is not None and not match.partial:
                return self._begin(match["name"], match.end(), bare=head is not self._heads[0])
            waiting = waiting or match is not None
        if waiting:
            return False
        match = self._object.match(self._buffer, partial=not final)
        if match is None:
            return self._no_call()
        if match.partial:
            return False
        self._span, self._scanned, self._state = JsonSpan(), match.end(), self._whole
        return True

    def _begin(self, name: str, end: int, *, bare: bool) -> bool:
        if name not in self._names:
            return self._no_call()
        self._add_call(name)
        self._buffer = self._buffer[end:]
        self._span = JsonSpan("" if bare else "{")
        self._floor = 0 if bare else 1
        self._state = self._arguments
        return True

    def _add_call(self, name: str) -> None:
        assert self._format is not None
        self._parts.append(CallBegin(self._calls, self._format.new_id(), name))
        self._calls += 1

    def _no_call(self) -> bool:
        taken, self._taken, self._state = self._taken, "", self._text
        self._give_text(Text, taken)
        return True

    def _whole(self, final: bool) -> bool:
        """In a call object whose name does not come first: it is read when it is complete."""
        end = self._span.find(self._buffer[self._scanned :], 0)
        if end is None:
            if final or self._span.broken:
                return self._no_call()
            self._scanned = len(self._buffer)
            return False
        end += self._scanned
        call = read_call(self._buffer[self._buffer.index("{") : end])
        if call is None or call[0] not in self._names:
            return self._no_call()
        self._add_call(call[0])
        self._parts.append(CallArguments(self._calls - 1, call[1]))
        self._buffer, self._state = self._buffer[end:], self._between
        return True

    def _arguments(self, final: bool) -> bool:
        end = self._span.find(self._buffer, self._floor)
        if self._span.broken:
            self._state = self._broken_arguments
            return True
        self._pass_arguments(len(self._buffer) if end is None else end)
        if end is not None:
            self._state = self._rest if self._floor else self._between
        return end is not None

    def _pass_arguments(self, end: int) -> None:
        self._parts.append(CallArguments(self._calls - 1, self._buffer[:end]))
        self._buffer = self._buffer[end:]

    def _broken_arguments(self, final: bool) -> bool:
        """They are no JSON any more: they go on to the end of the call, whatever comes."""
        return self._to_closer(final, keep=True)

    def _rest(self, final: bool) -> bool:
        """What an object has besides name and arguments; it is dropped."""
        end = self._span.find(self._buffer, 0)
        if self._span.broken:
            self._state = self._broken_rest
            return True
        self._buffer = "" if end is None else self._buffer[end:]
        self._state = self._rest if end is None else self._between
        return end is not None

    def _broken_rest(self, final: bool) -> bool:
        return self._to_closer(final, keep=False)

    def _to_closer(self, final: bool, *, keep: bool) -> bool:
        assert self._format is not None
        match, end = None, len(self._buffer)
        if self._format.closer is not None:
            pattern = compiled(_any_of((self._format.closer,)))
            match = pattern.search(self._buffer, partial=not final)
            end = end if match is None else match.start()
        if keep:
            self._pass_arguments(end)
        else:
            self._buffer = self._buffer[end:]
        if match is None or match.partial:
            return False
        self._state = self._between
        return True

    def _between(self, final: bool) -> bool:
        """Behind a call."""
        if self._one_call:
            self.done, self._state = True, self._nothing
            return True
        waiting = False
        for pattern, state in ((self._next, self._before), (self._end, self._text)):
            match = None if pattern is None else pattern.match(self._buffer, partial=True)
            if match is not None and not match.partial:
                self._taken, self._state = match[0], state
                self._buffer, self._strip = self._buffer[match.end() :], True
                return True
            waiting = waiting or match is not None
        if waiting:
            if final:
                self._buffer = ""
            return False
        self._strip, self._state = True, self._text
        return True

    def _nothing(self, final: bool) -> bool:
        self._buffer = ""
        return False

    # Helpers of the states.

    def _pass_to(
        self, pattern: regex.Pattern[str], kind: Callable[[str], Part], final: bool
    ) -> str | None:
        """Give what comes before `pattern`, and take its text; None: it is not there yet."""
        match = pattern.search(self._buffer, partial=not final)
        self._give(kind, len(self._buffer) if match is None else match.start())
        if match is None or match.partial:
            return None
        found: str = match[0]
        self._buffer = self._buffer[len(found) :]
        return found

    def _give(self, kind: Callable[[str], Part], end: int) -> None:
        self._give_text(kind, self._buffer[:end])
        self._buffer = self._buffer[end:]

    def _give_text(self, kind: Callable[[str], Part], text: str) -> None:
        if self._strip:
            text = text.lstrip()
            self._strip = not text
        if text and not (self._only_calls and kind is Text):
            self._parts.append(kind(text))


def read_call(text: str) -> tuple[str, str] | None:
    """Name and arguments of a call object in any of its dialects; None if it is none."""
    try:
        call: Any = msgspec.json.decode(text)
        if isinstance(call, dict) and isinstance(call.get("function"), dict):
            call = call["function"]
        arguments = call.get("arguments", call.get("parameters")) or {}
        if isinstance(arguments, str):  # JSON text within JSON
            arguments = msgspec.json.decode(arguments)
    except (ValueError, AttributeError, RecursionError):
        return None
    name = call.get("name")
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return None
    return name, msgspec.json.encode(arguments).decode()


def _any_of(literals: Collection[str]) -> str:
    return f"(?:{'|'.join(map(regex.escape, literals))})"
