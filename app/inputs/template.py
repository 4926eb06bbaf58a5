"""The model's chat template, rendered by transformers' own sandbox (which imports no torch)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import msgspec

# What `ChatTemplate.render` and the renderer pass themselves, so that no variable may.
RESERVED_VARIABLES = {
    *("messages", "tools", "documents", "add_generation_prompt", "continue_final_message"),
    *("conversations", "chat_template", "return_assistant_tokens_mask"),
}
_SPECIAL_TOKENS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


class TemplateRenderError(ValueError):
    """The template refused the messages or could not handle them; the message says why."""


@cache
def renderer() -> Callable[..., Any]:
    """transformers' `render_jinja_template`. The first call imports it, which takes a second."""
    from transformers.utils.chat_template_utils import render_jinja_template

    return render_jinja_template


class ChatTemplate:
    """A compiled template and the special tokens it may name."""

    def __init__(
        self, source: str, special_tokens: Mapping[str, Any], tool_source: str | None = None
    ) -> None:
        self.source = source
        self._tool_source = tool_source or source
        self._special_tokens = dict(special_tokens)

    @property
    def sources(self) -> str:
        """The texts of all its forms."""
        same = self._tool_source == self.source
        return self.source if same else f"{self._tool_source}\n{self.source}"

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt text; no variable may be reserved. Raises `TemplateRenderError`."""
        source = self._tool_source if tools else self.source
        try:
            rendered, _ = renderer()(
                conversations=[[dict(message) for message in messages]],
                tools=list(tools) if tools else None,
                documents=list(documents) if documents else None,
                chat_template=source,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **(self._special_tokens | dict(variables or {})),
            )
        except jinja2.TemplateError as error:
            raise TemplateRenderError(str(error)) from error
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise TemplateRenderError(f"{type(error).__name__}: {error}") from error
        except RecursionError as error:
            raise TemplateRenderError("the messages are nested too deeply") from error
        return str(rendered[0])


def load_chat_template(folder: Path) -> ChatTemplate | None:
    """The folder's template, from wherever it is kept; None if it has none.

    `chat_template.jinja` wins over `chat_template.json`, which wins over `tokenizer_config.json`.
    """
    config = read_json(folder / "tokenizer_config.json")
    source: Any = config.get("chat_template")
    if (path := folder / "chat_template.json").is_file():
        source = read_json(path).get("chat_template")
    if (path := folder / "chat_template.jinja").is_file():
        source = path.read_text(encoding="utf-8")
    if isinstance(source, list):
        source = {entry["name"]: entry["template"] for entry in source}
    if isinstance(source, str):
        source = {"default": source}
    if not source or "default" not in source:
        return None
    special_tokens = _special_tokens(read_json(folder / "special_tokens_map.json") | config)
    return ChatTemplate(source["default"], special_tokens, source.get("tool_use"))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object file; {} if there is none."""
    if not path.is_file():
        return {}
    return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    tokens = {}
    for name in _SPECIAL_TOKENS:
        token = config.get(f"{name}_token")
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str):
            tokens[f"{name}_token"] = token
    return tokens
