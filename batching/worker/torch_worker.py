"""The worker that computes: a transformers model over paged KV, on one device."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from batching.core.types import (
    StepPlan,
    StepResult,
    TokenLogprobs,
)
from batching.worker.assemble import assemble
from batching.worker.device import fetch, upload
from batching.worker.grammar_masks import GrammarSlots, StepGrammars
from batching.worker.kv_pool import GIB
from batching.worker.logprobs import PROMPT_LOGPROB_ROWS, LogprobTensors, token_logprobs
from batching.worker.peers import Peers
from batching.worker.protocol import (
    Capabilities,
    UnsupportedModelError,
    WorkerConfig,
    WorkerError,
)
from batching.worker.sampler_state import SamplerState
from batching.worker.sampling import SamplingInputs, sample
from batching.worker.slots import StepInputs
from batching.worker.start_up import Phases
from batching.worker.warm_up import first_steps, largest_steps


@dataclass
class PendingStep:
    """A submitted step: host tensors that are complete once `event` has passed.

    `logprobs` holds those of the sampled rows listed in `logprob_rows`, each with as many top
    tokens as `logprob_tops` says; `prompt_logprobs` holds (slot, top, values). `slots` are those of
    the sampled rows.
    """

    step: int
    started: float
    tokens: torch.Tensor | None = None
    logprobs: LogprobTensors | None = None
    logprob_rows: list[int] = field(default_factory=list)
    logprob_tops: list[int] = field(default_factory=list)
    prompt_logprobs: list[tuple[int, int, LogprobTensors]] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    grammars: StepGrammars | None = None
    event: torch.Event | None = None
    finished: float = 0.0
    error: Exception | None = None


class TorchWorker:
    """Implements `protocol.Worker`.

    Raises `UnsupportedModelError` if the model cannot be served exactly, or does not fit.
    """

    def __init__(
        self,
        config: WorkerConfig,
        progress: Callable[[str, float], None] = lambda *_: None,
        peers: Peers | None = None,
    ) -> None:
        """`peers` are the other ranks, where `tensor_parallel` is more than one."""
        phases = Phases(progress)
        built = assemble(config, phases, peers)
        self._peers = peers
        self._capabilities = limits = built.capabilities
        self._device, self._model = built.device, built.model
        self._slots = built.slots
        self._sampler = SamplerState(limits.vocab_size, built.device, self._slots.before)
        self._grammars = GrammarSlots(limits)
        self._finished = 0.0  # when the last step had been computed
        phases.begin("warmup")
        self._warm_up()
        phases.end()
        built.backend.touch_when_idle(built.pages)

    def capabilities(self) -> Capabilities:
        return self._capabilities

    def submit(self, plan: StepPlan) -> PendingStep:
        """Run the step (CPU), or queue it on the device. An error is kept for `wait`."""
        pending = PendingStep(plan.step, time.perf_counter())
        try:
            with torch.inference_mode():
                self._run(plan, pending)
        except Exception as error:  # the protocol has one way to say that a step failed
            pending.error = error
        return pending

    def wait(self, handle: PendingStep) -> StepResult:
        """The step's result, once the device has computed it."""
        try:
            if handle.error is not None:
                raise handle.error
            if handle.event is not None:
                handle.event.synchronize()
                handle.finished = time.perf_counter()
            # With overlap a step is submitted while the one before still runs.
            seconds = handle.finished - max(handle.started, self._finished)
            self._finished = handle.finished
            return _result(handle, seconds)
        except Exception as error:
            raise WorkerError(f"step {handle.step} failed: {error!r}") from error

    def close(self) -> None:
        """Free the model and its pages."""
        for name in ("_model", "_slots", "_sampler", "_grammars"):
            self.__dict__.pop(name, None)
        if self._device.type != "cpu":
            torch.accelerator.empty_cache()

    def _run(self, plan: StepPlan, pending: PendingStep) -> None:
        self._slots.begin(plan.inits)
        for init in plan.inits:
            self._sampler.begin(init)
            if self._peers is None or self._peers.rank == 0:  # whose tokens are everybody's
                self._grammars.begin(init)
        inputs = self._slots.build(plan)
        hidden = self._model.hidden(inputs.tokens, inputs.positions, inputs.metadata)
        if self._sampler.scores_prompts(plan):
            self._prompt_logprobs(plan, hidden, pending)
        if inputs.sampled:
            self._sample(plan, inputs, hidden, pending)
        if self._device.type == "cpu":
            pending.finished = time.perf_counter()
        else:
            pending.event = torch.Event(self._device)
            pending.event.record()

    def _sample(
        self, plan: StepPlan, inputs: StepInputs, hidden: torch.Tensor, pending: PendingStep
    ) -> None:
        """Sample the next token of some sequences, and append it to their rows."""
        sequences = [plan.sequences[i] for i in inputs.sampled]
        pending.slots = [s.slot for s in sequences]
        hidden = inputs.last(hidden)
        grammars = pending.grammars = self._grammars.step(pending.slots)
        how = self._sampler.inputs(pending.slots, [s.start + s.count for s in sequences])
        wanted = self._sampler.logprobs(pending.slots)
        pending.logprob_rows, pending.logprob_tops = list(wanted), list(wanted.values())
        # Other ranks know of no grammar: what is computed must not depend on one.
        known = self._device.type == "cpu" and self._peers is None
        if how.is_plain() and not wanted and (grammars is None or known):
            tokens = self._model.largest(hidden)
            if grammars is not None:
                grammars.correct(tokens, lambda some: self._model.logits(hidden[some]))
        elif how.keeps_logits() and not wanted and grammars is None:
            tokens = sample(self._model.scores(hidden), how)
        else:
            tokens = self._choose(self._model.logits(hidden), how, pending)
        if self._peers is not None:
            self._peers.agree(tokens)
        self._sampler.record(tokens)
        self._slots.append(inputs.slots, inputs.ends, tokens)
        scored = [] if pending.logprobs is None else pending.logprobs.tensors()
        pending.tokens, *rest = fetch([tokens, *scored])
        pending.logprobs = LogprobTensors(*rest) if rest else None

    def _choose(
        self, logits: torch.Tensor, how: SamplingInputs, pending: PendingStep
    ) -> torch.Tensor:
        """Tokens int64 [n] of logits [n, vocab], which change; with the logprobs asked for."""
        raw, grammars = logits, pending.grammars
        if pending.logprob_rows:
            wanted = upload(pending.logprob_rows, torch.int64, self._device)
            raw = logits[wanted]  # a copy: logprobs are those before penalties and bias
        if grammars is not None and self._device.type == "cpu":
            tokens = grammars.choose(logits, how)
        else:
            if grammars is not None:
                how.mask = grammars.mask(self._device)
            tokens = sample(logits, how)
        if pending.logprob_rows:
            top = max(pending.logprob_tops)
            pending.logprobs = token_logprobs(raw, tokens[wanted], top)
        return tokens

    def _prompt_logprobs(self, plan: StepPlan, hidden: torch.Tensor, pending: PendingStep) -> None:
        """Score the prompt tokens that this step's rows predict, a bounded number at a time."""
        first_row = 0
        for sequence in plan.sequences:
            top = self._sampler.params(sequence.slot).prompt_logprobs
            first = sequence.start + 1
            stop = min(first + sequence.count, self._sampler.prompt_length(sequence.slot))
            if top is not None:
                for position in range(first, stop, PROMPT_LOGPROB_ROWS):
                    end = min(position + PROMPT_LOGPROB_ROWS, stop)
                    rows = slice(first_row + position - first, first_row + end - first)
                    targets = self._slots.tokens_at(sequence.slot, position, end)
                    scored = token_logprobs(self._model.logits(hidden[rows]), targets, top)
                    host = LogprobTensors(*fetch(scored.tensors()))
                    pending.prompt_logprobs.append((sequence.slot, top, host))
            first_row += sequence.count

    def _warm_up(self) -> None:
        """Run what may come, so that no request pays for set-up or finds the memory too small."""
        limits = self._capabilities
        for plan in first_steps(limits):
            self.wait(self.submit(plan))
        if self._device.type == "cpu":
            return
        try:
            for plan in largest_steps(limits):
                self.wait(self.submit(plan))
        except WorkerError as error:
            if not isinstance(error.__cause__, torch.OutOfMemoryError):
                raise
            raise UnsupportedModelError(
                f"the largest step ({limits.max_step_tokens} tokens, {limits.max_sequences} "
                f"sequences) does not fit beside {limits.weight_bytes / GIB:.2f} GiB of weights "
                f"and {limits.kv_bytes / GIB:.2f} GiB of KV cache: lower memory_fraction, "
                "max_step_tokens or max_sequences"
            ) from error


def _result(handle: PendingStep, seconds: float) -> StepResult:
    tokens = () if handle.tokens is None else tuple(handle.tokens.tolist())
    gave_up: tuple[int, ...] = ()
    if handle.grammars is not None:
        handle.grammars.accept(tokens)  # with overlap, the next plan leaves these slots out
        gave_up = tuple(handle.slots[row] for row in handle.grammars.gave_up)
    logprobs: list[TokenLogprobs | None] = []
    if handle.logprobs is not None:
        logprobs = [None] * len(tokens)
        entries = handle.logprobs.entries(handle.logprob_tops)
        for row, entry in zip(handle.logprob_rows, entries, strict=True):
            logprobs[row] = entry
    prompt: dict[int, list[TokenLogprobs]] = {}
    for slot, top, scored in handle.prompt_logprobs:
        prompt.setdefault(slot, []).extend(scored.entries([top] * len(scored.tokens)))
    return StepResult(handle.step, tokens, seconds, tuple(logprobs), prompt, gave_up)
