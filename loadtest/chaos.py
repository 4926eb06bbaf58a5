"""`--chaos`: bad clients among good ones. The server must refuse, survive, and forget them.

Each kind of misbehaviour runs beside the measured load, over sockets of its own. What counts:
refusals are clean (4xx with an error object, or a closed connection for what is too large), slow
readers get their whole answer, and afterwards the server is healthy and holds nothing.
"""

from __future__ import annotations

import asyncio
import random
import ssl
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

import msgspec

from loadtest.client import Client
from loadtest.conversations import COMPLETIONS
from loadtest.scrape import GAUGES, scrape

_OVERSIZED_BYTES = 64 << 20
_SLOW_READ = 256  # bytes at a time
_SLOW_PAUSE = 0.05
_TIMEOUT = 120.0
_FORGET_SECONDS = 15.0

_MALFORMED: tuple[bytes, ...] = (
    b"{",
    b"[]",
    b'{"model": 5, "prompt": "x"}',
    b'{"prompt": {"a": 1}}',
    b'{"prompt": "x", "max_tokens": -3}',
    b'{"prompt": "x", "max_tokens": 1e99}',
    b'{"prompt": "x", "temperature": "hot"}',
    b'{"prompt": "x", "no_such_field_at_all": 1}',
    b"\xff\xfe\x00",
)


