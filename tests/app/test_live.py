"""`/debug/live`: frames of what happens, to who may see it, for as long as somebody watches."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import httpx
import msgspec
import pytest

from app.application import create_app
from app.flights.live import (
    MAX_LANES,
    MAX_OF_A_KEY,
    MAX_WATCHERS,
    WINDOW_SECONDS,
    Percentiles,
    Watch,
    percentiles,
)
from app.served import Served
from batching.core.types import EngineStats
from batching.worker.simulated import StepCost
from tests.app.conftest import Live, MakeServer, Server
from tests.app.flight_deck import FlightDeck
from tests.app.test_disconnect import until
from tests.app.test_keys import bearer


def watch(deck: FlightDeck, tenant: str = "") -> Watch:
    engine = SimpleNamespace(stats=EngineStats(), restarts=0)
    service = SimpleNamespace(flights=deck.recorder, engine=engine, model_name="m")
    return Watch(service, tenant)  # type: ignore[arg-type]


def test_a_frame_tells_lanes_and_only_new_steps() -> None:
    deck = FlightDeck(max_sequences=1)
    watcher = watch(deck)
    assert watcher.frame().lanes == []
    deck.fly("a", prompt=6, tokens=4)
    deck.step(2)
    deck.fly("b")
    frame = watcher.frame()
    assert [(lane.id, lane.state, lane.tokens) for lane in frame.lanes] == [
        ("cmpl-a", "decode", 2), ("cmpl-b", "queued", 0)
    ]  # fmt: skip
    assert [step.number for step in frame.steps] == [0, 1]
    assert [step.chunk_tokens for step in frame.steps] == [6, 0]
    (chunk,) = frame.lanes[0].chunks
    assert (chunk.tokens, chunk.ended) == (6, frame.lanes[0].first)
    deck.land()
    frame = watcher.frame()
    assert [step.number for step in frame.steps] == list(range(2, 8))
    assert [(lane.id, lane.state) for lane in frame.lanes] == [
        ("cmpl-b", "ended"), ("cmpl-a", "ended")
    ]  # fmt: skip
    deck.now += WINDOW_SECONDS + 1
    frame = watcher.frame()
    assert (frame.lanes, frame.steps) == ([], [])
    assert frame.time_to_first_token is frame.inter_token is None
    assert watch(deck).frame().steps == []


def test_times_between_tokens_are_those_of_the_steps() -> None:
    deck = FlightDeck(StepCost(fixed=0.01, prefill_token=0.001))
    deck.fly("a", tokens=90)
    deck.step(50)
    deck.fly("b", prompt=50, tokens=40)
    deck.land()
    frame = watch(deck).frame()
    found = frame.inter_token
    assert found is not None and frame.time_to_first_token is not None
    assert found.p50 == pytest.approx(0.01)
    assert found.p99 < 0.02
    gaps = [lane.last - lane.first for lane in frame.lanes]
    assert max(gaps) == pytest.approx(89 * 0.01 + 0.05)
    assert frame.time_to_first_token.p99 == pytest.approx(0.002 + 0.06)


def test_percentiles_count_weights() -> None:
    assert percentiles([]) is None
    assert percentiles([(3.0, 1)]) == Percentiles(3.0, 3.0, 3.0)
    assert percentiles([(9.0, 2), (1.0, 94), (5.0, 4)]) == Percentiles(1.0, 5.0, 9.0)


def test_rates_are_differences_of_totals() -> None:
    deck = FlightDeck()
    watcher = watch(deck)
    stats: Any = watcher._service.engine
    assert watcher.frame().rates is None
    for second in range(1, 9):
        deck.now += 1.0
        stats.stats = EngineStats(
            steps=50 * second, generation_tokens=100 * second, prompt_tokens=1000,
            forward_seconds=0.6 * second, idle_seconds=0.3 * second,
        )  # fmt: skip
        rates = watcher.frame().rates
        assert rates is not None and rates.output_tokens == pytest.approx(100)
    assert (rates.model, rates.idle) == (pytest.approx(0.6), pytest.approx(0.3))
    assert rates.host == pytest.approx(0.1)
    assert rates.prompt_tokens == 0
    assert len(watcher._moments) < 6


def test_a_tenant_sees_its_own_lanes_and_everybodys_steps() -> None:
    deck = FlightDeck()
    deck.fly("a", tenant="mine")
    deck.fly("b", tenant="theirs")
    deck.step()
    frame = watch(deck, "mine").frame()
    assert [lane.id for lane in frame.lanes] == ["cmpl-a"]
    assert [step.sequences for step in frame.steps] == [2]
    assert b"cmpl-b" not in msgspec.json.encode(frame)


def test_a_frame_is_bounded() -> None:
    deck = FlightDeck(max_sequences=4)
    for i in range(MAX_LANES + 9):
        deck.fly(f"r{i}")
    deck.step()
    frame = watch(deck).frame()
    assert (len(frame.lanes), frame.hidden) == (MAX_LANES, 9)
    assert [lane.state for lane in frame.lanes[:5]] == ["decode"] * 4 + ["queued"]
    deck.land()
    assert len(watch(deck).frame().lanes) == MAX_LANES


async def frames(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    async for line in response.aiter_lines():
        if line.startswith("data: "):
            yield json.loads(line.removeprefix("data: "))


async def test_over_http_until_the_watcher_goes(server: Server) -> None:
    recorder = server.service.flights
    async with Live(server) as running, httpx.AsyncClient() as http:
        url = f"http://127.0.0.1:{running.port}"
        async with http.stream("GET", f"{url}/debug/live") as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            news = frames(response)
            first = await anext(news)
            assert (first["model"], first["failure"], first["lanes"]) == ("tiny", None, [])
            assert recorder.watchers.total() == 1
            body = {"prompt": "a", "request_id": "seen"}
            await http.post(f"{url}/v1/completions", json=body)
            async for frame in news:
                if frame["lanes"]:
                    break
            assert frame["lanes"][0]["id"] == "cmpl-seen"
        await until(lambda: recorder.watchers.total() == 0)


async def test_it_ends_when_the_server_drains(server: Server) -> None:
    served = Served(server.service)
    server.app = create_app(served)
    async with Live(server) as running, httpx.AsyncClient() as http:
        url = f"http://127.0.0.1:{running.port}/debug/live"
        async with http.stream("GET", url) as response:
            news = frames(response)
            await anext(news)
            served.draining = True
            async with asyncio.timeout(10):
                async for _ in news:
                    pass
    assert server.service.flights.watchers.total() == 0


async def test_so_many_watchers_and_no_more(make_server: MakeServer) -> None:
    server = make_server()
    watchers = server.service.flights.watchers
    watchers[""] = MAX_WATCHERS
    response = await server.http.get("/debug/live")
    assert response.status_code == 429 and response.headers["retry-after"]
    assert response.json()["error"]["code"] == "too_many_watchers"
    watchers.clear()
    assert (await server.http.get("/debug/live?x=1")).json()["error"]["param"] == "x"


async def test_one_key_does_not_keep_out_the_others(make_server: MakeServer) -> None:
    server = make_server(api_keys=("greedy", "modest"))
    async with Live(server) as running, httpx.AsyncClient() as http:

        async def watch_as(key: str) -> httpx.Response:
            url = f"http://127.0.0.1:{running.port}/debug/live"
            request = http.build_request("GET", url, headers=bearer(key))
            return await http.send(request, stream=True)

        greedy = [await watch_as("greedy") for _ in range(MAX_OF_A_KEY + 1)]
        assert [r.status_code for r in greedy] == [200] * MAX_OF_A_KEY + [429]
        modest = await watch_as("modest")
        assert modest.status_code == 200
        for response in (*greedy, modest):
            await response.aclose()
