"""Pooling models give what transformers gives for one text, whatever batch the text rides in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from batching.worker.pool_protocol import PoolConfig
from batching.worker.pooling.padded import groups
from batching.worker.pooling.worker import TorchPoolWorker
from batching.worker.protocol import UnsupportedModelError
from tests.worker.tiny_poolers import MODELS, alone, build, save, texts

PACKED = {"bert", "roberta", "xlm_roberta", "distilbert", "electra", "qwen3", "llama"}
TOLERANCE = 1e-5  # what is promised in float32, of numbers near one


def worker(folder: Path, **config: Any) -> TorchPoolWorker:
    return TorchPoolWorker(PoolConfig(str(folder), **config))


def rows(made: TorchPoolWorker, batch: list[Any]) -> np.ndarray:
    return np.stack([np.frombuffer(row, "<f4") for row in made.run(batch)])


def assert_close(got: np.ndarray, expected: np.ndarray, tolerance: float = TOLERANCE) -> None:
    assert np.abs(got - expected).max() <= tolerance * max(1.0, np.abs(expected).max())


@pytest.mark.parametrize("name", MODELS)
def test_embeddings_are_the_models_own_in_any_batch(name: str, tmp_path: Path) -> None:
    model = build(name, "Model")
    made = worker(save(tmp_path, model))
    capabilities = made.capabilities()
    is_decoder = name in ("qwen3", "llama", "gemma2")
    assert capabilities.runner == ("packed" if name in PACKED else "padded")
    assert (capabilities.task, capabilities.size) == ("embed", 64)
    assert capabilities.pooling == ("lasttoken" if is_decoder else "mean")
    batch = texts()
    states = [alone(model, text).last_hidden_state[0] for text in batch]
    expected = np.stack([(s[-1] if is_decoder else s.mean(0)).numpy() for s in states])
    together = rows(made, batch)
    assert_close(together, expected)
    single = np.stack([rows(made, [text])[0] for text in batch])
    if name in PACKED:
        assert np.array_equal(together, single), "not the same bits"
        assert np.array_equal(rows(made, batch[::-1])[::-1], single)
    assert_close(together, single)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_number_of_threads_changes_no_bit(threads: int, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    folder = save(tmp_path, build("bert", "Model"))
    batch = texts(40)
    expected = rows(worker(folder, threads=1), batch)
    try:
        assert np.array_equal(rows(worker(folder, threads=threads), batch), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "name", ["bert", "roberta", "distilbert", "deberta", "qwen3", "modernbert"]
)
@pytest.mark.parametrize("labels", [1, 3])
def test_classifiers_give_the_models_own_logits(name: str, labels: int, tmp_path: Path) -> None:
    model = build(name, "ForSequenceClassification", num_labels=labels)
    made = worker(save(tmp_path, model))
    capabilities = made.capabilities()
    assert (capabilities.task, capabilities.size) == ("classify", labels)
    assert capabilities.labels == tuple(f"LABEL_{i}" for i in range(labels))
    assert capabilities.activation == ("sigmoid" if labels == 1 else "softmax")
    batch = texts()
    expected = np.stack([alone(model, text).logits[0].numpy() for text in batch])
    together = rows(made, batch)
    assert_close(together, expected)
    single = np.stack([rows(made, [text])[0] for text in batch])
    assert_close(together, single, 0.0 if capabilities.runner == "packed" else TOLERANCE)


POOLED = {
    "cls_token": lambda s: s[0],
    "max_tokens": lambda s: s.amax(0),
    "mean_tokens": lambda s: s.mean(0),
    "mean_sqrt_len_tokens": lambda s: s.sum(0) / len(s) ** 0.5,
    "weightedmean_tokens": lambda s: (
        (s * torch.arange(1, len(s) + 1)[:, None]).sum(0) / (len(s) * (len(s) + 1) / 2)
    ),
    "lasttoken": lambda s: s[-1],
}


@pytest.mark.parametrize("mode", POOLED)
def test_every_pooling_mode(mode: str, tmp_path: Path) -> None:
    model = build("bert", "Model")
    made = worker(save(tmp_path, model, mode, max_seq_length=100, do_lower_case=True))
    assert made.capabilities().max_model_len == 100
    assert made.capabilities().lower_case
    batch = texts(5)
    expected = [POOLED[mode](alone(model, t).last_hidden_state[0]).numpy() for t in batch]
    assert_close(rows(made, batch), np.stack(expected))


def test_bfloat16_is_close_and_the_same_in_any_batch(tmp_path: Path) -> None:
    model = build("bert", "Model")
    made = worker(save(tmp_path, model), dtype="bfloat16")
    assert made.capabilities().dtype == "bfloat16"
    batch = texts()
    together = rows(made, batch)
    expected = [alone(model, text).last_hidden_state[0].mean(0).numpy() for text in batch]
    assert_close(together, np.stack(expected), 0.02)
    assert np.array_equal(together, np.stack([rows(made, [text])[0] for text in batch]))


def test_positions_of_roberta_begin_behind_its_padding(tmp_path: Path) -> None:
    folder = save(tmp_path, build("roberta", "Model"))
    assert worker(folder).capabilities().max_model_len == 128
    with pytest.raises(UnsupportedModelError, match="max_model_len 129 exceeds 128"):
        worker(folder, max_model_len=129)


def test_what_is_not_understood_is_refused_by_name(tmp_path: Path) -> None:
    folder = save(tmp_path, build("bert", "Model"), "mean_tokens")
    modules = folder / "modules.json"
    text = modules.read_text()
    modules.write_text(text.replace("models.Normalize", "models.WeightedLayerPooling"))
    with pytest.raises(UnsupportedModelError, match="WeightedLayerPooling"):
        worker(folder)
    modules.write_text("{")
    with pytest.raises(UnsupportedModelError, match=r"cannot read .*modules\.json"):
        worker(folder)
    modules.write_text(text)
    (folder / "1_Pooling/config.json").write_text('{"pooling_mode": "attention"}')
    with pytest.raises(UnsupportedModelError, match="attention"):
        worker(folder)
    (folder / "1_Pooling/config.json").write_text("{}")
    with pytest.raises(UnsupportedModelError, match="int8"):
        worker(folder, quantization="int8")


@pytest.mark.parametrize(
    "config,activation",
    [
        ({"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}},
         "identity"),
        ({"sbert_ce_default_activation_function": "torch.nn.modules.activation.Sigmoid"},
         "sigmoid"),
        ({"problem_type": "regression"}, "identity"),
        ({"problem_type": "multi_label_classification", "num_labels": 2}, "sigmoid"),
    ],
)  # fmt: skip
def test_activations_of_classifiers(
    config: dict[str, Any], activation: str, tmp_path: Path
) -> None:
    model = build("bert", "ForSequenceClassification", **{"num_labels": 1, **config})
    assert worker(save(tmp_path, model)).capabilities().activation == activation


def test_padded_groups_hold_texts_of_similar_length() -> None:
    assert list(groups([10, 100, 9, 80, 7])) == [[1, 3], [0, 2], [4]]
    assert list(groups([])) == []
