"""Keys from a file, what their holders may do, and what they are told when they did it all."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import httpx
import pytest

from app import cli
from app.access.keys import KeyFileError, digest_of, read_keys
from app.access.quota import Bucket, Quota
from app.server import with_policy
from config.settings import EngineSettings, ServerSettings
from tests.app.conftest import MakeServer, Server
from tests.app.pooling import MakePools, make_pools, pool_folder
from tests.app.test_disconnect import until

__all__ = ["make_pools", "pool_folder"]


def write(path: Path, **keys: dict[str, Any]) -> Path:
    """A file of keys whose secrets are their names."""
    content = {name: {"sha256": digest_of(name)} | rights for name, rights in keys.items()}
    path.write_text(json.dumps(content))
    return path


def bearer(secret: str) -> dict[str, str]:
    return {"authorization": f"Bearer {secret}"}


async def complete(server: Server, secret: str, **fields: Any) -> httpx.Response:
    fields = {"prompt": [70] * 3, "max_tokens": 4, "seed": 1} | fields
    return await server.http.post("/v1/completions", json=fields, headers=bearer(secret))


def exceeded(response: httpx.Response, limit: str) -> None:
    assert response.status_code == 429, response.text
    error = response.json()["error"]
    assert error["code"] == "rate_limit_exceeded"
    assert error["type"] == "rate_limit_error"
    assert limit in error["message"]
    assert int(response.headers["retry-after"]) >= 1


# -- the file ------------------------------------------------------------------------------------


async def test_keys_of_yaml_and_json_let_in(make_server: MakeServer, tmp_path: Path) -> None:
    yaml = tmp_path / "keys.yaml"
    yaml.write_text(
        f"# ours\nalice: {{sha256: {digest_of('a')}}}\nbob:\n  sha256: {digest_of('b')}\n"
    )
    as_json = write(tmp_path / "keys.json", a={}, b={})
    for path in (yaml, as_json):
        server = make_server(api_key_file=str(path), api_keys=("plain",))
        for secret, status in (("a", 200), ("b", 200), ("plain", 200), ("c", 401), ("alice", 401)):
            assert (await complete(server, secret)).status_code == status
        assert (await server.http.get("/v1/models")).status_code == 401
        assert (await server.http.get("/health")).status_code == 200


async def test_an_empty_file_lets_nobody_in(make_server: MakeServer, tmp_path: Path) -> None:
    server = make_server(api_key_file=str(write(tmp_path / "keys.json")))
    assert (await complete(server, "")).status_code == 401
    nothing = {"sha256": digest_of("")}
    server = make_server(api_key_file=str(write(tmp_path / "keys.json", alice=nothing)))
    assert (await complete(server, "")).status_code == 401


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("[]", "must map names"),
        ("alice: 5", "alice"),
        ("alice: {}", "sha256"),
        ("alice: {sha256: abc}", "sha256"),
        (f"alice: {{sha256: {'A' * 64}}}", "sha256"),
        (f"alice: {{sha256: {'a' * 64}, banana: 1}}", "banana"),
        (f"alice: {{sha256: {'a' * 64}, concurrent: 0}}", "concurrent"),
        (f"alice: {{sha256: {'a' * 64}, admin: yes please}}", "admin"),
        (f"a b: {{sha256: {'a' * 64}}}", "a b"),
        (f"alice: {{sha256: {'a' * 64}}}\nalice: {{sha256: {'b' * 64}}}", "comes twice"),
        (f"alice: {{sha256: {'a' * 64}}}\nbob: {{sha256: {'a' * 64}}}", "same secret"),
        ("alice: [", "alice"),
        ("!!python/object/apply:os.system [true]", "python"),
    ],
)
def test_a_faulty_file_is_refused_in_one_line_that_says_why(
    tmp_path: Path, content: str, named: str
) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(content)
    with pytest.raises(KeyFileError) as error:
        read_keys(path)
    assert str(path) in str(error.value)
    assert named in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match="cannot read"):
        read_keys(tmp_path / "none")


async def test_the_file_is_read_again_when_it_changes(
    make_server: MakeServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "keys.json", alice={"requests_per_minute": 3})
    server = make_server(api_key_file=str(path))
    assert (await complete(server, "alice")).status_code == 200

    replacement = write(tmp_path / "next", alice={"requests_per_minute": 2}, bob={})
    os.replace(replacement, path)
    server.keys._checked = 0.0  # a second later
    assert (await complete(server, "bob")).status_code == 200
    assert (await complete(server, "alice")).status_code == 200
    exceeded(await complete(server, "alice"), "2 requests a minute")  # what was used stays used

    path.write_text("alice: [")
    server.keys.reload()  # as SIGHUP does
    assert "keys stay as they were" in caplog.text
    assert (await complete(server, "bob")).status_code == 200

    write(path, alice={})
    server.keys.reload()
    assert (await complete(server, "bob")).status_code == 401


def test_a_new_key_is_a_secret_and_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["key", "new", "alice"]) == 0
    printed = capsys.readouterr()
    secret = printed.err.split()[-1]
    assert secret not in printed.out
    path = tmp_path / "keys.yaml"
    path.write_text(printed.out)
    assert read_keys(path)["alice"].sha256 == digest_of(secret)
    assert len(secret) >= 43, "256 bits"


@pytest.mark.parametrize(
    "arguments", [[], ["new"], ["old", "alice"], ["new", "a b"], ["new", "-x"]]
)
def test_a_key_that_cannot_be_made(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["key", *arguments]) == 2
    assert capsys.readouterr().err.count("\n") == 1


# -- quotas --------------------------------------------------------------------------------------


async def test_requests_per_minute(make_server: MakeServer, tmp_path: Path) -> None:
    path = write(tmp_path / "keys", alice={"requests_per_minute": 2}, bob={})
    server = make_server(api_key_file=str(path))
    for left in (1, 0):
        answer = await complete(server, "alice")
        assert answer.status_code == 200
        assert answer.headers["x-ratelimit-limit-requests"] == "2"
        assert answer.headers["x-ratelimit-remaining-requests"] == str(left)
        assert 0 < float(answer.headers["x-ratelimit-reset-requests"].removesuffix("s")) <= 60
    refused = await complete(server, "alice")
    exceeded(refused, "2 requests a minute")
    assert "alice" in refused.json()["error"]["message"]
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    assert (await server.http.get("/v1/models", headers=bearer("alice"))).status_code == 200
    answer = await complete(server, "bob")
    assert answer.status_code == 200
    assert not [name for name in answer.headers if name.startswith("x-ratelimit")]


@pytest.mark.parametrize("stream", [False, True])
async def test_tokens_per_minute(make_server: MakeServer, tmp_path: Path, stream: bool) -> None:
    path = write(tmp_path / "keys", alice={"tokens_per_minute": 10})
    server = make_server(lambda request: [70] * 8, api_key_file=str(path))
    first = await complete(server, "alice", max_tokens=4, n=2, stream=stream)
    assert first.headers["x-ratelimit-limit-tokens"] == "10"
    # A stream's headers are sent with the first token.
    assert int(first.headers["x-ratelimit-remaining-tokens"]) in (range(1, 8) if stream else [0])
    # 3 of the prompt and twice 4: one too many, which later requests wait for.
    refused = await complete(server, "alice")
    exceeded(refused, "10 tokens a minute")
    assert refused.headers["x-ratelimit-remaining-tokens"] == "0"
    assert len(server.engine.requests) == 2


async def test_a_prompt_that_does_not_fit_any_more(make_server: MakeServer, tmp_path: Path) -> None:
    path = write(tmp_path / "keys", alice={"tokens_per_minute": 100})
    server = make_server(api_key_file=str(path))
    assert (await complete(server, "alice", prompt=[70] * 50, max_tokens=1)).status_code == 200
    exceeded(await complete(server, "alice", prompt=[70] * 60), "100 tokens a minute")
    assert (await complete(server, "alice", prompt=[70] * 40, max_tokens=1)).status_code == 200
    assert len(server.engine.requests) == 2


async def test_a_prompt_larger_than_the_limit_is_let_in_alone(
    make_server: MakeServer, tmp_path: Path
) -> None:
    path = write(tmp_path / "keys", alice={"tokens_per_minute": 10})
    server = make_server(api_key_file=str(path))
    assert (await complete(server, "alice", prompt=[70] * 50)).status_code == 200
    exceeded(await complete(server, "alice"), "10 tokens a minute")


async def test_texts_count_as_prompts_do(make_pools: MakePools, tmp_path: Path) -> None:
    path = write(tmp_path / "keys", alice={"tokens_per_minute": 10})
    pools = make_pools(api_key_file=str(path))
    for status in (200, 429):
        answer = await pools.http.post(
            "/v1/embeddings", json={"input": "a b c d"}, headers=bearer("alice")
        )
        assert answer.status_code == status


@pytest.mark.parametrize("stream", [False, True])
async def test_concurrent_requests(make_server: MakeServer, tmp_path: Path, stream: bool) -> None:
    path = write(tmp_path / "keys", alice={"concurrent": 2}, bob={"concurrent": 2})
    server = make_server(api_key_file=str(path))
    server.engine.resume.clear()
    open_ones = [asyncio.create_task(complete(server, "alice", stream=stream)) for _ in range(2)]
    await until(lambda: server.engine.running == 2)
    exceeded(await complete(server, "alice"), "2 requests at once")
    other = asyncio.create_task(complete(server, "bob"))
    await until(lambda: server.engine.running == 3)
    server.engine.resume.set()
    answers = await asyncio.gather(*open_ones, other)
    assert [answer.status_code for answer in answers] == [200] * 3
    assert (await complete(server, "alice")).status_code == 200
    assert (await complete(server, "alice", max_tokens=-1)).status_code == 400
    for name in ("alice", "bob"):
        key = server.keys.find(name.encode())
        assert key is not None and key.quota.open == 0


def test_a_bucket_refills_evenly_and_remembers_debts() -> None:
    now = 0.0
    bucket = Bucket(60, lambda: now)
    bucket.take(90)
    assert bucket.level() == -30
    assert bucket.seconds_until(1) == 31
    assert bucket.seconds_until(1000) == 90, "more than fits is as much as fits"
    now = 40.0
    assert bucket.seconds_until(10) == 0
    assert bucket.headers("x")["x-ratelimit-remaining-x"] == "10"
    now = 1e6
    assert bucket.level() == 60
    bucket.take(50)
    bucket.resize(100)
    assert bucket.level() == 50
    bucket.resize(None)
    assert (bucket.seconds_until(10**9), bucket.headers("x")) == (0.0, {})


def test_what_is_refused_is_not_counted() -> None:
    quota = Quota("alice", lambda: 0.0)
    quota.limit(1, None, None)
    quota.enter()
    for _ in range(3):
        with pytest.raises(Exception, match="1 requests a minute"):
            quota.enter()
    assert (quota.open, quota.requests.level()) == (1, 0)


# -- what a key may ask for, and whose it is -----------------------------------------------------


async def test_priority(make_server: MakeServer, tmp_path: Path) -> None:
    path = write(tmp_path / "keys", alice={}, boss={"priority": -5})
    server = make_server(api_key_file=str(path), api_keys=("plain",))
    for secret, priority, status in (
        ("alice", 0, 200), ("alice", 7, 200), ("alice", -1, 403), ("boss", -5, 200),
        ("boss", -6, 403), ("plain", -100, 200),
    ):  # fmt: skip
        answer = await complete(server, secret, priority=priority)
        assert answer.status_code == status
        if status == 403:
            assert answer.json()["error"]["param"] == "priority"
            assert answer.json()["error"]["type"] == "permission_error"


async def test_tenants_and_salts_are_by_key(make_server: MakeServer, tmp_path: Path) -> None:
    path = write(tmp_path / "keys", alice={}, proxy={"gateway": True})
    server = make_server(api_key_file=str(path))
    fairness = {"x-gateway-inference-fairness-id": "team-1"}
    for secret, header in (("alice", {}), ("alice", fairness), ("proxy", {}), ("proxy", fairness)):
        answer = await server.http.post(
            "/v1/completions", json={"prompt": "a", "cache_salt": "s"},
            headers=bearer(secret) | header,
        )  # fmt: skip
        assert answer.status_code == 200
    assert [(r.tenant, r.salt) for r in server.engine.requests] == [
        ("alice", b"alice\0s"),
        ("alice", b"alice\0s"),  # only a gateway is believed whom a request is for
        ("proxy", b"proxy\0s"),
        ("proxy/team-1", b"proxy\0s"),
    ]


async def test_without_keys_the_fairness_header_counts(server: Server) -> None:
    for header in ({}, {"x-gateway-inference-fairness-id": "team-1"}):
        await server.http.post("/v1/completions", json={"prompt": "a"}, headers=header)
    assert [(r.tenant, r.salt) for r in server.engine.requests] == [("", b""), ("/team-1", b"")]
    long = {"x-gateway-inference-fairness-id": "x" * 300}
    refused = await server.http.post("/v1/completions", json={"prompt": "a"}, headers=long)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "x-gateway-inference-fairness-id"


@pytest.mark.parametrize(
    ("asked", "keys", "file", "policy"),
    [
        ("auto", (), "", "fcfs"),
        ("auto", ("one",), "", "fcfs"),
        ("auto", ("one", "two"), "", "fair"),
        ("auto", (), "keys.yaml", "fair"),
        ("priority", ("one", "two"), "", "priority"),
    ],
)
def test_fair_is_the_default_where_there_are_several_keys(
    asked: Any, keys: tuple[str, ...], file: str, policy: str
) -> None:
    engine = EngineSettings(policy=asked)
    assert with_policy(engine, ServerSettings(api_keys=keys, api_key_file=file)).policy == policy


# -- the admin's key -----------------------------------------------------------------------------


async def test_a_separate_key_for_metrics(make_server: MakeServer, tmp_path: Path) -> None:
    path = write(tmp_path / "keys", alice={}, operator={"admin": True})
    for settings in (
        {"api_keys": ("alice",), "admin_key": "operator"},
        {"api_key_file": str(path)},
    ):
        server = make_server(**settings)
        for route in ("/metrics", "/debug/requests/x"):
            for headers, status in (
                ({}, 401), (bearer("alice"), 403), (bearer("operator"), None),
            ):  # fmt: skip
                answer = await server.http.get(route, headers=headers)
                allowed = {200, 404}
                assert answer.status_code == status or (
                    status is None and answer.status_code in allowed
                )
        assert (await complete(server, "operator")).status_code == 200


async def test_an_admin_key_alone_leaves_the_rest_open(make_server: MakeServer) -> None:
    server = make_server(admin_key="operator")
    assert (await server.http.get("/metrics")).status_code == 401
    assert (await server.http.get("/metrics", headers=bearer("operator"))).status_code == 200
    assert (await server.http.get("/v1/models")).status_code == 200
    assert (await server.http.post("/v1/completions", json={"prompt": "a"})).status_code == 200
    assert server.engine.requests[0].tenant == ""


async def test_without_an_admin_any_key_sees_metrics(make_server: MakeServer) -> None:
    server = make_server(api_keys=("alice",))
    assert (await server.http.get("/metrics")).status_code == 401
    assert (await server.http.get("/metrics", headers=bearer("alice"))).status_code == 200


# -- browsers ------------------------------------------------------------------------------------


async def test_other_origins_are_refused_unless_named(make_server: MakeServer) -> None:
    origin = {"origin": "https://app.example"}
    preflight = origin | {
        "access-control-request-method": "POST", "access-control-request-headers": "authorization",
    }  # fmt: skip
    closed = make_server(api_keys=("alice",))
    for answer in (
        await closed.http.options("/v1/completions", headers=preflight),
        await closed.http.get("/v1/models", headers=origin | bearer("alice")),
    ):
        assert "access-control-allow-origin" not in answer.headers
    server = make_server(api_keys=("alice",), cors_origins=("https://app.example",))
    answer = await server.http.options("/v1/completions", headers=preflight)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "https://app.example"
    assert "authorization" in answer.headers["access-control-allow-headers"].lower()
    answer = await server.http.get("/v1/models", headers=origin | bearer("alice"))
    assert answer.headers["access-control-allow-origin"] == "https://app.example"
    assert answer.headers["access-control-expose-headers"] == "*"
    assert "access-control-allow-credentials" not in answer.headers
    refused = await server.http.get("/v1/models", headers=origin)
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"], "a page may read why"
    other = {"origin": "https://evil.example"}
    answer = await server.http.get("/v1/models", headers=other | bearer("alice"))
    assert "access-control-allow-origin" not in answer.headers
