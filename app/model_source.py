"""Where a model comes from: the one in the package, a local folder, or the Hugging Face hub."""

from __future__ import annotations

import json
import os.path
from importlib import resources
from pathlib import Path
from typing import NamedTuple

BUILTIN_NAME = "slipstream-tiny"

_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
_PICKLE_FILES = ["*.bin"]
_CODE_FILES = ["*.py"]
_POOLING = (
    "Model", "ForSequenceClassification", "ForMaskedLM", "ForPreTraining", "ForTextEncoding",
)  # fmt: skip
_DUPLICATES = ["original/*", "consolidated*", "onnx/*", "training_args.bin"]


class ModelSourceError(ValueError):
    """There is no such model; the message is one line for whoever named it."""


class ModelSource(NamedTuple):
    """A folder with config, weights and tokenizer, and the name to serve it under."""

    folder: Path
    name: str


def find_model(
    model: str,
    revision: str | None = None,
    *,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> ModelSource:
    """The folder of `model`, downloaded (with a progress bar) if it is a hub id not yet cached.

    Empty is the built-in model. A local folder wins over a hub id of the same name. Pickled
    weights and Python files are downloaded only where they may be used. Raises `ModelSourceError`.
    """
    if not model:
        return ModelSource(
            _checked(Path(str(resources.files("batching") / "builtin/model"))), BUILTIN_NAME
        )
    folder = Path(model).expanduser()
    if folder.is_dir():
        return ModelSource(_checked(folder.resolve()), folder.resolve().name)
    if folder.exists():
        raise ModelSourceError(f"{model} is a file; a model is a folder or a hub id")
    if _looks_like_path(model):
        raise ModelSourceError(f"there is no folder {model}")
    patterns = _FILES + _PICKLE_FILES * allow_pickle + _CODE_FILES * trust_remote_code
    return ModelSource(_download(model, revision, patterns), model)


def is_pooling(folder: Path) -> bool:
    """Whether a model folder holds an embedder or classifier rather than a model that generates."""
    if (folder / "modules.json").is_file():  # sentence-transformers
        return True
    try:
        (architecture,) = json.loads((folder / "config.json").read_text())["architectures"]
    except (OSError, ValueError, LookupError, TypeError):
        return False  # the engine will say what is wrong
    return str(architecture).endswith(_POOLING) and not str(architecture).endswith("LMHeadModel")


def _looks_like_path(model: str) -> bool:
    return model.startswith((".", "~", os.path.sep)) or model.count("/") > 1 or "\\" in model


def _checked(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        raise ModelSourceError(f"{folder} holds no model: config.json is missing")
    return folder


def _download(repository: str, revision: str | None, patterns: list[str]) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    try:
        path = huggingface_hub.snapshot_download(
            repository, revision=revision, allow_patterns=patterns, ignore_patterns=_DUPLICATES
        )
    except errors.GatedRepoError as error:
        raise ModelSourceError(
            f"{repository} is gated: accept its terms on the hub and run `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelSourceError(f"{repository} has no revision {revision}") from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise ModelSourceError(
            f"there is neither a folder nor a public hub model called {repository}"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, OSError) as error:
        raise ModelSourceError(
            f"there is no folder {repository}, and the hub cannot be reached to look there"
        ) from error
    return _checked(Path(path))
