"""From logits to tokens, on the device: penalties, bias, mask, temperature, min- and top-p, noise.

The order and meaning are vLLM's, but that biases follow penalties. All functions are pure but for
the logits that they are told to change; none waits for a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from batching.worker.device import has_triton, upload
from batching.worker.noise import UNIFORM_STEPS, gumbel, uniform_bits

FIRST_WIDTH = 32  # candidates looked at first; a nucleus is rarely larger
WIDTH_GROWTH = 8
GROUP = 32
SLACK = 3.0  # the full noise is needed once in 500 million draws
CACHED_ELEMENTS = 1 << 17  # float32 rows handled at a time on the CPU: half a MiB


@dataclass
class Penalties:
    """For some rows, all [r]: where their tokens are counted, and factors (None if all are off).

    `counts` int32 and `in_prompt` bool, both [entries, vocab], are indexed by `entries`: how often
    each token was generated, and whether the prompt has it.
    """

    rows: torch.Tensor
    entries: torch.Tensor
    counts: torch.Tensor
    in_prompt: torch.Tensor
    repetition: torch.Tensor | None = None
    presence: torch.Tensor | None = None
    frequency: torch.Tensor | None = None


@dataclass
class Bias:
    """Single logits' additions (minus infinity bans): rows, token ids, values, all [b]."""

    rows: torch.Tensor
    tokens: torch.Tensor
    values: torch.Tensor


@dataclass
class Restriction:
    """Rows [r] that may not become some tokens: `banned` bool [r, vocab]."""

    rows: torch.Tensor
    banned: torch.Tensor


@dataclass
class Mask:
    """Which tokens rows [r] may have at all: a bit per token id, int32 [r, words]."""

    rows: torch.Tensor
    bits: torch.Tensor


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

    def select(self, some: slice | torch.Tensor) -> Draws:
        """The draws of some rows: a slice, or indices int64."""
        return Draws(
            rows=self.rows[some],
            temperature=self.temperature[some],
            keys=self.keys[some],
            top_k=None if self.top_k is None else self.top_k[some],
            top_p=None if self.top_p is None else self.top_p[some],
            min_p=None if self.min_p is None else self.min_p[some],
            max_k=self.max_k,
        )


@dataclass
class SamplingInputs:
    """How to sample the rows of one step's logits [n, vocab]; rows in no draw are greedy."""

    penalties: Penalties | None = None
    bias: Bias | None = None
    restriction: Restriction | None = None
    mask: Mask | None = None
    draws: tuple[Draws, ...] = ()

    def keeps_logits(self) -> bool:
        """Whether tokens come from the logits as they are."""
        changes = (self.penalties, self.bias, self.restriction, self.mask)
        return all(change is None for change in changes)

    def is_plain(self) -> bool:
        """Whether every row takes its largest logit, as it is."""
        return not self.draws and self.keeps_logits()


def sample(logits: torch.Tensor, inputs: SamplingInputs) -> torch.Tensor:
    """Next tokens int64 [n]. Changes `logits` [n, vocab] in place by all but draws.

    They are float32, or, where they are kept as they are, what the model computes in.
    """
    if inputs.penalties is not None:
        apply_penalties(logits, inputs.penalties)
    if inputs.bias is not None:
        index = (inputs.bias.rows, inputs.bias.tokens)
        logits.index_put_(index, inputs.bias.values, accumulate=True)
    if (limits := inputs.restriction) is not None:
        logits[limits.rows] = logits[limits.rows].masked_fill(limits.banned, -torch.inf)
    if inputs.mask is not None:
        apply_mask(logits, inputs.mask)
    if sum(len(draws.rows) for draws in inputs.draws) < len(logits):
        tokens = largest(logits)
    else:
        tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    for draws in inputs.draws:
        _draw_into(tokens, logits, draws)
    return tokens


def largest(logits: torch.Tensor) -> torch.Tensor:
    """`logits.argmax(dim=-1)`; on the CPU by numpy, which takes a quarter of torch's time."""
    if logits.device.type == "cpu":
        return torch.from_numpy(logits.float().numpy().argmax(axis=-1))
    return logits.argmax(dim=-1)


def sample_again(
    logits: torch.Tensor, inputs: SamplingInputs, rows: list[int], tokens: torch.Tensor
) -> None:
    """Replace the tokens of some rows, whose `logits` were changed after `sample`."""
    index = upload(rows, torch.int64, logits.device)
    tokens[index] = largest(logits[index])
    for draws in inputs.draws:
        some = torch.isin(draws.rows, index).nonzero()[:, 0]
        if len(some):
            _draw_into(tokens, logits, draws.select(some))


