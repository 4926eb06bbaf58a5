"""`/score`, `/rerank` and `/classify`: pairs as the model reads them, orders, activations."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from app.pooling.inputs import MAX_INPUTS
from tests.app.pooling import (
    CLASSIFIER,
    CLS,
    CROSS_ENCODER,
    EMBEDDER,
    LIMIT,
    SEP,
    MakePools,
    PoolServer,
    ids,
    make_pools,
    pool_folder,
    spread,
)
from tests.app.test_bad_requests import check_error

__all__ = ["make_pools", "pool_folder"]

RERANK = ("/rerank", "/v1/rerank", "/v2/rerank")


@pytest.fixture
def judge(make_pools: MakePools) -> PoolServer:
    """A cross-encoder whose logit is the sum of the second text's tokens, less forty."""
    pools = make_pools({"judge": CROSS_ENCODER})
    pools.engine.numbers = lambda r: [float(sum(r.tokens[r.second : -1])) - 40.0]
    return pools


def pair(first: str, second: str) -> list[int]:
    return [CLS, *ids(first), SEP, *ids(second), SEP]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def logit(document: str) -> float:
    return sum(ids(document)) - 40.0


def cosine(first: str, second: str) -> float:
    class Text:
        def __init__(self, words: str) -> None:
            self.tokens = [CLS, *ids(words), SEP]

    a, b = (np.array(spread(Text(words))) for words in (first, second))  # type: ignore[arg-type]
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.parametrize(
    "names",
    [("text_1", "text_2"), ("queries", "documents"), ("queries", "items"), ("data_1", "data_2")],
)
@pytest.mark.parametrize("path", ["/score", "/v1/score"])
async def test_a_cross_encoder_reads_pairs(
    judge: PoolServer, names: tuple[str, str], path: str
) -> None:
    answer = await judge.ok(path, **{names[0]: "a b", names[1]: ["c", "d e"]})
    assert judge.tokens == [pair("a b", "c"), pair("a b", "d e")]
    assert [request.second for request in judge.engine.requests] == [4, 4]
    assert [item["index"] for item in answer["data"]] == [0, 1]
    scores = [item["score"] for item in answer["data"]]
    assert scores == pytest.approx([sigmoid(logit("c")), sigmoid(logit("d e"))])
    assert answer["usage"] == {"prompt_tokens": 13, "total_tokens": 13}


async def test_texts_one_by_one_and_alone(judge: PoolServer) -> None:
    await judge.ok("/score", text_1=["a", "b"], text_2=["c", "d"])
    await judge.ok("/score", text_1="a", text_2="c")
    await judge.ok("/score", text_1=["a"], text_2=["c", "d", "e"])
    assert judge.tokens == [pair(*texts.split()) for texts in ("a c", "b d", "a c", "a c", "a d",
                                                               "a e")]  # fmt: skip


async def test_without_activation_the_logit_comes_back(judge: PoolServer) -> None:
    answer = await judge.ok("/score", text_1="a", text_2="c d", use_activation=False)
    assert answer["data"][0]["score"] == logit("c d")


async def test_an_identity_model_gives_logits(make_pools: MakePools) -> None:
    pools = make_pools({"judge": {**CROSS_ENCODER, "activation": "identity"}})
    pools.engine.numbers = lambda request: [7.5]
    assert (await pools.ok("/score", text_1="a", text_2="b"))["data"][0]["score"] == 7.5


@pytest.mark.parametrize("path", RERANK)
async def test_rerank_orders_by_score(judge: PoolServer, path: str) -> None:
    documents = ["a", "z z", "m", "z z"]
    answer = await judge.ok(path, query="q", documents=documents)
    assert [result["index"] for result in answer["results"]] == [1, 3, 2, 0]  # equals by index
    for result in answer["results"]:
        text = documents[result["index"]]
        assert result["document"] == {"text": text}
        assert result["relevance_score"] == pytest.approx(sigmoid(logit(text)))
    assert answer["model"] == "judge"
    assert answer["id"]
    assert answer["usage"]["prompt_tokens"] == sum(len(t) for t in judge.tokens)
    best = await judge.ok(path, query="q", documents=documents, top_n=2, return_documents=False)
    assert [result["index"] for result in best["results"]] == [1, 3]
    assert all(set(result) == {"index", "relevance_score"} for result in best["results"])
    everything = await judge.ok(path, query="q", documents=[{"text": "a"}, "b"], top_n=9)
    assert [r["document"]["text"] for r in everything["results"]] == ["b", "a"]


