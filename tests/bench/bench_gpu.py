"""The GPU table: throughput, single streams, busy share, start and attention, beside vLLM.

    python -m tests.bench.bench_gpu --models FOLDER [--prefix vllm-gpu=SITE] [--rounds 3]

For a machine with one NVIDIA GPU. FOLDER holds the models M and L (shapes of Qwen3-0.6B and
Llama-3.1-8B, random weights); they are made there when missing (L takes minutes and 16 GB). SITE is
the folder that vLLM is installed in (`pip install --target`). Servers take turns; figures are
medians over the rounds. Writes JSON after every case and prints Markdown, also when it is
interrupted.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import msgspec

from loadtest.workloads import Workload
from tests.bench.machine import model_size
from tests.bench.servers import NotInstalledError
from tests.bench.workloads import Case, run_case, warmed_up

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache" / "bench"
OURS, PEER = "slipstream-gpu", "vllm-gpu"

_UNIFORM = Workload(562, 562, spread=462 / 562)  # 100 to 1,024, in and out
_EIGHT_B = Workload(1024, 256)
CASES = (
    Case("M-256", "M", "M: 256 × (100–1,024 in and out), all at once", 256, 256, _UNIFORM),
    Case("M-1", "M", "M: single stream", 4, 1, Workload(128, 512)),
    Case("L-128", "L", "L: 256 × (1,024 in, 256 out), 128 concurrent", 256, 128, _EIGHT_B),
    Case("L-1", "L", "L: single stream", 4, 1, Workload(128, 256)),
)


class BusyShare:
    """While entered, samples what share of the time the GPU runs anything (nvidia-smi)."""

    def __enter__(self) -> BusyShare:
        command = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
        self._process = subprocess.Popen(
            [*command, "-lms", "200"], stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        said, _errors = self._process.communicate()
        self.share = busy_share(said)


def busy_share(said: str) -> float | None:
    """The median of the middle half of percentages, one a line: without ramp-up and tail."""
    samples = [float(line) for line in said.splitlines() if line.strip().isdigit()]
    middle = samples[len(samples) // 4 : -(len(samples) // 4) or None]
    return median(middle) / 100 if middle else None


async def measure(
    options: argparse.Namespace, name: str, model: str, result: dict[str, Any]
) -> None:
    """Start one server, run one model's cases, stop it. Raises as `Server` does."""
    cases = [case for case in CASES if case.model == model]
    async with warmed_up(options, name, model, cases) as (_, client, run):
        result["runs"].append(run)
        for seed, case in enumerate(cases):
            with BusyShare() as busy:
                figures = await run_case(client, case, seed)
            run["cases"][case.key] = figures | {"busy": busy.share}
            print(name, case.key, run["cases"][case.key], flush=True)
            options.out.write_bytes(msgspec.json.encode(result))
    if name == OURS:  # what it warned of, such as that it records no graphs
        print(options.out.with_name(f"{name}-{model}.log").read_text()[-2000:], flush=True)


def measure_all(options: argparse.Namespace, result: dict[str, Any]) -> None:
    """All servers and models in turn, into `result`; what fails is noted."""
    for number in range(options.rounds):
        for model in options.only:
            _make_missing(options.models, model)
            result["models"][model] = model_size(options.models / model).weight_bytes
            for name in (OURS, PEER) if number % 2 == 0 else (PEER, OURS):
                try:
                    asyncio.run(measure(options, name, model, result))
                except (NotInstalledError, OSError, RuntimeError) as error:
                    result["notes"].append(f"{name}, {model}: {error}")
                    print(result["notes"][-1], file=sys.stderr, flush=True)


def _make_missing(folder: Path, model: str) -> None:
    if not (folder / model / "tokenizer.json").exists():  # what is written last
        command = [sys.executable, "-m", "tests.bench.make_models", str(folder.resolve()), model]
        subprocess.run(command, cwd=ROOT, check=True)


