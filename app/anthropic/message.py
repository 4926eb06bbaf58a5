"""The message of an answer as it grows: content blocks, and the events that tell of each change."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from app.turns.parts import CallArguments, CallBegin, Part, Reasoning, Text
from app.turns.runs import Runs, Step

Event = dict[str, Any]


class TextBlock(msgspec.Struct, tag_field="type", tag="text"):
    text: str = ""


class ThinkingBlock(msgspec.Struct, tag_field="type", tag="thinking"):
    thinking: str = ""
    signature: str = ""


class ToolUseBlock(msgspec.Struct, tag_field="type", tag="tool_use"):
    id: str
    name: str
    input: dict[str, Any] = {}


Block = TextBlock | ThinkingBlock | ToolUseBlock


class MessageUsage(msgspec.Struct):
    """`input_tokens` and those read from the cache together are all of the prompt's."""

    input_tokens: int
    output_tokens: int
    cache_read_input_tokens: int
    cache_creation_input_tokens: int = 0


class Message(msgspec.Struct, kw_only=True):
    id: str
    type: str = "message"
    role: str = "assistant"
    model: str
    content: list[Block] = []
    stop_reason: str | None = None
    stop_sequence: str | None = None
    usage: MessageUsage


class Content:
    """Collects the parts of a turn in blocks; at most the last of them is open.

    The methods yield events. What an event holds may change afterwards: it is to be written at
    once.
    """

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self._runs = Runs()
        self._input = ""  # of the open tool_use block, as JSON text

    @property
    def called(self) -> bool:
        """A tool was used."""
        return any(isinstance(block, ToolUseBlock) for block in self.blocks)

    def feed(self, part: Part) -> Iterator[Event]:
        for step, of in self._runs.feed(part):
            match step:
                case Step.CLOSE:
                    yield from self._close()
                case Step.OPEN:
                    yield self._open(of)
                    yield from self._more(of)
                case Step.MORE:
                    yield from self._more(of)

    def finish(self) -> Iterator[Event]:
        """Close the last block, if there is one."""
        if self.blocks:
            yield from self._close()

    def _open(self, part: Part) -> Event:
        match part:
            case Text():
                self.blocks.append(TextBlock())
            case Reasoning():
                self.blocks.append(ThinkingBlock())
            case CallBegin(_, id, name):
                self._input = ""
                self.blocks.append(ToolUseBlock(id, name))
        return self._event("start", content_block=self.blocks[-1])

    def _more(self, part: Part) -> Iterator[Event]:
        block = self.blocks[-1]
        match part, block:
            case Text(text), TextBlock():
                block.text += text
                yield self._event("delta", delta={"type": "text_delta", "text": text})
            case Reasoning(text), ThinkingBlock():
                block.thinking += text
                yield self._event("delta", delta={"type": "thinking_delta", "thinking": text})
            case CallArguments(_, text), ToolUseBlock():
                self._input += text
                delta = {"type": "input_json_delta", "partial_json": text}
                yield self._event("delta", delta=delta)

    def _close(self) -> Iterator[Event]:
        block = self.blocks[-1]
        if isinstance(block, ThinkingBlock):
            delta = {"type": "signature_delta", "signature": block.signature}
            yield self._event("delta", delta=delta)
        elif isinstance(block, ToolUseBlock):
            block.input = _object(self._input)
        yield self._event("stop")

    def _event(self, name: str, /, **fields: Any) -> Event:
        return {"type": f"content_block_{name}", "index": len(self.blocks) - 1} | fields


def _object(text: str) -> dict[str, Any]:
    """The arguments of a call; {} of one that was cut off."""
    try:
        value = msgspec.json.decode(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
