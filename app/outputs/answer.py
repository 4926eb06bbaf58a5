"""From a checked request to its response: prepare, submit, then stream or collect."""

from __future__ import annotations

from typing import Protocol

from starlette.requests import Request
from starlette.responses import Response

from app.access.terms import RunFields, Terms
from app.http.sse import OPENAI_END, EventStream, Source, StreamEnd
from app.offload import prepare
from app.outputs.choice import Delta
from app.outputs.generation import Generation, Job
from app.service import Service
from app.structured.request import RequestedGrammar
from app.telemetry.headers import LOAD_HEADER, forecast_headers, load_format, load_report


class AnswerFields(RunFields, Protocol):
    """The request fields that say how it is answered."""

    @property
    def stream(self) -> bool: ...
    @property
    def request_id(self) -> str | None: ...


class Pieces(Protocol):
    """A response as server-sent events."""

    def piece(self, index: int, delta: Delta) -> bytes:
        """What tells of a choice's delta; may be nothing. Called for every token: it is quick."""

    async def last(self) -> bytes:
        """What comes when every choice has ended; may be nothing."""


class Handler(Protocol):
    """What an endpoint knows about its own kind of request and response."""

    id: str  # of the response
    jobs: list[Job]  # filled by `prepare`
    grammar: RequestedGrammar | None  # set by `prepare`

    def prepare(self) -> None:
        """Tokenise and lay out the jobs. Runs off the event loop when the body is long."""

    async def run(self, generation: Generation) -> bytes:
        """The whole response as JSON."""

    def stream(self, generation: Generation) -> Pieces:
        """The response as server-sent events."""


async def answer(
    service: Service,
    request: Request,
    fields: AnswerFields,
    handler: Handler,
    *,
    samples: int,
    body_bytes: int,
    ending: StreamEnd = OPENAI_END,
) -> Response:
    """Run the handler's jobs, which come in groups of `samples` with the same prompt.

    Raises `ApiError` and `EngineDeadError`; whatever happens, nothing stays submitted.
    """
    if fields.request_id is not None:
        request.state.request_id = fields.request_id
    terms, wants_load = Terms.of(request, fields), load_format(request)
    flight = service.flights.board(request.scope, handler.id, streamed=fields.stream)
    await prepare(handler.prepare, body_bytes)
    if handler.grammar is not None:
        flight.tokenised = service.clock()
        await service.grammars.check(*handler.grammar)
    receive = request.receive
    generation = Generation.start(service, handler.jobs, samples, receive, terms, flight)
    if fields.stream:
        response: Response = EventStream(_source(handler, generation), generation.close, ending)
    else:
        try:
            body = await handler.run(generation)
        finally:
            generation.close()
        response = Response(body, media_type="application/json")
    request.state.params = handler.jobs[0].params
    response.headers.update(forecast_headers(generation))
    if wants_load is not None:
        response.headers[LOAD_HEADER] = load_report(service, wants_load)
    return response


def _source(handler: Handler, generation: Generation) -> Source:
    async def source(stream: EventStream) -> bytes:
        pieces = handler.stream(generation)
        stream.on_full = generation.hold

        def take(index: int, delta: Delta) -> None:
            if piece := pieces.piece(index, delta):
                stream.write(piece)

        await generation.follow(take)
        return await pieces.last()

    return source
