"""The output of a response as it grows: items, and the events that tell of each change."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from app.outputs.logprobs import ChatToken
from app.responses.items import new_id
from app.responses.objects import (
    FunctionCall,
    OutputItem,
    OutputMessage,
    OutputText,
    ReasoningItem,
    ReasoningText,
)
from app.turns.parts import CallArguments, CallBegin, Part, Reasoning, Text
from app.turns.runs import Runs, Step

Event = dict[str, Any]


class Output:
    """Collects the parts of a turn in items; at most the last of them is in progress.

    The methods yield events without their sequence numbers. What an event holds may change
    afterwards: it is to be written at once.
    """

    def __init__(self) -> None:
        self.items: list[OutputItem] = []
        self._runs = Runs()

    def feed(self, part: Part, logprobs: list[ChatToken]) -> Iterator[Event]:
        """`logprobs` are of the part's tokens, if it is text."""
        for step, of in self._runs.feed(part):
            match step:
                case Step.CLOSE:
                    yield from self._close("completed")
                case Step.OPEN:
                    yield from self._open(of)
                    yield from self._more(of, logprobs)
                case Step.MORE:
                    yield from self._more(of, logprobs)

    def finish(self, status: str) -> Iterator[Event]:
        """Close the last item with `status`. An output without any gets an empty message."""
        if not self.items:
            yield from self._open(Text(""))
        yield from self._close(status)

    def _open(self, part: Part) -> Iterator[Event]:
        match part:
            case Text():
                self.items.append(OutputMessage(new_id("msg")))
            case Reasoning():
                self.items.append(ReasoningItem(new_id("rs")))
            case CallBegin(_, id, name):
                self.items.append(FunctionCall(new_id("fc"), id, name))
        item = self.items[-1]
        yield self._event("output_item.added", item=item, item_id=None)
        if isinstance(item, OutputMessage):
            item.content = [OutputText()]
        elif isinstance(item, ReasoningItem):
            item.content = [ReasoningText()]
        if not isinstance(item, FunctionCall):
            yield self._event("content_part.added", content_index=0, part=item.content[0])

    def _more(self, part: Part, logprobs: list[ChatToken]) -> Iterator[Event]:
        item = self.items[-1]
        match part, item:
            case Text(text), OutputMessage():
                item.content[0].text += text
                item.content[0].logprobs += logprobs
                yield self._event(
                    "output_text.delta", content_index=0, delta=text, logprobs=logprobs
                )
            case Reasoning(text), ReasoningItem():
                item.content[0].text += text
                yield self._event("reasoning_text.delta", content_index=0, delta=text)
            case CallArguments(_, text), FunctionCall():
                item.arguments += text
                yield self._event("function_call_arguments.delta", delta=text)

    def _close(self, status: str) -> Iterator[Event]:
        item = self.items[-1]
        item.status = status
        if isinstance(item, FunctionCall):
            yield self._event(
                "function_call_arguments.done", arguments=item.arguments, name=item.name
            )
        else:
            content = item.content[0]
            if isinstance(content, OutputText):
                yield self._event(
                    "output_text.done",
                    content_index=0,
                    text=content.text,
                    logprobs=content.logprobs,
                )
            else:
                yield self._event("reasoning_text.done", content_index=0, text=content.text)
            yield self._event("content_part.done", content_index=0, part=content)
        yield self._event("output_item.done", item=item, item_id=None)

    def _event(self, name: str, /, **fields: Any) -> Event:
        event = {
            "type": f"response.{name}",
            "item_id": self.items[-1].id,
            "output_index": len(self.items) - 1,
        } | fields
        if event["item_id"] is None:  # the item is there as a whole
            del event["item_id"]
        return event
