"""What users do: conversations of one or more turns, each turn one request.

A turn's request is known before the run, except that a chat's next turn carries the answers so
far. Users think between turns; the thinking is theirs, so it counts in no latency.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import msgspec

from loadtest.traces import TraceRequest, prompt_of
from loadtest.workloads import (
    COMPLETIONS,
    FIRST_ORDINARY_TOKEN,
    WORDS,
    Prompt,
    Workload,
    completion_fields,
)

CHAT = "/v1/chat/completions"
EMBEDDINGS = "/v1/embeddings"
_LONG_FACTOR = 8  # a long prompt is so many times the usual one
_SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},  # or a model may count for ever
        "city": {"type": "string", "maxLength": 20},
    },
    "required": ["name", "age", "city"],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Turn:
    """One request. `fields` are its body but for the history of a chat, which goes before
    `fields["messages"]`."""

    path: str
    fields: dict[str, Any]
    output: int
    input: int | None = None  # prompt tokens, where the client knows
    think: float = 0.0  # seconds between the last answer and this turn
    json_text: bool = False  # the answer must be JSON


@dataclass(frozen=True)
class Conversation:
    """Turns of one user. Figures are also given for each `group`; tenants share fairly or not."""

    turns: tuple[Turn, ...]
    group: str = "all"


@dataclass(frozen=True)
class Common:
    """Fields that all requests of a run have."""

    model: str
    temperature: float = 0.0
    ignore_eos: bool = True

    def completion(self, prompt: Prompt, output: int) -> Turn:
        """A turn that completes a prompt."""
        fields = completion_fields(self.model, prompt, output, self.temperature, self.ignore_eos)
        return Turn(COMPLETIONS, fields, output, len(prompt) if isinstance(prompt, list) else None)

    def chat(
        self, text: str, output: int, think: float = 0.0, schema: dict[str, Any] | None = None
    ) -> Turn:
        """A turn that says `text`; with a schema the answer ends when the JSON does."""
        fields = completion_fields(
            self.model, None, output, self.temperature, self.ignore_eos and schema is None
        )
        fields["messages"] = [{"role": "user", "content": text}]
        if schema is not None:
            form = {"name": "answer", "schema": schema, "strict": True}
            fields["response_format"] = {"type": "json_schema", "json_schema": form}
        return Turn(CHAT, fields, output, None, think, schema is not None)


def single(common: Common, workload: Workload, count: int, seed: int) -> list[Conversation]:
    """One completion each, with exact lengths and, if the workload says so, shared prefixes."""
    pairs = workload.generate(count, seed)
    return [Conversation((common.completion(*pair),)) for pair in pairs]


def long_mix(
    common: Common, workload: Workload, count: int, seed: int, share: float
) -> list[Conversation]:
    """Short prompts, and a share of prompts eight times as long among them."""
    size = workload.input_tokens * _LONG_FACTOR
    longer = Workload(size, workload.output_tokens, workload.spread, form=workload.form,
                      vocab_size=workload.vocab_size)  # fmt: skip
    short, long = workload.generate(count, seed), longer.generate(count, seed + 1)
    source = random.Random(seed)
    mixed = []
    for number in range(count):
        is_long = source.random() < share
        turn = common.completion(*(long if is_long else short)[number])
        mixed.append(Conversation((turn,), "long" if is_long else "short"))
    return mixed


def chats(
    common: Common, workload: Workload, count: int, seed: int, turns: int, think: float
) -> list[Conversation]:
    """Chats of `turns` turns. Thinking takes `think` seconds on average, exponentially."""
    source = random.Random(seed)

    def text() -> str:
        return " ".join(source.choice(WORDS) for _ in range(workload.input_tokens))

    def pause(turn: int) -> float:
        return source.expovariate(1 / think) if turn and think > 0 else 0.0

    return [
        Conversation(
            tuple(common.chat(text(), workload.output_tokens, pause(turn)) for turn in range(turns))
        )
        for _ in range(count)
    ]


def structured(common: Common, workload: Workload, count: int, seed: int) -> list[Conversation]:
    """Chats that must answer with JSON of a fixed schema."""
    source = random.Random(seed)
    found = []
    for _ in range(count):
        words = " ".join(source.choice(WORDS) for _ in range(workload.input_tokens))
        text = f"Describe a person as JSON with name, age and city. Words to think of: {words}"
        found.append(Conversation((common.chat(text, workload.output_tokens, schema=_SCHEMA),)))
    return found


def embeddings(common: Common, workload: Workload, count: int, seed: int) -> list[Conversation]:
    """One text to embed each; there is no output, so only e2e latency."""
    found = []
    for prompt, _ in workload.generate(count, seed):
        fields = {"model": common.model, "input": prompt}
        size = len(prompt) if isinstance(prompt, list) else None
        found.append(Conversation((Turn(EMBEDDINGS, fields, 0, size),)))
    return found


def replayed(
    common: Common,
    trace: Iterable[TraceRequest],
    seed: int,
    vocab_size: int,
    form: Literal["ids", "words"] = "ids",
) -> list[Conversation]:
    """The requests of a trace, equal blocks being equal text. Words stand for one token each."""

    @lru_cache(maxsize=4096)
    def block(name: Any, size: int) -> list[Any]:
        source = random.Random(f"{seed}:{name}")
        if form == "words":
            return source.choices(WORDS, k=size)
        return source.choices(range(FIRST_ORDINARY_TOKEN, vocab_size), k=size)

    found = []
    for number, request in enumerate(trace):
        tokens = prompt_of(request, number, block)
        prompt = " ".join(tokens) if form == "words" else tokens
        found.append(
            Conversation((common.completion(prompt, request.output_tokens),), request.group)
        )
    return found


def body_of(turn: Turn, history: list[dict[str, str]]) -> bytes:
    """The turn's JSON, after what was said before."""
    if not history:
        return msgspec.json.encode(turn.fields)
    messages = [*history, *turn.fields["messages"]]
    return msgspec.json.encode(turn.fields | {"messages": messages})
