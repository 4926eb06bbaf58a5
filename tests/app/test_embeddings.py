"""`/v1/embeddings`: forms of input, unit length, base64, truncation, errors, overload."""

from __future__ import annotations

import asyncio
import base64
import json
import re
from typing import Any

import msgspec
import numpy as np
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai._legacy_response import LegacyAPIResponse

from app.pooling.inputs import MAX_INPUTS
from app.schemas import pooling
from tests.app.conftest import Live, MakeServer, Server
from tests.app.pooling import (
    CLASSIFIER,
    CLS,
    CROSS_ENCODER,
    EMBEDDER,
    LIMIT,
    SEP,
    VOCABULARY,
    EngineDeadError,
    MakePools,
    PoolError,
    PoolServer,
    ids,
    make_pools,
    pool_folder,
)
from tests.app.test_any_json import bodies
from tests.app.test_bad_requests import check_error
from tests.app.test_disconnect import until

__all__ = ["make_pools", "pool_folder"]

PATH = "/v1/embeddings"
LONG = " ".join("a" for _ in range(LIMIT - 1))  # one token too many, with the special ones


@pytest.fixture
def pools(make_pools: MakePools) -> PoolServer:
    return make_pools()


def vectors(answer: dict[str, Any]) -> np.ndarray:
    assert [item["index"] for item in answer["data"]] == list(range(len(answer["data"])))
    assert {item["object"] for item in answer["data"]} == {"embedding"}
    return np.array([item["embedding"] for item in answer["data"]])


async def test_the_four_forms_of_input(pools: PoolServer) -> None:
    text = await pools.ok(PATH, input="a b")
    texts = await pools.ok(PATH, input=["c", "a b"])
    tokens = await pools.ok(PATH, input=[CLS, *ids("a b"), SEP])
    lists = await pools.ok(PATH, input=[ids("c"), [CLS, *ids("a b"), SEP]])
    assert pools.tokens == [
        [CLS, *ids("a b"), SEP],
        [CLS, *ids("c"), SEP],
        [CLS, *ids("a b"), SEP],
        [CLS, *ids("a b"), SEP],
        ids("c"),  # ids are used exactly as given
        [CLS, *ids("a b"), SEP],
    ]
    expected = vectors(text)[0]
    for answer in (texts, tokens, lists):
        assert np.array_equal(vectors(answer)[-1], expected)
    usages = [answer["usage"] for answer in (text, texts, tokens, lists)]
    assert usages == [{"prompt_tokens": n, "total_tokens": n} for n in (4, 7, 4, 5)]
    assert pools.models["embedder"].metrics.prompt_tokens == 4 + 7 + 4 + 5
    assert (text["object"], text["model"]) == ("list", "embedder")


async def test_base64_is_little_endian_float32_and_the_clients_default(pools: PoolServer) -> None:
    floats = vectors(await pools.ok(PATH, input=["a", "b c"]))
    answer = await pools.ok(PATH, input=["a", "b c"], encoding_format="base64")
    rows = [np.frombuffer(base64.b64decode(item["embedding"]), "<f4") for item in answer["data"]]
    assert np.array_equal(np.stack(rows), floats.astype(np.float32))
    async with Live(pools) as live:  # type: ignore[arg-type]
        client = openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{live.port}/v1", api_key="none")
        raw: LegacyAPIResponse[Any] = await client.embeddings.with_raw_response.create(
            model="embedder", input=["a", "b c"]
        )
        assert isinstance(json.loads(raw.content)["data"][0]["embedding"], str)
        assert [item.embedding for item in raw.parse().data] == floats.tolist()
        plain = await client.embeddings.create(
            model="embedder", input="a", encoding_format="float", dimensions=2, user="me"
        )
        assert len(plain.data[0].embedding) == 2
        await client.close()


