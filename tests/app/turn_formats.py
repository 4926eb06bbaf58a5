"""Small chat templates that write calls and reasoning as the known families of models do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

_FRAME = (
    "{%% if tools %%}<tools>{{ tools | tojson }}</tools>{%% endif %%}"
    "{%% for m in messages %%}<|{{ m.role }}|>{%% if m.reasoning_content %%}<think>\n"
    "{{ m.reasoning_content }}\n</think>\n\n{%% endif %%}{{ m.content }}%s<|end|>{%% endfor %%}"
    "{%% if add_generation_prompt %%}<|assistant|>%s{%% endif %%}"
)
_THINKING = "{% if enable_thinking is defined and enable_thinking %}<think>\n{% endif %}"
HERMES = _FRAME % (
    "{% for c in m.tool_calls or [] %}\n<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}'
    "\n</tool_call>{% endfor %}",
    _THINKING,
)
LLAMA3 = (_FRAME.replace("<think>", "").replace("</think>", "")) % (
    "{# <|python_tag|> #}{% for c in m.tool_calls or [] %}{% if not loop.first %}; {% endif %}"
    '{"name": "{{ c.function.name }}", "parameters": {{ c.function.arguments | tojson }}}'
    "{% endfor %}",
    "",
)
MISTRAL = (_FRAME.replace("<think>", "").replace("</think>", "")) % (
    "{% if m.tool_calls %}[TOOL_CALLS] [{% for c in m.tool_calls %}"
    "{% if not loop.first %}, {% endif %}"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}, '
    '"id": "{{ c.id }}"}{% endfor %}]{% endif %}',
    "",
)
MISTRAL_ARGS = (_FRAME.replace("<think>", "").replace("</think>", "")) % (
    "{% for c in m.tool_calls or [] %}[TOOL_CALLS]{{ c.function.name }}[CALL_ID]{{ c.id }}"
    "[ARGS]{{ c.function.arguments | tojson }}{% endfor %}",
    "",
)
TEMPLATES = {
    "hermes": HERMES, "llama3": LLAMA3, "mistral": MISTRAL, "mistral_args": MISTRAL_ARGS
}  # fmt: skip
SPECIAL = ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_tag|>", "<|channel|>")
# A format of its own, which only its response template knows.
RESPONSE_TEMPLATE = {
    "start_anchor": "<|assistant|>",
    "fields": {
        "reasoning_content": {"open": "<|channel|>thought\n", "close": "<|channel|>"},
        "tool_calls": {
            "open_pattern": r"<call (?P<name>\w+)>",
            "close": "</call>",
            "repeats": True,
            "content": "xml-inline",
            "content_args": {"tag_pattern": r"<(?P<key>\w+)>(?P<value>.*?)</\w+>"},
            "transform": {
                "type": "function",
                "function": {"name": "{name}", "arguments": "{content}"},
            },
        },
        "content": {"content": "text"},
    },
}


def make_folder(
    folder: Path, model_folder: Path, template: str, response_template: Any = None
) -> Path:
    """`model_folder` with another template and the special tokens that templates use."""
    folder.mkdir(parents=True)
    backend = Tokenizer.from_file(str(model_folder / "tokenizer.json"))
    backend.add_special_tokens(list(SPECIAL))
    backend.save(str(folder / "tokenizer.json"))
    config = json.loads((model_folder / "tokenizer_config.json").read_text())
    config |= {"chat_template": template}
    if response_template is not None:
        config["response_template"] = response_template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
