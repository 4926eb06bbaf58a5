"""Learn a step time from a running server: drive it over HTTP, read its diary.

Nothing is taken apart: client, front end and engine compete for the machine as they will in use.
The server's event log has every plan and the times around it; a step's period lasts from the commit
before (or from its plan, after a pause) to its own commit. What requests wait for outside the
engine is the difference to what the client saw, since both read the system's monotonic clock.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Iterable, Iterator
from statistics import median

import msgspec

from batching.core.event_log import Added, Committed, Line, Planned, Started
from batching.core.step_time import StepLoad, StepTime, fit, relative_error
from batching.core.types import Limits, StepPlan
from loadtest.client import Client
from loadtest.conversations import COMPLETIONS
from loadtest.events import Outcome
from loadtest.run import closed_loop
from loadtest.twin.replica import FrontEnd
from loadtest.workloads import FIRST_ORDINARY_TOKEN, completion_body

KNOTS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048,
         4096, 8192, 16384)  # fmt: skip
_VOCABULARY = 2000
_LONGEST = 0.03  # of the time, that one batch's prompts may take
_OUTPUT = 12  # tokens each request of a batch generates: steps of one load
_BURST = 16
_SLOWEST = 0.98  # of the steps' ratios to a first fit; beyond, something else disturbed
_PAUSE_SECONDS = 0.002  # between a commit and a plan that admits: the engine was idle

Sizes = list[tuple[int, int]]  # prompt and output tokens of requests sent together


class Calibration(msgspec.Struct, frozen=True):
    """What was learnt. `limits` are the server's, so that the twin has the same ones."""

    step_time: StepTime
    front: FrontEnd
    limits: Limits
    steps: int
    error: float  # mean relative, of one step


