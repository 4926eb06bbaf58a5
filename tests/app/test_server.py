"""Routes without generation, keys and request ids."""

from __future__ import annotations

import re

import msgspec
import pytest

from app.access.keys import KeyRing
from app.routes import ROUTES
from batching.worker.protocol import Capabilities
from tests.app.conftest import MakeServer, Server

ALL_PATHS = ["/v1/models", "/version", "/metrics", "/openapi.json", "/v1/nothing"]


async def test_plain_routes(server: Server) -> None:
    for path in ("/health", "/ready", "/ping", "/version", "/openapi.json"):
        assert (await server.http.get(path)).status_code == 200
    models = (await server.http.get("/v1/models")).json()
    (card,) = models["data"]
    assert models["object"] == "list"
    assert card["id"] == "tiny"
    assert card["max_model_len"] == 256
    assert (await server.http.get("/v1/models/tiny")).json() == card


async def test_what_an_engine_warned_of_is_told(
    make_server: MakeServer, capabilities: Capabilities
) -> None:
    slow = msgspec.structs.replace(capabilities, warnings=("no kernels",))
    for caps, degraded in ((capabilities, "false"), (slow, "true")):
        server = make_server(caps=caps)
        health = (await server.http.get("/health")).json()
        assert health.get("warnings", []) == list(caps.warnings) and health["status"] == "ok"
        text = (await server.http.get("/metrics")).text
        assert re.search(rf'slipstream_engine_info\{{.*degraded="{degraded}".*\}} 1', text)


async def test_what_a_restarted_engine_warns_of_is_told(
    server: Server, capabilities: Capabilities
) -> None:
    server.engine.capabilities = msgspec.structs.replace(
        capabilities, warnings=("no kernels",), num_blocks=77, phases={"weights": 12.5}
    )
    assert (await server.http.get("/health")).json()["warnings"] == ["no kernels"]
    text = (await server.http.get("/metrics")).text
    assert re.search(r'slipstream_engine_info\{.*degraded="true".*\} 1', text)
    assert re.search(r'vllm:cache_config_info\{.*num_gpu_blocks="77".*\} 1', text)
    assert re.search(r'phase="weights".*\} 12\.5', text)


async def test_only_admin_paths_ask_whether_there_are_admins(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[KeyRing] = []
    monkeypatch.setattr(KeyRing, "guards_admin", property(asked.append))
    await server.http.get("/v1/models")
    assert not asked
    await server.http.get("/metrics")
    assert len(asked) == 1


async def test_an_engine_that_does_not_serve_is_not_healthy(server: Server) -> None:
    server.engine.failure = "restarting: it hung"
    for path in ("/health", "/ready", "/ping"):
        response = await server.http.get(path)
        assert response.status_code == 503
        error = response.json()["error"]
        assert error["code"] == "engine_unavailable"
        assert "it hung" in error["message"]
    assert (await server.http.get("/live")).status_code == 200
    server.engine.failure = None
    assert (await server.http.get("/health")).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": "Bearer "},
        {"authorization": "right"},
        {"authorization": "Basic right"},
        {"x-api-key": "wrong"},
        {"authorization": b"Bearer \xff\xfe"},
    ],
)
async def test_wrong_keys(make_server: MakeServer, headers: dict[str, str]) -> None:
    server = make_server(api_keys=("right", "other"))
    for path in ALL_PATHS:
        response = await server.http.get(path, headers=headers)
        assert response.status_code == 401
        assert response.json()["error"]["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"
        assert response.headers["x-request-id"]
    response = await server.http.post("/v1/completions", content=b"{", headers=headers)
    assert response.status_code == 401
    for path in ("/health", "/ready", "/ping", "/live"):
        assert (await server.http.get(path, headers=headers)).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [{"authorization": "Bearer right"}, {"authorization": "bearer other"}, {"x-api-key": "right"}],
)
async def test_right_keys(make_server: MakeServer, headers: dict[str, str]) -> None:
    server = make_server(api_keys=("right", "other"))
    assert (await server.http.get("/v1/models", headers=headers)).status_code == 200


async def test_request_ids(server: Server) -> None:
    first = await server.http.get("/health")
    second = await server.http.get("/health")
    assert first.headers["x-request-id"] != second.headers["x-request-id"]
    for given, kept in (("abc-1", True), ("a b", False), ("x" * 201, False)):
        response = await server.http.get("/nothing", headers={"x-request-id": given})
        assert (response.headers["x-request-id"] == given) is kept


async def test_openapi_describes_the_bodies(server: Server) -> None:
    paths = (await server.http.get("/openapi.json")).json()["paths"]
    body = paths["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]
    schema = body["schema"]
    assert schema["required"] == ["prompt"]
    assert schema["additionalProperties"] is False
    assert schema["properties"]["n"] == {
        "type": "integer", "minimum": 1, "maximum": 128, "default": 1
    }  # fmt: skip
    assert "$ref" not in str(schema)


async def test_openapi_has_every_route_with_its_errors(server: Server) -> None:
    paths = (await server.http.get("/openapi.json")).json()["paths"]
    for path, item in paths.items():
        for method, operation in item.items():
            assert {"400", "401", "404", "413", "429", "500", "503"} <= set(operation["responses"])
            assert "422" not in operation["responses"]
            bodiless = method != "post" or path.endswith("/cancel")
            assert ("requestBody" in operation) is not bodiless
            named = {p["name"] for p in operation["parameters"] if p["in"] == "path"}
            assert named == set(re.findall(r"{(\w+)}", path))
    described = {route.path.replace(":path", "") for route in ROUTES if route.described}
    assert described == set(paths)


async def test_a_page_of_another_origin_is_refused_where_there_are_no_keys(
    make_server: MakeServer,
) -> None:
    server = make_server(cors_origins=("https://app.example",))
    for origin, status in (
        ("http://test", 200),  # its own page
        ("https://app.example", 200),
        ("https://evil.example", 403),
        ("http://test:8000", 403),
        ("null", 403),
    ):
        answer = await server.http.post(
            "/v1/completions",
            content='{"prompt": "a"}',
            headers={"origin": origin, "content-type": "text/plain"},  # a browser just sends it
        )
        assert answer.status_code == status, origin
        if status == 403:
            assert answer.json()["error"]["code"] == "origin_not_allowed"
    assert len(server.engine.requests) == 2
    assert (await server.post("/v1/completions", prompt="a")).status_code == 200
    evil = {"origin": "https://evil.example"}
    assert (await make_server().http.get("/metrics", headers=evil)).status_code == 403
    everybody = make_server(cors_origins=("*",))
    assert (await everybody.http.get("/v1/models", headers=evil)).status_code == 200
    keyed = make_server(api_keys=("right",))
    headers = evil | {"authorization": "Bearer right"}
    assert (await keyed.http.get("/v1/models", headers=headers)).status_code == 200
