"""A worker of plain dictionaries that believes nothing: it checks each plan against what the KV
pages really hold, and computes tokens as a function of the tokens before them."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from batching.core.types import Limits, StepPlan, StepResult, TokenLogprobs

VOCABULARY = 7


def next_token(tokens: list[int]) -> int:
    """The fake model: depends on every token before."""
    value = len(tokens)
    for token in tokens:
        value = (value ^ token) * 2654435761 % 2**32
        value ^= value >> 15
    return value % VOCABULARY


Page = tuple[int, int]  # block, offset
Entry = tuple[bytes, int, int]  # salt, position, digest of all tokens up to it


@dataclass
class _Slot:
    id: str
    tokens: list[int]
    prompt_length: int
    prompt_logprobs: int | None
    salt: bytes
    table: list[int] = field(default_factory=list)


class FakeWorker:
    """Executes plans in `submit`; `salts` maps request ids to cache salts, which plans lack."""

    def __init__(self, limits: Limits, salts: dict[str, bytes]) -> None:
        self.limits = limits
        self.salts = salts
        self.slots: dict[int, _Slot] = {}
        self.pages: dict[Page, Entry] = {}
        self.step = 0
        # What plans touch whose results are not committed: pages with their entries, and slots.
        self.in_flight: deque[tuple[dict[Page, Entry], set[int]]] = deque()

    def execute(self, plan: StepPlan, seconds: float = 0.01) -> StepResult:
        """Run one step: writes, then the checks of everything read, then samples."""
        assert plan.step == self.step, "plans skip or repeat a step"
        self.step += 1
        assert 0 < plan.token_count <= self.limits.max_step_tokens
        numbers = [s.slot for s in plan.sequences]
        assert len(set(numbers)) == len(numbers), "a slot appears twice in a step"
        assert all(0 <= n < self.limits.max_sequences for n in numbers)
        assert {i.slot for i in plan.inits} <= set(numbers), "a slot starts without a share"
        for init in plan.inits:
            assert all(init.slot not in slots for _, slots in self.in_flight), "slot in use"
            params = init.params
            self.slots[init.slot] = _Slot(
                init.id, list(init.tokens), init.prompt_length, params.prompt_logprobs,
                self.salts[init.id],
            )  # fmt: skip
        written: dict[Page, Entry] = {}
        for share in plan.sequences:
            self._write(share.slot, share.start, share.count, share.new_blocks, written)
        for touched, _ in self.in_flight:
            for page, entry in written.items():
                assert touched.get(page, entry) == entry, "overwrites what a plan in flight uses"
        self.pages.update(written)
        touched = {}
        tokens: list[int] = []
        prompt_logprobs: dict[int, list[TokenLogprobs]] = {}
        for share in plan.sequences:
            slot = self.slots[share.slot]
            end = share.start + share.count
            touched |= self._reads(slot, end)
            if slot.prompt_logprobs is not None and share.start + 1 < slot.prompt_length:
                positions = range(share.start + 1, min(end + 1, slot.prompt_length))
                prompt_logprobs[share.slot] = [
                    TokenLogprobs(slot.tokens[p], -float(p), 1) for p in positions
                ]
            if share.sample:
                assert end == len(slot.tokens), "sampled before all tokens were computed"
                assert end < self.limits.max_model_len
                slot.tokens.append(next_token(slot.tokens))
                tokens.append(slot.tokens[-1])
        self.in_flight.append((touched, set(numbers)))
        return StepResult(plan.step, tuple(tokens), seconds, prompt_logprobs=prompt_logprobs)

    def _write(
        self, number: int, start: int, count: int, new_blocks: tuple[int, ...],
        written: dict[Page, Entry],
    ) -> None:  # fmt: skip
        slot = self.slots[number]
        slot.table += new_blocks
        size = self.limits.block_size
        assert count > 0
        assert start + count <= len(slot.tokens), "computes a token nobody knows"
        assert start + count <= len(slot.table) * size, "the block table is too short"
        assert len(set(slot.table)) == len(slot.table)
        for position in range(start, start + count):
            page = (slot.table[position // size], position % size)
            # The prefix is part of what a KV entry is, hence a digest of it is part of the page.
            entry = (slot.salt, position, hash(tuple(slot.tokens[: position + 1])))
            assert written.get(page, entry) == entry, "two sequences write one page differently"
            written[page] = entry

    def _reads(self, slot: _Slot, end: int) -> dict[Page, Entry]:
        """The pages of positions below `end`, which must hold exactly the slot's tokens."""
        size = self.limits.block_size
        reads: dict[Page, Entry] = {}
        for position in range(end):
            page = (slot.table[position // size], position % size)
            reads[page] = (slot.salt, position, hash(tuple(slot.tokens[: position + 1])))
            assert self.pages.get(page) == reads[page], (
                f"{slot.id} reads position {position} from block {page[0]}, which holds other KV"
            )
        return reads
