"""Tools and reasoning over HTTP, with an engine that says what the test wants."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from tests.app.conftest import MakeTurnServer, Server
from tests.app.test_bad_requests import check_error
from tests.app.turn_formats import HERMES, LLAMA3, MISTRAL, MISTRAL_ARGS, RESPONSE_TEMPLATE

PATH = "/v1/chat/completions"
USER = {"role": "user", "content": "hi"}
ARGUMENTS = '{"city": "Zürich 😀", "n": [1, {}]}'


def tool(name: str, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **more}}


TOOLS = [tool("get_weather", parameters={"type": "object"}), tool("f", strict=True)]
FIELDS: dict[str, Any] = {"messages": [USER], "tools": TOOLS}


def hermes(name: str = "get_weather", arguments: str = ARGUMENTS) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def prompt_text(server: Server) -> str:
    ids = server.engine.requests[-1].prompt
    return str(server.service.tokenizer.backend.decode(ids, skip_special_tokens=False))


def put_together(chunks: list[dict[str, Any]], index: int = 0) -> dict[str, Any]:
    """A choice's chunks as a message, checked for what every stream owes its client."""
    mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
    deltas = [choice["delta"] for choice in mine]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert all("role" not in delta for delta in deltas[1:])
    assert [c["finish_reason"] for c in mine[:-1]] == [None] * (len(mine) - 1)
    calls: list[dict[str, Any]] = []
    for delta in deltas:
        for call in delta.get("tool_calls", ()):
            if "id" in call:
                assert call["index"] == len(calls)
                assert call["type"] == "function"
                calls.append({"id": call["id"], **call["function"]})
            else:
                assert set(call) == {"index", "function"}
                assert set(call["function"]) == {"arguments"}
                calls[call["index"]]["arguments"] += call["function"]["arguments"]
    assert len({call["id"] for call in calls}) == len(calls)
    return {
        "content": "".join(d.get("content", "") for d in deltas),
        "reasoning": "".join(d.get("reasoning_content", "") for d in deltas),
        "calls": [(call["name"], call["arguments"]) for call in calls],
        "finish": mine[-1]["finish_reason"],
        "logprobs": [e for c in mine if c["logprobs"] for e in c["logprobs"]["content"]],
    }


async def both(server: Server, **fields: Any) -> dict[str, Any]:
    """The first choice, which is the same plain and streamed, however tokens are merged."""
    (choice, *_) = (await server.ok(PATH, **fields))["choices"]
    message = choice["message"]
    calls = message.get("tool_calls", [])
    assert all(call["type"] == "function" for call in calls)
    plain = {
        "content": message["content"] or "",
        "reasoning": message.get("reasoning_content", ""),
        "calls": [(c["function"]["name"], c["function"]["arguments"]) for c in calls],
        "finish": choice["finish_reason"],
        "logprobs": choice["logprobs"]["content"] if choice["logprobs"] else [],
    }
    assert message.get("reasoning") == message.get("reasoning_content")
    assert (message["content"] is None) == bool(not plain["content"] and len(message) > 3)
    for tokens_per_step in (1, 3, 1000):
        server.engine.tokens_per_step = tokens_per_step
        assert put_together(await server.events(PATH, **fields)) == plain
    server.engine.tokens_per_step = 1
    return plain


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (HERMES, hermes()),
        (LLAMA3, f'<|python_tag|>{{"name": "get_weather", "parameters": {ARGUMENTS}}}'),
        (MISTRAL, f'[TOOL_CALLS][{{"name": "get_weather", "arguments": {ARGUMENTS}}}]'),
        (MISTRAL_ARGS, f"[TOOL_CALLS]get_weather[CALL_ID]123456789[ARGS]{ARGUMENTS}"),
    ],
    ids=["hermes", "llama3", "mistral", "mistral_args"],
)
async def test_a_call_in_each_format(
    make_turn_server: MakeTurnServer, template: str, text: str
) -> None:
    server = make_turn_server(template)
    server.say(text)
    got = await both(server, **FIELDS)
    assert (got["content"], got["finish"]) == ("", "tool_calls")
    assert got["calls"] == [("get_weather", ARGUMENTS)]
    assert json.dumps(TOOLS) in prompt_text(server)
    got = await both(server, **FIELDS, skip_special_tokens=False)
    assert got["calls"] == [("get_weather", ARGUMENTS)]


