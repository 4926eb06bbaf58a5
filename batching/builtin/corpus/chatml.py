"""The chat format, rendered without a template engine.

The same text as chat_template.jinja produces (a test compares them), cut into spans that say
which parts the assistant wrote: only those are trained on.
"""

import json
from typing import Any

Message = dict[str, Any]
Span = tuple[str, bool]
"""(text, whether the model must learn to produce it)."""

IM_START, IM_END, END_OF_TEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
TOOL_CALL, TOOL_CALL_END = "<tool_call>", "</tool_call>"

TOOLS_INTRO = (
    "# Tools\n\nYou may call one or more functions.\n\n<tools>\n{tools}\n</tools>\n\n"
    "For a function call, return JSON within <tool_call></tool_call> tags."
)


def dumps(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def tool_call_text(name: str, arguments: dict[str, Any]) -> str:
    call = f'{{"name": {dumps(name)}, "arguments": {dumps(arguments)}}}'
    return f"{TOOL_CALL}\n{call}\n{TOOL_CALL_END}"


def _body(message: Message) -> str:
    if message["role"] == "tool":
        return f"<tool_response>\n{message['content']}\n</tool_response>"
    calls = [
        tool_call_text(call["function"]["name"], call["function"]["arguments"])
        for call in message.get("tool_calls", ())
    ]
    content = message.get("content")
    return "\n".join(([content] if content else []) + calls)


def render(messages: list[Message], tools: list[dict[str, Any]] | None = None) -> list[Span]:
    """Spans of a whole conversation, without a generation prompt."""
    spans: list[Span] = []
    system = ""
    if messages[0]["role"] == "system":
        system, messages = messages[0]["content"], messages[1:]
    if tools:
        listed = TOOLS_INTRO.format(tools="\n".join(map(dumps, tools)))
        system = f"{system}\n\n{listed}" if system else listed
    if system:
        spans.append((f"{IM_START}system\n{system}{IM_END}\n", False))
    for message in messages:
        role = "user" if message["role"] == "tool" else message["role"]
        learned = role == "assistant"
        spans.append((f"{IM_START}{role}\n", False))
        spans.append((f"{_body(message)}{IM_END}", learned))
        spans.append(("\n", False))
    return spans