class Chaos:
    """Runs bad clients until told to stop, then checks the server. `counts` are by kind."""

    def __init__(self, url: str, model: str, api_key: str | None, seed: int) -> None:
        parts = urlsplit(url)
        tls = parts.scheme == "https"
        self._host, self._port = parts.hostname or "", parts.port or (443 if tls else 80)
        self._tls = ssl.create_default_context() if tls else None
        base = parts.path.rstrip("/").removesuffix("/v1")
        self._head = f"POST {base}{COMPLETIONS} HTTP/1.1\r\nHost: {parts.netloc}\r\n"
        self._head += "Content-Type: application/json\r\n"
        if api_key:
            self._head += f"Authorization: Bearer {api_key}\r\n"
        self._model = model
        self._random = random.Random(seed)
        self.counts: dict[str, int] = {}
        self.faults: dict[str, list[str]] = {}
        self.kinds: dict[str, Callable[[], Awaitable[str | None]]] = {
            "disconnect": self._disconnect,
            "slow reader": self._slow_reader,
            "malformed": self._malformed,
            "oversized": self._oversized,
            "over the limit": self._over_the_limit,
        }

    async def run(self) -> None:
        """Misbehave, one client of each kind at a time, until cancelled."""
        await asyncio.gather(*(self._repeat(kind) for kind in self.kinds))

    async def _repeat(self, kind: str) -> None:
        while True:
            await self.once(kind)
            await asyncio.sleep(self._random.uniform(0.02, 0.2))

    async def once(self, kind: str) -> None:
        """One misbehaviour of a kind."""
        try:
            async with asyncio.timeout(_TIMEOUT):
                fault = await self.kinds[kind]()
        except TimeoutError:
            fault = f"no end within {_TIMEOUT:.0f} s"
        except OSError as error:
            fault = f"{type(error).__name__}: {error}"
        self.counts[kind] = self.counts.get(kind, 0) + 1
        if fault is not None:
            self.faults.setdefault(kind, []).append(fault)

    async def _open(self, body: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection(self._host, self._port, ssl=self._tls)
        head = f"{self._head}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        return reader, writer

    def _stream(self, tokens: int) -> bytes:
        words = " ".join(str(self._random.random()) for _ in range(4))
        return msgspec.json.encode(
            {"model": self._model, "prompt": words, "max_tokens": tokens, "stream": True}
        )

    async def _disconnect(self) -> str | None:
        reader, writer = await self._open(self._stream(200))
        await reader.read(self._random.choice((1, 200, 400)))
        writer.transport.abort()
        return None

    async def _slow_reader(self) -> str | None:
        reader, writer = await self._open(self._stream(64))
        whole = b""
        while data := await reader.read(_SLOW_READ):
            whole += data
            await asyncio.sleep(_SLOW_PAUSE)
        writer.close()
        return None if b"data: [DONE]" in whole else f"the answer was cut: {whole[-80:]!r}"

    async def _malformed(self) -> str | None:
        body = self._random.choice(_MALFORMED)
        return await self._refused(body, {400, 404, 422})

    async def _over_the_limit(self) -> str | None:
        body = {"model": self._model, "prompt": list(range(300, 400)) * 20_000, "max_tokens": 8}
        return await self._refused(msgspec.json.encode(body), {400, 413, 422})

    async def _refused(self, body: bytes, statuses: set[int]) -> str | None:
        reader, writer = await self._open(body)
        answer = await reader.read(-1)
        writer.close()
        what = body[:40]
        status, text = _split(answer)
        if status not in statuses:
            return f"{what!r} was answered {status}, not refused"
        try:
            error = msgspec.json.decode(text)["error"]["message"]
        except (msgspec.DecodeError, KeyError, TypeError):
            return f"{what!r}: the refusal has no error object"
        return None if error else f"{what!r}: the refusal has no message"

    async def _oversized(self) -> str | None:
        reader, writer = await asyncio.open_connection(self._host, self._port, ssl=self._tls)
        head = f"{self._head}Connection: close\r\nContent-Length: {_OVERSIZED_BYTES}\r\n\r\n"
        writer.write(head.encode())
        sent = 0
        try:
            while sent < _OVERSIZED_BYTES and not reader.at_eof():
                writer.write(b" " * (1 << 16))
                sent += 1 << 16
                await writer.drain()
            answer = await reader.read(-1)
        except ConnectionError:
            return None  # closed while we were sending is a refusal too
        finally:
            writer.close()
        status, _ = _split(answer)
        return None if not answer or 400 <= status < 500 else f"64 MiB were answered {status}"


def _split(answer: bytes) -> tuple[int, bytes]:
    """Status and body of a response that ends with its connection; 0 if it is none."""
    head, _, body = answer.partition(b"\r\n\r\n")
    parts = head.split(b" ", 2)
    if len(parts) < 2 or not parts[1].isdigit():
        return 0, b""
    if b"chunked" in head.lower():
        body = body[body.find(b"\r\n") + 2 : body.rfind(b"\r\n0\r\n")]
    return int(parts[1]), body


async def verdict(chaos: Chaos, client: Client, failed: dict[str, int]) -> list[dict[str, Any]]:
    """Checks, each with `name`, `passed` and `detail`. `failed` are errors of the good requests."""
    checks = [_check("well-behaved requests all complete", not failed, str(failed or ""))]
    for kind, count in chaos.counts.items():
        faults = chaos.faults.get(kind, [])
        detail = f"{count} times"
        if faults:
            detail += f"; {len(faults)} wrong, such as {faults[0]}"
        checks.append(_check(kind, not faults, detail))
    try:
        await client.get("/v1/models")
        checks.append(_check("answers afterwards", True, ""))
    except (OSError, ValueError) as error:
        checks.append(_check("answers afterwards", False, str(error)))
    left = await _left_behind(client)
    if left is not None:
        checks.append(_check("nothing is left behind", not left, str(left or "")))
    return checks


async def _left_behind(client: Client) -> dict[str, float] | None:
    """Gauges that do not return to 0; None if the server has no such metrics."""
    left: dict[str, float] | None = None
    for _ in range(int(_FORGET_SECONDS / 0.25)):
        found = await scrape(client)
        if found is None or not any(name in found for name in GAUGES.values()):
            return None
        left = {name: found[name] for name in GAUGES.values() if found.get(name)}
        if not left:
            return left
        await asyncio.sleep(0.25)
    return left


def _check(name: str, passed: bool, detail: str) -> dict[str, Any]:
    return {"name": name, "passed": passed, "detail": detail}
