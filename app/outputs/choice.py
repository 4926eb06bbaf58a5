"""One choice of a response: token events in, text pieces out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from app.http.errors import engine_error
from app.inputs.tokenizer import TextDecoder, Tokenizer
from app.outputs.logprobs import Entry
from app.outputs.stop import StopMatcher
from app.turns.parts import Part, Text
from batching.core.types import FinishReason, TokenEvent, TokenLogprobs


class Delta(NamedTuple):
    """What one event added to a choice. `finish` is OpenAI's `finish_reason`.

    `entries` are the logprobs of the tokens whose text begins in `text`; all of them together
    belong to all the text. `stop_reason` (as vLLM names it) is the stop string or the user's stop
    token that ended the choice. `parts` come instead of `text` where it is taken apart.
    """

    text: str
    entries: Sequence[Entry] = ()
    finish: str | None = None
    stop_reason: str | int | None = None
    parts: Sequence[Part] = ()

    @property
    def news(self) -> Sequence[Part]:
        """Parts in either case."""
        return self.parts or ((Text(self.text),) if self.text else ())


class Choice:
    """Decodes, cuts at stop strings, counts tokens, and lines logprobs up with the text."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        *,
        stops: Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        eos_token_ids: Sequence[int] = (),
        logprobs: bool = False,
        discard: bool = False,
        offset: int = 0,
    ) -> None:
        """`discard`: nothing is wanted (max_tokens 0), the engine's one token is dropped.

        `offset`: characters of the choice's text before the generated part (an echoed prompt).
        """
        self._decoder = TextDecoder(tokenizer, prompt, skip_special_tokens=skip_special_tokens)
        self._matcher = StopMatcher(stops, include_stop) if stops else None
        self._include_stop = include_stop
        self._eos = eos_token_ids
        self._logprobs = logprobs
        self._discard = discard
        self._decoded = offset  # characters decoded
        self._emitted = offset  # characters given out: less, while a stop string may be coming
        self._waiting: list[Entry] = []  # entries whose text was not given out yet
        self.tokens = 0  # generated tokens, the one that ended the choice included
        self.token_ids: list[int] = []  # these
        self.reasoning_tokens: int | None = None  # of these; None: the model does not reason
        self.cached_tokens = 0
        self.prompt_logprobs: list[TokenLogprobs] = []
        self.logprob_sum = 0.0
        self.finish: str | None = None
        self.aborted = False

    def feed(self, event: TokenEvent) -> Delta:
        """Take an event. Raises `ApiError` when the engine reports that it failed."""
        if event.cached_tokens is not None:
            self.cached_tokens = event.cached_tokens
        if event.prompt_logprobs:
            self.prompt_logprobs += event.prompt_logprobs
        if event.finish is FinishReason.ERROR:
            raise engine_error(event.error)
        if event.finish is FinishReason.ABORT:
            self.aborted = True
            return Delta("")
        if self._discard:
            if event.finish is not None:
                self.finish = "length"
            return Delta("", finish=self.finish)
        before = self.tokens
        plain = self._matcher is None and not self._logprobs
        delta = self._feed_plain(event) if plain else self._feed_each(event)
        self.token_ids += event.tokens[: self.tokens - before]
        return delta

    def _feed_plain(self, event: TokenEvent) -> Delta:
        tokens = event.tokens
        self.tokens += len(tokens)
        if event.logprobs:
            self.logprob_sum += sum(entry.logprob for entry in event.logprobs)
        if event.finish is None:
            return Delta(self._decoder.feed(tokens))
        text = self._decoder.feed(self._visible(event))
        return self._ended(text + self._decoder.flush(), event)

    def _feed_each(self, event: TokenEvent) -> Delta:
        """Token by token, so that counts do not depend on how events were merged."""
        visible = self._visible(event)
        text = ""
        for i, token in enumerate(event.tokens):
            self.tokens += 1
            if event.logprobs:
                self.logprob_sum += event.logprobs[i].logprob
            if i >= len(visible):
                break
            if self._logprobs:
                self._waiting.append(Entry(self._decoded, token, event.logprobs[i]))
            piece = self._decoder.feed((token,))
            self._decoded += len(piece)
            text += self._match(piece)
            if self._matcher is not None and self._matcher.matched is not None:
                return self._stopped(text)
        if event.finish is None:
            return Delta(text, self._release(text))
        tail = self._decoder.flush()
        self._decoded += len(tail)
        text += self._match(tail)
        if self._matcher is not None:
            text += self._matcher.flush()
            if self._matcher.matched is not None:
                return self._stopped(text)
        return self._ended(text, event)

    def _visible(self, event: TokenEvent) -> Sequence[int]:
        """The event's tokens without the stop token, which is no part of the text."""
        if event.finish is not FinishReason.STOP:
            return event.tokens
        if self._include_stop and event.tokens[-1] not in self._eos:
            return event.tokens
        return event.tokens[:-1]

    def _match(self, text: str) -> str:
        return text if self._matcher is None else self._matcher.feed(text)

    def _stopped(self, text: str) -> Delta:
        assert self._matcher is not None
        self.finish = "stop"
        return Delta(text, self._release(text), "stop", self._matcher.matched)

    def _ended(self, text: str, event: TokenEvent) -> Delta:
        assert event.finish is not None
        self.finish = event.finish.value
        by_token = event.finish is FinishReason.STOP and event.tokens[-1] not in self._eos
        entries, self._waiting = self._waiting, []
        return Delta(text, entries, self.finish, event.tokens[-1] if by_token else None)

    def _release(self, text: str) -> list[Entry]:
        """Entries of tokens whose text begins before the end of what has been given out."""
        self._emitted += len(text)
        ready = sum(entry.offset < self._emitted for entry in self._waiting)
        released, self._waiting = self._waiting[:ready], self._waiting[ready:]
        return released
