"""Command-line flags made from the settings schema, and a help text that fits on one screen."""

from __future__ import annotations

import argparse
import sys
from typing import Any, Literal, NoReturn, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from config.load import FIELDS, flag_of
from config.settings import EngineSettings, ServerSettings

_COLUMN = 40  # where descriptions start
_GROUPS: dict[str, type[BaseModel]] = {"Engine:": EngineSettings, "Server:": ServerSettings}
_HEAD = f"""\
usage: slipstream serve [MODEL] [flags]
  {"MODEL":<{_COLUMN - 2}}{FIELDS["model"].description}
  {"--config FILE":<{_COLUMN - 2}}YAML file of settings, named as the flags with underscores"""
_FOOT = (
    "Every flag is also a variable: SLIPSTREAM_PORT=9000. Flags win over variables over the file."
)


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: error: {message} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(2)


class ServeParser(OneLineParser):
    """Parses to a namespace that has only what was typed, as text; pydantic does the rest."""

    def __init__(self) -> None:
        super().__init__(
            prog="slipstream serve", argument_default=argparse.SUPPRESS, allow_abbrev=False
        )
        self.add_argument("model", nargs="?")
        self.add_argument("--config")
        for name, field in FIELDS.items():
            if name == "model":
                continue
            if field.annotation is bool:
                self.add_argument(flag_of(name), action=argparse.BooleanOptionalAction)
            else:
                self.add_argument(flag_of(name), dest=name)

    def format_help(self) -> str:
        """One line a flag."""
        lines = [_HEAD]
        for title, model in _GROUPS.items():
            lines.append(title)
            lines += [
                f"  {_usage(name, field):<{_COLUMN - 3}} {field.description}{_default(field)}"
                for name, field in model.model_fields.items()
                if name != "model"
            ]
        return "\n".join([*lines, _FOOT, ""])


def _usage(name: str, field: FieldInfo) -> str:
    flag = flag_of(name)
    if field.annotation is bool:
        return flag.replace("--", "--[no-]", 1)
    if get_origin(field.annotation) is Literal:
        return f"{flag} {'|'.join(get_args(field.annotation))}"
    return f"{flag} {_metavar(field.annotation)}"


def _metavar(annotation: Any) -> str:
    spelt = str(annotation)
    if "tuple" in spelt:
        return "A,B"
    if "int" in spelt or "float" in spelt:
        return "N"
    return "TEXT"


def _default(field: FieldInfo) -> str:
    if field.default in (None, "", ()):
        return ""
    if isinstance(field.default, bool):
        return f" [{'yes' if field.default else 'no'}]"
    return f" [{field.default:g}]" if isinstance(field.default, float) else f" [{field.default}]"
