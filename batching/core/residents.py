"""Who holds slots and KV blocks: admission, growth, preemption, release.

Ownership changes hands only here. What a sequence loses while an uncommitted plan touches it waits
in quarantine, because the worker still reads and writes it.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from operator import attrgetter

from batching.core.admission import OutputForecast, future_peak
from batching.core.blocks import BlockPool, IntegrityError, Parent
from batching.core.policy import WaitingQueue
from batching.core.sequence import Sequence
from batching.core.types import Lack, Limits

_key = attrgetter("key")
_RETRY_STEPS = 16  # a refused head is priced again after this many steps, or when blocks return


class Residents:
    """The running sequences, in policy order, and the pool they live in."""

    def __init__(self, limits: Limits, waiting: WaitingQueue) -> None:
        self.pool = BlockPool(limits.num_blocks, limits.block_size)
        self.output_forecast = OutputForecast()
        self.running: list[Sequence] = []  # the last is preempted first
        self.committed = -1  # the last step whose result is known
        self.preemptions = 0
        self.queries = 0  # tokens looked up in the prefix cache
        self.hits = 0  # tokens found there
        self._limits = limits
        self._waiting = waiting
        self._quarantine: list[tuple[int, int, list[int]]] = []  # (last step, slot, blocks)
        # Every decode must fit into every step, hence never more slots than tokens in a step.
        slots = min(limits.max_sequences, limits.max_step_tokens)
        self._slots = list(range(slots - 1, -1, -1))
        self._growth_limit = 0  # blocks that the running sequences may still need, at most
        self._profile: tuple[int, list[tuple[int, int]]] = (-1, [])  # of running, at a step
        self._refused: tuple[Sequence, int] | None = None  # head without room; when to retry

    @property
    def blocked(self) -> bool:
        """Whether the queue's head, when last tried, lacked a slot or blocks."""
        return not self._slots or self._refused is not None

    @property
    def is_full(self) -> bool:
        """Whether no slot is free."""
        return not self._slots

    def expected_output(self) -> float:
        """Tokens that the running sequences will probably still generate, all together."""
        return self.output_forecast.share * self._growth_limit * self._limits.block_size

    def admit(self, head: Sequence, step: int) -> int | None:
        """Move the queue's head into a slot, with blocks for all its tokens, if there is room.

        Returns the tokens found in the prefix cache; None if there is no room in this `step`.
        """
        if not self._slots:
            return None
        if self._refused is not None:
            # A lookup costs time in proportion to the prompt: not in every step.
            refused, retry = self._refused
            if refused is head and step < retry:
                return None
        pool, size, length = self.pool, self._limits.block_size, len(head.tokens)
        hits: list[int] = []
        chain: Parent = head.request.salt
        lookup = self._limits.prefix_caching and not head.wants_prompt_logprobs()
        if lookup:
            # One token stays to be computed, for the logits.
            hits, chain = pool.lookup(head.tokens, head.request.salt, (length - 1) // size)
        fresh = -(-length // size) - len(hits)
        taken = fresh + pool.unowned(hits)
        if taken > pool.free or not self._will_fit(head, taken, step):
            self._refused = (head, step + _RETRY_STEPS)
            return None
        pool.acquire(hits)
        self._waiting.remove(head)
        head.admit(self._slots.pop(), hits + pool.allocate(fresh), len(hits), chain, size)
        head.shared_blocks = len(head.blocks) - taken
        self._growth_limit += head.most_blocks - len(head.blocks)
        insort(self.running, head, key=_key)
        if lookup:
            self.queries += length
            self.hits += len(hits) * size
        return len(hits) * size

    def _will_fit(self, head: Sequence, taken: int, step: int) -> bool:
        """Whether all can probably go on to their ends if `head` enters with `taken` blocks."""
        size = self._limits.block_size
        table = -(-len(head.tokens) // size)
        worst = taken + head.most_blocks - table + self._growth_limit
        if worst <= self.pool.free or not self.running:
            return True
        if self._profile[0] != step:
            self._profile = (
                step,
                sorted(
                    (self._growth(s, len(s.blocks)), len(s.blocks) - s.shared_blocks)
                    for s in self.running
                ),
            )
        # Within a step only admissions change the profile: a burst does not price all anew.
        profile = self._profile[1]
        entry = (self._growth(head, table), taken)
        insort(profile, entry)
        if future_peak(profile) <= self.pool.num_blocks:
            return True
        profile.remove(entry)
        return False

    def _growth(self, sequence: Sequence, table: int) -> int:
        """Blocks the sequence is expected to need beyond the `table` it has."""
        length = len(sequence.tokens)
        final = length + self.output_forecast.remaining(sequence.length_limit - length)
        blocks = -(-min(final, sequence.compute_limit) // self._limits.block_size)
        return max(0, blocks - table)

    def grow(self, sequence: Sequence) -> tuple[int, ...]:
        """Give the sequence one more block (one must be free)."""
        blocks = tuple(self.pool.allocate(1))
        sequence.blocks += blocks
        self._growth_limit -= 1
        return blocks

    def lack(self, head: Sequence) -> Lack:
        """Why `head` still waits since the last step was planned."""
        if not self._slots:
            return Lack.SLOTS
        refused = self._refused is not None and self._refused[0] is head
        return Lack.BLOCKS if refused else Lack.TOKENS

    def make_room(self, sequence: Sequence, preempted: list[str]) -> bool:
        """Preempt from the end of the order until a block is free; False: not in this step.

        Adds the ids of whom it preempts to `preempted`.

        Only the tail is preempted, so nothing already placed in this step loses its blocks, and
        the first sequence always goes on: it can finish even if all others must wait.
        """
        while not self.pool.free:
            if self._quarantine:
                return False  # blocks return with the next commit; preempting more is premature
            victim = self.running[-1]
            self._preempt(victim, preempted)
            self.output_forecast.preempted()
            if victim is sequence:
                return False
        return True

    def share_slots(self, preempted: list[str]) -> None:
        """Under "fair": if the queue's head finds no room, take it from a tenant that has more.

        That tenant was served more as well, and keeps at least as many slots as the head's tenant
        then has, so that slots are not taken to and fro. Its newest sequence goes; as its blocks
        stay in the cache, little is computed anew. At most one in a step; adds its id to
        `preempted`.
        """
        head = self._waiting.head()
        if not self._waiting.is_fair or head is None or not self.running or self._quarantine:
            return
        if self.lack(head) is Lack.TOKENS:
            return
        held = Counter(s.request.tenant for s in self.running)
        victim = max(reversed(self.running), key=lambda s: held[s.request.tenant])
        has_more = held[victim.request.tenant] > held[head.request.tenant] + 1
        if has_more and self._waiting.rank(victim) > self._waiting.rank(head):
            self._preempt(victim, preempted)

    def _preempt(self, victim: Sequence, preempted: list[str]) -> None:
        self.evict(victim)
        victim.preemptions += 1
        preempted.append(victim.id)
        self.preemptions += 1
        self._waiting.push(victim)

    def register(self, sequence: Sequence) -> None:
        """Offer blocks to the prefix cache whose tokens are all known and computed by a plan.

        Not only by a committed one: steps run in order and write KV before they read it, so who
        hits the block reads what that plan writes. Sequences that arrive together share a prefix.
        """
        if not self._limits.prefix_caching:
            return
        size = self._limits.block_size
        full = min(sequence.computed, len(sequence.tokens)) // size
        while sequence.registered < full:
            index = sequence.registered
            tokens = sequence.tokens[index * size : (index + 1) * size]
            sequence.chain = self.pool.register(sequence.blocks[index], sequence.chain, tokens)
            sequence.registered += 1

    def decode(self, steps: int, token: int, ahead: int) -> None:
        """Give every running sequence `token`, computed and known, in each of so many steps, fewer
        than a block has tokens or as many, with `ahead` plans uncommitted.

        Blocks are taken and offered in the order in which these steps would.
        """
        size = self._limits.block_size
        due: list[tuple[int, int, int, bool]] = []  # step, with its commit or plan, whose, to grow
        for place, sequence in enumerate(self.running):
            computed = sequence.computed
            grows = len(sequence.blocks) * size - computed
            if grows < steps:
                due.append((grows, 1, place, True))
            # With one plan ahead a block's last token is known when it is computed, with two it
            # becomes known a step later, by a commit.
            filled = (ahead - 2 - computed) % size
            if filled < steps:
                due.append((filled, 2 - ahead, place, False))
            sequence.tokens += [token] * steps
            sequence.computed += steps
            sequence.last_step += steps
            self._waiting.charge(sequence, steps)
        for _, _, place, to_grow in sorted(due):
            if to_grow:
                self.grow(self.running[place])
            else:
                self.register(self.running[place])
        self.committed += steps

    def evict(self, sequence: Sequence) -> None:
        """Take slot and blocks from a running sequence."""
        del self.running[bisect_left(self.running, sequence.key, key=_key)]
        self._release(sequence)

    def _release(self, sequence: Sequence) -> None:
        """Take slot and blocks from a sequence, now or when its last plan is committed."""
        self._growth_limit -= sequence.most_blocks - len(sequence.blocks)
        self._profile = (-1, [])
        self._quarantine.append((sequence.last_step, sequence.slot, sequence.blocks))
        sequence.leave()
        self.release_quarantine()

    def release_quarantine(self) -> None:
        """Free what no uncommitted plan touches any more."""
        if not self._quarantine:
            return
        waiting = []
        for step, slot, blocks in self._quarantine:
            if step > self.committed:
                waiting.append((step, slot, blocks))
                continue
            self.pool.release(blocks)
            self._slots.append(slot)
            self._refused = None
        self._quarantine = waiting

    def check(self) -> None:
        """Verify the books of blocks and slots. O(blocks + sequences).

        Raises:
            IntegrityError: naming the first contradiction found.
        """
        held = [blocks for _, _, blocks in self._quarantine]
        self.pool.check([s.blocks for s in self.running] + held)
        slots = [*self._slots, *(s.slot for s in self.running)]
        slots += [slot for _, slot, _ in self._quarantine]
        total = min(self._limits.max_sequences, self._limits.max_step_tokens)
        if sorted(slots) != list(range(total)):
            raise IntegrityError(f"slots are lost or owned twice: {sorted(slots)}")
        if sum(s.most_blocks - len(s.blocks) for s in self.running) != self._growth_limit:
            raise IntegrityError(f"growth limit {self._growth_limit} is wrong")
        if [s.key for s in self.running] != sorted(s.key for s in self.running):
            raise IntegrityError("running sequences are out of order")
        if any(step <= self.committed for step, _, _ in self._quarantine):
            raise IntegrityError("a committed step's blocks are still in quarantine")
