"""Send requests open loop (at their times, whatever comes back) or closed loop (n at once)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence

from loadtest.events import Outcome

Send = Callable[[bytes], Awaitable[Outcome]]

_LEAD_SECONDS = 0.05  # so that the first request, too, is waited for


async def open_loop(
    send: Send,
    messages: Sequence[bytes],
    offsets: Sequence[float],
    clock: Callable[[], float] = time.perf_counter,
) -> list[Outcome]:
    """Send message i at `offsets[i]` seconds after the start. Outcomes in the order of messages.

    Latency counts from the scheduled time: a stalled server, or a client that is late, delays
    the sending of nothing and hides nothing (no coordinated omission).
    """
    start = clock() + _LEAD_SECONDS
    tasks = []
    for message, offset in zip(messages, offsets, strict=True):
        delay = start + offset - clock()
        if delay > 0:
            await asyncio.sleep(delay)
        tasks.append(asyncio.ensure_future(_scheduled(send, message, start + offset)))
    return list(await asyncio.gather(*tasks))


async def closed_loop(send: Send, messages: Sequence[bytes], concurrency: int) -> list[Outcome]:
    """Keep `concurrency` requests in flight. Outcomes in the order of messages.

    The load adapts to the server, so latencies are those of users who wait politely; a request's
    scheduled time is the time it was sent.
    """
    outcomes: list[Outcome | None] = [None] * len(messages)
    queue = iter(enumerate(messages))

    async def user() -> None:
        for index, message in queue:
            outcomes[index] = await _scheduled(send, message, None)

    await asyncio.gather(*(user() for _ in range(min(concurrency, len(messages)))))
    return [outcome for outcome in outcomes if outcome is not None]


async def _scheduled(send: Send, message: bytes, scheduled: float | None) -> Outcome:
    outcome = await send(message)
    outcome.scheduled = outcome.sent if scheduled is None else scheduled
    return outcome
