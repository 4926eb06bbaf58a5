"""The steps that a worker runs before it serves, so that the first request pays for no set-up.

Their tokens are rubbish in block 0, which no sequence has been given yet.
"""

from __future__ import annotations

from batching.core.types import SamplingParams, SequencePlan, SlotInit, StepPlan
from batching.worker.protocol import Capabilities

PLAIN = SamplingParams(max_tokens=1, temperature=1.0, top_p=0.9)
COSTLY = SamplingParams(
    max_tokens=1,
    temperature=1.0,
    top_k=50,
    top_p=0.9,
    min_p=0.1,
    frequency_penalty=0.1,
    logprobs=20,
)


def first_steps(limits: Capabilities) -> list[StepPlan]:
    """A prompt of one block, and a decode."""
    count = min(limits.block_size, limits.max_step_tokens)
    init = SlotInit(0, "warm-up", [0] * count, count, PLAIN)
    return [
        StepPlan(0, (init,), (SequencePlan(0, 0, count - 1, False, (0,)),)),
        StepPlan(0, (), (SequencePlan(0, count - 1, 1, True),)),
    ]


def largest_steps(limits: Capabilities) -> list[StepPlan]:
    """As many prompt tokens as a step may have, and as many decodes, sampled at the most cost."""
    longest = limits.max_model_len - 1
    prompts = min(limits.max_sequences, limits.max_step_tokens)
    sequences: list[SequencePlan] = []
    for slot in range(prompts):
        left = limits.max_step_tokens - sum(s.count for s in sequences)
        count = min(longest, left - (prompts - 1 - slot))
        table = (0,) * -(-(count + 1) // limits.block_size)
        sequences.append(SequencePlan(slot, 0, count, True, table))
    inits = [SlotInit(s.slot, f"{s.slot}", [0] * s.count, s.count, COSTLY) for s in sequences]
    decodes = [SequencePlan(s.slot, s.count, 1, True) for s in sequences]
    return [
        StepPlan(0, tuple(inits), tuple(sequences)),
        StepPlan(0, (), tuple(decodes)),
    ]