@pytest.mark.parametrize("dimensions", [None, 1, 2, 3, 4])
async def test_unit_length_also_of_fewer_dimensions(
    pools: PoolServer, dimensions: int | None
) -> None:
    whole = vectors(await pools.ok(PATH, input=["a", "b c d"], use_activation=False))
    cut = vectors(await pools.ok(PATH, input=["a", "b c d"], dimensions=dimensions))
    assert cut.shape == (2, dimensions or 4)
    assert np.abs(np.linalg.norm(cut, axis=1) - 1).max() < 1e-6
    head = whole[:, : dimensions or 4]
    assert np.allclose(cut, head / np.linalg.norm(head, axis=1, keepdims=True), atol=1e-6)


async def test_zeros_are_not_divided(pools: PoolServer) -> None:
    pools.engine.numbers = lambda request: [0.0, 0.0, 0.0, 1.0]
    assert vectors(await pools.ok(PATH, input="a", dimensions=3)).tolist() == [[0.0, 0.0, 0.0]]
    pools.engine.numbers = lambda request: [3e38, 3e38, 3e38, 3e38]  # their squares overflow
    assert vectors(await pools.ok(PATH, input="a")).tolist() == [[0.5] * 4]


async def test_numbers_that_are_not_finite_are_a_failure(pools: PoolServer) -> None:
    pools.engine.numbers = lambda request: [1.0, float("nan"), 0.0, 0.0]
    check_error(await pools.post(PATH, input="a"), 500, None)


@pytest.mark.parametrize(
    "fields,expected",
    [
        ({"truncate_prompt_tokens": 4}, [CLS, *ids("a b"), SEP]),
        ({"truncate_prompt_tokens": 4, "truncation_side": "left"}, [CLS, *ids("d e"), SEP]),
        ({"truncate_prompt_tokens": 4, "add_special_tokens": False}, ids("a b c d")),
        ({"truncate_prompt_tokens": -1}, [CLS, *ids("a b c d e"), SEP]),
        ({"add_special_tokens": False}, ids("a b c d e")),
    ],
)
async def test_truncation(pools: PoolServer, fields: dict[str, Any], expected: list[int]) -> None:
    answer = await pools.ok(PATH, input="a b c d e", **fields)
    assert pools.tokens == [expected]
    assert answer["usage"]["prompt_tokens"] == len(expected)


async def test_truncation_of_ids(pools: PoolServer) -> None:
    await pools.ok(PATH, input=ids("a b c d"), truncate_prompt_tokens=2)
    await pools.ok(PATH, input=[ids("a b c d")], truncate_prompt_tokens=3, truncation_side="left")
    assert pools.tokens == [ids("a b"), ids("b c d")]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("words", [LIMIT, 20 * LIMIT, 2000 * LIMIT])
async def test_a_long_text_is_cut_only_when_asked(pools: PoolServer, words: int, side: str) -> None:
    text = "a " * words + "b"
    error = check_error(await pools.post(PATH, input=["c", text]), 400, "input[1]")
    assert error["code"] == "context_length_exceeded"
    assert str(LIMIT) in error["message"]
    await pools.ok(PATH, input=text, truncate_prompt_tokens=-1, truncation_side=side)
    (tokens,) = pools.tokens
    assert len(tokens) == LIMIT
    assert (tokens[-2] == ids("b")[0]) is (side == "left")


async def test_spaces_do_not_make_a_text_long(pools: PoolServer) -> None:
    await pools.ok(PATH, input="a" + " " * 5000 + "b")
    assert pools.tokens == [[CLS, *ids("a b"), SEP]]


async def test_lower_case_is_the_models_wish(make_pools: MakePools) -> None:
    pools = make_pools({"embedder": {"lower_case": True}})
    await pools.ok(PATH, input="A b")
    assert pools.tokens == [[CLS, *ids("a b"), SEP]]


