"""The value every dialogue family produces: one question with its answer.

Held-out examples are decided by hashing, not by drawing: a question belongs to the held-out
twentieth or it does not, whatever the seed, so training and evaluation can never overlap.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

HELD_OUT_PERCENT = 5


@dataclass(frozen=True)
class Exchange:
    """One user question and the assistant's answer.

    `expected` is the part of the answer that decides whether it is right (a number, a name, a
    JSON text). `key` is what the held-out split hashes: the operands where the space can be
    enumerated, the whole question where the answer is a fact that must be learned.
    """

    kind: str
    question: str
    answer: str
    expected: str
    key: str

    @property
    def held_out(self) -> bool:
        return is_held_out(self.kind, self.key)


Family = Callable[[Random], Exchange]


def is_held_out(kind: str, key: str) -> bool:
    """True for the fixed 5 % of (kind, key) pairs that training data never contains."""
    digest = hashlib.blake2b(f"{kind}:{key}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") % 100 < HELD_OUT_PERCENT


def draw(family: Family, rng: Random, *, held_out: bool = False) -> Exchange:
    """Draw from `family` until the example lies on the wanted side of the split."""
    while True:
        exchange = family(rng)
        if exchange.held_out == held_out:
            return exchange
