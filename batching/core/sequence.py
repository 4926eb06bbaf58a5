"""One request's state inside the scheduler."""

from __future__ import annotations

import math

from batching.core.blocks import Parent
from batching.core.types import Limits, Request


class Sequence:
    """A request on its way: tokens known, tokens computed, and what it owns.

    `computed` counts tokens whose KV is written by plans made so far (committed or not);
    `pending` counts samples of uncommitted plans, whose tokens exist but are not known yet.
    So `len(tokens) + pending` is the length, and what lies between it and `computed` is to do.
    """

    __slots__ = (
        "blocks", "cached_tokens", "chain", "compute_limit", "computed", "epoch",
        "first_token_known", "fresh", "id", "is_constrained", "key", "last_step", "length_limit",
        "most_blocks", "pending", "preemptions", "prompt_computed", "prompt_length",
        "prompt_scored", "registered", "reported", "request", "shared_blocks",
        "slot", "stop_from", "stop_tokens", "tokens",
    )  # fmt: skip

    def __init__(self, request: Request, key: tuple[float, int], limits: Limits) -> None:
        params = request.params
        self.request = request
        self.id = request.id
        self.key = key  # place in the policy's order; unique
        self.tokens = [*request.prompt, *request.generated]
        self.prompt_length = len(request.prompt)
        length = len(self.tokens)
        self.length_limit = max(
            length, min(self.prompt_length + params.max_tokens, limits.max_model_len)
        )
        # The last token of a sequence is never fed back, so its KV is never needed.
        self.compute_limit = max(length, self.length_limit - 1)
        self.most_blocks = -(-self.compute_limit // limits.block_size)
        self.stop_tokens = frozenset(params.stop_token_ids)
        # With a grammar, the worker's mask bans stop tokens that come too early.
        early = 0 if params.grammar is not None else params.min_tokens
        self.stop_from = self.prompt_length + early
        self.is_constrained = params.grammar is not None

        self.slot = -1  # -1: waiting
        self.fresh = False  # admitted, but no plan has named it yet
        self.epoch = 0  # counts losses of the slot; results of an older epoch are dropped
        self.last_step = -1  # the last plan that touches its slot and blocks
        self.blocks: list[int] = []
        self.shared_blocks = 0  # of them, those another sequence owned at admission
        self.registered = 0  # of them, those offered to the prefix cache
        self.chain: Parent = request.salt  # content id of the last registered block
        self.computed = 0
        self.pending = 0

        self.prompt_computed = 0  # prompt tokens whose KV was ever available, for the totals
        self.prompt_scored = 1  # first prompt position whose logprobs were not delivered
        self.cached_tokens: int | None = None  # prefix hit of the first admission
        self.reported = False  # an event was sent
        self.first_token_known = False
        self.preemptions = 0

    @property
    def expiry(self) -> float:
        """When it is of no use any more, if it has come no further."""
        request = self.request
        end = math.inf if request.end_by is None else request.end_by
        if self.first_token_known or request.generated or request.deadline is None:
            return end
        return min(end, request.deadline)

    def todo(self) -> int:
        """Tokens to compute now for the sequence to catch up."""
        return min(len(self.tokens) + self.pending, self.compute_limit) - self.computed

    def wants_prompt_logprobs(self) -> bool:
        """Whether prompt positions remain to be scored, which needs them computed, not cached."""
        return (
            self.request.params.prompt_logprobs is not None
            and self.prompt_scored < self.prompt_length
        )

    def admit(
        self, slot: int, blocks: list[int], hits: int, chain: Parent, block_size: int
    ) -> None:
        """Enter a slot with blocks for all tokens, the first `hits` of them computed already."""
        self.slot = slot
        self.fresh = True
        self.blocks = blocks
        self.registered = hits
        self.chain = chain
        self.computed = hits * block_size
        if self.cached_tokens is None:
            self.cached_tokens = min(self.computed, self.prompt_length)

    def leave(self) -> None:
        """Lose the slot: what is in flight for it will be dropped, to be computed again."""
        self.epoch += 1
        self.slot = -1
        self.blocks = []
        self.computed = 0
        self.pending = 0
