"""What the chunks of chats and completions share, and `stream_options`: which carry usage."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from app.http.errors import ApiError
from app.http.sse import Envelope
from app.openai.token_ids import TokenIdOption
from app.outputs.generation import Generation, Job
from app.outputs.usage import usage_of
from app.schemas.common import GenerationFields
from app.telemetry.timings import Timings


class UsageOption:
    """The `usage` part of each chunk, as JSON text to append to it."""

    def __init__(
        self, fields: GenerationFields, jobs: list[Job], timings: Callable[[], Timings]
    ) -> None:
        """`timings` is asked, if they are wanted, when all choices have ended."""
        options = fields.stream_options
        self.include = bool(options and options.include_usage)
        self._continuous = bool(options and options.continuous_usage_stats) and self.include
        self._jobs = jobs
        self._samples = fields.n
        self._timings = timings if fields.timings else None

    def suffix(self) -> bytes:
        """For a chunk with a choice: nothing, null, or with continuous usage the counts so far."""
        if not self.include:
            return b""
        return self.final() if self._continuous else b',"usage":null'

    def final(self) -> bytes:
        """The counts so far."""
        return b',"usage":' + msgspec.json.encode(usage_of(self._jobs, self._samples))

    def last(self) -> bytes:
        """For a chunk after the last choice ended. Empty: there is none."""
        last = self.final() if self.include else b""
        if self._timings is not None:
            last += b',"timings":' + msgspec.json.encode(self._timings())
        return last


class Chunks:
    """A streamed answer but for what a delta becomes: what is around and after the chunks."""

    def __init__(
        self, fields: GenerationFields, generation: Generation, envelope: Envelope
    ) -> None:
        self._envelope = envelope
        self._usage = UsageOption(fields, generation.jobs, generation.timings)
        self._ids = TokenIdOption(fields.return_token_ids, generation.jobs)

    async def last(self) -> bytes:
        """A chunk with usage, if it is wanted."""
        last = self._usage.last()
        return self._envelope.usage(last) if last else b""


def check_stream_options(fields: GenerationFields) -> None:
    """Raises `ApiError` for options of a stream that is not asked for, and the other way round."""
    if fields.stream and fields.prompt_logprobs is not None:
        raise ApiError(
            "prompt_logprobs: cannot be streamed", param="prompt_logprobs", code="invalid_value"
        )
    if fields.stream_options is not None and not fields.stream:
        raise ApiError(
            "stream_options: only allowed when stream is true",
            param="stream_options",
            code="invalid_value",
        )
