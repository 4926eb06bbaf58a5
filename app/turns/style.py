"""How the served model writes its turns, and what to read one of them with."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from app.inputs.template import ChatTemplate, read_json
from app.inputs.tokenizer import Tokenizer
from app.inputs.tools import ToolUse
from app.turns import response_template
from app.turns.formats import HERMES, CallFormat, Think, call_format, think_markers
from app.turns.parser import MarkerParser, TurnParser
from app.turns.response_template import TemplateParser

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TurnStyle:
    """Where the tokenizer has a response template, that; else the markers of known formats."""

    calls: CallFormat | None = HERMES
    think: Think | None = None
    response: Any = None
    # Special tokens that are not shown: those that mark parts must be, for the parser to see them.
    hidden: frozenset[int] = frozenset()

    @classmethod
    def load(cls, folder: Path, template: ChatTemplate | None, tokenizer: Tokenizer) -> TurnStyle:
        """Read the model folder. Raises `ValueError` where a file is none."""
        source = template.sources if template is not None else ""
        style = cls(call_format(source), think_markers(source))
        spec = read_json(folder / "tokenizer_config.json").get("response_template")
        if spec is not None:
            try:
                response = response_template.load(spec)
                style = replace(style, response=response, think=response_template.think(response))
            except ValueError as error:
                logger.warning("the tokenizer's response_template is not used: %s", error)
        markers = {*(style.think or ())}
        if style.calls is not None:
            markers |= {*style.calls.openers, *style.calls.special}
            markers |= {style.calls.closer or ""}
        hidden = (i for i, text in tokenizer.special_tokens.items() if text not in markers)
        return replace(style, hidden=frozenset(hidden))

    @property
    def reasons(self) -> bool:
        """A turn may hold reasoning."""
        return self.response is not None or self.think is not None

    def reader(
        self, prompt: str, use: ToolUse, *, has_answer: bool
    ) -> tuple[TurnParser, frozenset[int]] | None:
        """For the turn after `prompt`: a parser, and the hidden tokens. None: all of it is text.

        Where a grammar (`app.turns.grammar`) writes the calls, because they are forced or because
        it does so with the answer (`has_answer`), they are in `calls`; if that is not known, they
        are as Hermes writes them.
        """
        by_grammar = bool(use.callable) and (use.forced or has_answer)
        calls = (self.calls or HERMES) if by_grammar else self.calls
        tools, one_call = use.callable, use.one_call
        if self.response is not None and not by_grammar:
            new_id = (calls or HERMES).new_id
            template = TemplateParser(self.response, prompt, tools, new_id, one_call=one_call)
            return template, frozenset()
        if self.think is None and (calls is None or not tools):
            return None
        parser = MarkerParser(
            calls,
            self.think,
            names={tool["function"]["name"] for tool in tools},
            in_reasoning=self.think is not None and prompt.rstrip().endswith(self.think.open),
            one_call=one_call,
            only_calls=use.forced,
        )
        return parser, self.hidden
