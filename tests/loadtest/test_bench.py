"""`slipstream bench` as a user runs it, against a scripted server in this process."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from loadtest.cli import main
from tests.loadtest.scripted_server import (
    DONE,
    HEAD,
    ManualClock,
    Reply,
    event,
    plain,
    serving,
    usage,
)


async def server_script(request: dict[str, Any], reply: Reply) -> None:
    if not request:
        reply._writer.write(plain("200 OK", b'{"data": [{"id": "the-model"}]}'))
        return
    if request["max_tokens"] == 13:
        reply._writer.write(plain("429 Too Many Requests", b'{"error": {"message": "full"}}'))
        return
    count = request["max_tokens"]
    events = b"".join(event(f" {n}") for n in range(count - 1)) + event("!", "length")
    data = events + usage(len(request["prompt"]), count) + DONE
    reply._writer.write(HEAD + b"%x\r\n%s\r\n0\r\n\r\n" % (len(data), data))


async def bench(*arguments: str) -> tuple[int, list[tuple[str, dict[str, Any]]]]:
    async with serving(server_script, ManualClock()) as server:
        code = await asyncio.to_thread(main, ["--url", server.url, *arguments])
        return code, server.requests


@pytest.mark.parametrize("load", [["--concurrency", "3"], ["--rate", "500"]])
async def test_a_run_is_reported(
    load: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "result.json"
    sizes = ["--requests", "20", "--warmup", "2", "--input-tokens", "9", "--output-tokens", "4"]
    code, requests = await bench(*load, *sizes, "--out", str(out), "--api-key", "hidden")
    assert code == 0
    summary = json.loads(out.read_text())["summary"]
    assert summary["requests"] == {"sent": 20, "completed": 20}
    assert summary["tokens"] == {"input": 180, "output": 80, "cached": 0}
    assert summary["disagreements"] == {}
    assert "hidden" not in out.read_text()
    printed = capsys.readouterr().out
    assert "20 of 20 requests" in printed
    assert max(map(len, printed.splitlines())) <= 100
    sent = [body for path, body in requests if path == "/v1/completions"]
    assert len(sent) == 22
    assert {(b["model"], b["max_tokens"], b["temperature"], b["ignore_eos"]) for b in sent} == {
        ("the-model", 4, 0.0, True)
    }
    assert not any(b["skip_special_tokens"] for b in sent)
    assert all(b["stream_options"] == {"include_usage": True} for b in sent)


async def test_failures_are_shown_and_make_the_exit_code_1(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, requests = await bench("--requests", "3", "--output-tokens", "13", "--no-ignore-eos")
    assert code == 1
    extensions = {"ignore_eos", "skip_special_tokens"}
    assert not any(extensions & set(body) for _, body in requests)
    assert "error: HTTP 429: 3, such as" in capsys.readouterr().out


async def test_no_server_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert await asyncio.to_thread(main, ["--url", "http://127.0.0.1:1"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("--rate 0", "--rate: 0 is not above 0"),
        ("--rate inf", "--rate: inf is not above 0"),
        ("--rate 1 --concurrency 2", "not allowed with"),
        ("--requests x", "--requests: invalid int value: 'x'"),
        ("--warmup -1", "--warmup: -1 is not 0 or more"),
        ("--spread 1", "--spread: 1 is not in [0, 1)"),
        ("--nonsense", "unrecognized arguments"),
        ("--out /no/such/folder/x.json", "x.json cannot be written"),
        ("--html .", "--html: . is a folder"),
    ],
)
def test_wrong_usage_is_exit_code_2(
    wrong: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(wrong.split())
    complaint = capsys.readouterr().err
    assert stop.value.code == 2
    assert said in complaint and complaint.count("\n") == 1


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("--slo missing.yaml", "'missing.yaml'"),
        ("--trace missing.csv", "'missing.csv'"),
        ("--find-rate 3", "--find-rate needs --slo"),
        ("--rate 3 --shape wave", "'wave' is no shape"),
        ("--prefix-tokens 128", "prefix must be shorter"),
        ("--vocab-size 300", "more than 300 tokens"),
    ],
)
async def test_what_cannot_be_run_is_one_line(
    wrong: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _ = await bench(*wrong.split())
    complaint = capsys.readouterr().err
    assert code == 2 and complaint.count("\n") == 1 and said in complaint


@pytest.mark.parametrize("body", [b"{}", b'{"data": []}', b"[]", b"hello"])
async def test_a_server_without_models_is_one_line(
    body: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    async def script(request: dict[str, Any], reply: Reply) -> None:
        reply._writer.write(plain("200 OK", body))

    async with serving(script, ManualClock()) as server:
        assert await asyncio.to_thread(main, ["--url", server.url]) == 2
    assert capsys.readouterr().err.startswith(f"slipstream bench: error: {server.url}: ")


async def test_a_search_ends_when_nobody_answers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loadtest.bench.PROBE_SECONDS", 0.05)
    slo = tmp_path / "slo.yaml"
    slo.write_text("default: {ttft_ms: 1}")
    flags = f"--find-rate 400 --slo {slo} --output-tokens 13 --requests 20"
    code, _ = await bench(*flags.split())
    assert code == 2
    assert "at 400 requests/s none completed: HTTP 429" in capsys.readouterr().err
