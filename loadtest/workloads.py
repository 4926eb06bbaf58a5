"""What is sent: prompts of a chosen length, as token ids (exact) or as words (any server)."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

COMPLETIONS = "/v1/completions"

# The lowest ids are special tokens and single bytes in most vocabularies.
FIRST_ORDINARY_TOKEN = 300

WORDS = (
    "time year people way day man thing woman life child world school state family student group "
    "country problem hand part place case week company system program question work government "
    "number night point home water room mother area money story fact month lot right study book "
    "eye job word business issue side kind head house service friend father power hour game line "
    "end member law car city community name president team minute idea body information back"
).split()

Prompt = list[int] | str


@dataclass(frozen=True)
class Workload:
    """A seeded family of prompts.

    `input_tokens` counts the whole prompt; with `groups` > 0 its first `prefix_tokens` are one of
    that many shared prefixes. Lengths (of input beyond the prefix, and of output) are uniform in
    [1 - spread, 1 + spread] times the nominal. Words stand for tokens where `form` is "words":
    their number is only near the server's token count.
    """

    input_tokens: int
    output_tokens: int
    spread: float = 0.0
    prefix_tokens: int = 0
    groups: int = 0
    form: Literal["ids", "words"] = "ids"
    vocab_size: int = 2000

    def __post_init__(self) -> None:
        if self.prefix_tokens >= self.input_tokens:
            raise ValueError("the shared prefix must be shorter than the input")
        if self.vocab_size <= FIRST_ORDINARY_TOKEN:
            raise ValueError(f"the vocabulary must have more than {FIRST_ORDINARY_TOKEN} tokens")

    def generate(self, count: int, seed: int) -> list[tuple[Prompt, int]]:
        """`count` pairs of prompt and output tokens. Equal seeds give equal pairs."""
        source = random.Random(seed)
        draw, join = self._form(source)
        prefixes = [[draw() for _ in range(self.prefix_tokens)] for _ in range(self.groups)]
        pairs = []
        for _ in range(count):
            prefix = source.choice(prefixes) if prefixes else []
            rest = self._length(source, self.input_tokens - len(prefix))
            prompt = join(prefix + [draw() for _ in range(rest)])
            pairs.append((prompt, self._length(source, self.output_tokens)))
        return pairs

    def _length(self, source: random.Random, nominal: int) -> int:
        if self.spread == 0:
            return nominal
        low, high = nominal * (1 - self.spread), nominal * (1 + self.spread)
        return max(1, source.randint(round(low), round(high)))

    def _form(self, source: random.Random) -> tuple[Callable[[], int | str], Callable[..., Prompt]]:
        if self.form == "words":
            return (lambda: source.choice(WORDS)), " ".join
        return (lambda: source.randrange(FIRST_ORDINARY_TOKEN, self.vocab_size)), list


def completion_body(
    model: str,
    prompt: Prompt,
    max_tokens: int,
    temperature: float = 0.0,
    *,
    ignore_eos: bool = True,
) -> bytes:
    """JSON of a streamed completion that ends with `usage`.

    With `ignore_eos`, which OpenAI's API does not have, the output has exactly `max_tokens`.
    """
    return msgspec.json.encode(
        completion_fields(model, prompt, max_tokens, temperature, ignore_eos)
    )


def completion_fields(
    model: str, prompt: Prompt | None, max_tokens: int, temperature: float, ignore_eos: bool
) -> dict[str, Any]:
    """The body of `completion_body` as a value; without a prompt, that of a chat but messages."""
    body: dict[str, Any] = {
        "model": model,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if prompt is None:
        del body["prompt"]
    if ignore_eos:
        # Without the second, end tokens in the middle would be tokens that show no text.
        body |= {"ignore_eos": True, "skip_special_tokens": False}
    return body
