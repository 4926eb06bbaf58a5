"""The worker that computes: a transformers model over paged KV, on one device."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from batching.core.types import (
    SamplingParams,
    SequencePlan,
    SlotInit,
    StepPlan,
    StepResult,
    TokenLogprobs,
)
from batching.worker.assemble import Phases, assemble
from batching.worker.grammar_masks import GrammarSlots, StepGrammars
from batching.worker.logprobs import LogprobTensors, token_logprobs
from batching.worker.protocol import Capabilities, WorkerConfig, WorkerError
from batching.worker.sampler_state import SamplerState
from batching.worker.sampling import SamplingInputs, sample
from batching.worker.slots import SlotTables, StepInputs

PROMPT_LOGPROB_ROWS = 256  # prompt rows whose logits exist at once


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
    finished: float | None = None
    error: Exception | None = None


class TorchWorker:
    """Implements `protocol.Worker`.

    Raises `UnsupportedModelError` if the model cannot be served exactly, or does not fit.
    """

    def __init__(
        self, config: WorkerConfig, progress: Callable[[str, float], None] = lambda *_: None
    ) -> None:
        phases = Phases(progress)
        built = assemble(config, phases)
        self._capabilities = limits = built.capabilities
        self._device, self._backend, self._specs = built.device, built.backend, built.specs
        self._model = built.model
        self._slots = SlotTables(
            limits.max_sequences, limits.max_model_len, limits.block_size, built.device
        )
        self._sampler = SamplerState(limits.vocab_size, built.device)
        self._grammars = GrammarSlots(limits)
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
            return _result(handle)
        except Exception as error:
            raise WorkerError(f"step {handle.step} failed: {error!r}") from error

    def close(self) -> None:
        """Free the model and its pages."""
        for name in ("_model", "_slots", "_sampler", "_grammars", "_backend", "_specs"):
            self.__dict__.pop(name, None)
        if self._device.type != "cpu":
            torch.accelerator.empty_cache()

    def _run(self, plan: StepPlan, pending: PendingStep) -> None:
        self._slots.begin(plan.inits)
        for init in plan.inits:
            self._sampler.begin(init)
            self._grammars.begin(init)
        inputs = self._slots.build(plan)
        inputs.metadata.schedule = self._backend.prepare(inputs.metadata, self._specs)
        self._model.step.metadata = inputs.metadata
        hidden = self._model.hidden(inputs.tokens, inputs.positions)
        self._prompt_logprobs(plan, hidden, pending)
        sampled = [i for i, sequence in enumerate(plan.sequences) if sequence.sample]
        if sampled:
            self._sample(plan, sampled, inputs, hidden, pending)
        if self._device.type == "cpu":
            pending.finished = time.perf_counter()
        else:
            pending.event = torch.Event(self._device)
            pending.event.record()

    def _sample(
        self,
        plan: StepPlan,
        sampled: list[int],
        inputs: StepInputs,
        hidden: torch.Tensor,
        pending: PendingStep,
    ) -> None:
        """Sample the next token of the sequences `sampled`, and append it to their rows."""
        slots, ends = inputs.slots, inputs.ends
        rows = inputs.last_rows
        if len(sampled) < len(plan.sequences):
            chosen = torch.tensor(sampled, device=self._device)
            slots, ends, rows = slots[chosen], ends[chosen], rows[chosen]
        hidden = hidden if len(rows) == len(hidden) else hidden[rows]
        sequences = [plan.sequences[i] for i in sampled]
        pending.slots = [s.slot for s in sequences]
        params = [self._sampler.params(slot) for slot in pending.slots]
        pending.logprob_rows = [i for i, p in enumerate(params) if p.logprobs is not None]
        pending.logprob_tops = [params[i].logprobs or 0 for i in pending.logprob_rows]
        pending.grammars = self._grammars.step(pending.slots)
        how = self._sampler.inputs(pending.slots, [s.start + s.count for s in sequences])
        if how.is_plain() and not pending.logprob_rows and pending.grammars is None:
            tokens = self._model.largest(hidden)
        else:
            tokens = self._choose(self._model.logits(hidden), how, pending)
        self._sampler.record(tokens)
        self._slots.append(slots, ends, tokens)
        pending.tokens = tokens.to("cpu", non_blocking=True)

    def _choose(
        self, logits: torch.Tensor, how: SamplingInputs, pending: PendingStep
    ) -> torch.Tensor:
        """Tokens int64 [n] of logits [n, vocab], which change; with the logprobs asked for."""
        raw, grammars = logits, pending.grammars
        if pending.logprob_rows:
            wanted = torch.tensor(pending.logprob_rows, device=self._device)
            raw = logits[wanted]  # a copy: logprobs are those before penalties and bias
        if grammars is not None and self._device.type == "cpu":
            tokens = grammars.choose(logits, how)
        else:
            if grammars is not None:
                how.mask = grammars.mask(self._device)
            tokens = sample(logits, how)
        if pending.logprob_rows:
            top = max(pending.logprob_tops)
            pending.logprobs = token_logprobs(raw, tokens[wanted], top).to_host()
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
                    pending.prompt_logprobs.append((sequence.slot, top, scored.to_host()))
            first_row += sequence.count

    def _warm_up(self) -> None:
        """Run a prefill and a decode step, so that the first request does not pay for set-up.

        They leave rubbish in block 0, which no sequence has been given yet.
        """
        count = min(self._capabilities.block_size, self._capabilities.max_step_tokens)
        params = SamplingParams(max_tokens=1, temperature=1.0, top_p=0.9)
        init = SlotInit(0, "warm-up", [0] * count, count, params)
        prefill = SequencePlan(0, 0, count - 1, False, (0,))
        decode = SequencePlan(0, count - 1, 1, True)
        self.wait(self.submit(StepPlan(0, (init,), (prefill,))))
        self.wait(self.submit(StepPlan(0, (), (decode,))))


def _result(handle: PendingStep) -> StepResult:
    finished = time.perf_counter() if handle.finished is None else handle.finished
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
    seconds = finished - handle.started
    return StepResult(handle.step, tokens, seconds, tuple(logprobs), prompt, gave_up)
