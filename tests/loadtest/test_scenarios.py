"""What `slipstream bench` sends and reports for each kind of user, against a scripted server."""

from __future__ import annotations

import asyncio
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import loadtest
from loadtest.chaos import Chaos, verdict
from loadtest.cli import main
from loadtest.client import Client
from tests.loadtest.scripted_server import DONE, HEAD, ManualClock, Reply, plain, serving, usage

DATA = Path(loadtest.__file__).parent / "data"
METRICS = b"vllm:prompt_tokens_total %d\nvllm:generation_tokens_total %d\n"


class Fake:
    """Answers all endpoints at once and keeps count, as a server would; `lie` is added to it."""

    def __init__(self, text: str = "hi", lie: int = 0) -> None:
        self.input = self.output = 0
        self.text, self.lie = text, lie
        self.bodies: list[dict[str, Any]] = []

    async def script(self, request: dict[str, Any], reply: Reply) -> None:
        write = reply._writer.write
        if reply.path == "/v1/models":
            write(plain("200 OK", b'{"data": [{"id": "m", "max_model_len": 4000}]}'))
            return
        if reply.path == "/metrics":
            write(plain("200 OK", METRICS % (self.input, self.output + self.lie * self.output)))
            return
        self.bodies.append(request)
        if "input" in request:
            self.input += len(request["input"])
            body = {"data": [], "usage": {"prompt_tokens": len(request["input"])}}
            write(plain("200 OK", json.dumps(body).encode()))
            return
        said = " ".join(m["content"] for m in request.get("messages", ()))
        prompt = request.get("prompt") or said.split()
        count = request["max_tokens"]
        self.input += len(prompt)
        self.output += count
        choice: dict[str, Any] = {"index": 0, "finish_reason": "length", "text": self.text}
        if "messages" in request:
            choice["delta"] = {"content": choice.pop("text")}
        data = b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"
        data += usage(len(prompt), count) + DONE
        write(HEAD + b"%x\r\n%s\r\n0\r\n\r\n" % (len(data), data))


