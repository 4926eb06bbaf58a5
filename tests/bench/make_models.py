"""Models of real shapes with random weights, for measuring speed only: their text means nothing.

    python -m tests.bench.make_models FOLDER [S] [M] [L]

S has the shape of SmolLM2-135M, M of Qwen3-0.6B, L (16 GB, only if named) of Llama-3.1-8B.
bfloat16 safetensors, seeded. Each token of the tokenizer but single bytes is a made-up ASCII word,
so that whatever is sampled shows as text.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen3Config

_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_COMMON: dict[str, Any] = {
    "bos_token_id": 0, "pad_token_id": 0, "eos_token_id": 2, "tie_word_embeddings": True,
    "dtype": "bfloat16",
}  # fmt: skip
_CONFIGS = {
    "S": LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, head_dim=64, max_position_embeddings=8192,
        rms_norm_eps=1e-5, rope_theta=100_000.0, **_COMMON,
    ),
    "M": Qwen3Config(
        vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28,
        num_attention_heads=16, num_key_value_heads=8, head_dim=128,
        max_position_embeddings=40960, rms_norm_eps=1e-6, rope_theta=1_000_000.0, **_COMMON,
    ),
    "L": LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128,
        max_position_embeddings=131072, rms_norm_eps=1e-5, rope_theta=500_000.0,
        **(_COMMON | {"tie_word_embeddings": False}),
    ),
}  # fmt: skip
_CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE whose merges spell words of letters: a, b, … ba, bb, … with a space first."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*_SPECIAL, *alphabet])}
    letters = "abcdefghijklmnopqrstuvwxyz"
    words, merges = ["Ġ"], []
    for word in words:  # breadth first: grows while it is read
        for letter in letters:
            if len(vocabulary) == vocab_size:
                break
            vocabulary[word + letter] = len(vocabulary)
            merges.append((word, letter))
            words.append(word + letter)
    bpe = Tokenizer(models.BPE(vocabulary, merges))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=_SPECIAL[0], pad_token=_SPECIAL[0], eos_token=_SPECIAL[2],
        additional_special_tokens=[_SPECIAL[1]], clean_up_tokenization_spaces=False,
    )  # fmt: skip
    fast.chat_template = _CHAT
    return fast


def make(name: str, folder: Path) -> None:
    """Write one model and its tokenizer to `folder`."""
    config = _CONFIGS[name]
    torch.manual_seed(1234)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):  # L takes minutes on a CPU
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer(config.vocab_size).save_pretrained(folder)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.make_models", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", default=["S", "M"], help="S, M, L (default: S M)")
    options = parser.parse_args()
    for name in options.names:
        make(name, options.folder / name)
        print(f"made {options.folder / name}")


if __name__ == "__main__":
    main()
