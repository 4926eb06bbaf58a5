"""`return_token_ids`: the ids of prompt and output, as vLLM adds them to answers."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from app.outputs.generation import Job


class TokenIdOption:
    """What a stream adds to its chunks, as JSON text to append; nothing unless `wanted`."""

    def __init__(self, wanted: bool, jobs: Sequence[Job]) -> None:
        self._wanted = wanted
        self._jobs = jobs
        self._sent = [0] * len(jobs)

    def prompt(self, index: int) -> bytes:
        """The prompt's."""
        if not self._wanted:
            return b""
        return b',"prompt_token_ids":' + msgspec.json.encode(self._jobs[index].prompt)

    def news(self, index: int) -> bytes:
        """What a choice generated since the last call."""
        if not self._wanted:
            return b""
        ids = self._jobs[index].choice.token_ids
        new, self._sent[index] = ids[self._sent[index] :], len(ids)
        return b',"token_ids":' + msgspec.json.encode(new)