async def test_text_and_two_calls(make_turn_server: MakeTurnServer) -> None:
    server = make_turn_server(HERMES)
    server.say(f"I look.\n{hermes()}\n{hermes('f', '{}')}")
    got = await both(server, **FIELDS)
    assert (got["content"], got["finish"]) == ("I look.", "tool_calls")
    assert got["calls"] == [("get_weather", ARGUMENTS), ("f", "{}")]
    got = await both(server, **FIELDS, parallel_tool_calls=False)
    assert (got["calls"], got["finish"]) == ([("get_weather", ARGUMENTS)], "tool_calls")
    assert server.engine.running == 0


async def test_choices_have_calls_of_their_own(make_turn_server: MakeTurnServer) -> None:
    server = make_turn_server(HERMES)
    server.say(hermes())
    answer = await server.ok(PATH, **FIELDS, n=3)
    ids = {call["id"] for c in answer["choices"] for call in c["message"]["tool_calls"]}
    assert len(ids) == 3
    chunks = await server.events(PATH, **FIELDS, n=3)
    assert all(put_together(chunks, i)["finish"] == "tool_calls" for i in range(3))


async def test_what_is_no_call_stays_text(make_turn_server: MakeTurnServer) -> None:
    server = make_turn_server(HERMES)
    for text in (hermes("other"), "<tool_call>{}</tool_call>", "a <tool_call", "plain  "):
        server.say(text)
        got = await both(server, **FIELDS)
        assert (got["content"], got["calls"], got["finish"]) == (text, [], "stop")
    server.say(hermes())
    for fields in ({"messages": [USER]}, {**FIELDS, "tool_choice": "none"}):
        got = await both(server, **fields)
        assert (got["content"], got["calls"]) == (hermes(), [])


async def test_a_cut_call_ends_with_length(make_turn_server: MakeTurnServer) -> None:
    server = make_turn_server(HERMES)
    server.say(hermes())
    tokens = len(server.ids(hermes().partition(' "n"')[0]))
    got = await both(server, **FIELDS, max_tokens=tokens)
    assert got["finish"] == "length"
    ((name, arguments),) = got["calls"]
    assert name == "get_weather" and ARGUMENTS.startswith(arguments)


async def test_stop_strings_cut_before_calls_are_read(make_turn_server: MakeTurnServer) -> None:
    server = make_turn_server(HERMES)
    server.say(f"wait {hermes()}")
    got = await both(server, **FIELDS, stop=["<tool_call>"])
    assert (got["content"], got["calls"], got["finish"]) == ("wait ", [], "stop")


async def test_logprobs_cover_every_token(make_turn_server: MakeTurnServer) -> None:
    server = make_turn_server(HERMES)
    text = f"<think>\nhm\n</think>\n\nso {hermes()}"
    server.say(text)
    got = await both(server, **FIELDS, logprobs=True, top_logprobs=1)
    assert b"".join(bytes(e["bytes"]) for e in got["logprobs"]).decode() == text
    once = await both(server, **FIELDS, logprobs=True, parallel_tool_calls=False)
    joined = b"".join(bytes(e["bytes"]) for e in once["logprobs"]).decode()
    assert text.startswith(joined) and joined.endswith("}}")


async def test_reasoning(make_turn_server: MakeTurnServer) -> None:
    server = make_turn_server(HERMES)
    server.say("<think>\nlet me see\n</think>\n\nyes")
    got = await both(server, messages=[USER])
    assert (got["content"], got["reasoning"], got["finish"]) == ("yes", "let me see", "stop")
    usage = (await server.ok(PATH, messages=[USER]))["usage"]
    between = len(server.ids("\nlet me see\n</think"))  # byte level: the last token is ">"
    assert usage["completion_tokens_details"] == {"reasoning_tokens": between}
    got = await both(server, messages=[USER], include_reasoning=False)
    assert (got["content"], got["reasoning"]) == ("yes", "")


