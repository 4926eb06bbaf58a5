"""A tokenizer for the tiny models: one token per printable ASCII character."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from tests.worker.tiny_models import VOCAB

PIECES = ["<pad>", "<bos>", "<eos>", *(chr(c) for c in range(33, 127)), "Ġ", "Ċ"]
END = 2
assert len(PIECES) < VOCAB, "the model has ids that the tokenizer lacks"


def save_tokenizer(folder: Path, markers: Sequence[str] = ()) -> None:
    """`markers` are further special tokens; their ids follow those of `PIECES`."""
    backend = Tokenizer(models.BPE(vocab={p: i for i, p in enumerate(PIECES)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    special = [*PIECES[:3], *markers]
    backend.add_special_tokens([AddedToken(piece, special=True) for piece in special])
    backend.save(str(folder / "tokenizer.json"))
