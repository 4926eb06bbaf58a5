"""How a model folder says that its tokens become one vector: sentence-transformers' files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batching.worker.protocol import UnsupportedModelError

MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")

# The flags of older files, in the order in which several of them are concatenated.
_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_ORDER = ("Transformer", "Pooling", "Dense", "Normalize")  # and each at most once but Dense


@dataclass(frozen=True)
class Recipe:
    """What follows the transformer. `modes` are concatenated; `dense` are folders of layers."""

    modes: tuple[str, ...]
    dense: tuple[Path, ...] = ()
    max_seq_length: int | None = None
    lower_case: bool = False


def read_recipe(folder: Path) -> Recipe | None:
    """The folder's recipe; None if it has no `modules.json`.

    Normalizing is not part of it: the front end does that, after it cut an embedding to the
    dimensions asked for. Raises `UnsupportedModelError` naming what is not understood.
    """
    if not (folder / "modules.json").is_file():
        return None
    modules = read_json(folder / "modules.json", list)
    kinds = [str(module.get("type", "")).rpartition(".")[2] for module in modules]
    paths = [folder / str(module.get("path", "")) for module in modules]
    strange = [kind for kind in kinds if kind not in _ORDER]
    places = [_ORDER.index(kind) for kind in kinds if kind in _ORDER]
    if strange or places != sorted(places) or kinds[:2] != ["Transformer", "Pooling"]:
        raise UnsupportedModelError(
            f"{folder}: modules.json has {', '.join(kinds)}; understood are Transformer, Pooling, "
            "then any Dense, then Normalize"
        )
    if paths[0].resolve() != folder.resolve():
        raise UnsupportedModelError(f"{folder}: the transformer lies in {modules[0]['path']}")
    bert = _read_optional(folder / "sentence_bert_config.json")
    return Recipe(
        _modes(read_json(paths[1] / "config.json", dict), paths[1]),
        tuple(path for kind, path in zip(kinds, paths, strict=True) if kind == "Dense"),
        bert.get("max_seq_length"),
        bool(bert.get("do_lower_case", False)),
    )


def _modes(config: dict[str, Any], path: Path) -> tuple[str, ...]:
    mode = config.get("pooling_mode")
    if mode is None:
        modes = tuple(name for flag, name in _FLAGS.items() if config.get(flag)) or ("mean",)
    else:
        modes = (mode,) if isinstance(mode, str) else tuple(mode)
    strange = [mode for mode in modes if mode not in MODES]
    if strange:
        raise UnsupportedModelError(f"{path}: unknown pooling mode {strange[0]!r}")
    return modes


def _read_optional(path: Path) -> dict[str, Any]:
    return read_json(path, dict) if path.is_file() else {}


def read_json(path: Path, kind: type) -> Any:
    """The file's content. Raises `UnsupportedModelError` if that is not a `kind`."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UnsupportedModelError(f"cannot read {path}: {error}") from error
    if not isinstance(content, kind):
        raise UnsupportedModelError(f"{path} holds no JSON {kind.__name__}")
    return content