async def test_a_template_that_opens_the_reasoning(make_turn_server: MakeTurnServer) -> None:
    server = make_turn_server(HERMES)
    server.say(f"let me see\n</think>\n\n{hermes()}")
    thinking = {"chat_template_kwargs": {"enable_thinking": True}}
    got = await both(server, **FIELDS, **thinking)
    assert prompt_text(server).endswith("<think>\n")
    assert (got["content"], got["reasoning"]) == ("", "let me see")
    assert got["calls"] == [("get_weather", ARGUMENTS)]
    got = await both(server, messages=[USER], reasoning_effort="low", max_tokens=3)
    assert (got["content"], got["reasoning"], got["finish"]) == ("", "let", "length")
    server.say("just an answer")
    for off in ({"reasoning_effort": "none"}, {"chat_template_kwargs": {"enable_thinking": False}}):
        got = await both(server, messages=[USER], **off)
        assert not prompt_text(server).endswith("<think>\n")
        assert (got["content"], got["reasoning"]) == ("just an answer", "")


async def test_a_tokenizer_with_a_response_template(make_turn_server: MakeTurnServer) -> None:
    server = make_turn_server(HERMES, RESPONSE_TEMPLATE)
    server.say("<|channel|>thought\nhm<|channel|>so\n<call f><n>7</n></call>")
    got = await both(server, **FIELDS)
    assert (got["content"], got["reasoning"], got["finish"]) == ("so", "hm", "tool_calls")
    assert got["calls"] == [("f", '{"n": "7"}')]


async def test_a_useless_response_template_is_left_alone(
    make_turn_server: MakeTurnServer,
) -> None:
    server = make_turn_server(HERMES, {"fields": 5})
    server.say(hermes())
    assert (await both(server, **FIELDS))["calls"] == [("get_weather", ARGUMENTS)]


async def test_a_whole_conversation_reaches_the_prompt(make_turn_server: MakeTurnServer) -> None:
    server = make_turn_server(HERMES)
    call = {"id": "c1", "type": "function"} | {
        "function": {"name": "get_weather", "arguments": ARGUMENTS}
    }
    refusal = [{"type": "refusal", "refusal": "no"}]
    server.say("ok")
    await server.ok(
        PATH,
        messages=[
            USER,
            {"role": "assistant", "reasoning_content": "hm", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "sun"}]},
            {"role": "assistant", "reasoning": "so", "content": refusal},
        ],
    )
    assert prompt_text(server) == (
        f"<|user|>hi<|end|><|assistant|><think>\nhm\n</think>\n\n{hermes()}<|end|>"
        "<|tool|>sun<|end|><|assistant|><think>\nso\n</think>\n\nno<|end|><|assistant|>"
    )


async def test_allowed_tools(make_turn_server: MakeTurnServer) -> None:
    server = make_turn_server(HERMES)
    allowed = {"mode": "auto", "tools": [tool("f")]}
    choice = {"type": "allowed_tools", "allowed_tools": allowed}
    server.say(f"{hermes()}{hermes('f', '{}')}")
    got = await both(server, **FIELDS, tool_choice=choice)
    assert got["calls"] == [("f", "{}")]
    assert got["content"] == hermes()
    assert "get_weather" not in prompt_text(server).partition("<|user|>")[0]


