"""The values that cross every boundary: API to scheduler to worker and back.

All are `msgspec.Struct`s, so the same definition is the in-process value, the wire format between
the front end and the engine child, and the line in the event log. Times are seconds on one
monotonic clock (`time.monotonic()`, which on one machine all processes share). Those made by the
thousand are kept out of Python's cycle collector (`gc=False`): none can be part of a cycle.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec


class FinishReason(StrEnum):
    """Why a request ended. The first two are OpenAI's `finish_reason` values."""

    STOP = "stop"  # a stop token was generated, or the front end matched a stop string
    LENGTH = "length"  # `max_tokens` or the model's context was reached, or a grammar gave up
    ABORT = "abort"  # the client went away
    ERROR = "error"  # the engine could not serve it; `TokenEvent.error` says why
    EXPIRED = "expired"  # its deadline passed


class Grammar(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a sequence's text must be, from its first token to its end.

    Compiled once in `app`, so that no faulty one comes here. The mask made of it wins over bias and
    penalties; end tokens are allowed where the text is complete, and once nothing may follow they
    alone are, whatever `min_tokens` says.
    """

    source: str  # as llguidance reads it: Lark, in which JSON schemas and expressions may nest
    to_the_end: bool = False  # end only where nothing may follow (the client's `ignore_eos`)
    free_keys: bool = False  # it has JSON with keys that no schema names: none may come twice
    has_json: bool = False  # numbers in it are to end, though no schema bounds their digits
    json_after: tuple[str, ...] = ("",)  # the texts that JSON may follow; "": the beginning
    # Keys whose values, wherever they come, may be any string or number: what one is does not
    # change what may follow. None: it is no JSON schema, or it cannot be told.
    free_values: tuple[str, ...] | None = None


class SamplingParams(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one sample may look like. Validated once, in `app`; trusted everywhere else."""

    max_tokens: int
    temperature: float = 1.0  # 0 is greedy, and then `seed`, `top_*` and `min_p` have no effect
    top_p: float = 1.0  # 1 is off
    top_k: int = 0  # 0 is off
    min_p: float = 0.0  # 0 is off
    seed: int = 0  # 64 bits, always set: the front end draws one when the client gives none
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0  # 1 is off; counts prompt and generated tokens
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, added to its logit)
    allowed_token_ids: tuple[int, ...] = ()  # when not empty, no other token is generated
    # Tokens of words: the last of one never follows the others, if all are generated. If nothing
    # else is left (a grammar, `allowed_token_ids`), it may.
    bad_words: tuple[tuple[int, ...], ...] = ()
    # Includes the model's end tokens unless `ignore_eos`; with a grammar always.
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0  # stop tokens are banned until this many tokens were generated
    logprobs: int | None = None  # None: none. k >= 0: the sampled token's and the k most likely
    prompt_logprobs: int | None = None  # the same for every prompt token but the first
    grammar: Grammar | None = None


class Request(msgspec.Struct, frozen=True, omit_defaults=True):
    """One sequence to generate. A client asking for n choices becomes n requests.

    `generated` holds tokens already emitted by an engine that died: the request resumes after
    them, and they count against `params.max_tokens`.
    """

    id: str
    prompt: list[int]
    params: SamplingParams
    arrival: float
    priority: int = 0  # lower runs first
    tenant: str = ""
    deadline: float | None = None  # latest useful time of the first token; then it is dropped
    end_by: float | None = None  # latest useful time of the last token, likewise
    salt: bytes = b""  # prefix-cache blocks are shared only between equal salts
    generated: list[int] = []


class SlotInit(msgspec.Struct, frozen=True, array_like=True):
    """Everything a worker must know to start (or restart) a sequence in a slot.

    `tokens` are the prompt and all tokens generated so far; `prompt_length` tells them apart.
    """

    slot: int
    id: str
    tokens: list[int]
    prompt_length: int
    params: SamplingParams


