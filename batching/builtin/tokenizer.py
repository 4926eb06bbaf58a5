"""The built-in model's tokenizer: byte-level BPE, digits one token each, ChatML with tools."""

import itertools
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from .corpus.chatml import END_OF_TEXT, IM_END, IM_START, TOOL_CALL, TOOL_CALL_END, TOOLS_INTRO
from .corpus.mix import documents

VOCABULARY = 4096
SPECIAL = (END_OF_TEXT, IM_START, IM_END)
MARKERS = (TOOL_CALL, TOOL_CALL_END)
"""Single tokens that are text: a client that skips special tokens must still see them."""

# Words take their leading space, every digit stands alone: sums are then learnable column by
# column, and a space before a number is a token of its own.
_PIECES = r"\p{N}| ?[\p{L}\p{M}]+| ?[^\s\p{L}\p{M}\p{N}]+|\s+"

_INTRO_HEAD, _INTRO_TAIL = TOOLS_INTRO.split("{tools}")


def _template() -> str:
    """The ChatML template; `corpus.chatml.render` writes the same text (a test compares)."""
    head, tail = (part.replace("\n", "\\n") for part in (_INTRO_HEAD, _INTRO_TAIL))
    return (
        "{%- set system = '' -%}\n"
        "{%- set rest = messages -%}\n"
        "{%- if messages[0].role == 'system' -%}\n"
        "    {%- set system = messages[0].content -%}\n"
        "    {%- set rest = messages[1:] -%}\n"
        "{%- endif -%}\n"
        "{%- if tools or system -%}\n"
        "    {{- '<|im_start|>system\\n' + system -}}\n"
        "    {%- if tools -%}\n"
        "        {%- if system -%}{{- '\\n\\n' -}}{%- endif -%}\n"
        f"        {{{{- '{head.rstrip()}' -}}}}\n"
        "        {%- for tool in tools -%}\n"
        "            {%- if not loop.first -%}{{- '\\n' -}}{%- endif -%}\n"
        "            {{- tool | tojson -}}\n"
        "        {%- endfor -%}\n"
        f"        {{{{- '{tail}' -}}}}\n"
        "    {%- endif -%}\n"
        "    {{- '<|im_end|>\\n' -}}\n"
        "{%- endif -%}\n"
        "{%- for message in rest -%}\n"
        "    {%- if message.role == 'tool' -%}\n"
        "        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content"
        " + '\\n</tool_response><|im_end|>\\n' -}}\n"
        "    {%- else -%}\n"
        "        {{- '<|im_start|>' + message.role + '\\n' -}}\n"
        "        {%- if message.content -%}{{- message.content -}}{%- endif -%}\n"
        "        {%- for call in message.tool_calls or [] -%}\n"
        "            {%- if message.content or not loop.first -%}{{- '\\n' -}}{%- endif -%}\n"
        "            {%- set function = call.function if call.function is defined else call -%}\n"
        "            {{- '<tool_call>\\n{\"name\": ' -}}\n"
        "            {{- function.name | tojson -}}\n"
        "            {{- ', \"arguments\": ' -}}\n"
        "            {%- if function.arguments is string -%}\n"
        "                {{- function.arguments -}}\n"
        "            {%- else -%}\n"
        "                {{- function.arguments | tojson -}}\n"
        "            {%- endif -%}\n"
        "            {{- '}\\n</tool_call>' -}}\n"
        "        {%- endfor -%}\n"
        "        {{- '<|im_end|>\\n' -}}\n"
        "    {%- endif -%}\n"
        "{%- endfor -%}\n"
        "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}\n"
    )


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
    wrapped.chat_template = _template()
    wrapped.save_pretrained(out)
    return wrapped