async def test_the_openai_client_reads_the_stream(make_turn_server: MakeTurnServer) -> None:
    server = make_turn_server(HERMES)
    server.say(f"so {hermes()}{hermes('f', '{}')}")
    async with openai.AsyncOpenAI(
        api_key="k", base_url="http://test/v1", http_client=server.http,
        _strict_response_validation=True,
    ) as api:  # fmt: skip
        plain = await api.chat.completions.create(model="tiny", **FIELDS)
        done: list[tuple[str, str]] = []
        async with api.chat.completions.stream(model="tiny", **FIELDS) as stream:
            async for event in stream:
                if event.type == "tool_calls.function.arguments.done":
                    done.append((event.name, event.arguments))
            final = (await stream.get_final_completion()).choices[0]
    assert done == [("get_weather", ARGUMENTS), ("f", "{}")]
    assert plain.choices[0].message.content == final.message.content == "so"
    assert final.finish_reason == plain.choices[0].finish_reason == "tool_calls"


LONG = "n" * 65
BAD: list[tuple[dict[str, Any], str]] = [
    ({"tools": [5]}, "tools[0]"),
    ({"tools": [{}]}, "tools[0].type"),
    ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type"),
    ({"tools": [{"type": "function"}]}, "tools[0].function"),
    ({"tools": [{**tool("f"), "x": 1}]}, "tools[0].x"),
    ({"tools": [tool("f", x=1)]}, "tools[0].function.x"),
    ({"tools": [tool("f"), {"type": "function", "function": {}}]}, "tools[1].function.name"),
    ({"tools": [tool("a b")]}, "tools[0].function.name"),
    ({"tools": [tool("é")]}, "tools[0].function.name"),
    ({"tools": [tool(LONG)]}, "tools[0].function.name"),
    ({"tools": [tool("")]}, "tools[0].function.name"),
    ({"tools": [tool("f\n")]}, "tools[0].function.name"),
    ({"tools": [tool("f"), tool("f")]}, "tools[1].function.name"),
    ({"tools": [tool("f", description=5)]}, "tools[0].function.description"),
    ({"tools": [tool("f", strict="yes")]}, "tools[0].function.strict"),
    ({"tools": [tool("f", parameters=[])]}, "tools[0].function.parameters"),
    ({"tools": [tool("f", parameters={"type": "string"})]}, "tools[0].function.parameters"),
    ({"tool_choice": "auto"}, "tool_choice"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": tool("f")}, "tool_choice"),
    ({"tool_choice": "none"}, "tool_choice"),
    *(({"tools": [], "tool_choice": c}, "tool_choice") for c in ("none", "auto", "required")),
    ({"tools": TOOLS, "tool_choice": "maybe"}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": {}}, "tool_choice.type"),
    ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "f"}}, "tool_choice.name"),
    ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "tool_choice.function"),
    ({"tools": TOOLS, "tool_choice": tool("g")}, "tool_choice.function.name"),
    ({"tools": TOOLS, "tool_choice": {"type": "allowed_tools"}}, "tool_choice.allowed_tools"),
    (
        {"tools": TOOLS, "tool_choice": {"type": "allowed_tools", "allowed_tools": {}}},
        "tool_choice.allowed_tools.mode",
    ),
    (
        {
            "tools": TOOLS,
            "tool_choice": {
                "type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [tool("g")]},
            },
        },
        "tool_choice.allowed_tools.tools[0].function.name",
    ),
    ({"parallel_tool_calls": 1}, "parallel_tool_calls"),
    ({"include_reasoning": "no"}, "include_reasoning"),
    (
        {"messages": [{"role": "assistant", "tool_calls": [{"type": "custom"}]}]},
        "messages[0].tool_calls[0].type",
    ),
    (
        {"messages": [{"role": "assistant", "tool_calls": [{**tool("f"), "id": 1}]}]},
        "messages[0].tool_calls[0].id",
    ),
    (
        {"messages": [{"role": "assistant", "reasoning_content": 5}]},
        "messages[0].reasoning_content",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "refusal", "refusal": "x"}]}]},
        "messages[0].content[0].type",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param"), BAD, ids=str)
async def test_bad_requests(server: Server, fields: dict[str, Any], param: str) -> None:
    check_error(await server.post(PATH, **{"messages": [USER], **fields}), 400, param)