class SequencePlan(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One sequence's share of a step: compute `count` tokens from position `start`.

    The tokens are those at positions start … start+count-1 of the slot's token row; the worker
    writes each token that it samples to that row itself, so a decode step needs no token ids.
    `new_blocks` are appended to the slot's block table; on a slot's first plan they are the whole
    table, prefix-cache hits included. With `sample`, the logits of the last computed position
    yield the next token.
    """

    slot: int
    start: int
    count: int
    sample: bool
    new_blocks: tuple[int, ...] = ()


class StepPlan(msgspec.Struct, frozen=True, array_like=True):
    """One forward pass. A plain value: what is logged, replayed, simulated and tested.

    `inits` come first: each names a slot of `sequences` that starts afresh. Sequences keep the
    scheduler's order; slots are distinct.
    """

    step: int
    inits: tuple[SlotInit, ...]
    sequences: tuple[SequencePlan, ...]

    @property
    def token_count(self) -> int:
        """Tokens computed in this step, over all sequences."""
        return sum(s.count for s in self.sequences)


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Log-probabilities at one position, of the model's raw distribution (before penalties).

    `top` holds (token id, logprob) of the k most likely, most likely first; the sampled token is
    not added to it. `rank` is 1 for the most likely token.
    """

    token: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


class StepResult(msgspec.Struct, frozen=True, array_like=True):
    """What a worker returns for one plan.

    `tokens` has one entry per plan sequence with `sample`, in plan order; `logprobs` is empty or
    as long as `tokens` (None where not asked for). `prompt_logprobs` maps a slot to the entries of
    the prompt tokens that this step's logits predict (positions start+1 … start+count, as far as
    they lie in the prompt). `seconds` is the time the step took.
    """

    step: int
    tokens: tuple[int, ...]
    seconds: float
    logprobs: tuple[TokenLogprobs | None, ...] = ()
    prompt_logprobs: dict[int, list[TokenLogprobs]] = {}
    gave_up: tuple[int, ...] = ()


class TokenEvent(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """News of one request: tokens it gained in a step, or its end.

    `cached_tokens` comes with the first event: prompt tokens found in the prefix cache.
    With `finish` STOP, the last token is the stop token that ended it.
    """

    id: str
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    cached_tokens: int | None = None
    finish: FinishReason | None = None
    error: str | None = None


class Lack(StrEnum):
    """What kept the head of the queue out of a step."""

    SLOTS = "slots"  # `max_sequences` were running
    BLOCKS = "blocks"  # there was too little room in the KV pool
    TOKENS = "tokens"  # the step was as long as it may be


class StepSummary(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What a step was made of, so that everybody in it can be told what it took and why.

    `chunks` are (id, first position, tokens) of the shares that catch up: prompts, and what is
    computed again for sequences that were preempted or come from a dead engine. The others
    decoded one token each.
    """

    began: float  # when it was planned
    ended: float  # when its result was known
    sequences: int
    chunks: tuple[tuple[str, int, int], ...] = ()
    preempted: tuple[str, ...] = ()  # ids of sequences that lost their blocks to others in it
    lack: Lack | None = None  # None: nobody was left waiting


class PoolRequest(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """One text to be turned into numbers, all at once: an embedding, or a classifier's logits.

    Texts of one API call share `call`; calls take turns. `second` is where the second text of a
    pair begins, for models that tell the two apart.
    """

    id: str
    call: str
    tokens: list[int]
    arrival: float
    second: int | None = None


class PoolResult(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The numbers of one `PoolRequest`, as little-endian float32, and when it was computed."""

    id: str
    values: bytes
    scheduled: float
    finished: float


class Coefficients(msgspec.Struct, frozen=True, array_like=True):
    """What a step costs (see `cost_model`): seconds per unit of each term. The defaults are the
    prior: a mid-sized model somewhere between a laptop and a data-centre GPU, of which one takes
    some ten times as long and the other a tenth."""

    step: float = 5e-3
    prefill_token: float = 1e-4
    sequence: float = 5e-5
    context_token: float = 2e-7
    prefill_pair: float = 2e-8


class Outlook(msgspec.Struct, frozen=True, array_like=True):
    """What the scheduler knows of the steps to come; `forecast` makes times of it."""

    cost: Coefficients
    decode_seconds: float  # of the next step without prefill
    prefill_seconds: float  # that prefill may add to a step with decodes
    prefilling: int  # running sequences without all of their prompt
    prefilled_tokens: int  # that these have computed
    output_tokens: float  # that all running sequences will probably still generate
    blocked: bool  # whoever waits lacks a slot or blocks


class EngineStats(msgspec.Struct, frozen=True, omit_defaults=True):
    """The scheduler's gauges and running totals after a step. Totals only grow."""

    running: int = 0
    waiting: int = 0
    blocks_total: int = 0
    blocks_used: int = 0  # owned by a sequence; cached but unowned blocks are free
    blocks_cached: int = 0  # of the free ones, those whose content a prompt may still hit
    steps: int = 0
    step_tokens: int = 0  # tokens computed in the last step
    step_seconds: float = 0.0  # the last step
    forward_seconds: float = 0.0
    prompt_tokens: int = 0  # prompt tokens whose KV became available, cached ones included
    generation_tokens: int = 0
    prefix_queries: int = 0  # tokens looked up
    prefix_hits: int = 0  # tokens found
    preemptions: int = 0
    predicted_step_seconds: float = 0.0  # the cost model's forecast of the last step
    outlook: Outlook | None = None  # None: too few steps were measured
    # Totals of where the engine's loop spent its time; `submit` and `wait` are the worker's.
    inbox_seconds: float = 0.0
    plan_seconds: float = 0.0
    submit_seconds: float = 0.0
    wait_seconds: float = 0.0
    commit_seconds: float = 0.0
    outbox_seconds: float = 0.0
    idle_seconds: float = 0.0  # nothing to do

    @property
    def kv_usage(self) -> float:
        """Share of KV blocks that are owned, 0 to 1."""
        return self.blocks_used / self.blocks_total if self.blocks_total else 0.0


class Limits(msgspec.Struct, frozen=True):
    """The scheduler's fixed limits. Built by the engine from settings and worker capabilities."""

    num_blocks: int
    block_size: int  # tokens per block
    max_sequences: int  # slots: sequences that may run at once
    max_model_len: int  # prompt and generated tokens of one sequence
    max_step_tokens: int  # hard bound on tokens computed in one step
    inter_token_target: float = 0.1  # seconds; bounds the prefill share of a mixed step
    # Or so many times the step without prefill, if that is longer: where decodes alone take up the
    # target, prompts would starve and with them the batch.
    stretch: float = 2.5
    policy: str = "fcfs"  # fcfs, priority, deadline, fair
    prefix_caching: bool = True
    overlap: int = 0  # plans that may be uncommitted when the next is made: 0 or 1

    def prefill_seconds(self, decode: float) -> float:
        """What prefill may add to a step whose decodes take `decode` seconds."""
        return max(self.inter_token_target, self.stretch * decode) - decode
