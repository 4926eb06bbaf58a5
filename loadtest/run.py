"""Send requests open loop (at their times, whatever comes back) or closed loop (n at once)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from loadtest.client import Client
from loadtest.conversations import COMPLETIONS, EMBEDDINGS, Conversation, Turn, body_of
from loadtest.events import Outcome

T = TypeVar("T")
Send = Callable[[T], Awaitable[Outcome]]

_LEAD_SECONDS = 0.05  # so that the first request, too, is waited for


async def open_loop(
    send: Send[T],
    items: Sequence[T],
    offsets: Sequence[float],
    clock: Callable[[], float] = time.perf_counter,
) -> list[Outcome]:
    """Send item i at `offsets[i]` seconds after the start. Outcomes in the order of items.

    Latency counts from the scheduled time: a stalled server, or a client that is late, delays
    the sending of nothing and hides nothing (no coordinated omission).
    """
    start = clock() + _LEAD_SECONDS
    tasks = []
    for item, offset in zip(items, offsets, strict=True):
        delay = start + offset - clock()
        if delay > 0:
            await asyncio.sleep(delay)
        tasks.append(asyncio.ensure_future(_scheduled(send, item, start + offset)))
    return list(await asyncio.gather(*tasks))


async def closed_loop(send: Send[T], items: Sequence[T], concurrency: int) -> list[Outcome]:
    """Keep `concurrency` items in flight. Outcomes in the order of items.

    The load adapts to the server, so latencies are those of users who wait politely; a request's
    scheduled time is the time it was sent.
    """
    outcomes: list[Outcome | None] = [None] * len(items)
    queue = iter(enumerate(items))

    async def user() -> None:
        for index, item in queue:
            outcomes[index] = await _scheduled(send, item, None)

    await asyncio.gather(*(user() for _ in range(min(concurrency, len(items)))))
    return [outcome for outcome in outcomes if outcome is not None]


async def _scheduled(send: Send[T], item: T, scheduled: float | None) -> Outcome:
    outcome = await send(item)
    outcome.scheduled = outcome.sent if scheduled is None else scheduled
    return outcome


class Player:
    """Plays conversations: `play` is what the loops send.

    The loops see the first turn of each; `later` collects the outcomes of all other turns, whose
    scheduled time is the end of the turn before and the thinking. After a failed turn the
    conversation ends. `seen` is told of every outcome as it comes.
    """

    def __init__(
        self, client: Client, seen: Callable[[Outcome], None] = lambda outcome: None
    ) -> None:
        self._client = client
        self._seen = seen
        self._rendered: dict[int, bytes] = {}
        self.later: list[Outcome] = []
        self.sent = 0

    def render(self, conversations: Sequence[Conversation]) -> None:
        """Prepare all first messages, so that sending costs one write."""
        for conversation in conversations:
            turn = conversation.turns[0]
            self._rendered[id(conversation)] = self._client.message(turn.path, body_of(turn, []))

    async def play(self, conversation: Conversation) -> Outcome:
        """Run a rendered conversation to its end. Returns the outcome of its first turn."""
        first, *others = conversation.turns
        message = self._rendered.pop(id(conversation))
        outcome = await self._ask(message, first, conversation)
        history: list[dict[str, str]] = []
        before, turn = outcome, first
        for other in others:
            if before.error is not None:
                break
            history += [*turn.fields["messages"], {"role": "assistant", "content": before.text}]
            scheduled = before.ended + other.think
            await asyncio.sleep(other.think)
            message = self._client.message(other.path, body_of(other, history))
            before, turn = await self._ask(message, other, conversation), other
            before.scheduled = scheduled
            self.later.append(before)
        return outcome

    async def _ask(self, message: bytes, turn: Turn, conversation: Conversation) -> Outcome:
        self.sent += 1
        if turn.path == EMBEDDINGS:
            outcome = await self._client.plain(message)
        else:
            keep = turn.path != COMPLETIONS
            outcome = await self._client.stream(message, keep_text=keep)
        outcome.asked_input, outcome.asked_output = turn.input, turn.output
        outcome.group, outcome.json_asked = conversation.group, turn.json_text
        outcome.scheduled = outcome.scheduled or outcome.sent
        self._seen(outcome)
        return outcome
