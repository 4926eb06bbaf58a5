"""Bad input gets a clear OpenAI-style error, and the server goes on."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.e2e.conftest import MODEL
from tests.e2e.server_process import ServerProcess

GOOD: dict[str, Any] = {"model": MODEL, "prompt": "Once", "max_tokens": 2}


def raw(text: str) -> bytes:
    return text.encode()


BODIES: list[tuple[bytes | dict[str, Any], int, str | None]] = [
    (raw("{"), 400, None),
    (raw(""), 400, None),
    (raw("[1]"), 400, None),
    (b"\xff\xfe", 400, None),
    (raw("[" * 100_000), 400, None),
    (raw('{"model":"' + MODEL + '","prompt":"x","temperature":NaN}'), 400, "temperature"),
    (raw('{"model":"' + MODEL + '","prompt":"x","temperature":1e999}'), 400, "temperature"),
    (GOOD | {"max_tokens": "ten"}, 400, "max_tokens"),
    (GOOD | {"max_tokens": 2.5}, 400, "max_tokens"),
    (GOOD | {"stream": 1}, 400, "stream"),
    (GOOD | {"prompt": [1, True]}, 400, "prompt"),
    (GOOD | {"prompt": [1, 10**9]}, 400, "prompt"),
    (GOOD | {"prompt": [-1]}, 400, "prompt"),
    (GOOD | {"prompt": "word " * 20_000}, 400, "prompt"),
    (GOOD | {"max_tokens": 10**6}, 400, "max_tokens"),
    (GOOD | {"stop": ["a", "b", "c", "d", "e"]}, 400, "stop"),
    (GOOD | {"temperature": 3}, 400, "temperature"),
    (GOOD | {"top_p": -0.1}, 400, "top_p"),
    (GOOD | {"n": 0}, 400, "n"),
    (GOOD | {"logit_bias": {"5": 200}}, 400, "logit_bias"),
    (GOOD | {"banana": 1}, 400, "banana"),
    (GOOD | {"model": "nobody/nothing"}, 404, "model"),
]


@pytest.mark.parametrize("body,status,param", BODIES, ids=[str(i) for i in range(len(BODIES))])
def test_the_error_names_the_field(
    server: ServerProcess, body: bytes | dict[str, Any], status: int, param: str | None
) -> None:
    sent = {"content": body} if isinstance(body, bytes) else {"json": body}
    response = httpx.post(f"{server.url}/v1/completions", timeout=30, **sent)  # type: ignore[arg-type]
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    if param is not None:
        assert error["param"] is not None and error["param"].split(".")[0] == param
    good = httpx.post(f"{server.url}/v1/completions", json=GOOD, timeout=30)
    assert good.status_code == 200


def test_unknown_routes_and_methods_take_the_same_shape(server: ServerProcess) -> None:
    for response in (
        httpx.get(f"{server.url}/v1/nothing"),
        httpx.get(f"{server.url}/v1/completions"),
    ):
        assert response.status_code in (404, 405)
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
