"""Conversations in which a tool is called: definitions, question, call, result, answer."""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from .chatml import Message, dumps
from .exchange import is_held_out
from .geography import CAPITALS
from .stories import DAYS, FOODS, HEROES

_WEATHER = ("sunny", "rainy", "windy", "cloudy", "foggy", "snowy")
_TOPICS = ("volcanoes", "whales", "trains", "bread", "planets", "music", "castles", "bees",
           "rivers", "coffee", "robots", "tea", "glaciers", "bridges")  # fmt: skip

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Tool:
    """One callable function and how people ask for it.

    `names` are aliases: the model must copy the name from the definition, not remember it.
    `arguments` draws the call's arguments; `result` gives (tool output, final answer).
    """

    names: tuple[str, ...]
    description: str
    types: dict[str, str]
    asks: tuple[str, ...]
    arguments: Callable[[Random], Arguments]
    result: Callable[[Random, Arguments], tuple[Arguments, str]]

    def definition(self, name: str) -> dict[str, Any]:
        properties = {field: {"type": kind} for field, kind in self.types.items()}
        parameters = {"type": "object", "properties": properties, "required": list(self.types)}
        function = {"name": name, "description": self.description, "parameters": parameters}
        return {"type": "function", "function": function}


def _weather(rng: Random, a: Arguments) -> tuple[Arguments, str]:
    sky, degrees = rng.choice(_WEATHER), rng.randint(-9, 35)
    return {"sky": sky, "degrees": degrees}, f"It is {sky} and {degrees} °C in {a['city']}."


def _time(rng: Random, a: Arguments) -> tuple[Arguments, str]:
    clock = f"{rng.randint(0, 23):02}:{rng.randint(0, 59):02}"
    return {"time": clock}, f"It is {clock} in {a['city']}."


def _search(rng: Random, a: Arguments) -> tuple[Arguments, str]:
    count = rng.randint(2, 99)
    return {"results": count}, f"I found {count} pages about {a['query']}."


def _done(answer: str) -> Callable[[Random, Arguments], tuple[Arguments, str]]:
    return lambda rng, a: ({"status": "ok"}, answer.format(**a))


def _clock(rng: Random) -> str:
    return f"{rng.randint(0, 23):02}:{rng.choice((0, 5, 10, 15, 20, 30, 40, 45, 50)):02}"


CATALOGUE: tuple[Tool, ...] = (
    Tool(
        ("get_weather", "weather", "current_weather"), "Get the weather in a city.",
        {"city": "string"},
        ("What is the weather in {city}?", "How is the weather in {city}?",
         "Is it raining in {city}?", "What's the weather like in {city} today?"),
        lambda rng: {"city": rng.choice(CAPITALS)}, _weather,
    ),
    Tool(
        ("get_time", "local_time", "clock"), "Get the local time in a city.",
        {"city": "string"},
        ("What time is it in {city}?", "Tell me the time in {city}.",
         "What is the local time in {city}?"),
        lambda rng: {"city": rng.choice(CAPITALS)}, _time,
    ),
    Tool(
        ("search", "web_search", "find_pages"), "Search the web.",
        {"query": "string"},
        ("Search the web for {query}.", "Find pages about {query}.", "Look up {query}."),
        lambda rng: {"query": f"{rng.choice(_TOPICS)} in {rng.choice(CAPITALS)}"}, _search,
    ),
    Tool(
        ("set_alarm", "create_alarm", "wake_up"), "Set an alarm.",
        {"time": "string", "day": "string"},
        ("Set an alarm for {time} on {day}.", "Wake me up at {time} on {day}.",
         "I need an alarm on {day} at {time}."),
        lambda rng: {"time": _clock(rng), "day": rng.choice(DAYS)},
        _done("Your alarm is set for {time} on {day}."),
    ),
    Tool(
        ("send_message", "message", "text_person"), "Send a message to a person.",
        {"to": "string", "text": "string"},
        ("Send {to} a message: {text}", "Write to {to}: {text}", "Text {to}: {text}"),
        lambda rng: {
            "to": rng.choice(HEROES),
            "text": f"See you on {rng.choice(DAYS)} at {_clock(rng)}",
        },
        _done("I sent the message to {to}."),
    ),
    Tool(
        ("order_food", "shop", "buy"), "Order food.",
        {"item": "string", "quantity": "integer"},
        ("Order {quantity} {item}.", "Please buy {quantity} {item}.",
         "I would like {quantity} {item}."),
        lambda rng: {"item": rng.choice(FOODS), "quantity": rng.randint(2, 60)},
        _done("I ordered {quantity} {item}."),
    ),
)  # fmt: skip


@dataclass(frozen=True)
class ToolConversation:
    """`messages` from the question to the final answer; `messages[1]` holds the one call."""

    messages: list[Message]
    tools: list[dict[str, Any]]

    @property
    def call(self) -> dict[str, Any]:
        """{"name": …, "arguments": …} of the call that the question asks for."""
        function: dict[str, Any] = self.messages[1]["tool_calls"][0]["function"]
        return function

    @property
    def held_out(self) -> bool:
        return is_held_out("tools", self.messages[0]["content"])


def definitions(rng: Random, used: Tool, name: str) -> list[dict[str, Any]]:
    """The used tool among up to two others, in any order."""
    others = rng.sample([tool for tool in CATALOGUE if tool is not used], rng.choice((0, 1, 1, 2)))
    listed = [used.definition(name)]
    listed += [tool.definition(rng.choice(tool.names)) for tool in others]
    rng.shuffle(listed)
    return listed


def conversation(rng: Random, *, held_out: bool = False) -> ToolConversation:
    """One tool conversation from the wanted side of the held-out split."""
    while True:
        tool = rng.choice(CATALOGUE)
        name, arguments = rng.choice(tool.names), tool.arguments(rng)
        output, answer = tool.result(rng, arguments)
        call = {"type": "function", "function": {"name": name, "arguments": arguments}}
        drawn = ToolConversation(
            [
                {"role": "user", "content": rng.choice(tool.asks).format(**arguments)},
                {"role": "assistant", "content": "", "tool_calls": [call]},
                {"role": "tool", "content": dumps(output)},
                {"role": "assistant", "content": answer},
            ],
            definitions(rng, tool, name),
        )
        if drawn.held_out == held_out:
            return drawn
