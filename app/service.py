"""What every endpoint works with: the engine, the model's text side, limits and counters."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from app.access.admission import Admission
from app.access.backlog import Backlog
from app.engine_protocol import Engine
from app.flights.recorder import FlightRecorder
from app.http.errors import ApiError, no_such_model
from app.inputs.sampling import SamplingDefaults
from app.inputs.template import ChatTemplate
from app.inputs.text_side import TextSide
from app.inputs.tokenizer import Tokenizer
from app.responses.store import ResponseStore
from app.structured.compiler import GrammarCompiler
from app.telemetry.metrics import Metrics
from app.turns.style import TurnStyle
from batching.worker.protocol import Capabilities
from config.settings import ServerSettings


@dataclass(frozen=True)
class Service:
    """One served model. Built once, when the engine is ready."""

    settings: ServerSettings
    engine: Engine
    model_name: str
    tokenizer: Tokenizer
    template: ChatTemplate | None
    style: TurnStyle
    defaults: SamplingDefaults
    metrics: Metrics
    flights: FlightRecorder
    admission: Admission
    backlog: Backlog
    grammars: GrammarCompiler
    responses: ResponseStore
    others: dict[str, str] = field(default_factory=dict)  # models beside it, and what they do
    created: int = field(default_factory=lambda: int(time.time()))
    clock: Callable[[], float] = time.monotonic

    @classmethod
    def load(
        cls,
        settings: ServerSettings,
        engine: Engine,
        capabilities: Capabilities,
        metrics: Metrics,
        flights: FlightRecorder,
        policy: str = "fcfs",
        text: TextSide | None = None,
    ) -> Service:
        """Read the model folder's text side, unless it was. Raises `TokenizerError`.

        `policy` is the engine's, by which the backlog is ordered.
        """
        text = text or TextSide.load(Path(capabilities.model))
        backlog = Backlog(engine, capabilities, policy)
        admission = Admission(
            settings.max_queued_requests, settings.max_queued_tokens, backlog.drain_seconds
        )
        metrics.serve(capabilities, engine, admission, backlog)
        flights.serve(engine)
        return cls(
            settings=settings,
            engine=engine,
            model_name=metrics.model_name,
            tokenizer=text.tokenizer,
            template=text.template,
            style=text.style,
            defaults=text.defaults,
            metrics=metrics,
            flights=flights,
            admission=admission,
            backlog=backlog,
            grammars=GrammarCompiler(capabilities, settings.max_grammar_bytes),
            responses=ResponseStore(settings.response_store, settings.max_stored_responses),
        )

    @property
    def capabilities(self) -> Capabilities:
        """The engine's, or the last one's while it restarts."""
        assert self.engine.capabilities is not None
        return self.engine.capabilities

    @property
    def name(self) -> str:
        """The same, as every kind of model has it."""
        return self.model_name

    @property
    def context(self) -> int:
        """Most tokens of prompt and output together: the model's limit, or the KV pool's."""
        pool = self.capabilities.num_blocks * self.capabilities.block_size
        return min(self.capabilities.max_model_len, pool)

    @property
    def prompt_limit(self) -> int:
        """Most tokens of a prompt: one token must still fit."""
        return self.context - 1

    def check_model(self, name: str | None) -> None:
        """Absent means the served one. Raises `ApiError`: 404, or 400 for one that only pools."""
        if name is None or name == self.model_name:
            return
        if (does := self.others.get(name)) is not None:
            message = f"the model {name!r} only {does}; {self.model_name!r} generates text"
            raise ApiError(message, param="model", code="model_not_suitable")
        raise no_such_model(name)
