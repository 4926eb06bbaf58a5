"""From logits to tokens, on the device: penalties, bias, temperature, min-p, top-k, top-p, noise.

The order and meaning are vLLM's, but that biases follow penalties. All functions are pure but for
the logits that they are told to change; none waits for a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from batching.worker.noise import gumbel

FIRST_WIDTH = 128  # candidates looked at first; a nucleus is rarely larger
WIDTH_GROWTH = 16


@dataclass
class Penalties:
    """For some rows: their tokens so far and three factors. All [r], but the first two [r, vocab].

    `counts` int32: generated tokens. `in_prompt` bool.
    """

    rows: torch.Tensor
    counts: torch.Tensor
    in_prompt: torch.Tensor
    repetition: torch.Tensor
    presence: torch.Tensor
    frequency: torch.Tensor


@dataclass
class Bias:
    """Single logits' additions (minus infinity bans): rows, token ids, values, all [b]."""

    rows: torch.Tensor
    tokens: torch.Tensor
    values: torch.Tensor


@dataclass
class Draws:
    """Rows to sample at a temperature, all [r]. `top_k` etc. are None if no row limits them so."""

    rows: torch.Tensor
    temperature: torch.Tensor
    keys: torch.Tensor  # int32 [r, 2]
    top_k: torch.Tensor | None = None  # int64; the vocabulary's size is off
    top_p: torch.Tensor | None = None  # 1 is off
    min_p: torch.Tensor | None = None  # 0 is off
    max_k: int = 0  # the largest top_k


@dataclass
class SamplingInputs:
    """How to sample the rows of one step's logits [n, vocab]; rows in no draw are greedy."""

    penalties: Penalties | None = None
    bias: Bias | None = None
    draws: tuple[Draws, ...] = ()

    @property
    def changes_logits(self) -> bool:
        """Whether `sample` changes the logits that it is given."""
        return self.penalties is not None or self.bias is not None


def sample(logits: torch.Tensor, inputs: SamplingInputs) -> torch.Tensor:
    """Next tokens int64 [n]. Applies penalties and bias to `logits` float32 [n, vocab] in place."""
    if inputs.penalties is not None:
        apply_penalties(logits, inputs.penalties)
    if inputs.bias is not None:
        index = (inputs.bias.rows, inputs.bias.tokens)
        logits.index_put_(index, inputs.bias.values, accumulate=True)
    if len(inputs.draws) == 1 and len(inputs.draws[0].rows) == len(logits):
        return draw(logits, inputs.draws[0])
    tokens = logits.argmax(dim=-1)
    for draws in inputs.draws:
        tokens[draws.rows] = draw(logits[draws.rows], draws)
    return tokens


def apply_penalties(logits: torch.Tensor, penalties: Penalties) -> None:
    """Change the penalised rows of `logits` [n, vocab] in place.

    Repetition (Keskar et al. 2019) divides positive and multiplies negative logits of tokens in the
    prompt or output; frequency and presence (OpenAI) subtract per, and once for, generated tokens.
    """
    rows = logits[penalties.rows]
    generated = penalties.counts > 0
    factor = penalties.repetition[:, None]
    repeated = torch.where(rows > 0, rows / factor, rows * factor)
    rows = torch.where(generated | penalties.in_prompt, repeated, rows)
    rows -= penalties.frequency[:, None] * penalties.counts
    rows -= penalties.presence[:, None] * generated
    logits[penalties.rows] = rows


def draw(logits: torch.Tensor, draws: Draws) -> torch.Tensor:
    """Sample one token int64 [r] from each row of float32 logits [r, vocab]."""
    scaled = logits / draws.temperature[:, None]
    if draws.min_p is not None:
        floor = scaled.amax(dim=-1, keepdim=True) + draws.min_p.log()[:, None]
        scaled.masked_fill_(scaled < floor, float("-inf"))
    candidates = None
    if draws.top_k is not None or draws.top_p is not None:
        threshold, values, candidates = find_threshold(scaled, draws)
        if candidates is not None:
            scaled = values
        scaled = scaled.masked_fill_(scaled < threshold, float("-inf"))
    if candidates is None:
        vocabulary = torch.arange(scaled.shape[1], dtype=torch.int32, device=scaled.device)
        return (gumbel(draws.keys, vocabulary).add_(scaled)).argmax(dim=-1)
    choice = gumbel(draws.keys, candidates.int()).add_(scaled).argmax(dim=-1, keepdim=True)
    return candidates.gather(1, choice)[:, 0]


def find_threshold(
    scaled: torch.Tensor, draws: Draws
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The least logit [r, 1] that top-k and top-p keep; ties with it are kept, too.

    On the CPU also the largest logits and their token ids, [r, width], among which all kept ones
    are: widened until that holds. Elsewhere that would need a wait, so the ids are None, and the
    rows are sorted as far as needed at most.
    """
    vocabulary = scaled.shape[1]
    total = scaled.logsumexp(dim=-1, keepdim=True) if draws.top_p is not None else None
    if scaled.device.type != "cpu":
        width = vocabulary if draws.top_p is not None else draws.max_k
        values, _ = scaled.topk(width, dim=-1)
        return threshold_of(values, total, draws), values, None
    width = min(vocabulary, max(FIRST_WIDTH, draws.max_k))
    while True:
        values, ids = scaled.topk(width, dim=-1)
        threshold = threshold_of(values, total, draws)
        last = values[:, -1:]
        if width == vocabulary or bool(((threshold > last) | last.isneginf()).all()):
            return threshold, values, ids
        width = min(vocabulary, width * WIDTH_GROWTH)


def threshold_of(values: torch.Tensor, total: torch.Tensor | None, draws: Draws) -> torch.Tensor:
    """The least kept logit [r, 1] among each row's largest `values` [r, width], in falling order.

    `total` is the logsumexp [r, 1] of the whole row. Top-p counts probabilities after top-k.
    """
    width = values.shape[1]
    threshold = values[:, -1:]
    if draws.top_k is not None:
        is_limited = (draws.top_k <= width)[:, None]
        index = draws.top_k.clamp(max=width)[:, None] - 1
        threshold = torch.where(is_limited, values.gather(1, index), threshold)
    if draws.top_p is None:
        return threshold
    assert total is not None
    if draws.top_k is not None:
        kept = values.masked_fill(values < threshold, float("-inf"))
        total = torch.where(is_limited, kept.logsumexp(dim=-1, keepdim=True), total)
    probabilities = (values - total).exp()
    before = probabilities.cumsum(dim=-1) - probabilities
    top_p = draws.top_p[:, None]
    in_nucleus = (before < top_p) | (top_p >= 1)
    in_nucleus[:, 0] = True
    nucleus = values.masked_fill(~in_nucleus, float("inf")).amin(dim=-1, keepdim=True)
    return torch.maximum(threshold, nucleus)
