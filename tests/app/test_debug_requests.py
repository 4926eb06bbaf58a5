"""`/debug/requests`: every kind of request is found, by its owner only, without a word of it."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any

import pytest

from app.flights.recorder import KEPT_LANES
from tests.app.conftest import Live, MakeServer, Server
from tests.app.test_bad_requests import check_error
from tests.app.test_disconnect import PATIENCE, until

SECRET = "swordfish"
GENERATING: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": SECRET, "max_tokens": 5},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": SECRET}], "max_tokens": 5},
    "/v1/responses": {"input": SECRET, "max_output_tokens": 16},
    "/v1/messages": {"messages": [{"role": "user", "content": SECRET}], "max_tokens": 5},
}


async def told(server: Server, id: str, **headers: str) -> dict[str, Any]:
    response = await server.http.get(f"/debug/requests/{id}", headers=headers)
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.parametrize("path", GENERATING)
async def test_every_generating_endpoint(server: Server, path: str) -> None:
    server.say("hello world")
    response = await server.post(path, **GENERATING[path])
    answer, request_id = response.json(), response.headers["x-request-id"]
    by_request, by_answer = await told(server, request_id), await told(server, answer["id"])
    assert by_request == by_answer
    assert (by_answer["id"], by_answer["request_id"]) == (answer["id"], request_id)
    assert (by_answer["path"], by_answer["state"]) == (path, "ended")
    assert by_answer["streamed"] is False
    usage = answer["usage"]
    (sequence,) = by_answer["sequences"]
    counted = (sequence["prompt_tokens"], sequence["output_tokens"])
    names = [("prompt_tokens", "completion_tokens"), ("input_tokens", "output_tokens")]
    assert counted in [(usage.get(a), usage.get(b)) for a, b in names]
    assert sum(by_answer["stages"].values()) == pytest.approx(by_answer["seconds"])
    assert by_answer["verdict"]
    assert SECRET not in json.dumps(by_answer) and "hello" not in json.dumps(by_answer)


async def test_a_clients_own_id_names_the_request(server: Server) -> None:
    await server.ok("/v1/completions", prompt="a", request_id="mine/1")
    assert (await told(server, "mine/1"))["id"] == "cmpl-mine/1"
    assert (await told(server, "cmpl-mine/1"))["request_id"] == "mine/1"


async def test_a_stream_is_told_while_it_runs(server: Server) -> None:
    server.engine.resume.clear()
    server.engine.free_tokens = 2
    server.engine.script = lambda request: [70] * 6
    fields = {"prompt": [70], "max_tokens": 6, "stream": True, "n": 2}
    headers = {"x-request-id": "here"}
    task = asyncio.create_task(server.http.post("/v1/completions", json=fields, headers=headers))
    await until(lambda: server.service.metrics.generation_tokens == 4)
    running = await told(server, "here")
    assert (running["state"], running["finish"], running["streamed"]) == ("decode", None, True)
    assert [s["output_tokens"] for s in running["sequences"]] == [2, 2]
    assert " so far " in running["verdict"]
    (listed,) = (await server.http.get("/debug/requests")).json()["data"]
    assert (listed["request_id"], listed["output_tokens"]) == ("here", 4)
    server.engine.resume.set()
    await task
    assert (await told(server, "here"))["finish"] == "length"


async def test_the_list_is_newest_first(server: Server) -> None:
    for i in range(4):
        await server.ok("/v1/completions", prompt="a", max_tokens=1, request_id=f"r{i}")
    listed = (await server.http.get("/debug/requests?limit=3")).json()
    assert [entry["request_id"] for entry in listed["data"]] == ["r3", "r2", "r1"]
    assert listed["object"] == "list"


@pytest.mark.parametrize("limit", ["0", "1001", "-1", "x", "1.5", "9" * 30])
async def test_a_bad_limit(server: Server, limit: str) -> None:
    response = await server.http.get(f"/debug/requests?limit={limit}")
    assert "1 to 1000" in check_error(response, 400, "limit")["message"]


@pytest.mark.parametrize("path", ["/debug/requests", "/debug/requests/x"])
async def test_unknown_parameters_are_refused(server: Server, path: str) -> None:
    check_error(await server.http.get(f"{path}?banana=1"), 400, "banana")


async def test_what_is_not_known_is_404(server: Server) -> None:
    response = await server.http.get("/debug/requests/nothing")
    error = check_error(response, 404, "id")
    assert str(KEPT_LANES) in error["message"] and error["code"] == "request_not_found"


async def test_refused_requests_are_not_remembered(make_server: MakeServer) -> None:
    server = make_server(max_queued_requests=1)
    assert (await server.post("/v1/completions", prompt=["a", "b"])).status_code == 400
    server.engine.die()
    assert (await server.post("/v1/completions", prompt="a")).status_code == 503
    assert (await server.http.get("/debug/requests")).json()["data"] == []


async def test_a_key_sees_its_own_requests_only(make_server: MakeServer) -> None:
    server = make_server(api_keys=("one", "two"))
    for key in ("one", "two"):
        headers = {"authorization": f"Bearer {key}", "x-request-id": f"of-{key}"}
        await server.http.post("/v1/completions", json={"prompt": "a"}, headers=headers)
    assert (await server.http.get("/debug/requests")).status_code == 401
    assert (await server.http.get("/debug/requests/of-one")).status_code == 401
    mine = {"authorization": "Bearer one"}
    listed = (await server.http.get("/debug/requests", headers=mine)).json()["data"]
    assert [entry["request_id"] for entry in listed] == ["of-one"]
    assert (await told(server, "of-one", **mine))["request_id"] == "of-one"
    response = await server.http.get("/debug/requests/of-two", headers=mine)
    check_error(response, 404, "id")
    assert "two" not in json.dumps(await told(server, "of-one", **mine))


async def test_a_client_that_does_not_read_is_told_of(server: Server) -> None:
    """More than the buffers of both ends hold; the engine goes on, the answer waits."""
    server.engine.script = lambda request: server.ids("hello world ") * 100
    async with Live(server) as running:
        running.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", running.port))
        client.setblocking(False)
        reader, writer = await asyncio.open_connection(sock=client, limit=2048)
        fields = {"prompt": "a", "max_tokens": 200, "n": 8, "logprobs": 5, "stream": True}
        body = json.dumps(fields | {"request_id": "slow"}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        recorder = server.service.flights
        await until(lambda: (f := recorder.find("slow", "")) is not None and f.stalls > 0)
        await until(lambda: server.engine.running == 0)
        words = "passed until the client had read the answer"
        async with asyncio.timeout(PATIENCE):
            while not (await told(server, "slow"))["verdict"].endswith(f"so far {words}"):
                await asyncio.sleep(0.01)
        assert (await told(server, "slow"))["state"] == "delivering"
        while b"[DONE]" not in await reader.read(65536):
            pass
        await until(lambda: not recorder.open)
        ended = await told(server, "slow")
        assert ended["client_stalls"] >= 1 and ended["client_stalled_seconds"] > 0
        assert ended["verdict"].endswith(words) and ended["state"] == "ended"
        writer.close()


async def test_an_admins_key_sees_all_and_is_needed(make_server: MakeServer) -> None:
    server = make_server(api_keys=("one",), admin_key="operator")
    headers = {"authorization": "Bearer one", "x-request-id": "of-one"}
    await server.http.post("/v1/completions", json={"prompt": "a"}, headers=headers)
    for key, status in (("one", 403), ("operator", 200)):
        for path in ("/debug/requests/of-one", "/debug/requests"):
            answer = await server.http.get(path, headers={"authorization": f"Bearer {key}"})
            assert answer.status_code == status
            assert ("of-one" in answer.text) is (status == 200)