def _draw_into(tokens: torch.Tensor, logits: torch.Tensor, draws: Draws) -> None:
    if has_triton(logits.device):
        from batching.worker.draw_kernel import draw_into

        draw_into(tokens, logits, draws)
        return
    for some in row_chunks(len(draws.rows), logits):
        part = draws.select(some)
        tokens[part.rows] = draw(logits[part.rows].float(), part)


def row_chunks(count: int, logits: torch.Tensor) -> Iterator[slice]:
    """Slices of `count` rows: on the CPU so few at a time that their values stay in the cache."""
    step = count
    if logits.device.type == "cpu":
        step = max(1, CACHED_ELEMENTS // logits.shape[1])
    for first in range(0, count, step):
        yield slice(first, first + step)


def apply_penalties(logits: torch.Tensor, penalties: Penalties) -> None:
    """Change the penalised rows of `logits` [n, vocab] in place.

    Repetition (Keskar et al. 2019) divides positive and multiplies negative logits of tokens in the
    prompt or output; frequency and presence (OpenAI) subtract per, and once for, generated tokens.
    """
    for some in row_chunks(len(penalties.rows), logits):
        entries = penalties.entries[some]
        rows, counts = logits[penalties.rows[some]], penalties.counts[entries]
        generated = counts > 0
        if penalties.repetition is not None:
            factor = penalties.repetition[some, None]
            repeated = torch.where(rows > 0, rows / factor, rows * factor)
            rows = torch.where(generated | penalties.in_prompt[entries], repeated, rows)
        if penalties.frequency is not None:
            rows -= penalties.frequency[some, None] * counts
        if penalties.presence is not None:
            rows -= penalties.presence[some, None] * generated
        logits[penalties.rows[some]] = rows


def apply_mask(logits: torch.Tensor, mask: Mask) -> None:
    """Make what the mask bans impossible, in place."""
    banned = unpack_bits(~mask.bits, logits.shape[1])
    if logits.device.type != "cpu":
        logits[mask.rows] = logits[mask.rows].masked_fill_(banned, -torch.inf)
        return
    # Not by torch, whose threads take longer to wake than this takes.
    values, where = logits.numpy(), banned.numpy()
    for i, row in enumerate(mask.rows.tolist()):
        np.copyto(values[row], -np.inf, where=where[i])


def unpack_bits(bits: torch.Tensor, count: int) -> torch.Tensor:
    """The first `count` bits of each row int32 [r, words], lowest first, as bool [r, count]."""
    if bits.device.type == "cpu":
        packed = bits.numpy().view(np.uint8)
        unpacked = np.unpackbits(packed, axis=1, count=count, bitorder="little")
        return torch.from_numpy(unpacked).view(torch.bool)
    shifts = torch.arange(32, dtype=torch.int32, device=bits.device)
    return (bits[:, :, None] >> shifts & 1).bool().flatten(1)[:, :count]


def draw(logits: torch.Tensor, draws: Draws) -> torch.Tensor:
    """Sample one token int64 [r] from each row of float32 logits [r, vocab]."""
    scaled = logits / draws.temperature[:, None]
    if draws.min_p is not None:
        floor = scaled.amax(dim=-1, keepdim=True) + draws.min_p.log()[:, None]
        scaled.masked_fill_(scaled < floor, float("-inf"))
    if draws.top_k is None and draws.top_p is None:
        return take_noisiest(scaled, draws.keys)
    if scaled.device.type == "cpu":
        return draw_from_largest(scaled, draws, max(FIRST_WIDTH, draws.max_k + 1))
    # Without Triton. Whether few candidates suffice is known to the device alone: sort all.
    width = scaled.shape[1] if draws.top_p is not None else draws.max_k
    threshold = find_threshold(scaled, scaled.topk(width, dim=-1).values, draws)
    return take_noisiest(scaled.masked_fill_(scaled < threshold, -torch.inf), draws.keys)


def draw_from_largest(scaled: torch.Tensor, draws: Draws, width: int) -> torch.Tensor:
    """Sample from what top-k and top-p leave of each row, looking at its `width` largest logits.

    Rows where that may not be all that is left are looked at again, more widely.
    """
    width = min(width, scaled.shape[1])
    values, ids = take_largest(scaled, width)
    threshold = find_threshold(scaled, values, draws)
    noisy = gumbel(draws.keys, ids.int()).add_(values).masked_fill_(values < threshold, -torch.inf)
    tokens = ids.gather(1, noisy.argmax(dim=-1, keepdim=True))[:, 0]
    if width < scaled.shape[1]:
        last = values[:, -1:]
        is_open = ((threshold <= last) & ~last.isneginf())[:, 0]
        if is_open.any():
            rows = is_open.nonzero()[:, 0]
            wider = draw_from_largest(scaled[rows], draws.select(rows), width * WIDTH_GROWTH)
            tokens[rows] = wider
    return tokens


def take_noisiest(scaled: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """`argmax(scaled + gumbel)` int64 [r] over the vocabulary: samples of softmax(scaled).

    On the CPU only tokens that can win have their noise computed in full. The largest sum is below
    log(sum(exp(scaled))) - SLACK with probability exp(-exp(SLACK)), and to be above it a token's
    uniform must be below exp(SLACK) times its probability, which few are.
    """
    vocabulary = torch.arange(scaled.shape[1], dtype=torch.int32, device=scaled.device)
    if scaled.device.type == "cpu":
        weights = (scaled - scaled.amax(dim=-1, keepdim=True)).exp_()
        total = weights.sum(dim=-1, keepdim=True)
        weights *= UNIFORM_STEPS * math.exp(SLACK) / total
        rows, tokens = (uniform_bits(keys, vocabulary) <= weights).nonzero(as_tuple=True)
        sums = gumbel(keys[rows], tokens.int()[:, None])[:, 0] + scaled[rows, tokens]
        best = torch.full((len(scaled),), -torch.inf).scatter_reduce(0, rows, sums, "amax")
        floor = scaled.amax(dim=-1) + total[:, 0].log() - SLACK
        if bool((best > floor).all()):
            winners = torch.empty(len(scaled), dtype=torch.int64)
            wins = sums == best[rows]
            return winners.scatter_(0, rows[wins], tokens[wins])
    return gumbel(keys, vocabulary).add_(scaled).argmax(dim=-1)


def take_largest(rows: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`rows.topk(count)`, faster on long rows [r, n]: values in falling order, and indices int64.

    The row is cut into groups of every `n / GROUP`-th element; the `count` largest elements are
    among the `count` groups with the largest maxima (and the rest that fills no group).
    """
    length = rows.shape[1] // GROUP
    if count * 2 > length:
        return rows.topk(count, dim=-1)
    grouped = rows[:, : length * GROUP].view(-1, GROUP, length)
    groups = grouped.amax(dim=1).topk(count, dim=-1, sorted=False).indices
    members = groups[:, None] + torch.arange(GROUP)[:, None] * length
    rest = torch.arange(length * GROUP, rows.shape[1]).expand(len(rows), -1)
    indices = torch.cat([members.flatten(1), rest], dim=1)
    values, chosen = rows.gather(1, indices).topk(count, dim=-1)
    return values, indices.gather(1, chosen)


def find_threshold(scaled: torch.Tensor, values: torch.Tensor, draws: Draws) -> torch.Tensor:
    """The least logit [r, 1] that top-k and top-p keep; ties with it are kept, too.

    `values` [r, width] are the largest of `scaled` [r, vocab], in falling order. If all of them are
    kept, there may be more. Top-p counts probabilities after top-k.
    """
    width = values.shape[1]
    threshold = values[:, -1:]
    if draws.top_k is not None:
        is_limited = (draws.top_k <= width)[:, None]
        index = draws.top_k.clamp(max=width)[:, None] - 1
        threshold = torch.where(is_limited, values.gather(1, index), threshold)
    if draws.top_p is None:
        return threshold
    total = scaled.logsumexp(dim=-1, keepdim=True)
    if draws.top_k is not None:
        kept = values.masked_fill(values < threshold, -torch.inf)
        total = torch.where(is_limited, kept.logsumexp(dim=-1, keepdim=True), total)
    probabilities = (values - total).exp()
    before = probabilities.cumsum(dim=-1) - probabilities
    top_p = draws.top_p[:, None]
    in_nucleus = (before < top_p) | (top_p >= 1)
    in_nucleus[:, 0] = True
    nucleus = values.masked_fill(~in_nucleus, torch.inf).amin(dim=-1, keepdim=True)
    return torch.maximum(threshold, nucleus)
