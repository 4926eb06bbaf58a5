"""Templates render as transformers renders them, wherever a model keeps them, without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from app.inputs.template import ChatTemplate, TemplateRenderError, load_chat_template

CHATML = (
    "{%- if tools %}<tools>{% for t in tools %}{{ t | tojson }}\n{% endfor %}</tools>{% endif %}\n"
    "{% for message in messages %}\n"
    "    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{{ bos_token }}{% set ns = namespace(n=0) %}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{% set ns.n = ns.n + 1 %}[INST] {{ m['content'] | trim }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] }}{{ eos_token }}"
    "{% else %}{{ raise_exception('only users and assistants') }}{% endif %}"
    "{% if ns.n > 5 %}{% break %}{% endif %}{% endfor %}"
)
GENERATION = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}{{ m }}{% endif %}{% endfor %}"
    "{{ strftime_now('%Y') }}{{ documents }}{{ flavour | default('plain') }}{{ unk_token }}"
)
CHAT = [
    {"role": "user", "content": ' 3 < 4 & "é" '},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "日本 {{ 7 * 7 }}"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"a": ["<", "é"]}}}]
CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<s>",
    "eos_token": {"content": "</s>", "__type": "AddedToken", "special": True},
}


def folder_with(tmp_path: Path, model_folder: Path, config: dict[str, Any]) -> Path:
    (tmp_path / "tokenizer.json").write_bytes((model_folder / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(CONFIG | config))
    return tmp_path


@pytest.mark.parametrize("source", [CHATML, LLAMA2, GENERATION], ids=["chatml", "llama2", "other"])
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["", "tools"])
def test_equals_transformers(
    tmp_path: Path, model_folder: Path, source: str, tools: list[dict[str, Any]] | None
) -> None:
    from transformers import AutoTokenizer

    folder = folder_with(tmp_path, model_folder, {"chat_template": source})
    reference = AutoTokenizer.from_pretrained(folder)
    template = load_chat_template(folder)
    assert template is not None
    for extra in ({}, {"flavour": "x"}):
        for start in (False, True):
            expected = reference.apply_chat_template(
                CHAT, tools=tools, tokenize=False, add_generation_prompt=start, **extra
            )
            assert (
                template.render(CHAT, tools=tools, add_generation_prompt=start, variables=extra)
                == expected
            )


def test_prompt_ids_equal_transformers(model_folder: Path) -> None:
    from transformers import AutoTokenizer

    from app.inputs.tokenizer import Tokenizer

    reference = AutoTokenizer.from_pretrained(model_folder)
    template = load_chat_template(model_folder)
    assert template is not None
    text = template.render(CHAT)
    ids = Tokenizer.load(model_folder).encode(text, add_special_tokens=False, limit=1000)
    expected = reference.apply_chat_template(CHAT, add_generation_prompt=True)
    assert ids == list(expected["input_ids"])


def test_where_templates_are_found(tmp_path: Path, model_folder: Path) -> None:
    folder = folder_with(tmp_path, model_folder, {})
    assert load_chat_template(folder) is None
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "config"}))
    assert load_chat_template(folder).render(CHAT) == "config"  # type: ignore[union-attr]
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "json"}))
    assert load_chat_template(folder).render(CHAT) == "json"  # type: ignore[union-attr]
    (folder / "chat_template.jinja").write_text("jinja é")
    assert load_chat_template(folder).render(CHAT) == "jinja é"  # type: ignore[union-attr]


def test_named_templates(tmp_path: Path, model_folder: Path) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    template = load_chat_template(folder_with(tmp_path, model_folder, {"chat_template": named}))
    assert template is not None
    assert template.render(CHAT) == "plain"
    assert template.render(CHAT, tools=TOOLS) == "tools"


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('no') }}",
        "{{ messages[0].missing.deeper }}",
        "{{ 'a' + 1 }}",
        "{{ 1 / 0 }}",
        "{{ messages.__class__.__mro__ }}",
        "{% for x in %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_whatever_a_template_does_is_one_kind_of_error(source: str) -> None:
    with pytest.raises(TemplateRenderError):
        ChatTemplate(source, {}).render(CHAT)


def test_the_front_end_does_not_load_torch() -> None:
    code = (
        "import sys, app.application, app.inputs.template; app.inputs.template.renderer();"
        "import transformers.utils.chat_parsing;"
        "assert not {'torch', 'tensorflow', 'jax'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
