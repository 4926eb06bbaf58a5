"""The image runs without rights, and writes nowhere but where it says."""

from __future__ import annotations

import json
import re
import ssl
import urllib.request
from typing import Any

import pytest
import yaml

from tests.meta.tree import ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text()


def stages() -> dict[str, str]:
    """The instructions of each stage by its name, those it is built on included."""
    built: dict[str, str] = {}
    for block in re.split(r"^(?=FROM )", DOCKERFILE, flags=re.M)[1:]:
        match = re.match(r"FROM (\S+) AS (\S+)\n", block)
        assert match is not None
        built[match[2]] = built.get(match[1], "") + block
    return built


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_the_process_is_nobody(target: str) -> None:
    users = re.findall(r"^USER (\S+)$", stages()[target], re.M)
    assert users == ["10001"], "by number, so that Kubernetes can see that it is not root"
    assert "useradd --uid 10001" in stages()[target]


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_every_cache_is_in_the_volume(target: str) -> None:
    stage = stages()[target]
    caches = re.findall(r"(?:^ENV |^ {4})(\w*(?:HOME|DIR))=(\S+)", stage, re.M)
    assert {"HOME", "XDG_CACHE_HOME", "HF_HOME", "TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR"} <= {
        name for name, _ in caches
    }
    assert [value for _, value in caches if not value.startswith("/cache")] == []
    assert "VOLUME /cache" in stage
    assert "PYTHONDONTWRITEBYTECODE=1" in stage


def test_compose_takes_away_what_is_not_needed() -> None:
    service = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]["slipstream"]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["tmpfs"] == ["/tmp"]
    assert "privileged" not in service and "user" not in service
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])


@pytest.mark.parametrize(("variables", "scheme"), [({}, "http"), ({"TLS_CERT": "x"}, "https")])
def test_health_is_asked_for_as_it_is_served(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], scheme: str
) -> None:
    asked: list[str] = []

    def urlopen(url: str, timeout: float, context: ssl.SSLContext) -> Any:
        asked.append(url)

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    for name, value in ({"PORT": "8000"} | variables).items():
        monkeypatch.setenv(f"SLIPSTREAM_{name}", value)
    (command,) = re.findall(r"^HEALTHCHECK .*\\\n +CMD (.*)$", DOCKERFILE, re.M)
    *_, program = json.loads(command)
    exec(program)
    assert asked == [f"{scheme}://127.0.0.1:8000/health"]
