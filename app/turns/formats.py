"""How models write tool calls and reasoning, and which way a chat template teaches."""

from __future__ import annotations

import secrets
import string
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import regex

_ALPHANUMERIC = string.ascii_letters + string.digits


def _openai_id() -> str:
    return f"call_{secrets.token_hex(12)}"


def _mistral_id() -> str:
    """Mistral's templates insist on nine letters and digits."""
    return "".join(secrets.choice(_ALPHANUMERIC) for _ in range(9))


@dataclass(frozen=True)
class CallFormat:
    """How calls are written, and how a forced call is to be written.

    A call is an object with `name` and `arguments` (or `parameters`), behind one of `openers`.
    The patterns match where the one before them ended. They are `regex`'s, which can tell whether
    a text may still become a match: that makes them usable on text that comes in pieces.
    """

    openers: tuple[str, ...]
    before: str = r"\s*"  # between the opener and the object
    named: str | None = None  # instead of an object: the name, then bare arguments
    next: str | None = None  # between two calls behind one opener
    end: str | None = None  # behind the last call
    closer: str | None = None  # a text that ends a call however broken it is
    at_start: bool = False  # an object that begins the answer is a call too
    special: tuple[str, ...] = ()  # further special tokens that the patterns mention
    new_id: Callable[[], str] = _openai_id
    # How calls are forced. `forced` is around the arguments of one, with %s for the name; all
    # begin with the first opener, if with any.
    forced: tuple[str, str] = ('{"name": "%s", "arguments": ', "}")
    forced_begin: str = ""
    forced_between: str = ""
    forced_end: str = ""


HERMES = CallFormat(
    openers=("<tool_call>",),
    next=r"[\s}]*(?=\{)",
    end=r"[\s}]*</tool_call>",  # models like to close a brace too many
    closer="</tool_call>",
    forced_begin="<tool_call>\n",
    forced_between="\n</tool_call>\n<tool_call>\n",
    forced_end="\n</tool_call>",
)
LLAMA3 = CallFormat(
    openers=("<|python_tag|>",),
    next=r"\s*[;,]?\s*(?=\{)",
    at_start=True,
    forced=('{"name": "%s", "parameters": ', "}"),
    forced_between="; ",
)
MISTRAL = CallFormat(
    openers=("[TOOL_CALLS]",),
    before=r"\s*(?:\[\s*)?",
    named=r"\s*(?P<name>[\w.-]{1,64})\s*(?:\[CALL_ID\]\s*\w+\s*)?(?:\[ARGS\]\s*)?(?=\{)",
    next=r"\s*,\s*(?=\{)",
    end=r"\s*\]",
    special=("[CALL_ID]", "[ARGS]"),
    new_id=_mistral_id,
    forced_begin="[TOOL_CALLS][",
    forced_between=", ",
    forced_end="]",
)
# Mistral's newer templates.
MISTRAL_ARGS = replace(
    MISTRAL,
    forced=("%s[ARGS]", ""),
    forced_begin="[TOOL_CALLS]",
    forced_between="[TOOL_CALLS]",
    forced_end="",
)

_CALLS, _CALL, _SEP, _CALL_END, _CALLS_END = (
    f"<\uff5ctool\u2581{name}\uff5c>"
    for name in ("calls\u2581begin", "call\u2581begin", "sep", "call\u2581end", "calls\u2581end")
)
DEEPSEEK = CallFormat(
    openers=(_CALLS,),
    # V3 and R1 say "function" first, and put the arguments in a fence.
    named=rf"\s*{_CALL}(?:function{_SEP})?(?P<name>[\w.-]+)(?:{_SEP}|\n```json\n)\s*(?=\{{)",
    next=rf"[\s`]*{_CALL_END}\s*(?={_CALL})",
    end=rf"[\s`]*{_CALL_END}\s*{_CALLS_END}",
    closer=_CALL_END,
    special=(_CALL, _SEP, _CALLS_END),
    forced=(f"{_CALL}%s{_SEP}", _CALL_END),
    forced_begin=_CALLS,
    forced_end=_CALLS_END,
)

# The head of a call object whose name comes first: all that is needed to pass arguments on as
# they come. Other orders are read when the object is complete.
HEAD = (
    r'\{\s*(?:"(?:type|id)"\s*:\s*"[^"\\]{0,64}"\s*,\s*){0,2}'
    r'"name"\s*:\s*"(?P<name>[^"\\]{1,64})"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)
# An object in which name and arguments may come in another order.
OBJECT = r'(?=\{\s*"(?:name|arguments|parameters|function|type|id)")'


class Think(NamedTuple):
    """What opens and closes the reasoning, at the beginning of a turn."""

    open: str
    close: str


_THINKS = (
    Think("<think>", "</think>"),
    Think("[THINK]", "[/THINK]"),
    Think("<seed:think>", "</seed:think>"),
    Think("<|START_THINKING|>", "<|END_THINKING|>"),
)
# Calls within <tool_call> that are no JSON.
_MARKUP = ("<function=", "<arg_key>")


def call_format(template: str) -> CallFormat | None:
    """The format of the tool calls that a chat template renders; None: one unknown here.

    Hermes' where the template says nothing of tools: most models have seen it.
    """
    if "[TOOL_CALLS]" in template:
        return MISTRAL_ARGS if "[ARGS]" in template else MISTRAL
    if _CALLS in template:
        return DEEPSEEK
    if "<tool_call>" in template:
        return None if any(markup in template for markup in _MARKUP) else HERMES
    if "<|python_tag|>" in template or '"parameters": dictionary of argument name' in template:
        return LLAMA3
    return HERMES


def think_markers(template: str) -> Think | None:
    """The markers of the reasoning that a chat template knows of."""
    return next((think for think in _THINKS if think.close in template), None)


@cache
def compiled(pattern: str) -> regex.Pattern[str]:
    return regex.compile(pattern, regex.DOTALL)