async def test_an_embedder_scores_by_cosine(make_pools: MakePools) -> None:
    pools = make_pools({"one": EMBEDDER})
    answer = await pools.ok("/score", text_1="a", text_2=["a", "b c"])
    scores = [item["score"] for item in answer["data"]]
    assert scores == pytest.approx([1.0, cosine("a", "b c")], abs=1e-6)
    assert pools.tokens == [[CLS, *ids(words), SEP] for words in ("a", "a", "b c")]
    assert answer["usage"]["prompt_tokens"] == 10  # each text once
    one_by_one = await pools.ok("/score", text_1=["a", "b"], text_2=["c", "b"])
    scores = [item["score"] for item in one_by_one["data"]]
    assert scores == pytest.approx([cosine("a", "c"), 1.0], abs=1e-6)
    ranking = await pools.ok("/rerank", query="a", documents=["z z z z", "a"])
    assert [result["index"] for result in ranking["results"]] == [1, 0]
    pools.engine.numbers = lambda request: [0.0] * 4
    assert (await pools.ok("/score", text_1="a", text_2="b"))["data"][0]["score"] == 0.0


@pytest.mark.parametrize(
    "fields,expected",
    [
        ({"truncate_prompt_tokens": 7}, pair("a b", "e f")),  # both alike
        ({"truncate_prompt_tokens": 8}, pair("a b", "e f g")),
        ({"truncate_prompt_tokens": 7, "truncation_side": "left"}, pair("c d", "h i")),
        ({"max_tokens_per_doc": 1}, pair("a b c d", "e")),
        ({"max_tokens_per_query": 1, "max_tokens_per_doc": 2}, pair("a", "e f")),
        ({"max_tokens_per_query": 1, "truncate_prompt_tokens": 6}, pair("a", "e f")),
        ({"truncate_prompt_tokens": -1}, pair("a b c d", "e f g h i")),
    ],
)
async def test_pairs_are_cut_longest_first(
    judge: PoolServer, fields: dict[str, Any], expected: list[int]
) -> None:
    await judge.ok("/rerank", query="a b c d", documents=["e f g h i"], **fields)
    assert judge.tokens == [expected]
    assert judge.engine.requests[0].second == expected.index(SEP) + 1


async def test_a_long_document_names_itself(judge: PoolServer) -> None:
    for length in (LIMIT, 3000):
        long = "a " * length
        response = await judge.post("/rerank", query="a", documents=["b", long])
        assert str(LIMIT) in check_error(response, 400, "documents[1]")["message"]
        await judge.ok("/rerank", query="a", documents=["b", long], max_tokens_per_doc=20)
        await judge.ok("/rerank", query="a", documents=["b", long], truncate_prompt_tokens=-1)
    assert max(len(tokens) for tokens in judge.tokens) == LIMIT


