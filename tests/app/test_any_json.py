"""Whatever JSON comes, the answer is a result or an error object, never a 5xx."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.schemas import chat, completions, messages, responses
from tests.app.conftest import Server

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=20), st.sampled_from([0, 1, -1, 2**63, 2**70, "", "none", "auto", "user"]),
)  # fmt: skip
KEYS = st.sampled_from(["type", "role", "content", "text", "name", "function", "0", "7"])
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(KEYS | st.text(), inner, max_size=4)
    ),
    max_leaves=8,
)


def bodies(schema: type, required: dict[str, Any], refused: dict[str, str]) -> st.SearchStrategy:
    names = [f.name for f in msgspec.structs.fields(schema)] + sorted(refused)
    extra = st.dictionaries(st.sampled_from(names), VALUES, max_size=3)
    return st.tuples(extra, st.booleans()).map(
        lambda pair: (required | pair[0]) if pair[1] else (pair[0] | required)
    )


ANTHROPIC = {"type", "message"}
MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("path", "strategy"),
    [
        (
            "/v1/completions",
            bodies(completions.CompletionRequest, {"prompt": "a"}, completions.REFUSED),
        ),
        ("/v1/chat/completions", bodies(chat.ChatRequest, {"messages": MESSAGES}, chat.REFUSED)),
        ("/v1/responses", bodies(responses.ResponsesRequest, {"input": "a"}, responses.REFUSED)),
        (
            "/v1/messages",
            bodies(
                messages.MessagesRequest,
                {"messages": MESSAGES, "max_tokens": 5},
                messages.REFUSED,
            ),
        ),
    ],
    ids=["completions", "chat", "responses", "messages"],
)
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
async def test_no_server_error(
    server: Server, path: str, strategy: st.SearchStrategy, data: st.DataObject
) -> None:
    body = data.draw(strategy)
    response = await server.http.post(path, content=json.dumps(body).encode())
    assert response.status_code < 500, (body, response.text)
    if response.status_code != 200:
        expected = ANTHROPIC if path == "/v1/messages" else {"message", "type", "param", "code"}
        assert set(response.json()["error"]) == expected
