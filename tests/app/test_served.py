"""Several models behind one server: lists, health, metrics, and what each one refuses."""

from __future__ import annotations

from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from app.routes import ROUTES
from tests.app.conftest import MODEL, MakeServer
from tests.app.pooling import EMBEDDER, MakePools, make_pools, pool_folder
from tests.app.test_bad_requests import check_error

__all__ = ["make_pools", "pool_folder"]


async def test_models_lists_all_and_each(make_server: MakeServer, make_pools: MakePools) -> None:
    pools = make_pools({"org/one": EMBEDDER}, make_server().service)
    listed = (await pools.http.get("/v1/models")).json()["data"]
    assert [card["id"] for card in listed] == [MODEL, "org/one"]
    for card in listed:
        assert (await pools.http.get(f"/v1/models/{card['id']}")).json() == card
    assert (await pools.http.get("/v1/models/org")).status_code == 404


async def test_health_asks_every_engine(make_server: MakeServer, make_pools: MakePools) -> None:
    chat = make_server()
    pools = make_pools({"one": EMBEDDER}, chat.service)
    assert (await pools.http.get("/health")).status_code == 200
    pools.engine.failure = "restarting: it hung"
    response = await pools.http.get("/health")
    assert "one: no engine serves (restarting: it hung)" in response.json()["error"]["message"]
    assert response.status_code == 503
    pools.engine.failure = None
    chat.engine.failure = "gone"
    assert MODEL in (await pools.http.get("/ready")).json()["error"]["message"]


async def test_metrics_have_each_family_once(
    make_server: MakeServer, make_pools: MakePools
) -> None:
    pools = make_pools({"one": EMBEDDER, "two": EMBEDDER}, make_server().service)
    await pools.ok("/v1/embeddings", input=["a b", "c"], model="two")
    text = (await pools.http.get("/metrics")).text
    families = list(text_string_to_metric_families(text))
    assert len(families) == len({family.name for family in families})
    (tokens,) = (family for family in families if family.name == "vllm:prompt_tokens")
    values = {s.labels["model_name"]: s.value for s in tokens.samples}
    assert values == {MODEL: 0, "one": 0, "two": 7}
    (ended,) = (family for family in families if family.name == "vllm:request_success")
    wanted = {"model_name": "two", "engine": "0", "finished_reason": "stop"}
    assert [sample.value for sample in ended.samples if sample.labels == wanted] == [2]
    for name in ("e2e_request_latency_seconds", "request_prompt_tokens", "iteration_tokens_total"):
        assert f'vllm:{name}_count{{engine="0",model_name="two"}}' in text


async def test_generation_names_what_a_pooling_model_does(
    make_server: MakeServer, make_pools: MakePools
) -> None:
    pools = make_pools({"one": EMBEDDER}, make_server().service)
    for path, fields in (
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
        ("/tokenize", {"prompt": "a"}),
    ):
        error = check_error(await pools.post(path, model="one", **fields), 400, "model")
        assert "/v1/embeddings" in error["message"] and MODEL in error["message"]
        check_error(await pools.post(path, model="nobody", **fields), 404, "model")
        assert (await pools.post(path, **fields)).status_code == 200


@pytest.mark.parametrize(
    "route", [r for r in ROUTES if not r.whole], ids=lambda route: f"{route.method} {route.path}"
)
async def test_an_embedder_alone_refuses_to_generate(make_pools: MakePools, route: Any) -> None:
    pools = make_pools({"one": EMBEDDER})
    path = route.path.replace("{id}", "x").replace("{name:path}", "x")
    response = await pools.http.request(route.method, path, json={"model": "one"})
    assert response.status_code == 400
    assert "/v1/embeddings" in response.text and "cannot generate" in response.text