@pytest.mark.parametrize(
    "path,fields,param",
    [
        ("/score", {}, "text_1"),
        ("/score", {"text_1": "a"}, "text_1"),
        ("/score", {"text_1": "a", "documents": "b"}, "text_1"),
        ("/score", {"text_1": "a", "text_2": "b", "items": "c"}, "text_1"),
        ("/score", {"text_1": "", "text_2": "b"}, "text_1"),
        ("/score", {"text_1": "a", "text_2": []}, "text_2"),
        ("/score", {"text_1": "a", "text_2": ["b", ""]}, "text_2[1]"),
        ("/score", {"text_1": "a", "text_2": ["b", 1]}, "text_2[1]"),
        ("/score", {"text_1": "a", "text_2": ["b", {"text": "c"}]}, "text_2[1]"),
        ("/score", {"text_1": ["a", "b"], "text_2": "c"}, "text_1"),
        ("/score", {"text_1": ["a", "b"], "text_2": ["c", "d", "e"]}, "text_1"),
        ("/score", {"text_1": "a", "text_2": ["b"] * (MAX_INPUTS + 1)}, "text_2"),
        ("/rerank", {}, "query"),
        ("/rerank", {"query": "a"}, "documents"),
        ("/rerank", {"query": "", "documents": ["b"]}, "query"),
        ("/rerank", {"query": ["a"], "documents": ["b"]}, "query"),
        ("/rerank", {"query": "a", "documents": []}, "documents"),
        ("/rerank", {"query": "a", "documents": "b"}, "documents"),
        ("/rerank", {"query": "a", "documents": ["b", {"text": 1}]}, "documents[1]"),
        ("/rerank", {"query": "a", "documents": [{"text": "b", "image": "c"}]}, "documents[0]"),
        ("/rerank", {"query": "a", "documents": [{"text": ""}]}, "documents[0]"),
        ("/rerank", {"query": "a", "documents": ["b"] * (MAX_INPUTS + 1)}, "documents"),
        ("/rerank", {"query": "a", "documents": ["b"], "top_n": -1}, "top_n"),
        ("/rerank", {"query": "a", "documents": ["b"], "top_n": True}, "top_n"),
        ("/rerank", {"query": "a", "documents": ["b"], "rank_fields": ["x"]}, "rank_fields"),
        ("/rerank", {"query": "a", "documents": ["b"], "truncate_prompt_tokens": 3},
         "truncate_prompt_tokens"),
        ("/classify", {}, "input"),
        ("/classify", {"input": ""}, "input"),
        ("/classify", {"input": "a", "dimensions": 1}, "dimensions"),
    ],
)  # fmt: skip
async def test_bad_requests(
    make_pools: MakePools, path: str, fields: dict[str, Any], param: str
) -> None:
    pools = make_pools({"judge": CROSS_ENCODER})
    check_error(await pools.post(path, **fields), 400, param)
    assert pools.tokens == []


async def test_classify_gives_probabilities(make_pools: MakePools) -> None:
    pools = make_pools({"kinds": CLASSIFIER})
    pools.engine.numbers = lambda r: [1000.0, float(r.tokens[1]) + 990, -1000.0]
    answer = await pools.ok("/classify", input=["a", "z"])
    first, second = answer["data"]
    assert [first["label"], second["label"]] == ["label 0", "label 1"]
    assert (first["index"], first["num_classes"]) == (0, 3)
    share = 1 / (1 + math.exp(ids("a")[0] - 10))
    assert first["probs"] == pytest.approx([share, 1 - share, 0.0])
    raw = await pools.ok("/classify", input=ids("a z"), use_activation=False)
    assert raw["data"][0]["probs"] == [1000.0, float(ids("z")[0]) + 990, -1000.0]
    assert raw["usage"]["prompt_tokens"] == 2


async def test_several_labels_at_once_are_sigmoids(make_pools: MakePools) -> None:
    pools = make_pools({"kinds": {**CLASSIFIER, "activation": "sigmoid"}})
    pools.engine.numbers = lambda request: [0.0, 2.0, -1000.0]
    (item,) = (await pools.ok("/classify", input="a"))["data"]
    assert item["probs"] == pytest.approx([0.5, sigmoid(2.0), 0.0])
    assert item["label"] == "label 1"


async def test_models_that_cannot_say_what_they_can(make_pools: MakePools) -> None:
    pools = make_pools({"kinds": CLASSIFIER, "one": EMBEDDER})
    for path in ("/score", "/rerank"):
        fields: dict[str, Any] = (
            {"text_1": "a", "text_2": "b"}
            if path == "/score"
            else {"query": "a", "documents": ["b"]}
        )
        assert (await pools.ok(path, **fields))["model"] == "one"
        error = check_error(await pools.post(path, model="kinds", **fields), 400, "model")
        assert "/classify" in error["message"] and "'one'" in error["message"]
    error = check_error(await pools.post("/classify", input="a", model="one"), 400, "model")
    assert "/v1/embeddings" in error["message"] and "'kinds'" in error["message"]