class Driver:
    """Sends made-up batches to a server whose model is called `model`."""

    def __init__(self, client: Client, model: str, context: int, most_sequences: int) -> None:
        self._client = client
        self._model = model
        self._context = min(context, 65_536)
        self._most = most_sequences
        self._random = random.Random(0)

    async def run(self, seconds: float) -> list[list[Outcome]]:
        """Drive for about so long. Returns the batches' outcomes; raises `ValueError` if a request
        failed. The first batches only warm up, and tell how long a batch may be."""
        size = min(256, self._context // 2)
        batches = [await self._send([(size, 4)] * 2)]
        began = time.monotonic()
        batches.append(await self._send([(size, 1)]))
        budget = int(size / (time.monotonic() - began) * seconds * _LONGEST)
        began = time.monotonic()
        for sizes in self._experiments(budget):
            batches.append(await self._send(sizes))
        while time.monotonic() - began < seconds:
            batches.append(await self._send(self._mix(budget)))
        return batches

    def _experiments(self, budget: int) -> Iterator[Sizes]:
        """Batches that show every term by itself, none with more than `budget` prompt tokens."""
        longest = self._context - _OUTPUT
        count = 1
        while count <= self._most:
            for length in (8, min(512, longest, budget // count)):
                if length >= 8:
                    yield [(length, _OUTPUT)] * count
            count = count * 2 if count < 4 else count * 3 // 2
        prompt = 1
        while prompt <= min(longest, budget):
            yield [(prompt, 1)]
            prompt = prompt * 2 if prompt < 64 else prompt * 3 // 2

    def _mix(self, budget: int) -> Sizes:
        """A random batch: lengths over all scales, so that prefills meet decodes."""
        source = self._random
        count = source.randint(1, self._most)
        most = max(2, min(self._context - 2 * _OUTPUT, 2 * budget // count))
        return [
            (max(1, round(most ** source.random())), source.randint(1, 2 * _OUTPUT))
            for _ in range(count)
        ]

    async def _send(self, sizes: Sizes) -> list[Outcome]:
        messages = [
            self._client.message(COMPLETIONS, completion_body(self._model, self._prompt(n), output))
            for n, output in sizes
        ]
        outcomes = await closed_loop(self._client.stream, messages, len(messages))
        for outcome in outcomes:
            if outcome.error is not None:
                raise ValueError(f"a request failed: {outcome.error} {outcome.detail}")
        return outcomes

    def _prompt(self, count: int) -> list[int]:
        return self._random.choices(range(FIRST_ORDINARY_TOKEN, _VOCABULARY), k=count)


def learn(log: Iterable[bytes], batches: list[list[Outcome]]) -> Calibration:
    """From the diary of a server that got these batches and nothing else. Raises `ValueError`."""
    decode = msgspec.json.Decoder(Line).decode
    lines = [decode(line) for line in log]
    limits = next((line.limits for line in lines if isinstance(line, Started)), None)
    if limits is None:
        raise ValueError("the event log is empty")
    warm_up = sum(map(len, batches[:2]))
    samples = periods(lines, skip=warm_up)
    step_time = robust_fit(samples)
    front = front_end(lines, batches)
    error = relative_error(step_time, samples)
    return Calibration(step_time, front, limits, len(samples), error)


def periods(lines: list[Line], skip: int = 0) -> list[tuple[StepLoad, float]]:
    """Loads and seconds of all steps after the first `skip` requests."""
    flight: deque[tuple[StepPlan, float]] = deque()
    before = added = 0.0
    found = []
    for line in lines:
        if isinstance(line, Added):
            added += 1
        elif isinstance(line, Planned) and line.plan is not None:
            flight.append((line.plan, line.now))
        elif isinstance(line, Committed):
            plan, planned = flight.popleft()
            begin = before
            if planned - before > _PAUSE_SECONDS and plan.inits:
                begin = planned
            if added > skip:
                found.append((StepLoad.of(plan), line.now - begin))
            before = line.now
    return found


def robust_fit(samples: list[tuple[StepLoad, float]]) -> StepTime:
    """A fit, and one more without the steps that the first finds by far too slow."""
    model = fit(samples, KNOTS)
    ratios = sorted(seconds / model.seconds(load) for load, seconds in samples)
    limit = ratios[int(_SLOWEST * (len(ratios) - 1))]
    return fit([s for s in samples if s[1] <= limit * model.seconds(s[0])], KNOTS)


def front_end(lines: list[Line], batches: list[list[Outcome]]) -> FrontEnd:
    """How long requests of their own, and bursts, take to the engine, and tokens back."""
    added = [line for line in lines if isinstance(line, Added)]
    firsts = _first_commits(lines)
    alone, back, burst = [], [], []
    place = 0
    for batch in batches:
        mine = added[place : place + len(batch)]
        place += len(batch)
        sent = min(outcome.sent for outcome in batch)
        if len(batch) == 1 and mine[0].request.id in firsts and batch[0].chunk_times:
            alone.append(mine[0].now - sent)
            back.append(batch[0].chunk_times[0] - firsts[mine[0].request.id])
        elif len(batch) >= _BURST:
            burst.append((mine[-1].now - sent) / len(batch))
    request = median(burst) if burst else FrontEnd().request
    default = FrontEnd()
    return FrontEnd(
        request=max(request, 0.0),
        gather=max(median(alone) - request, 0.0) if alone else default.gather,
        reply=max(median(back), 0.0) if back else default.reply,
    )


def _first_commits(lines: list[Line]) -> dict[str, float]:
    """Ids of requests that began alone to the commit of their first sample."""
    found: dict[str, float] = {}
    slots: dict[int, str] = {}
    flight: deque[StepPlan] = deque()
    for line in lines:
        if isinstance(line, Planned) and line.plan is not None:
            flight.append(line.plan)
        elif isinstance(line, Committed):
            plan = flight.popleft()
            slots |= {init.slot: init.id for init in plan.inits}
            for sequence in plan.sequences:
                if sequence.sample and sequence.slot in slots:
                    found.setdefault(slots[sequence.slot], line.now)
    return found
