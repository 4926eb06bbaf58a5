"""A server in public: keys from a file, read again on SIGHUP, over TLS; nobody shares a cache."""

from __future__ import annotations

import shutil
import signal
import ssl
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from app.access.keys import digest_of
from tests.e2e.server_process import ServerProcess, running

SECRET_TEXT = "the treasure is below the third palm"

pytestmark = pytest.mark.skipif(
    shutil.which("openssl") is None, reason="certificates are made by the openssl command"
)


def certificate(folder: Path, name: str) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1, and its key."""
    cert, key = folder / f"{name}.pem", folder / f"{name}.key"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
            *("-nodes", "-days", "2", "-subj", f"/CN={name}", "-keyout", str(key)),
            *("-addext", "subjectAltName=IP:127.0.0.1", "-out", str(cert)),
        ],
        check=True,
        capture_output=True,
    )
    return cert, key


def write_keys(path: Path, *names: str) -> None:
    path.write_text("".join(f"{name}: {{sha256: {digest_of(name)}}}\n" for name in names))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("public")


@pytest.fixture(scope="module")
def public(folder: Path) -> Iterator[ServerProcess]:
    cert, key = certificate(folder, "server")
    write_keys(folder / "keys.yaml", "alice", "bob")
    process = ServerProcess(
        folder / "log",
        *("--worker", "simulated", "--log-level", "debug"),
        *("--tls-cert", str(cert), "--tls-key", str(key)),
        *("--api-key-file", str(folder / "keys.yaml"), "--admin-key", "operator"),
    )
    with running(process):
        yield process


def post(server: ServerProcess, secret: str, prompt: str) -> httpx.Response:
    return httpx.post(
        f"{server.url}/v1/completions",
        json={"prompt": prompt, "max_tokens": 4},
        headers={"authorization": f"Bearer {secret}"},
        verify=server.tls,
        timeout=30,
    )


def cached(answer: httpx.Response) -> int:
    assert answer.status_code == 200, answer.text
    return int(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])


def test_prompts_are_cached_for_their_own_key_only(public: ServerProcess) -> None:
    assert public.url.startswith("https://")
    prompt = f"Once upon a time {SECRET_TEXT} " * 20
    assert cached(post(public, "alice", prompt)) == 0
    assert cached(post(public, "alice", prompt)) > 0
    assert cached(post(public, "bob", prompt)) == 0
    assert cached(post(public, "bob", prompt)) > 0


def test_keys_are_read_again_on_sighup(public: ServerProcess, folder: Path) -> None:
    assert post(public, "carol", "x").status_code == 401
    write_keys(folder / "keys.yaml", "alice", "bob", "carol")
    public.process.send_signal(signal.SIGHUP)
    deadline = time.monotonic() + 10
    while post(public, "carol", "x").status_code != 200:
        assert time.monotonic() < deadline, public.log()
        time.sleep(0.05)
    assert "3 keys read from" in public.log()


def test_metrics_are_the_admins(public: ServerProcess) -> None:
    for secret, status in (("alice", 403), ("operator", 200)):
        headers = {"authorization": f"Bearer {secret}"}
        answer = httpx.get(f"{public.url}/metrics", headers=headers, verify=public.tls)
        assert answer.status_code == status


def test_no_secret_and_no_body_is_logged(public: ServerProcess) -> None:
    post(public, "alice", SECRET_TEXT)
    headers = {"authorization": "Bearer alice"}
    broken = b'{"prompt": "' + SECRET_TEXT.encode() + b'", "temperature": "hot"}'
    answer = httpx.post(
        f"{public.url}/v1/completions", content=broken, headers=headers, verify=public.tls
    )
    assert answer.status_code == 400
    assert post(public, "wrong-secret", SECRET_TEXT).status_code == 401
    log = public.log()
    assert "serving" in log.lower() or public.url in log, "the log is where this looks"
    for text in (SECRET_TEXT, "wrong-secret", "operator"):
        assert text not in log


def test_plain_http_and_unknown_certificates_get_nowhere(public: ServerProcess) -> None:
    with pytest.raises(httpx.TransportError):
        httpx.get(public.url.replace("https", "http") + "/health")
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        httpx.get(f"{public.url}/health")


def test_clients_may_need_certificates(tmp_path: Path) -> None:
    cert, key = certificate(tmp_path, "server")
    client_cert, client_key = certificate(tmp_path, "client")
    server = ServerProcess(
        tmp_path / "log",
        *("--worker", "simulated", "--tls-cert", str(cert), "--tls-key", str(key)),
        *("--tls-client-ca", str(client_cert)),
    )
    try:
        stranger = ssl.create_default_context(cafile=str(cert))
        assert isinstance(server.tls, ssl.SSLContext)
        server.tls.load_cert_chain(client_cert, client_key)
        server.wait_ready()
        assert httpx.get(f"{server.url}/v1/models", verify=server.tls).status_code == 200
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{server.url}/v1/models", verify=stranger)
    finally:
        server.stop()


@pytest.mark.parametrize("flag", ["--tls-key", "--api-key-file"])
def test_what_cannot_be_used_is_said_before_the_model_is_loaded(tmp_path: Path, flag: str) -> None:
    cert, _ = certificate(tmp_path, "server")
    unusable = tmp_path / "unusable"
    unusable.write_text("[")
    arguments = ("--tls-cert", str(cert)) if flag == "--tls-key" else ()
    server = ServerProcess(tmp_path / "log", *arguments, flag, str(unusable))
    assert server.process.wait(60) == 1
    (line,) = server.log().splitlines()
    assert str(unusable) in line
