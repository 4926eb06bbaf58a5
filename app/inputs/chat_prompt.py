"""Chat messages to a prompt, by the model's template."""

from __future__ import annotations

from typing import Any, Protocol

from app.http.errors import ApiError
from app.inputs.messages import template_messages
from app.inputs.template import RESERVED_VARIABLES, TemplateRenderError
from app.inputs.tools import check_tools
from app.service import Service


class PromptFields(Protocol):
    """The request fields that shape a chat's prompt."""

    @property
    def messages(self) -> list[Any] | None: ...
    @property
    def tools(self) -> list[dict[str, Any]] | None: ...
    @property
    def documents(self) -> list[dict[str, Any]] | None: ...
    @property
    def add_generation_prompt(self) -> bool: ...
    @property
    def continue_final_message(self) -> bool: ...
    @property
    def chat_template_kwargs(self) -> dict[str, Any] | None: ...
    @property
    def reasoning_effort(self) -> str | None: ...


def check_prompt_fields(fields: PromptFields) -> None:
    """Combinations that make no sense, and tools that are none. Raises `ApiError`."""
    if fields.continue_final_message and fields.add_generation_prompt:
        raise _bad("continue_final_message", "set add_generation_prompt to false with it")
    if clash := RESERVED_VARIABLES & set(fields.chat_template_kwargs or ()):
        raise _bad(f"chat_template_kwargs.{min(clash)}", "the server sets this variable itself")
    check_tools(fields.tools)


def render_chat(
    service: Service, fields: PromptFields, tools: list[dict[str, Any]] | None = None
) -> str:
    """The prompt's text, with these tools (None: the request's). Raises `ApiError`."""
    template = service.template
    if template is None:
        raise ApiError(
            "this model has no chat template; use /v1/completions",
            param="messages",
            code="no_chat_template",
        )
    messages = template_messages(
        fields.messages or [], has_developer_role="developer" in template.source
    )
    variables: dict[str, Any] = dict(fields.chat_template_kwargs or {})
    if fields.reasoning_effort is not None:
        variables["reasoning_effort"] = fields.reasoning_effort
        variables.setdefault("enable_thinking", fields.reasoning_effort != "none")
    try:
        return template.render(
            messages,
            tools=fields.tools if tools is None else tools,
            documents=fields.documents,
            add_generation_prompt=fields.add_generation_prompt,
            continue_final_message=fields.continue_final_message,
            variables=variables,
        )
    except TemplateRenderError as error:
        raise ApiError(
            f"messages: the model's chat template refused them: {error}",
            param="messages",
            code="invalid_value",
        ) from error


def _bad(param: str, message: str) -> ApiError:
    return ApiError(f"{param}: {message}", param=param, code="invalid_value")
