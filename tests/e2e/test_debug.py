"""Why was this slow? The real server tells of requests that met in its steps."""

from __future__ import annotations

import asyncio

import httpx
import openai

from tests.e2e.conftest import MODEL
from tests.e2e.server_process import ServerProcess


async def test_requests_that_met(server: ServerProcess, aclient: openai.AsyncOpenAI) -> None:
    async def read(name: str, prompt: str, tokens: int) -> int:
        stream = await aclient.completions.create(
            model=MODEL,
            prompt=prompt,
            max_tokens=tokens,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True, "request_id": name},
        )
        return [chunk.usage async for chunk in stream if chunk.usage][-1].prompt_tokens

    streams = [asyncio.create_task(read(f"met-{i}", f"Story {i}", 300)) for i in range(4)]
    async with httpx.AsyncClient(base_url=server.url) as http:

        async def told(name: str) -> dict:
            return (await http.get(f"/debug/requests/{name}")).raise_for_status().json()

        while not all(t["state"] == "decode" for t in (await everyone(http))[:4]):
            await asyncio.sleep(0.01)
        length = await read("met-long", "word " * 600, 8)
        await asyncio.gather(*streams)
        long, short = await told("met-long"), await told("cmpl-met-0")

    (sequence,) = long["sequences"]
    assert (sequence["prompt_tokens"], sequence["output_tokens"]) == (length, 8)
    chunks = [span for span in long["spans"] if span["what"] == "prefill"]
    computed = sum(int(span["note"].split()[0].replace(",", "")) for span in chunks)
    assert computed == length - sequence["cached_tokens"]
    assert sequence["queue"]["running"] == 4
    assert all("with 4 other sequences" in span["note"] for span in chunks)
    decode = short["sequences"][0]["decode"]
    assert decode["prompt_tokens_beside"] >= computed and 1 < decode["mean_batch"] <= 5
    assert decode["worst_gap"]["why"] and decode["worst_gap"]["step"] is not None
    for one in (long, short):
        assert abs(sum(one["stages"].values()) - one["seconds"]) < 1e-6
        assert one["state"] == "ended" and " % of " in one["verdict"]
    server.wait_idle()


async def everyone(http: httpx.AsyncClient) -> list[dict]:
    data = (await http.get("/debug/requests")).raise_for_status().json()["data"]
    return data if len(data) >= 4 else [{"state": "not here yet"}] * 4
