"""Server-sent events of a streamed completion, reduced to what a measurement needs."""

from __future__ import annotations

from typing import Any

import msgspec

_DETAIL_BYTES = 300


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _Details | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


class Outcome(msgspec.Struct):
    """One request as the client saw it. Times are seconds on the client's clock.

    `chunk_times` are the arrivals of events that carried text: the first is the first token. A
    server may put several tokens into one event, so their number is at most `output_tokens`,
    which is what the server's `usage` says. `error` is a kind, or None if all went well.
    """

    sent: float
    ended: float
    status: int = 0
    chunk_times: list[float] = []
    input_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    finish: str | None = None
    error: str | None = None
    detail: str = ""  # what the server said of an error
    scheduled: float = 0.0  # when it should have been sent; set by the runner
    asked_input: int | None = None  # tokens in the prompt, where the client knows
    asked_output: int = 0
    text: str = ""  # where it was asked to be kept
    group: str = "all"
    json_asked: bool = False  # the text should be JSON


class EventStream:
    """Takes body bytes as they arrive; `now` is set by the connection before each feed."""

    def __init__(self, keep_body: bool = False, keep_text: bool = False) -> None:
        self.now = 0.0
        self.status = 0
        self.error: str | None = None
        self.body = b""  # all of it, or with a stream the line that is not complete yet
        self._detail = b""
        self.keep_body = keep_body
        self._texts: list[str] | None = [] if keep_text else None
        self._times: list[float] = []
        self._usage: _Usage | None = None
        self._finish: str | None = None
        self._done = False
        self._decode = msgspec.json.Decoder(_Chunk).decode

    def feed(self, data: bytes) -> None:
        """Handle body bytes, however they were cut."""
        if self.keep_body or self.status != 200:
            self.body += data
            return
        if self.body:
            data = self.body + data
        *lines, self.body = data.split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):  # one data line an event, as all such servers send
                self._event(line[5:].strip())

    def _event(self, data: bytes) -> None:
        if data == b"[DONE]":
            self._done = True
            return
        try:
            chunk = self._decode(data)
        except msgspec.MsgspecError:
            self._fail("bad event", data)
            return
        if chunk.error is not None:
            self._fail("error in stream", data)
        if chunk.usage is not None:
            self._usage = chunk.usage
        for choice in chunk.choices:
            text = choice.text or (choice.delta and choice.delta.content)
            if text:
                self._times.append(self.now)
                if self._texts is not None:
                    self._texts.append(text)
            if choice.finish_reason is not None:
                self._finish = choice.finish_reason

    def _fail(self, kind: str, data: bytes) -> None:
        self.error = self.error or kind
        self._detail = self._detail or data

    def outcome(self, sent: float, ended: float) -> Outcome:
        """What was seen of a request sent at `sent` and over at `ended`."""
        usage = self._usage
        details = usage.prompt_tokens_details if usage is not None else None
        return Outcome(
            sent=sent,
            ended=ended,
            status=self.status,
            chunk_times=self._times,
            input_tokens=usage.prompt_tokens if usage is not None else None,
            output_tokens=usage.completion_tokens if usage is not None else None,
            cached_tokens=details.cached_tokens if details is not None else None,
            finish=self._finish,
            error=self.error or self._verdict(),
            detail=(self._detail or self.body)[:_DETAIL_BYTES].decode(errors="replace"),
            text="".join(self._texts or ()),
        )

    def close_plain(self) -> None:
        """Take a complete JSON body (no event stream) for the end of the response."""
        if self.status == 200:
            self._event(self.body)
            self.body, self._done, self._finish = b"", True, "stop"

    def _verdict(self) -> str | None:
        if self.status != 200:
            return f"HTTP {self.status}"
        if not self._done or self._finish is None:
            return "truncated"
        return None
