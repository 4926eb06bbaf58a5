"""The scheduler: `add · abort · expire · plan · commit`; nothing else changes its state.

One rule (after vLLM V1): there is no prefill and no decode phase; every running sequence has
computed tokens that catch up with its tokens within the step's budget. Prefix-cache hits,
preemption by recomputation and resumed requests only set where the catching up starts.

With `limits.overlap` 1 a plan is made while the one before is executed:

    worker     [ step 1 ][ step 2 ][ step 3 ]
    scheduler   plan 2    commit 1  commit 2
                          plan 3    plan 4

A sequence that samples in an uncommitted plan is known to gain one token, whatever it is, so it
can be planned; if that token ends it, the later result is dropped, and its slot and blocks wait in
quarantine until the last plan that touches them is committed. Overlap 0 is the same code with the
quarantine always empty when a plan is made.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping

from batching.core.blocks import IntegrityError
from batching.core.cost_model import CostModel
from batching.core.draft import Draft
from batching.core.policy import WaitingQueue
from batching.core.residents import Residents
from batching.core.sequence import Sequence
from batching.core.totals import Totals
from batching.core.types import (
    EngineStats,
    FinishReason,
    Lack,
    Limits,
    Request,
    SequencePlan,
    StepPlan,
    StepResult,
    StepSummary,
    TokenEvent,
    TokenLogprobs,
)


class Scheduler:
    """Plans steps for one worker. Pure: same calls, same plans; time comes in as `now` (seconds).

    Args:
        limits: the worker's and the operator's fixed bounds.
        cost_model: prices steps, to bound the prefill share of mixed ones; learns at commits.

    Raises:
        ValueError: limits that make no scheduler.
    """

    def __init__(self, limits: Limits, cost_model: CostModel | None = None) -> None:
        if min(limits.num_blocks, limits.block_size, limits.max_sequences) < 1:
            raise ValueError("num_blocks, block_size and max_sequences must be positive")
        if limits.max_step_tokens < 1 or limits.overlap not in (0, 1):
            raise ValueError("max_step_tokens must be positive and overlap 0 or 1")
        self.limits = limits
        self.cost_model = cost_model or CostModel()
        self._waiting = WaitingQueue(limits.policy)
        self._residents = Residents(limits, self._waiting)
        self._sequences: dict[str, Sequence] = {}
        self._in_flight: deque[Draft] = deque()
        self._serial = 0
        self._planned = 0
        self._totals = Totals()
        self._next_expiry = math.inf  # no deadline passes before
        self.last_step: StepSummary | None = None  # the last that was committed

    @property
    def has_work(self) -> bool:
        """Whether a request is unfinished or a plan uncommitted."""
        return bool(self._sequences or self._in_flight)

    @property
    def unfinished(self) -> Mapping[str, Sequence]:
        """Requests that have not ended, by id; to be read only."""
        return self._sequences

    @property
    def forecast(self) -> float:
        """Seconds that the newest uncommitted plan is predicted to take; 0 without one."""
        return self._in_flight[-1].forecast if self._in_flight else 0.0

    def add(self, request: Request, now: float) -> None:
        """Queue a request.

        Raises:
            ValueError: it can never be served, or its id is in use; nothing has changed then.
        """
        limits = self.limits
        if request.id in self._sequences:
            raise ValueError(f"request {request.id!r} exists already")
        if not request.prompt:
            raise ValueError("the prompt is empty")
        length = len(request.prompt) + len(request.generated)
        needed = length + (request.params.max_tokens > len(request.generated))
        if needed > limits.max_model_len:
            raise ValueError(
                f"{needed} tokens exceed the model's context of {limits.max_model_len}"
            )
        sequence = Sequence(request, (self._waiting.order(request), self._serial), limits)
        if sequence.most_blocks > limits.num_blocks:
            raise ValueError(
                f"prompt and max_tokens need {sequence.most_blocks} KV blocks, "
                f"the pool has {limits.num_blocks}"
            )
        self._serial += 1
        self._sequences[request.id] = sequence
        self._waiting.join(sequence)
        self._next_expiry = min(self._next_expiry, sequence.expiry)

    def abort(self, request_id: str, now: float) -> TokenEvent | None:
        """End a request early. None if it is unknown (or has ended already)."""
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return None
        self._remove(sequence)
        return self._event(sequence, finish=FinishReason.ABORT)

    def expire(self, now: float) -> list[TokenEvent]:
        """End requests whose deadline has passed. O(1) unless one may have."""
        if now < self._next_expiry:
            return []
        late = [s for s in self._sequences.values() if s.expiry <= now]
        for sequence in late:
            self._remove(sequence)
        self._next_expiry = min((s.expiry for s in self._sequences.values()), default=math.inf)
        return [self._event(s, finish=FinishReason.EXPIRED) for s in late]

    def plan(self, now: float) -> StepPlan | None:
        """The next step; None if there is nothing to do until a commit or an `add`.

        Raises:
            IntegrityError: more than `limits.overlap` plans are uncommitted.
        """
        if len(self._in_flight) > self.limits.overlap:
            raise IntegrityError(f"plan() with {len(self._in_flight)} plans uncommitted")
        draft = Draft(self._planned, now)
        self._residents.share_slots(draft.preempted)
        prefills = self._plan_decodes(draft)
        self._plan_prefills(draft, prefills)
        self._totals.count_prefills(prefills)
        if not draft.sequences:
            return None
        if (head := self._waiting.head()) is not None:
            draft.lack = Lack.BLOCKS if draft.shortage else self._residents.lack(head)
        plan = draft.seal()
        draft.forecast = self.cost_model.predict(draft.features())
        self._in_flight.append(draft)
        self._planned += 1
        return plan

    def commit(self, result: StepResult, now: float) -> list[TokenEvent]:
        """Take in the oldest uncommitted plan's result. Returns news in plan order.

        Raises:
            IntegrityError: the result is not that plan's; nothing has changed then.
        """
        if not self._in_flight or self._in_flight[0].plan.step != result.step:
            raise IntegrityError(f"the result of step {result.step} was not expected")
        draft = self._in_flight[0]
        if len(result.tokens) != draft.samples or len(result.logprobs) not in (0, draft.samples):
            raise IntegrityError(f"step {result.step} samples {draft.samples} tokens")
        self._in_flight.popleft()
        self._residents.committed = result.step
        self.last_step = draft.summary(now)
        self.cost_model.update(draft.features(), result.seconds)
        self._totals.count_steps((result.seconds,), draft.tokens, draft.forecast)
        events: list[TokenEvent] = []
        shares = draft.plan.sequences
        samples = zip(result.tokens, result.logprobs or (None,) * draft.samples, strict=True)
        for sequence, epoch, share in zip(draft.sequences, draft.epochs, shares, strict=True):
            token, logprobs = next(samples) if share.sample else (None, None)
            if sequence.epoch != epoch:
                continue  # finished, aborted or preempted meanwhile
            scored = result.prompt_logprobs.get(share.slot, [])
            if share.slot in result.gave_up:
                token = logprobs = None
            event = self._advance(sequence, share, token, logprobs, scored)
            if event is not None:
                events.append(event)
        self._residents.release_quarantine()
        return events

    def stats(self) -> EngineStats:
        """Gauges and totals as of now."""
        return self._totals.stats(self._residents, self._waiting, self.cost_model, self.limits)

    def check_integrity(self) -> None:
        """Verify the books of blocks, slots and sequences. O(blocks + sequences).

        Raises:
            IntegrityError: naming the first contradiction found.
        """
        self._residents.check()
        if len(self._residents.running) + len(self._waiting) != len(self._sequences):
            raise IntegrityError("running and waiting sequences are not all sequences")
        for s in self._residents.running:
            known, room = len(s.tokens) + s.pending, len(s.blocks) * self.limits.block_size
            if not (0 <= s.computed <= min(known, s.compute_limit, room)) or s.todo() < 0:
                raise IntegrityError(f"{s.id}: computed {s.computed} of {known}, room {room}")
            if known > s.length_limit or not (0 <= s.pending <= len(self._in_flight)):
                raise IntegrityError(f"{s.id}: {known} tokens, {s.pending} of them pending")

    # -- plans ------------------------------------------------------------------------------

    def _plan_decodes(self, draft: Draft) -> list[Sequence]:
        """Place every sequence with one token to do. Returns those with more, in policy order."""
        prefills: list[Sequence] = []
        running = self._residents.running
        index = 0
        while index < len(running):
            sequence = running[index]
            index += 1
            todo = sequence.todo()
            if todo != 1:
                if todo > 1:
                    prefills.append(sequence)
                continue
            if sequence.pending and sequence.is_constrained:
                continue  # which tokens may follow depends on the one that is not known yet
            new_blocks: tuple[int, ...] = ()
            if sequence.computed == len(sequence.blocks) * self.limits.block_size:
                if not self._residents.pool.free:
                    draft.shortage = True
                    if not self._residents.make_room(sequence, draft.preempted):
                        continue
                new_blocks = self._residents.grow(sequence)
            draft.place(sequence, 1, new_blocks)
            if sequence.computed % self.limits.block_size == 0:
                self._residents.register(sequence)
        return [s for s in prefills if s.slot >= 0]

    def _plan_prefills(self, draft: Draft, prefills: list[Sequence]) -> None:
        """Fill the budget with chunks, in policy order over running and waiting sequences."""
        room = self.limits.max_step_tokens - len(draft.sequences)
        slack = math.inf
        if draft.sequences:
            slack = self.limits.prefill_seconds(self.cost_model.predict(draft.features()))
        queue = deque(sorted(prefills, key=self._waiting.rank))
        first = True
        while room > 0:
            sequence = self._next_prefill(queue, prefills, draft)
            if sequence is None:
                return
            count = self._chunk(sequence, room, slack, first)
            if count == 0:
                return
            slack -= self.cost_model.chunk_seconds(sequence.computed, count)
            room -= count
            first = False
            draft.place(sequence, count, ())
            self._residents.register(sequence)

    def _next_prefill(
        self, queue: deque[Sequence], prefills: list[Sequence], draft: Draft
    ) -> Sequence | None:
        """The first of `queue`, or whoever waits and comes before; `prefills` gains that one."""
        head = self._waiting.head()
        if head is not None and not draft.shortage:
            rank = self._waiting.rank
            if not queue or rank(head) < rank(queue[0]):
                hits = self._residents.admit(head, self._planned)
                if hits is not None:
                    prefills.append(head)
                    if not head.preemptions:
                        self._waiting.charge(head, len(head.tokens) - hits)
                    return head
        return queue.popleft() if queue else None

    def _chunk(self, sequence: Sequence, room: int, slack: float, first: bool) -> int:
        """Tokens of the sequence to compute in this step; at least a block for the first."""
        start, todo, size = sequence.computed, sequence.todo(), self.limits.block_size
        room = min(room, todo)
        count = self.cost_model.largest_chunk(start, slack, room)
        if count < min(todo, size):
            return min(room, size) if first else 0
        if count < todo:
            count -= (start + count) % size  # whole blocks can be shared at once
        return count

    # -- what follows from results -------------------------------------------------------------

    def _advance(
        self,
        sequence: Sequence,
        share: SequencePlan,
        token: int | None,
        logprobs: TokenLogprobs | None,
        scored: list[TokenLogprobs],
    ) -> TokenEvent | None:
        """Apply one sequence's share of a result."""
        end = share.start + share.count
        if sequence.prompt_computed < sequence.prompt_length:
            available = min(end, sequence.prompt_length)
            self._totals.prompt += max(0, available - sequence.prompt_computed)
            sequence.prompt_computed = max(available, sequence.prompt_computed)
        if scored:
            # After a preemption positions are scored again; deliver each once.
            first, last = share.start + 1, share.start + len(scored)
            scored = scored[max(0, sequence.prompt_scored - first) :]
            sequence.prompt_scored = max(sequence.prompt_scored, last + 1)
        finish = None
        if token is not None:
            finish = self._append(sequence, token)
        elif end == sequence.length_limit or share.sample:
            finish = FinishReason.LENGTH  # only the prompt was wanted, or its grammar gave up
        elif not scored:
            return None
        if finish is not None:
            generated = len(sequence.tokens) - sequence.prompt_length
            self._residents.output_forecast.finished(
                generated, sequence.length_limit - sequence.prompt_length
            )
            self._remove(sequence)
        return self._event(sequence, token, logprobs, scored, finish)

    def _append(self, sequence: Sequence, token: int) -> FinishReason | None:
        tokens = sequence.tokens
        sequence.first_token_known = True
        sequence.pending -= 1
        tokens.append(token)
        self._totals.generated += 1
        self._waiting.charge(sequence, 1)
        length = len(tokens)
        if token in sequence.stop_tokens and length > sequence.stop_from:
            return FinishReason.STOP
        if length == sequence.length_limit:
            return FinishReason.LENGTH
        if length % self.limits.block_size == 0:
            self._residents.register(sequence)
        return None

    def _event(
        self,
        sequence: Sequence,
        token: int | None = None,
        logprobs: TokenLogprobs | None = None,
        scored: list[TokenLogprobs] | tuple[()] = (),
        finish: FinishReason | None = None,
    ) -> TokenEvent:
        cached = None if sequence.reported else sequence.cached_tokens
        sequence.reported = True
        return TokenEvent(
            id=sequence.id,
            tokens=() if token is None else (token,),
            logprobs=() if logprobs is None else (logprobs,),
            prompt_logprobs=tuple(scored),
            cached_tokens=cached,
            finish=finish,
        )

    def _remove(self, sequence: Sequence) -> None:
        """Forget a request that has ended."""
        if sequence.slot < 0:
            self._waiting.remove(sequence)
        else:
            self._residents.evict(sequence)
        self._waiting.leave(sequence)
        del self._sequences[sequence.id]