@pytest.mark.parametrize(
    "fields,param",
    [
        ({}, "input"),
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": [""]}, "input[0]"),
        ({"input": ["a", ""]}, "input[1]"),
        ({"input": ["a", 1]}, "input"),
        ({"input": ["a", ["b"]]}, "input"),
        ({"input": [[]]}, "input[0]"),
        ({"input": [[1], [1, True]]}, "input[1]"),
        ({"input": [1, True]}, "input"),
        ({"input": [1.0]}, "input"),
        ({"input": [-1]}, "input"),
        ({"input": [[0], [len(VOCABULARY)]]}, "input[1]"),
        ({"input": [2**70]}, "input"),
        ({"input": 5}, "input"),
        ({"input": {"text": "a"}}, "input"),
        ({"input": ["a"] * (MAX_INPUTS + 1)}, "input"),
        ({"input": [[1]] * (MAX_INPUTS + 1)}, "input"),
        ({"input": LONG}, "input"),
        ({"input": [0] * (LIMIT + 1)}, "input"),
        ({"input": "a", "dimensions": 0}, "dimensions"),
        ({"input": "a", "dimensions": 5}, "dimensions"),
        ({"input": "a", "dimensions": 2.0}, "dimensions"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format"),
        ({"input": "a", "embed_dtype": "float16"}, "embed_dtype"),
        ({"input": "a", "endianness": "big"}, "endianness"),
        ({"input": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"input": "a", "truncate_prompt_tokens": 2}, "truncate_prompt_tokens"),
        ({"input": "a", "truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
        ({"input": "a", "truncate_prompt_tokens": LIMIT + 1}, "truncate_prompt_tokens"),
        ({"input": "a", "truncation_side": "middle"}, "truncation_side"),
        ({"input": "a", "use_activation": 1}, "use_activation"),
        ({"input": "a", "banana": 1}, "banana"),
        ({"input": "a", "messages": []}, "messages"),
        ({"input": "a", "priority": 1}, "priority"),
    ],
)
async def test_bad_requests(pools: PoolServer, fields: dict[str, Any], param: str) -> None:
    check_error(await pools.post(PATH, **fields), 400, param)
    assert pools.tokens == []
    await pools.ok(PATH, input="a", dimensions=None)  # null is absent


async def test_as_many_texts_as_allowed(pools: PoolServer) -> None:
    answer = await pools.ok(PATH, input=["a b"] * MAX_INPUTS)
    assert len(vectors(answer)) == MAX_INPUTS
    assert answer["usage"]["prompt_tokens"] == 4 * MAX_INPUTS


@pytest.mark.parametrize(
    "limits,code",
    [
        ({"max_queued_requests": 1}, "max_num_queued_reqs"),
        ({"max_queued_tokens": 1}, "max_num_queued_tokens"),
    ],
)
async def test_a_full_queue_is_429(
    make_pools: MakePools, limits: dict[str, int], code: str
) -> None:
    pools = make_pools(**limits)
    pools.engine.hold = True
    first = asyncio.create_task(pools.post(PATH, input=["a"] * 50))  # a call counts as one
    await until(lambda: pools.engine.open == 50)
    response = await pools.post(PATH, input="b")
    assert check_error(response, 429, None)["code"] == code
    assert int(response.headers["retry-after"]) >= 1
    first.cancel()
    await until(lambda: pools.engine.open == 0)
    pools.engine.hold = False
    await pools.ok(PATH, input="b")


async def test_a_client_that_goes_away_frees_its_texts(pools: PoolServer) -> None:
    pools.engine.hold = True
    model = pools.models["embedder"]
    async with Live(pools) as live:  # type: ignore[arg-type]
        _, writer = await asyncio.open_connection("127.0.0.1", live.port)
        body = b'{"input": ["a", "b", "c"]}'
        head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        await until(lambda: pools.engine.open == 3)
        assert model.admission.requests == 1
        writer.close()
        await until(lambda: len(pools.engine.aborted) == 3)
        await until(lambda: model.metrics.finished["abort"] == 3)
    assert model.admission.requests == 0


async def test_failures_of_the_engine(pools: PoolServer) -> None:
    pools.engine.error = PoolError("the request crashed the engine repeatedly")
    error = check_error(await pools.post(PATH, input="a"), 500, None)
    assert "crashed the engine" in error["message"]
    pools.engine.error = EngineDeadError("the engine died too often")
    assert check_error(await pools.post(PATH, input="a"), 503, None)["code"] == "engine_unavailable"
    pools.engine.failure = "gone"
    check_error(await pools.post(PATH, input="a"), 503, None)
    assert pools.models["embedder"].metrics.finished["error"] == 3


async def test_what_a_restarted_engine_warns_of_is_told(pools: PoolServer) -> None:
    caps = pools.engine.capabilities
    pools.engine.capabilities = msgspec.structs.replace(caps, warnings=("no kernels",))
    assert (await pools.http.get("/health")).json()["warnings"] == ["no kernels"]
    text = (await pools.http.get("/metrics")).text
    assert re.search(r'slipstream_engine_info\{.*degraded="true".*\} 1', text)


async def test_the_model_is_picked_by_name_or_by_what_it_can(make_pools: MakePools) -> None:
    pools = make_pools(
        {"classifier": CLASSIFIER, "judge": CROSS_ENCODER, "one": EMBEDDER, "two": EMBEDDER}
    )
    assert (await pools.ok(PATH, input="a"))["model"] == "one"
    assert (await pools.ok(PATH, input="a", model="two"))["model"] == "two"
    for name in ("classifier", "judge"):
        error = check_error(await pools.post(PATH, input="a", model=name), 400, "model")
        assert "/classify" in error["message"] and "'one' makes embeddings" in error["message"]
    error = check_error(await pools.post(PATH, input="a", model="x/y"), 404, "model")
    assert error["code"] == "model_not_found"


async def test_a_chat_model_says_that_it_makes_none(server: Server) -> None:
    for fields in ({}, {"model": "tiny"}):
        error = check_error(await server.post(PATH, input="a", **fields), 400, "model")
        assert "--also" in error["message"]
    check_error(await server.post(PATH, input="a", model="other"), 404, "model")


@pytest.fixture
def both(make_pools: MakePools) -> PoolServer:
    return make_pools({"one": EMBEDDER, "judge": CROSS_ENCODER})


@pytest.mark.parametrize(
    "path,schema,required,refused",
    [
        (PATH, pooling.EmbeddingRequest, {"input": "a"}, pooling.REFUSED_EMBEDDING),
        ("/classify", pooling.ClassifyRequest, {"input": ["a", "b"]}, pooling.REFUSED_CLASSIFY),
        ("/score", pooling.ScoreRequest, {"text_1": "a", "text_2": "b"}, pooling.REFUSED_SCORE),
        ("/rerank", pooling.RerankRequest, {"query": "a", "documents": ["b"]},
         pooling.REFUSED_RERANK),
    ],
)  # fmt: skip
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
async def test_whatever_json_comes_there_is_no_server_error(
    both: PoolServer,
    path: str,
    schema: type[msgspec.Struct],
    required: dict[str, Any],
    refused: dict[str, str],
    data: st.DataObject,
) -> None:
    body = data.draw(bodies(schema, required, refused))
    response = await both.http.post(path, content=json.dumps(body).encode())
    assert response.status_code < 500, (body, response.text)
    if response.status_code != 200:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


async def test_keys_cover_it(make_pools: MakePools, make_server: MakeServer) -> None:
    pools = make_pools(api_keys=("right",))
    assert (await pools.post(PATH, input="a")).status_code == 401
    headers = {"authorization": "Bearer right"}
    answer = await pools.http.post(PATH, json={"input": "a"}, headers=headers)
    assert answer.status_code == 200
