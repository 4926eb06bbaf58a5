"""`/v1/responses`: items in, items and events out, and what is kept of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from app.responses.store import MAX_AGE_SECONDS, ResponseStore, ResponseStoreError, Stored
from tests.app.conftest import MakeServer, Server
from tests.app.test_bad_requests import check_error

PATH = "/v1/responses"


async def events(server: Server, **fields: Any) -> list[dict[str, Any]]:
    """The events of a stream, checked to be numbered in order."""
    found = await server.named_events(PATH, **fields)
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


async def test_shape(server: Server) -> None:
    server.say("hello world")
    answer = await server.ok(PATH, input="hi", instructions="be brief", metadata={"a": "b"})
    assert server.prompt_text == "<|system|>be brief<|end|><|user|>hi<|end|><|assistant|>"
    assert answer["object"] == "response"
    assert answer["status"] == "completed"
    assert answer["incomplete_details"] is None and answer["error"] is None
    assert answer["instructions"] == "be brief" and answer["metadata"] == {"a": "b"}
    (item,) = answer["output"]
    assert item["type"] == "message" and item["role"] == "assistant"
    assert item["status"] == "completed"
    text = {"type": "output_text", "text": "hello world", "annotations": [], "logprobs": []}
    assert item["content"] == [text]
    prompt = len(server.engine.requests[-1].prompt)
    assert answer["usage"] == {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": 3,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": prompt + 3,
    }


async def test_cut_output_is_incomplete_with_a_reason(server: Server) -> None:
    server.engine.script = lambda request: server.ids("hello world") * 20
    answer = await server.ok(PATH, input="hi", max_output_tokens=3)
    assert answer["status"] == "incomplete"
    assert answer["incomplete_details"] == {"reason": "max_output_tokens"}
    assert answer["output"][0]["status"] == "incomplete"
    found = await events(server, input="hi", max_output_tokens=3)
    assert found[-1]["type"] == "response.incomplete"
    assert found[-1]["response"]["incomplete_details"] == {"reason": "max_output_tokens"}


async def test_every_item_reaches_the_prompt(server: Server) -> None:
    await server.ok(
        PATH,
        max_output_tokens=2,
        input=[
            {"role": "developer", "content": "be brief"},
            {"type": "message", "role": "user", "content": [
                {"type": "input_text", "text": "one"}, {"type": "input_text", "text": "two"}]},
            {"type": "reasoning", "summary": [], "id": "rs_1",
             "content": [{"type": "reasoning_text", "text": "hm"}]},
            {"role": "assistant", "content": [{"type": "output_text", "text": "well"}]},
            {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"x": 1}'},
            {"type": "function_call", "call_id": "c2", "name": "g", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c1", "output": "42"},
            {"type": "function_call_output", "call_id": "c2",
             "output": [{"type": "input_text", "text": "43"}]},
        ],
    )  # fmt: skip
    calls = [
        {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}},
        {"id": "c2", "type": "function", "function": {"name": "g", "arguments": {}}},
    ]
    assert server.prompt_text == (
        "<|system|>be brief<|end|><|user|>one\ntwo<|end|>"
        f"<|assistant|>well{json.dumps(calls)}<|end|><|tool|>42<|end|><|tool|>43<|end|>"
        "<|assistant|>"
    )


async def test_events_tell_the_whole_story_in_order(server: Server) -> None:
    server.say("hello world, this")
    found = await events(server, input="hi", top_logprobs=1)
    kinds = [event["type"].removeprefix("response.") for event in found]
    deltas = kinds.count("output_text.delta")
    assert kinds == [
        "created", "in_progress", "output_item.added", "content_part.added",
        *["output_text.delta"] * deltas,
        "output_text.done", "content_part.done", "output_item.done", "completed",
    ]  # fmt: skip
    assert deltas > 1
    assert found[0]["response"]["status"] == found[1]["response"]["status"] == "in_progress"
    assert found[0]["response"]["output"] == []
    item = found[-1]["response"]["output"][0]
    assert {event["item_id"] for event in found if "item_id" in event} == {item["id"]}
    assert {event["output_index"] for event in found[2:-1]} == {0}
    assert found[2]["item"] == item | {"content": [], "status": "in_progress"}
    text = "".join(e["delta"] for e in found if e["type"] == "response.output_text.delta")
    (done,) = [e for e in found if e["type"] == "response.output_text.done"]
    assert text == done["text"] == item["content"][0]["text"] == "hello world, this"
    streamed = [lp for e in found if e["type"].endswith("text.delta") for lp in e["logprobs"]]
    assert streamed == done["logprobs"] == item["content"][0]["logprobs"]
    assert b"".join(bytes(lp["bytes"]) for lp in streamed) == b"hello world, this"
    assert {event["response"]["id"] for event in found if "response" in event} == {
        found[0]["response"]["id"]
    }


async def test_stream_equals_plain(server: Server) -> None:
    fields = {"input": "hi", "seed": 3, "max_output_tokens": 40, "top_logprobs": 2}
    plain = await server.ok(PATH, **fields)
    streamed = (await events(server, **fields))[-1]["response"]
    for answer in (plain, streamed):
        for name in ("id", "created_at", "completed_at"):
            del answer[name]
        del answer["output"][0]["id"]
    assert plain == streamed


async def test_an_empty_turn_is_an_empty_message(server: Server) -> None:
    server.say("")
    answer = await server.ok(PATH, input="hi")
    assert [part["text"] for part in answer["output"][0]["content"]] == [""]
    kinds = [event["type"] for event in await events(server, input="hi")]
    assert kinds[2] == "response.output_item.added" and kinds[-1] == "response.completed"


async def test_a_conversation_goes_on(server: Server) -> None:
    server.say("hello")
    first = await server.ok(PATH, input="one", instructions="not carried over")
    second = await server.ok(PATH, input="two", previous_response_id=first["id"])
    assert second["previous_response_id"] == first["id"]
    assert server.prompt_text == (
        "<|user|>one<|end|><|assistant|>hello<|end|><|user|>two<|end|><|assistant|>"
    )
    assert second["usage"]["input_tokens"] == len(server.engine.requests[-1].prompt)
    await events(server, input="three", previous_response_id=second["id"])
    assert server.prompt_text.count("<|assistant|>hello<|end|>") == 2


async def test_the_default_choice_of_tools_may_be_said_without_tools(server: Server) -> None:
    for choice in ("auto", "none"):
        answer = await server.ok(PATH, input="hi", tools=[], tool_choice=choice)
        assert answer["tool_choice"] == choice
    response = await server.post(PATH, input="hi", tool_choice="required")
    assert response.json()["error"]["param"] == "tool_choice"


async def test_get_items_delete(server: Server) -> None:
    server.say("hello")
    first = await server.ok(PATH, input="one")
    streamed = (await events(server, input="two", previous_response_id=first["id"]))[-1]["response"]
    for answer in (first, streamed):
        kept = await server.http.get(f"{PATH}/{answer['id']}")
        assert kept.json() == answer
    url = f"{PATH}/{streamed['id']}/input_items"
    items = (await server.http.get(url)).json()
    assert [item["role"] for item in items["data"]] == ["user", "assistant", "user"]
    texts = [item["content"][0]["text"] for item in items["data"]]
    assert texts == ["two", "hello", "one"]
    assert (items["first_id"], items["last_id"]) == tuple(items["data"][i]["id"] for i in (0, -1))
    assert items["has_more"] is False
    page = (await server.http.get(url, params={"limit": 2, "order": "asc"})).json()
    assert page["has_more"] is True
    rest = (await server.http.get(url, params={"order": "asc", "after": page["last_id"]})).json()
    assert page["data"] + rest["data"] == items["data"][::-1]
    gone = await server.http.delete(f"{PATH}/{first['id']}")
    assert gone.json() == {"id": first["id"], "object": "response", "deleted": True}
    for method in ("GET", "DELETE"):
        check_error(await server.http.request(method, f"{PATH}/{first['id']}"), 404, "response_id")
    # The later one has its whole context itself.
    await server.ok(PATH, input="three", previous_response_id=streamed["id"])


async def test_what_is_not_stored_is_not_there(server: Server) -> None:
    for fields in ({"store": False}, {"store": False, "stream": True}):
        response = await server.post(PATH, input="one", max_output_tokens=2, **fields)
        id = "resp_" + response.text.split('"resp_')[1].split('"')[0]
        check_error(await server.http.get(f"{PATH}/{id}"), 404, "response_id")
        check_error(await server.http.get(f"{PATH}/{id}/input_items"), 404, "response_id")
        error = check_error(
            await server.post(PATH, input="two", previous_response_id=id),
            400,
            "previous_response_id",
        )
        assert error["code"] == "previous_response_not_found"


async def test_a_key_sees_only_its_own(make_server: MakeServer) -> None:
    server = make_server(api_keys=("mine", "theirs"))
    server.say("hello")
    mine, theirs = ({"authorization": f"Bearer {key}"} for key in ("mine", "theirs"))
    answer = await server.http.post(PATH, json={"input": "one"}, headers=mine)
    url = f"{PATH}/{answer.json()['id']}"
    assert (await server.http.get(url, headers=theirs)).status_code == 404
    assert (await server.http.delete(url, headers=theirs)).status_code == 404
    assert (await server.http.get(url, headers=mine)).status_code == 200


async def test_only_background_responses_can_be_cancelled(server: Server) -> None:
    server.say("hello")
    answer = await server.ok(PATH, input="one")
    check_error(await server.post(f"{PATH}/{answer['id']}/cancel"), 400, "response_id")
    check_error(await server.post(f"{PATH}/resp_nobody/cancel"), 404, "response_id")


async def test_input_tokens_are_those_of_the_response(server: Server) -> None:
    server.say("hello")
    fields = {"input": [{"role": "user", "content": "one two"}], "instructions": "three"}
    count = await server.ok(f"{PATH}/input_tokens", **fields)
    answer = await server.ok(PATH, **fields)
    assert count == {
        "object": "response.input_tokens", "input_tokens": answer["usage"]["input_tokens"]
    }  # fmt: skip


async def test_a_failure_on_the_way_is_the_last_event(server: Server) -> None:
    server.say("hello world, this")
    server.engine.die_after = 2
    found = await events(server, input="hi")
    assert found[-1]["type"] == "response.failed"
    response = found[-1]["response"]
    assert response["status"] == "failed"
    assert response["error"]["code"] == "server_error" and response["error"]["message"]
    assert response["output"][0]["content"][0]["text"]
    check_error(await server.post(PATH, input="hi", stream=True), 503, None)


CALL = {"type": "function_call", "call_id": "1", "name": "f"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"input": ["a"]}, "input[0]"),
        ({"input": [{"role": "wizard", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
         "input[0].content[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]},
         "input[0].content[0].text"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"type": ["message"]}]}, "input[0].type"),
        ({"input": [{**CALL, "arguments": "{"}]}, "input[0].arguments"),
        ({"input": [{**CALL, "arguments": "[]"}]}, "input[0].arguments"),
        ({"input": [{**CALL, "arguments": {}}]}, "input[0].arguments"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0].call_id"),
        ({"input": [{"type": "function_call_output", "call_id": "x"}]}, "input[0].output"),
        ({"input": "hello" * 300}, "input"),
        ({"input": "a", "background": True}, "background"),
        ({"input": "a", "max_output_tokens": 0}, "max_output_tokens"),
        ({"input": "a", "max_output_tokens": 256}, "max_output_tokens"),
        ({"input": "a", "top_logprobs": 21}, "top_logprobs"),
        ({"input": "a", "include": ["everything"]}, "include[0]"),
        ({"input": "a", "truncation": "auto"}, "truncation"),
        ({"input": "a", "text": {"format": {"type": "banana"}}}, "text.format.type"),
        ({"input": "a", "text": {"format": {"type": "json_schema", "name": "x", "schema": {
            "type": "banana"}}}}, "text.format.schema.type"),
        ({"input": "a", "text": {"format": {"type": "json_schema", "schema": {}}}},
         "text.format.name"),
        ({"input": "a", "text": {"format": {}}}, "text.format.type"),
        ({"input": "a", "tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"input": "a", "tools": [{"type": "function"}]}, "tools[0].name"),
        ({"input": "a", "tool_choice": {"type": "mcp"}}, "tool_choice.type"),
        ({"input": "a", "metadata": {"a": 5}}, "metadata"),
        ({"input": "a", "metadata": {str(i): "x" for i in range(17)}}, "metadata"),
        ({"input": "a", "stream_options": {}}, "stream_options"),
        ({"input": "a", "conversation": "c"}, "conversation"),
        ({"input": "a", "prompt": {"id": "p"}}, "prompt"),
        ({"input": "a", "messages": []}, "messages"),
        ({"input": "a", "n": 1}, "n"),
        ({"input": "a", "previous_response_id": "resp_nobody"}, "previous_response_id"),
        ({"input": "a", "stop_token_ids": [400]}, "stop_token_ids"),
    ],
    ids=lambda value: str(value)[:60],
)  # fmt: skip
async def test_faults(server: Server, fields: dict[str, Any], param: str) -> None:
    for extra in ({}, {"stream": True}):
        if "stream_options" not in fields:
            check_error(await server.post(PATH, **fields, **extra), 400, param)
    if "stream_options" in fields:
        check_error(await server.post(PATH, **fields), 400, param)
    assert not server.engine.requests


@pytest.mark.parametrize(
    ("path", "param"),
    [
        ("x?banana=1", "banana"), ("x?stream=true", "stream"), ("x?starting_after=1", "stream"),
        ("x/input_items?limit=0", "limit"), ("x/input_items?limit=101", "limit"),
        ("x/input_items?limit=²", "limit"), ("x/input_items?order=up", "order"),
    ],
)  # fmt: skip
async def test_wrong_queries(server: Server, path: str, param: str) -> None:
    check_error(await server.http.get(f"{PATH}/{path}"), 400, param)


async def test_the_store_is_bounded_in_number_and_age() -> None:
    store = ResponseStore("", 3)
    for i in range(5):
        await store.put(f"r{i}", "me", Stored(b"{}", b"[%d]" % i), now=float(i))
    found = [await store.get(f"r{i}", "me", 5.0) for i in range(5)]
    assert [f is not None for f in found] == [False, False, True, True, True]
    assert found[4] == Stored(b"{}", b"[4]")
    assert await store.get("r4", "me", 4.0 + MAX_AGE_SECONDS) is None
    assert await store.get("r4", "you", 5.0) is None
    await store.put("late", "me", Stored(b"{}", b"[]"), now=3.5 + MAX_AGE_SECONDS)
    assert await store.delete("r4", "me") and not await store.delete("r3", "me")
    store.close()


async def test_the_store_is_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.responses.store.MAX_BYTES", 1000)
    store = ResponseStore("", 100)
    for i in range(5):
        await store.put(f"r{i}", "me", Stored(b"x" * 400, b""), now=float(i))
    assert [await store.get(f"r{i}", "me", 5.0) is not None for i in range(5)] == (
        [False] * 3 + [True] * 2
    )
    store.close()


def test_a_file_that_is_no_database_is_said(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("no database, " * 100)
    for wrong in (path, tmp_path / "nowhere" / "file"):
        with pytest.raises(ResponseStoreError, match=str(wrong)):
            ResponseStore(str(wrong), 1)


async def test_a_file_outlives_the_server(make_server: MakeServer, tmp_path: Path) -> None:
    path = str(tmp_path / "responses.sqlite")
    first = make_server(response_store=path)
    first.say("hello")
    answer = await first.ok(PATH, input="one")
    first.service.responses.close()
    second = make_server(response_store=path)
    assert (await second.http.get(f"{PATH}/{answer['id']}")).json() == answer
