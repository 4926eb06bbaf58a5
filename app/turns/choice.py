"""A choice whose text is taken apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from app.inputs.tokenizer import MarkedDecoder, Tokenizer
from app.outputs.choice import Choice, Delta
from app.turns.parser import TurnParser
from app.turns.parts import CallBegin, Part, Reasoning, merged
from batching.core.types import TokenEvent


class TurnChoice(Choice):
    """Its deltas carry `parts` instead of `text`.

    `logprobs` entries are of all tokens, those of calls and reasoning too; they come with the
    parts that they led to, or soon after. `reasoning_tokens` counts what lies between the markers.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        parser: TurnParser,
        *,
        hidden: frozenset[int],
        counts_reasoning: bool = False,
        show_reasoning: bool = True,
        calls_finish: str = "tool_calls",
        skip_special_tokens: bool = True,
        **options: Any,
    ) -> None:
        """`hidden`: special tokens that are not shown. `options` are those of `Choice`.

        `calls_finish` is the finish reason of a turn that ended by itself and made calls.
        """
        super().__init__(tokenizer, prompt, skip_special_tokens=False, **options)
        if skip_special_tokens:
            self._decoder = MarkedDecoder(tokenizer, prompt, hidden)
        self._parser = parser
        self._show_reasoning = show_reasoning
        self._calls_finish = calls_finish
        self._called = False
        self.reasoning_tokens = 0 if counts_reasoning else None

    def feed(self, event: TokenEvent) -> Delta:
        parts: list[Part] = []
        entries: list[Any] = []
        parser = self._parser
        for one in _single(event):
            was_reasoning = parser.reasoning
            delta = super().feed(one)
            parts += parser.feed(delta.text)
            entries += delta.entries
            if was_reasoning and parser.reasoning and self.reasoning_tokens is not None:
                self.reasoning_tokens += len(one.tokens)
            if parser.done and self.finish is None:
                self.finish = "stop"
                entries += self._waiting
            if self.finish is not None:
                parts += parser.finish()
                break
        if not self._show_reasoning:
            parts = [part for part in parts if not isinstance(part, Reasoning)]
        self._called = self._called or any(isinstance(part, CallBegin) for part in parts)
        finish = self.finish
        if finish == "stop" and self._called:
            finish = self._calls_finish
        return Delta("", entries, finish, delta.stop_reason, merged(parts))


def _single(event: TokenEvent) -> Iterator[TokenEvent]:
    """The event cut into one per token, so that nothing depends on how events were merged."""
    if len(event.tokens) < 2:
        yield event
        return
    last = len(event.tokens) - 1
    for i, token in enumerate(event.tokens):
        yield TokenEvent(
            event.id,
            tokens=(token,),
            logprobs=event.logprobs[i : i + 1],
            prompt_logprobs=event.prompt_logprobs if i == 0 else (),
            cached_tokens=event.cached_tokens if i == 0 else None,
            finish=event.finish if i == last else None,
            error=event.error if i == last else None,
        )
