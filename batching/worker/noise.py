"""Stateless sampling noise: a hash of (seed, position, token id), the same bits on every device.

A draw depends on nothing else: not on the batch, not on what was drawn before. So a request gives
the same text alone and in company, and a resumed one continues exactly.

The seed and position are mixed on the host by SplitMix64 (Steele, Lea & Flood 2014) into a 64-bit
key; its halves enter a two-round multiply-xorshift hash of the token id whose constants are those
of the "lowbias32" integer hash (C. Wellons, hash-prospector).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

MASK_64 = (1 << 64) - 1
GOLDEN_64 = 0x9E3779B97F4A7C15
GOLDEN_32 = 0x9E3779B1 - (1 << 32)  # as int32: multiplication wraps
ROUND_1 = 0x7FEB352D
ROUND_2 = 0x846CA68B - (1 << 32)
BELOW_ONE = 1.0 - 2.0**-24
UNIFORM_STEPS = 2.0**31


def draw_keys(seeds: Sequence[int], positions: Sequence[int] | np.ndarray) -> torch.Tensor:
    """One key a draw, int32 [n, 2], from 64-bit seeds and token positions."""
    state = np.array([seed & MASK_64 for seed in seeds], dtype=np.uint64)
    return torch.from_numpy(mix(state, positions).reshape(-1, 2))


def mix(seeds: np.ndarray, positions: Sequence[int] | np.ndarray) -> np.ndarray:
    """The same of seeds uint64 [n]: int32 [2 * n]."""
    with np.errstate(over="ignore"):
        state = _split_mix(seeds) + np.asarray(positions, np.uint64) * np.uint64(GOLDEN_64)
        return _split_mix(state).view(np.int32)


def _split_mix(state: np.ndarray) -> np.ndarray:
    state = state + np.uint64(GOLDEN_64)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def hash_bits(keys: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """32 random bits for each (key, token id), as int32 [n, c].

    `keys` int32 [n, 2]; `token_ids` int32 [n, c], or [c] for the same ids in every row.
    """
    x = token_ids * GOLDEN_32 + keys[:, :1]
    # int32 shifts are arithmetic: the masks clear the copies of the sign bit
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    x *= ROUND_1
    x += keys[:, 1:]
    x ^= (x >> 15).bitwise_and_(0x1FFFF)
    x *= ROUND_2
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    return x


def uniform_bits(keys: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """The hash's low 31 bits, int32 [n, c]: (bits + 1/2) / UNIFORM_STEPS is uniform in (0, 1)."""
    return hash_bits(keys, token_ids).bitwise_and_(0x7FFFFFFF)


def gumbel(keys: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise, float32 [n, c], always finite.

    `argmax(logits + gumbel)` is a sample of softmax(logits). Uniforms keep their full relative
    precision near zero, where the rare winners of unlikely tokens are decided.
    """
    uniform = uniform_bits(keys, token_ids).float().add_(0.5).mul_(1 / UNIFORM_STEPS)
    exponential = uniform.clamp_(max=BELOW_ONE).neg_().log1p_().neg_()
    return exponential.log_().neg_()