async def bench(fake: Fake, out: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    def run(url: str) -> tuple[int, dict[str, Any]]:
        code = main(["--url", url, "--out", str(out), *arguments])
        return code, json.loads(out.read_text()) if out.exists() else {}

    async with serving(fake.script, ManualClock()) as server:
        return await asyncio.to_thread(run, server.url)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "result.json"


async def test_a_chat_carries_its_history_and_thinks(out: Path) -> None:
    fake = Fake("an answer")
    flags = "--workload chat --turns 3 --think 0.01 --requests 4 --warmup 0 --concurrency 2"
    code, result = await bench(fake, out, *flags.split(), "--input-tokens", "5")
    assert code == 0
    assert result["summary"]["requests"] == {"sent": 12, "completed": 12}
    lengths = sorted(len(body["messages"]) for body in fake.bodies)
    assert lengths == [1] * 4 + [3] * 4 + [5] * 4
    longest = next(b["messages"] for b in fake.bodies if len(b["messages"]) == 5)
    assert [m["role"] for m in longest] == ["user", "assistant"] * 2 + ["user"]
    assert longest[1]["content"] == "an answer"
    assert all(len(m["content"].split()) == 5 for m in longest[::2])


@pytest.mark.parametrize(("text", "valid"), [('{"name": "x"}', 3), ("Sure! Here", 0)])
async def test_structured_answers_are_checked(out: Path, text: str, valid: int) -> None:
    fake = Fake(text)
    flags = "--workload structured --requests 3 --warmup 0".split()
    _, result = await bench(fake, out, *flags)
    assert result["summary"]["json"] == {"asked": 3, "valid": valid}
    wrong = result["summary"]["disagreements"].get("JSON asked for, other text given", 0)
    assert wrong == 3 - valid
    form = fake.bodies[0]["response_format"]
    assert form["type"] == "json_schema" and "ignore_eos" not in fake.bodies[0]


async def test_embeddings_have_only_an_end(out: Path) -> None:
    flags = "--workload embeddings --requests 5 --warmup 1 --input-tokens 7".split()
    code, result = await bench(Fake(), out, *flags)
    summary = result["summary"]
    assert code == 0 and summary["tokens"]["input"] == 35
    assert result["load"].endswith("embeddings, 7 tokens in")
    assert summary["latency_ms"]["ttft"] is None and summary["latency_ms"]["e2e"]["count"] == 5


async def test_a_long_mix_reports_its_groups(out: Path, tmp_path: Path) -> None:
    slo = tmp_path / "slo.yaml"
    slo.write_text("default: {ttft_ms: 60000}\n")
    flags = "--workload long-mix --long-share 0.3 --requests 40 --input-tokens 10".split()
    page = tmp_path / "page.html"
    _, result = await bench(Fake(), out, *flags, "--slo", str(slo), "--html", str(page))
    groups = result["summary"]["groups"]
    assert groups["long"]["requests"] + groups["short"]["requests"] == 40
    assert 4 <= groups["long"]["requests"] <= 20
    assert result["summary"]["goodput"]["groups"] == {"long": 1.0, "short": 1.0}
    assert "Jain fairness" in page.read_text()


async def test_a_trace_is_replayed_at_its_times(out: Path) -> None:
    fake = Fake()
    trace = str(DATA / "azure-conv-2023.csv")
    flags = ["--trace", trace, "--seconds", "20", "--time-scale", "0.01", "--warmup", "0"]
    code, result = await bench(fake, out, *flags)
    assert code == 0
    sent = [(len(body["prompt"]), body["max_tokens"]) for body in fake.bodies]
    assert sent[:3] == [(374, 44), (396, 109), (879, 55)]
    assert max(n + m for n, m in sent) <= 4000
    assert "replay of azure-conv-2023.csv" in result["load"]


async def test_mooncakes_prefixes_are_sent_again(out: Path) -> None:
    fake = Fake()
    trace = str(DATA / "mooncake-synthetic.jsonl")
    flags = ["--trace", trace, "--concurrency", "4", "--length-scale", "0.05", "--warmup", "0"]
    _, result = await bench(fake, out, *flags)
    assert result["summary"]["requests"]["completed"] == 40
    beginnings = [tuple(body["prompt"][:25]) for body in fake.bodies]
    assert len(set(beginnings)) < 40


async def test_a_server_that_counts_otherwise_is_contradicted(out: Path) -> None:
    flags = "--requests 5 --warmup 1 --concurrency 1 --output-tokens 4".split()
    _, honest = await bench(Fake(), out, *flags)
    assert honest["summary"]["disagreements"] == {}
    _, lying = await bench(Fake(lie=1), out, *flags)
    (disagreement,) = lying["summary"]["disagreements"]
    assert disagreement.startswith("/metrics counts") and disagreement.endswith("usage 20")


async def test_repetitions_have_seeds_of_their_own_and_intervals(out: Path) -> None:
    fake = Fake()
    flags = "--requests 6 --warmup 0 --repeat 3".split()
    _, result = await bench(fake, out, *flags)
    assert len({tuple(body["prompt"]) for body in fake.bodies}) == 18
    assert len(result["repetitions"]) == 3
    assert result["confidence"]["output tokens/s"]["half_width"] > 0


async def test_a_rate_is_found_and_drawn(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loadtest.bench.PROBE_SECONDS", 0.05)
    slo, page = tmp_path / "slo.yaml", tmp_path / "page.html"
    slo.write_text("default: {ttft_ms: 0.000001}\n")
    flags = ["--requests", "3", "--slo", str(slo), "--html", str(page), "--find-rate"]
    code, result = await bench(Fake(), out, *flags, "4000")
    assert code == 1 and result["find_rate"]["rate"] is None
    assert len(result["find_rate"]["probes"]) == 7
    assert "TTFT against rate" in page.read_text()


class Page(HTMLParser):
    """Fails on tags that do not match, and keeps what would be loaded from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [str(v) for name, v in attrs if name in {"src", "href", "data"}]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


async def test_the_page_is_whole_and_needs_nothing_else(out: Path, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    flags = ["--requests", "30", "--repeat", "2", "--model", "<script>", "--html", str(path)]
    await bench(Fake(), out, *flags)
    page = Page()
    page.feed(path.read_text())
    assert page.open == [] and page.loads == []
    assert "<script" not in path.read_text() and "&lt;script&gt;" in path.read_text()
    assert len(re.findall("<polyline", path.read_text())) >= 4


@pytest.mark.parametrize(
    "wrong",
    [
        ["--find-rate", "3"],
        ["--shape", "wave", "--rate", "3"],
        ["--trace", "nowhere.csv"],
        ["--trace", str(DATA / "README.md")],
        ["--trace", str(DATA / "azure-conv-2023.csv"), "--rate", "3"],
        ["--slo", str(DATA / "azure-conv-2023.csv")],
    ],
)
async def test_what_cannot_be_is_one_line(
    out: Path, wrong: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code, _ = await bench(Fake(), out, *wrong)
    assert code == 2
    assert capsys.readouterr().err.count("\n") == 1


REFUSAL = plain("400 Bad Request", b'{"error": {"message": "no"}}')


async def chaos_against(answer: bytes) -> Chaos:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        left = int(head.lower().split("content-length: ")[1].split()[0])
        while left > 0 and (data := await reader.read(1 << 20)):
            left -= len(data)
        writer.write(answer)
        await writer.drain()
        writer.close()

    listener = await asyncio.start_server(handle, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    chaos = Chaos(url, "m", None, 0)
    for kind in chaos.kinds:
        await chaos.once(kind)
    listener.close()
    return chaos


async def test_chaos_tells_a_clean_refusal_from_a_bad_one() -> None:
    clean = await chaos_against(REFUSAL)
    assert set(clean.faults) == {"slow reader"}  # no answer to read
    rude = await chaos_against(plain("400 Bad Request", b"no"))
    assert {"malformed", "over the limit"} <= set(rude.faults)
    obeyed = await chaos_against(plain("200 OK", b"{}"))
    assert {"malformed", "over the limit", "oversized"} <= set(obeyed.faults)


@pytest.mark.parametrize(
    ("metrics", "passed"),
    [(b"vllm:num_requests_running 0\n", True), (b"vllm:num_requests_running 1\n", False)],
)
async def test_what_is_left_behind_fails_the_chaos(
    metrics: bytes, passed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loadtest.chaos._FORGET_SECONDS", 0.5)

    async def script(_: dict[str, Any], reply: Reply) -> None:
        body = metrics if reply.path == "/metrics" else b"{}"
        reply._writer.write(plain("200 OK", body))

    chaos = Chaos("http://127.0.0.1:1", "m", None, 0)
    async with serving(script, ManualClock()) as server:
        client = Client(server.url)
        checks = await verdict(chaos, client, {})
        by_name = {check["name"]: check["passed"] for check in checks}
        client.close()
    assert by_name["nothing is left behind"] is passed
    assert by_name["well-behaved requests all complete"]
