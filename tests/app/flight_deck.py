"""An engine loop on a virtual clock that feeds a flight recorder, as the real one would."""

from __future__ import annotations

from typing import Any

from app.flights.record import Flight
from app.flights.recorder import FlightRecorder
from app.flights.verdict import tell
from app.flights.waterfall import View, Waterfall
from app.telemetry.metrics import Metrics
from batching.core.scheduler import Scheduler
from batching.core.types import FinishReason, Limits, Request, SamplingParams
from batching.engine.loop import EngineLoop
from batching.engine.messages import FromEngine, StepOutput, Submit
from batching.worker.protocol import Capabilities
from batching.worker.simulated import SimulatedWorker, StepCost


class FlightDeck:
    """Also what the recorder asks of an engine: `failure`, `restarts`."""

    def __init__(self, cost: StepCost | None = None, kept: int = 1024, **limits: Any) -> None:
        self.now = 100.0
        self.failure: str | None = None
        self.restarts = 0
        self.recorder = FlightRecorder(Metrics("m"), lambda: self.now, kept)
        self.recorder.serve(self)  # type: ignore[arg-type]
        sizes = {"num_blocks": 64, "block_size": 4, "max_sequences": 8, "max_step_tokens": 64}
        self.limits = Limits(max_model_len=256, **(sizes | limits))  # type: ignore[arg-type]
        self.cost = cost or StepCost(fixed=0.01, prefill_token=0.001)
        self._inbox: list[Submit] = []
        self._flights: dict[str, Flight] = {}
        self._steps = 0
        self.start()

    def start(self) -> None:
        """A new engine, that knows nothing of the one before."""
        c = self.limits
        sizes = (c.max_model_len, c.num_blocks, c.block_size, c.max_sequences, c.max_step_tokens)
        self._worker = SimulatedWorker(
            Capabilities("m", "s", 100, *sizes, "", "", ""), self.cost, self._sleep
        )
        self._loop = EngineLoop(
            Scheduler(c), self._worker, self._receive, self._hear, clock=lambda: self.now
        )

    def _sleep(self, seconds: float) -> None:
        self.now += seconds

    def _receive(self, timeout: float) -> list[Submit]:
        submits, self._inbox = self._inbox, []
        return submits

    def _hear(self, message: FromEngine) -> None:
        if not isinstance(message, StepOutput):
            return
        self.recorder.on_step(message)
        for event in message.events:
            if event.finish is not None:
                self.end(event.id.rpartition("-")[0], event.finish)

    def fly(
        self, name: str, prompt: int = 4, tokens: int = 4, n: int = 1, tenant: str = ""
    ) -> Flight:
        """Send a request of `n` samples. Its answer's id is `cmpl-` and the name."""
        state = {"request_id": f"x-{name}", "arrival": self.now - 0.002, "tenant": tenant}
        scope = {"state": state, "path": "/v1/completions"}
        flight = self.recorder.board(scope, f"cmpl-{name}", streamed=True)
        self._flights[name] = flight
        # Each begins with a token of its own: nothing is found in the prefix cache.
        prompts = [[len(self._flights), i, *[1] * (prompt - 2)] for i in range(n)]
        params = SamplingParams(max_tokens=tokens)
        requests = [Request(f"{name}-{i}", ids, params, self.now) for i, ids in enumerate(prompts)]
        self.recorder.depart(flight, requests[0])
        for request in requests:
            self.send(request)
        return flight

    def send(self, request: Request) -> None:
        if request.id not in {lane.id for f in self._flights.values() for lane in f.lanes}:
            self.recorder.submitted(self._flights[request.id.rpartition("-")[0]], request)
        self._inbox.append(Submit([request]))

    def end(self, name: str, finish: FinishReason) -> None:
        """The answer is over, as `Generation.close` says it."""
        flight = self._flights[name]
        if all(lane.ended for lane in flight.lanes):
            for lane in flight.lanes:
                self.recorder.lane_ended(lane.id, finish.value, lane.tokens)
            self.recorder.arrive(flight)

    def cost_of_worker(self, cost: StepCost) -> None:
        """From now on steps cost this."""
        self._worker._cost = cost

    def expect_short_outputs(self) -> None:
        """Admit more than fits."""
        self._loop._scheduler._residents.output_forecast.share = 0.01

    def forget(self) -> None:
        """What this deck itself keeps of the past."""
        self._flights.clear()

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            self._loop.run_once()

    def land(self) -> None:
        """Until all have ended."""
        while self.recorder.open:
            self.step()

    def told(self, name: str, tenant: str = "") -> Waterfall:
        """What `tenant` is told of a request of its own."""
        flight = self.recorder.find(name, tenant)
        assert flight is not None
        return tell(View(self.recorder, tenant), flight)
