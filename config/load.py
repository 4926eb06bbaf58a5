"""Where settings come from: flags over `SLIPSTREAM_…` variables over a YAML file over defaults.

Every value remembers where it was set, so that a wrong one is reported in one line that names the
flag, the variable or the file to change. A name that is no setting is an error, not ignored.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from config.settings import EngineSettings, ServerSettings

PREFIX = "SLIPSTREAM_"
FIELDS: dict[str, FieldInfo] = {**EngineSettings.model_fields, **ServerSettings.model_fields}

# Kubernetes sets these in every pod beside a Service that is called "slipstream".
_SERVICE_LINK = re.compile(r"SERVICE_(HOST|PORT\w*)|PORT_\d+_(TCP|UDP|SCTP)\w*")

Model = TypeVar("Model", bound=BaseModel)


class SettingsError(ValueError):
    """A setting is wrong; the message is one line for whoever set it."""


class Given(NamedTuple):
    """A value and where it was set."""

    source: str
    value: Any


def load_settings(
    flags: Mapping[str, Any], environment: Mapping[str, str] | None = None
) -> tuple[EngineSettings, ServerSettings]:
    """Merge all sources. `flags` maps field names, and `config` (a file), to what was typed.

    `environment` defaults to the process's. Raises `SettingsError`.
    """
    environment = os.environ if environment is None else environment
    typed = {name: Given(flag_of(name), value) for name, value in flags.items()}
    given = _from_environment(environment) | typed
    config = given.pop("config", None)
    if config is not None:
        given = _from_file(Path(config.value)) | given
    return _validate(EngineSettings, given), _validate(ServerSettings, given)


def flag_of(name: str) -> str:
    """A field's name on the command line; the model is positional."""
    return "MODEL" if name == "model" else "--" + name.replace("_", "-")


def _from_environment(environment: Mapping[str, str]) -> dict[str, Given]:
    given = {}
    for variable, value in sorted(environment.items()):
        name = variable.removeprefix(PREFIX)
        if name == variable or value == "" or _SERVICE_LINK.fullmatch(name):
            continue
        if name == "PORT" and value.startswith("tcp://"):
            continue  # a Service link again
        if name != "CONFIG":
            _check_name(name.lower(), variable, lambda known: PREFIX + known.upper())
        given[name.lower()] = Given(variable, value)
    return given


def _from_file(path: Path) -> dict[str, Given]:
    try:
        content = yaml.safe_load(path.read_text()) or {}
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"cannot read {path}: {error}") from error
    except yaml.YAMLError as error:
        raise SettingsError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise SettingsError(f"{path} must map setting names to values")
    for name in content:
        _check_name(str(name), f"{path}: {name}", lambda known: known)
    return {name: Given(f"{path}: {name}", value) for name, value in content.items()}


def _check_name(name: str, source: str, spell: Callable[[str], str]) -> None:
    if name not in FIELDS:
        close = difflib.get_close_matches(name, FIELDS, n=1)
        hint = f"; did you mean {spell(close[0])}?" if close else ""
        raise SettingsError(f"{source} is not a setting{hint}")


def _validate(model: type[Model], given: Mapping[str, Given]) -> Model:
    """The part of `given` that is `model`'s, validated. Raises `SettingsError`."""
    ours = {name: given[name] for name in model.model_fields if name in given}
    try:
        return model.model_validate({name: _parse(name, g.value) for name, g in ours.items()})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        source, value = ours[str(first["loc"][0])]
        message = first["msg"].removeprefix("Value error, ").replace("Input", "the value", 1)
        raise SettingsError(f"{source}: {message}, got {value!r}") from error


def _parse(name: str, value: Any) -> Any:
    """Lists may be written as text: a,b,c."""
    if isinstance(value, str) and "tuple" in str(FIELDS[name].annotation):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value