def table(result: dict[str, Any]) -> str:
    """The issue's table as Markdown, with what was measured."""
    rows = [
        _ratio_row(result, "M-256", "1.0 × vLLM", "1.15 ×"),
        _ratio_row(result, "L-128", "0.95 × vLLM", "1.05 ×"),
        *(_stream_row(result, key) for key in ("M-1", "L-1")),
        *(_busy_row(result, key) for key in ("M-256", "L-128")),
        _start_row(result),
    ]
    for name, found in result["machine"]["attention"].items():
        share = f"{found['share']:.0%} ({found['ms']:.3f} ms)"
        rows.append((f"attention, decode, {name}: of HBM", share, "–", "70 %", "85 %"))
    head = ("workload", "slipstream", "vLLM", "bar", "goal")
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _values(result: dict[str, Any], server: str, case: str, figure: str) -> list[float]:
    runs = [run for run in result["runs"] if run["server"] == server]
    found = [run["cases"][case][figure] for run in runs if case in run["cases"]]
    return [value for value in found if value is not None]


def _title(key: str) -> str:
    return next(case.title for case in CASES if case.key == key)


def _ratio_row(result: dict[str, Any], key: str, bar: str, goal: str) -> tuple[str, ...]:
    ours, peer = (_values(result, name, key, "output_rate") for name in (OURS, PEER))
    cells = [f"{median(rates):.0f} tok/s" if rates else "–" for rates in (ours, peer)]
    if ours and peer:
        cells[0] += f" ({median(ours) / median(peer):.2f} ×)"
    return (_title(key), *cells, bar, goal)


def _stream_row(result: dict[str, Any], key: str) -> tuple[str, ...]:
    model = key.partition("-")[0]
    best = result["models"].get(model, 0) / result["machine"]["bandwidth"] * 1e3
    cells = []
    for name in (OURS, PEER):
        found = _values(result, name, key, "tpot_ms")
        cells.append(f"{median(found) / best:.2f} ({median(found):.2f} ms)" if found else "–")
    return (f"{_title(key)}: TPOT ÷ time to read the weights", *cells, "≤ 1.35", "≤ 1.15")


def _busy_row(result: dict[str, Any], key: str) -> tuple[str, ...]:
    cells = []
    for name in (OURS, PEER):
        found = _values(result, name, key, "busy")
        cells.append(f"{median(found):.0%}" if found else "–")
    return (f"{_title(key)}: GPU busy", *cells, "95 %", "99 %")


def _start_row(result: dict[str, Any]) -> tuple[str, ...]:
    cells = []
    for name in (OURS, PEER):
        runs = [r for r in result["runs"] if r["server"] == name and r["model"] == "L"]
        found = [run["start_seconds"] for run in runs]
        cells.append(f"{median(found):.1f} s" if found else "–")
    return ("L: start to first token", *cells, "20 s", "10 s")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.bench_gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--models", type=Path, default=CACHE, help="folder of M and L")
    parser.add_argument("--only", nargs="+", default=["M", "L"], choices=["M", "L"])
    parser.add_argument("--prefix", action="append", default=[], metavar="SERVER=FOLDER")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=CACHE / "gpu.json")
    options = parser.parse_args(arguments)
    measured = [sys.executable, "-m", "tests.bench.gpu_machine"]
    machine = subprocess.run(measured, cwd=ROOT, stdout=subprocess.PIPE)
    if machine.returncode:  # it said why
        return machine.returncode
    options.out.parent.mkdir(parents=True, exist_ok=True)
    found = msgspec.json.decode(machine.stdout)
    result: dict[str, Any] = {"machine": found, "models": {}, "runs": [], "notes": []}
    try:
        measure_all(options, result)
    except KeyboardInterrupt:
        result["notes"].append("interrupted")
    options.out.write_bytes(msgspec.json.encode(result))
    print(table(result))
    return int(any(note.startswith(OURS) for note in result["notes"]))


if __name__ == "__main__":
    sys.exit(main())
