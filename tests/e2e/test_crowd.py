"""Many streams at once, and clients that vanish."""

from __future__ import annotations

import asyncio
import json
import socket

import openai

from tests.e2e.conftest import MODEL
from tests.e2e.server_process import ServerProcess


async def stream(client: openai.AsyncOpenAI, prompt: str, max_tokens: int) -> str:
    text = ""
    async for chunk in await client.completions.create(
        model=MODEL,
        prompt=prompt,
        max_tokens=max_tokens,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    ):
        text += chunk.choices[0].text
    return text


async def test_64_streams_of_differing_lengths_match_the_same_requests_alone(
    aclient: openai.AsyncOpenAI, server: ServerProcess
) -> None:
    jobs = [(f"Story {i}: " + "once upon a time " * (i % 9), 5 + (i * 7) % 60) for i in range(64)]
    generated = server.metric("vllm:generation_tokens_total")
    crowd = await asyncio.gather(*(stream(aclient, *job) for job in jobs))
    assert server.metric("vllm:generation_tokens_total") - generated == sum(n for _, n in jobs)
    for i in range(0, 64, 7):
        assert crowd[i] == await stream(aclient, *jobs[i])
    server.wait_idle()


def open_stream(server: ServerProcess, streamed: bool) -> socket.socket:
    """A raw connection with a long generation under way."""
    body = json.dumps(
        {
            "model": MODEL,
            "prompt": "Once upon a time",
            "max_tokens": 1900,
            "ignore_eos": True,
            "stream": streamed,
        }
    ).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    connection = socket.create_connection(("127.0.0.1", server.port))
    connection.sendall(head.encode() + body)
    return connection


async def test_killed_clients_leave_nothing_behind(
    server: ServerProcess, aclient: openai.AsyncOpenAI
) -> None:
    connections = [open_stream(server, streamed=i % 2 == 0) for i in range(12)]
    await asyncio.sleep(0.4)
    assert server.metric("vllm:num_requests_running") + server.metric("vllm:num_requests_waiting")
    for connection in connections:
        connection.close()
    server.wait_idle()
    assert await stream(aclient, "Once upon", 3)
