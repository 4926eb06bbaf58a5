"""One real server on the built-in model for all black-box tests, and the real openai clients."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from tests.e2e.server_process import ServerProcess, running

MODEL = "slipstream-tiny"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--minutes", default="20", help="of the soak test")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    log = tmp_path_factory.mktemp("server") / "log"
    process = ServerProcess(log, "--dtype", "float32", "--served-model-name", MODEL)
    with running(process):
        yield process


@pytest.fixture
def client(server: ServerProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)


@pytest.fixture
def aclient(server: ServerProcess) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120
    )
