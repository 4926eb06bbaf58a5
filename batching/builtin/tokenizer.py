"""The built-in model's tokenizer: byte-level BPE, digits one token each, ChatML with tools."""

import itertools
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from .corpus.chatml import END_OF_TEXT, IM_END, IM_START, TOOL_CALL, TOOL_CALL_END
from .corpus.mix import documents

VOCABULARY = 4096
SPECIAL = (END_OF_TEXT, IM_START, IM_END)
MARKERS = (TOOL_CALL, TOOL_CALL_END)
"""Single tokens that are text: a client that skips special tokens must still see them."""

# Words take their leading space, every digit stands alone: sums are then learnable column by
# column, and a space before a number is a token of its own.
_PIECES = r"\p{N}| ?[\p{L}\p{M}]+| ?[^\s\p{L}\p{M}\p{N}]+|\s+"

CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja")
"""`corpus.chatml.render` writes the same text without a template engine (a test compares)."""


def _text(seed: int, count: int) -> Iterator[str]:
    for document in itertools.islice(documents(seed), count):
        yield "".join(text for text, _ in document)


def train_tokenizer(out: Path, seed: int = 0, count: int = 30_000) -> PreTrainedTokenizerFast:
    """Learn merges from `count` documents and save tokenizer and chat template to `out`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(MARKERS),
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_text(seed, count), trainer)
    tokenizer.add_tokens(list(MARKERS))
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=IM_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[IM_START],
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHAT_TEMPLATE.read_text(encoding="utf-8")
    wrapped.save_pretrained(out)
    return wrapped
