"""SIGTERM, SIGINT and SIGKILL at every stage: streams end clearly, nothing is left behind."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from tests.e2e.server_process import FaultyServer, ServerProcess, exists, wait_until

Start = Callable[..., FaultyServer]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts servers with made-up tokens: `start(*flags)`."""
    servers: list[FaultyServer] = []

    def launch(*flags: str) -> FaultyServer:
        server = FaultyServer(tmp_path / f"log{len(servers)}", "--worker", "simulated", *flags)
        servers.append(server)
        server.wait_ready()
        return server

    yield launch
    for server in servers:
        server.kill()


class Stream(threading.Thread):
    """Reads one stream of a completion in a thread of its own."""

    def __init__(self, server: ServerProcess, tokens: int) -> None:
        super().__init__(daemon=True)
        self._url = f"{server.url}/v1/completions"
        self._body = {
            "prompt": [1, 2], "max_tokens": tokens, "ignore_eos": True, "stream": True, "seed": 7,
            "return_token_ids": True,
        }  # fmt: skip
        self.events: list[str] = []
        self.start()
        wait_until(lambda: len(self.events) > 0, "no event")

    def run(self) -> None:
        try:
            with httpx.stream("POST", self._url, json=self._body, timeout=60) as response:
                for line in response.iter_lines():
                    if line:
                        self.events.append(line.removeprefix("data: "))
        except httpx.TransportError:
            self.events.append("cut")

    @property
    def tokens(self) -> list[int]:
        """Those of all events; checks that the stream is whole."""
        self.join(60)
        assert self.events[-1] == "[DONE]"
        choices = [json.loads(event)["choices"][0] for event in self.events[:-1]]
        assert choices[-1]["finish_reason"] == "length"
        return [token for choice in choices for token in choice["token_ids"]]


def error_of(answer: httpx.Response) -> str:
    return str(answer.json()["error"]["code"])


def test_sigterm_finishes_what_is_open_and_refuses_what_is_new(start: Start) -> None:
    server = start()
    child = server.engine_pid()
    streams = [Stream(server, 300) for _ in range(4)]
    with httpx.Client(base_url=server.url, timeout=30) as client:
        assert client.get("/health").status_code == 200
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: client.get("/health").status_code == 503, "health does not tell")
        assert error_of(client.get("/ready")) == "draining"
        refused = client.post("/v1/completions", json={"prompt": "x"})
        assert (refused.status_code, error_of(refused)) == (503, "shutting_down")
        assert refused.headers["connection"] == "close" and refused.headers["retry-after"]
        assert client.get("/live").status_code == client.get("/metrics").status_code == 200
    server.process.send_signal(signal.SIGTERM)  # once more changes nothing
    tokens = [stream.tokens for stream in streams]
    assert [len(t) for t in tokens] == [300] * 4 and tokens == [tokens[0]] * 4
    assert server.process.wait(20) == 0
    assert not exists(child)


def test_what_does_not_finish_in_time_is_told_so(start: Start) -> None:
    server = start("--drain-seconds", "0.2", "--max-model-len", "100000")
    stream = Stream(server, 99_000)
    plain: list[httpx.Response] = []

    def post() -> None:
        body = {"prompt": [1], "max_tokens": 99_000, "ignore_eos": True}
        plain.append(httpx.post(f"{server.url}/v1/completions", json=body, timeout=60))

    thread = threading.Thread(target=post, daemon=True)
    thread.start()
    wait_until(lambda: server.metric("vllm:num_requests_running") == 2, "not running")
    server.process.send_signal(signal.SIGTERM)
    stream.join(30)
    thread.join(30)
    error, done = stream.events[-2:]
    assert done == "[DONE]"
    assert json.loads(error)["error"]["code"] == "shutting_down"
    assert (plain[0].status_code, error_of(plain[0])) == (503, "shutting_down")
    assert server.process.wait(20) == 0
    assert "2 requests are cut off" in server.log() and "Traceback" not in server.log()


@pytest.mark.parametrize("stopped", [False, True])
def test_sigint_twice_ends_everything_at_once(start: Start, stopped: bool) -> None:
    server = start("--max-model-len", "100000")
    child = server.engine_pid()
    Stream(server, 99_000)
    if stopped:
        server.signal_engine(signal.SIGSTOP)
    server.process.send_signal(signal.SIGINT)
    wait_until(lambda: "are open and have" in server.log(), "it does not drain")
    assert server.process.poll() is None
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(2) == 128 + signal.SIGINT
    wait_until(lambda: not exists(child), "the child lives on", 2)


@pytest.mark.parametrize("stopped", [False, True])
def test_the_engine_does_not_outlive_a_killed_front_end(start: Start, stopped: bool) -> None:
    server = start()
    child = server.engine_pid()
    Stream(server, 1000)
    if stopped:
        server.signal_engine(signal.SIGSTOP)
    server.process.kill()
    wait_until(lambda: not exists(child), "the child lives on", 5)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_start_up(tmp_path: Path, number: int) -> None:
    server = ServerProcess(tmp_path / "log")
    try:
        wait_until(lambda: "weights" in server.log(), "it does not load")
        child = server.engine_pid()
        server.process.send_signal(number)
        assert server.process.wait(20) == 128 + number
        assert not exists(child)
        assert "Traceback" not in server.log()
    finally:
        server.kill()


def test_sigterm_while_the_engine_restarts(start: Start) -> None:
    server = start()
    expected = Stream(server, 200).tokens
    stream = Stream(server, 200)
    dead = server.engine_pid()
    server.signal_engine(signal.SIGKILL)
    wait_until(lambda: not exists(dead), "it lives")
    server.process.send_signal(signal.SIGTERM)
    assert stream.tokens == expected
    assert server.process.wait(20) == 0
    assert "starting the engine again" in server.log()


def test_a_sigterm_that_reaches_the_engine_too_disturbs_nothing(start: Start) -> None:
    """systemd, for one, sends it to every process of a service."""
    server = start()
    stream = Stream(server, 200)
    server.signal_engine(signal.SIGTERM)
    server.process.send_signal(signal.SIGTERM)
    assert len(stream.tokens) == 200
    assert server.process.wait(20) == 0
    assert "starting the engine again" not in server.log()


def test_without_restarts_a_dead_engine_is_the_end(start: Start) -> None:
    server = start("--restart-limit", "0")
    stream = Stream(server, 1000)
    server.signal_engine(signal.SIGKILL)
    stream.join(30)
    error, done = stream.events[-2:]
    assert done == "[DONE]"
    assert json.loads(error)["error"]["code"] == "engine_unavailable"
    assert server.process.wait(20) == 1
    assert "the engine died too often" in server.log()
