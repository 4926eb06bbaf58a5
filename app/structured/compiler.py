"""Compiles grammars off the event loop, so that every faulty one is the client's 400."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

from app.http.errors import ApiError
from batching.core.types import Grammar
from batching.worker.grammar import Grammars
from batching.worker.protocol import Capabilities

# The engine compiles a grammar again, between two steps: what takes long would stall everyone.
_MAX_SECONDS = 1.0
_REMEMBERED = 1024


class GrammarCompiler:
    """Says whether grammars can be used with the served model. Verdicts are kept by content."""

    def __init__(self, capabilities: Capabilities, max_bytes: int) -> None:
        self._ends = capabilities.eos_token_ids
        self._max_bytes = max_bytes
        self._grammars = Grammars(capabilities.model, capabilities.vocab_size, self._ends)
        self._verdicts: OrderedDict[str, str | None] = OrderedDict()
        # One thread: llguidance's objects are shared, and compiling is not where time should go.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammar")

    async def check(self, grammar: Grammar, param: str) -> None:
        """Raises `ApiError` naming `param` if the grammar cannot be used."""
        if not self._ends:
            raise _bad(param, "this model has no end token, so its text cannot be constrained")
        size = len(grammar.source.encode(errors="replace"))
        if size > self._max_bytes:
            raise _bad(param, f"{size} bytes; a grammar may have {self._max_bytes}")
        if grammar.source not in self._verdicts:
            loop = asyncio.get_running_loop()
            verdict = await loop.run_in_executor(self._thread, self._fault, grammar)
            self._verdicts[grammar.source] = verdict
            if len(self._verdicts) > _REMEMBERED:
                self._verdicts.popitem(last=False)
        if (fault := self._verdicts[grammar.source]) is not None:
            raise _bad(param, fault)

    def _fault(self, grammar: Grammar) -> str | None:
        self._grammars.load()
        began = time.perf_counter()
        fault = self._grammars.fault(grammar)
        seconds = time.perf_counter() - began
        if fault is None and seconds > _MAX_SECONDS:
            fault = f"it takes {seconds:.1f} s to compile; {_MAX_SECONDS:.0f} s is allowed"
        return fault


def _bad(param: str, message: str) -> ApiError:
    return ApiError(f"{param}: {message}", param=param, code="invalid_value")
