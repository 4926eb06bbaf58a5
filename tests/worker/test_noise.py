"""The sampling noise: reference bits, distribution, independence of company and of order."""

from __future__ import annotations

import math

import numpy as np
import torch

from batching.worker.noise import draw_keys, gumbel, hash_bits

MASK = 0xFFFFFFFF
PINNED_KEYS = [[1293516399, -1492722385], [-867670130, -1139366956]]


def hash_in_integers(key: tuple[int, int], token: int) -> int:
    """The documented hash in unbounded Python integers."""
    x = (token * 0x9E3779B1 + key[0]) & MASK
    x ^= x >> 16
    x = (x * 0x7FEB352D + key[1]) & MASK
    x ^= x >> 15
    x = (x * 0x846CA68B) & MASK
    return x ^ (x >> 16)


def test_bits_equal_the_integer_definition() -> None:
    keys = draw_keys([0, 1, (1 << 64) - 1], [0, 5, 131_071])
    tokens = torch.tensor([0, 1, 2, 77, 151_935], dtype=torch.int32)
    got = hash_bits(keys, tokens).numpy().view(np.uint32)
    for row, key in enumerate(keys.numpy().view(np.uint32).tolist()):
        assert got[row].tolist() == [hash_in_integers(tuple(key), t) for t in tokens.tolist()]


def test_keys_are_pinned() -> None:
    # Changing the noise changes every seeded answer that a client has stored.
    assert draw_keys([0, 42], [0, 7]).tolist() == PINNED_KEYS


def test_a_row_does_not_depend_on_the_others() -> None:
    tokens = torch.arange(100, dtype=torch.int32)
    together = gumbel(draw_keys([3, 4, 5], [10, 11, 12]), tokens)
    alone = gumbel(draw_keys([4], [11]), tokens)
    assert torch.equal(together[1:2], alone)
    some = tokens[torch.tensor([90, 5])][None]
    assert torch.equal(gumbel(draw_keys([4], [11]), some)[0], alone[0, [90, 5]])


def test_noise_follows_the_gumbel_distribution() -> None:
    keys = draw_keys(list(range(200)), [17] * 200)
    noise = gumbel(keys, torch.arange(1000, dtype=torch.int32)).double().flatten()
    assert torch.isfinite(noise).all()
    ordered = noise.sort().values
    expected = torch.exp(-torch.exp(-ordered))
    observed = (torch.arange(len(ordered)) + 0.5) / len(ordered)
    # Kolmogorov-Smirnov: 1.95 is the 0.1 % point of sqrt(n) times the largest deviation.
    assert float((expected - observed).abs().max()) * math.sqrt(len(ordered)) < 1.95


def test_neighbouring_keys_are_uncorrelated() -> None:
    tokens = torch.arange(20_000, dtype=torch.int32)
    base = gumbel(draw_keys([9], [100]), tokens)[0]
    for seed, position in ((9, 101), (10, 100), (9 + (1 << 32), 100), (8, 101)):
        other = gumbel(draw_keys([seed], [position]), tokens)[0]
        correlation = float(torch.corrcoef(torch.stack([base, other]))[0, 1])
        assert abs(correlation) < 4 / math.sqrt(len(tokens))
