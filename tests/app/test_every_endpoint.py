"""What holds on each route that takes a body: requirements on errors that no endpoint may forget.

The routes are those the server has: a new one is covered when it is added.
"""

from __future__ import annotations

from typing import Any

import pytest

from app.http.errors import ERROR_SCHEMA
from app.routes import ROUTES, Route
from tests.app.conftest import MakeServer, Server
from tests.app.test_bad_requests import BODIES, check_error

WITH_BODY = [route for route in ROUTES if route.body is not None]
EXAMPLES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "a"},
    "/tokenize": {"prompt": "a"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
    "/detokenize": {"tokens": [1]},
    "/v1/responses": {"input": "a"},
    "/v1/responses/input_tokens": {"input": "a"},
    "/v1/messages": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1},
    "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": "hi"}]},
    "/v1/embeddings": {"input": "a"},
    "/classify": {"input": "a"},
    **{path: {"text_1": "a", "text_2": "b"} for path in ("/score", "/v1/score")},
    "/rerank": {"query": "a", "documents": ["b"]},
    "/v1/rerank": {"query": "a", "documents": ["b"]},
    "/v2/rerank": {"query": "a", "documents": ["b"]},
}
EACH = pytest.mark.parametrize("route", WITH_BODY, ids=lambda route: route.path)


def check(route: Route, response: Any, status: int) -> dict[str, Any]:
    """The error, in its route's shape."""
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    if route.errors is ERROR_SCHEMA:
        return check_error(response, status, response.json()["error"]["param"])
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == set(route.errors["required"])
    return body["error"]


@EACH
@pytest.mark.parametrize("body", BODIES, ids=lambda body: repr(body[:30]))
async def test_a_body_that_is_no_json_object_is_400(
    server: Server, route: Route, body: bytes
) -> None:
    check(route, await server.http.post(route.path, content=body), 400)


@EACH
@pytest.mark.parametrize("number", [b"NaN", b"Infinity", b"-Infinity", b"1e999"])
async def test_numbers_that_are_not_finite_are_400(
    server: Server, route: Route, number: bytes
) -> None:
    assert route.body is not None
    for field in route.body.__struct_encode_fields__:
        body = b'{"%s": %s}' % (field.encode(), number)
        error = check(route, await server.http.post(route.path, content=body), 400)
        assert field in error["message"]


@EACH
async def test_an_unknown_field_is_refused_by_name(server: Server, route: Route) -> None:
    for value in (1, None, {}):
        error = check(route, await server.post(route.path, banana=value), 400)
        assert "banana" in error["message"]


VALUES = {
    "string": "5", "integer": 17, "number": 1.5, "boolean": True, "array": [], "object": {},
}  # fmt: skip


def accepted(schema: dict[str, Any]) -> set[str]:
    """The JSON types that a field may have; empty for any."""
    if "anyOf" in schema:
        return set().union(*map(accepted, schema["anyOf"]))
    if "enum" in schema:
        return {"string"}
    return {schema["type"]} if "type" in schema else set(VALUES)


@EACH
async def test_no_type_is_converted(server: Server, route: Route) -> None:
    openapi = (await server.http.get("/openapi.json")).json()["paths"][route.path]["post"]
    schema = openapi["requestBody"]["content"]["application/json"]["schema"]
    for name, field in schema["properties"].items():
        types = accepted(field)
        types |= {"integer"} if "number" in types else set()
        for kind in sorted(VALUES.keys() - types):
            response = await server.post(route.path, **{name: VALUES[kind]})
            error = check(route, response, 400)
            assert name in error["message"], (name, kind)
    assert not server.engine.requests


@EACH
async def test_a_large_body_is_413(make_server: MakeServer, route: Route) -> None:
    server = make_server(max_body_bytes=1024)
    check(route, await server.http.post(route.path, content=b" " * 1025), 413)


@EACH
async def test_authentication_precedes_the_body(make_server: MakeServer, route: Route) -> None:
    server = make_server(api_keys=("right",))
    check(route, await server.http.post(route.path, content=b"{"), 401)


@EACH
async def test_a_wrong_method_is_405(server: Server, route: Route) -> None:
    response = await server.http.put(route.path, json={})
    check(route, response, 405)
    assert response.headers["allow"] == "POST"


async def test_an_unexpected_failure_is_a_500_that_names_the_request(server: Server) -> None:
    def fail(name: str | None) -> None:
        raise ZeroDivisionError

    object.__setattr__(server.service, "check_model", fail)
    for route in WITH_BODY:
        headers = {"x-request-id": "find-me"}
        fields = (
            {"prompt": "a"} if "prompt" in route.body.__struct_fields__ else EXAMPLES[route.path]
        )
        response = await server.http.post(route.path, json=fields, headers=headers)
        assert "find-me" in check(route, response, 500)["message"]
        assert response.headers["x-request-id"] == "find-me"
