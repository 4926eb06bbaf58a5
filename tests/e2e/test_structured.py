"""Structured output over HTTP, from the real model: whatever it would rather say."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest

from tests.e2e.conftest import MODEL
from tests.e2e.server_process import ServerProcess, running
from tests.structured.corpus import corpus
from tests.structured.prefix import is_prefix
from tests.structured.validity import fault, unique

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "é", 3, None]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
GREEDY: dict[str, Any] = {"temperature": 0}
WILD: dict[str, Any] = {"temperature": 2, "top_p": 1, "seed": 5}


def response_format(schema: Any) -> Any:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


def ask(client: openai.OpenAI, **fields: Any) -> Any:
    messages: Any = [{"role": "user", "content": "Who are you?"}]
    return client.chat.completions.create(
        **{"model": MODEL, "messages": messages, "max_tokens": 200, **fields}
    )


def complete(client: openai.OpenAI, **fields: Any) -> Any:
    extra = {k: fields.pop(k) for k in list(fields) if k.startswith(("guided", "struct", "min_"))}
    return client.completions.create(
        **{"model": MODEL, "prompt": "Once", "max_tokens": 100, "extra_body": extra, **fields}
    ).choices[0]


@pytest.mark.parametrize("sampling", [GREEDY, WILD], ids=["greedy", "wild"])
def test_a_schema_is_kept_plain_and_streamed(
    client: openai.OpenAI, sampling: dict[str, Any]
) -> None:
    plain = ask(client, response_format=response_format(PERSON), **sampling).choices[0]
    assert plain.finish_reason == "stop"
    value = json.loads(plain.message.content)
    jsonschema.validate(value, PERSON)
    assert list(value) == ["name", "age", "tags"]
    chunks = ask(client, response_format=response_format(PERSON), stream=True, **sampling)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == plain.message.content


def test_a_sample_of_the_corpus(client: openai.OpenAI) -> None:
    """Many schemas at once: each text is valid, or the beginning of JSON where it was cut."""

    def check(case: tuple[str, Any]) -> bool:
        name, schema = case
        sampling = WILD if sum(name.encode()) % 2 else GREEDY
        choice = ask(client, response_format=response_format(schema), **sampling).choices[0]
        chunks = list(ask(client, response_format=response_format(schema), stream=True, **sampling))
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert text == choice.message.content
        assert chunks[-1].choices[0].finish_reason == choice.finish_reason
        if choice.finish_reason == "length":
            assert is_prefix(text), text
            return False
        assert choice.finish_reason == "stop"
        assert fault(text, schema) is None
        return True

    cases = list(corpus())[::4]
    with ThreadPoolExecutor(8) as threads:
        ended = list(threads.map(check, cases))
    assert sum(ended) > 0.7 * len(cases)


@pytest.mark.parametrize("sampling", [GREEDY, WILD], ids=["greedy", "wild"])
def test_any_object(client: openai.OpenAI, sampling: dict[str, Any]) -> None:
    choice = ask(client, response_format={"type": "json_object"}, **sampling).choices[0]
    text = choice.message.content
    assert text.startswith("{")
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(text, object_pairs_hook=unique), dict)
    else:
        assert is_prefix(text)


def test_expressions_choices_and_grammars(client: openai.OpenAI) -> None:
    lark = 'start: item ("," item)* "."\nitem: /[a-z]{2,4}/ | "é"'
    gbnf = 'root ::= "(" [0-9]+ ("+" [0-9]+)? ")"'
    cases: list[tuple[dict[str, Any], str]] = [
        ({"guided_regex": r"[A-Z]{3}/\d{2,4}"}, r"[A-Z]{3}/[0-9]{2,4}"),
        ({"guided_regex": "a|é日|c\nd"}, "a|é日|c\nd"),
        ({"guided_choice": ["yes", "no", 'may "be"\n', "ja/nein"]}, 'yes|no|may "be"\n|ja/nein'),
        ({"guided_grammar": lark}, r"([a-z]{2,4}|é)(,([a-z]{2,4}|é))*\."),
        ({"guided_grammar": gbnf}, r"\([0-9]+(\+[0-9]+)?\)"),
        ({"structured_outputs": {"regex": "x{3}"}}, "xxx"),
        ({"structured_outputs": {"choice": ["one"]}}, "one"),
        ({"structured_outputs": {"json": {"const": [1, "é"]}}}, r'\[1, ?"é"\]'),
    ]
    for fields, pattern in cases:
        for sampling in (GREEDY, WILD):
            choice = complete(client, **fields, **sampling)
            if choice.finish_reason == "stop":
                assert re.fullmatch(pattern, choice.text), (fields, choice.text)
            else:
                assert "grammar" in str(fields) and len(choice.text) >= 20


def test_nothing_outweighs_the_grammar(client: openai.OpenAI) -> None:
    bias = {str(token): -100 if token % 2 else 100 for token in range(600)}
    for sampling in (GREEDY, WILD):
        choice = ask(
            client, response_format=response_format(PERSON), logit_bias=bias, n=3, logprobs=True,
            presence_penalty=2, frequency_penalty=-2, top_logprobs=2, **sampling,
        )  # fmt: skip
        for one in choice.choices:
            jsonschema.validate(json.loads(one.message.content), PERSON)
            read = b"".join(bytes(entry.bytes) for entry in one.logprobs.content)
            assert read.decode() == one.message.content


def test_a_cut_text_is_the_beginning_of_json(client: openai.OpenAI) -> None:
    whole = ask(client, response_format=response_format(PERSON), **GREEDY)
    text, count = whole.choices[0].message.content, whole.usage.completion_tokens
    for most in range(1, count):
        fields = {"response_format": response_format(PERSON), "max_tokens": most, **GREEDY}
        cut = ask(client, **fields).choices[0]
        assert text.startswith(cut.message.content) and is_prefix(cut.message.content)
        assert cut.finish_reason == "length"


def test_ends_and_stops(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"guided_regex": "[a-z]{1,30}", **GREEDY}
    assert len(complete(client, min_tokens=8, **fields).text) >= 8
    late = complete(client, min_tokens=90, **fields)
    assert (len(late.text), late.finish_reason) == (30, "stop")
    to_the_end = client.completions.create(
        model=MODEL, prompt="Once", max_tokens=100, temperature=0,
        extra_body={"guided_regex": "[a-z]{1,30}", "ignore_eos": True},
    ).choices[0]  # fmt: skip
    assert (len(to_the_end.text), to_the_end.finish_reason) == (30, "stop")
    text = late.text
    cut = complete(client, min_tokens=90, stop=text[5:9], **fields)
    assert (cut.text, cut.finish_reason) == (text[: text.index(text[5:9])], "stop")


def test_contradictions_end_in_time(client: openai.OpenAI) -> None:
    endless = {
        "$defs": {"a": {"type": "object", "properties": {"x": {"$ref": "#/$defs/a"}},
                        "required": ["x"]}},
        "$ref": "#/$defs/a",
    }  # fmt: skip
    choice = ask(client, response_format=response_format(endless)).choices[0]
    assert choice.finish_reason == "length" and is_prefix(choice.message.content)
    jsonschema.validate(
        json.loads(ask(client, response_format=response_format(PERSON)).choices[0].message.content),
        PERSON,
    )


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    log = tmp_path_factory.mktemp("simulated") / "log"
    server = ServerProcess(log, "--worker", "simulated", "--served-model-name", MODEL)
    with running(server):
        yield server


def test_the_simulated_worker_keeps_to_it_too(simulated: ServerProcess) -> None:
    client = openai.OpenAI(base_url=f"{simulated.url}/v1", api_key="none", max_retries=0)
    for seed in range(5):
        choice = ask(client, response_format=response_format(PERSON), seed=seed).choices[0]
        assert choice.finish_reason == "stop"
        jsonschema.validate(json.loads(choice.message.content), PERSON)


def test_a_stream_goes_on_in_its_grammar_after_a_crash(tmp_path: Path) -> None:
    server = ServerProcess(tmp_path / "log", "--dtype", "float32", "--served-model-name", MODEL)
    try:
        server.wait_ready()
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        schema = {"type": "array", "items": PERSON, "minItems": 12, "maxItems": 12}
        fields: dict[str, Any] = {
            "response_format": response_format(schema), "max_tokens": 1500, **WILD
        }  # fmt: skip
        expected = ask(client, **fields).choices[0].message.content
        text, killed = "", False
        for chunk in ask(client, stream=True, **fields):
            text += chunk.choices[0].delta.content or ""
            if len(text) > 100 and not killed:
                server.signal_engine(signal.SIGKILL)
                killed = True
        assert killed and text == expected
        jsonschema.validate(json.loads(text), schema)
    finally:
        server.stop()
