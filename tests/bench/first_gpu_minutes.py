"""All that the first minutes on a GPU should tell, smallest first, in one command.

    python -m tests.bench.first_gpu_minutes [--minutes 9] [--models FOLDER] [--out FOLDER]
                                            [--stages tests machine …] [--prefix vllm-gpu=SITE]

Each stage has its limit and what time is left at most; its output is shown, and kept in FOLDER. At
the end stands what became of each stage; whatever came in time is above. Needs no installation of
this project, only its dependencies (`tests` also pytest and its plugins).
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
STOP_SECONDS = 20.0  # for a stage to stop its servers and print what it has
TESTS = (
    "triton_attention", "few_rows", "fused_layers", "triton_slots", "draw_kernel", "quantized",
    "fp8_cache", "cuda_graphs", "read_ahead",
)  # fmt: skip


class Stage(NamedTuple):
    """Commands that run at once, and the seconds that they may take."""

    commands: list[list[str]]
    seconds: float


def stages(options: argparse.Namespace) -> dict[str, Stage]:
    """What there is to do, in order."""

    def bench(name: str, *arguments: str) -> list[str]:
        return [sys.executable, "-m", f"tests.bench.{name}", *arguments]

    pytest = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"]
    models, found = str(options.models), str(options.out / "gpu.json")
    prefixes = [word for prefix in options.prefix for word in ("--prefix", prefix)]
    table = bench("bench_gpu", "--models", models, "--out", found, "--rounds", "1", *prefixes)
    return {
        # Does it compute? Compiling takes most of the time, so all files at once.
        "tests": Stage([[*pytest, f"tests/worker/test_{name}.py"] for name in TESTS], 180),
        "machine": Stage([bench("gpu_machine")], 60),
        "M": Stage([bench("make_models", models, "M")], 60),
        "steps": Stage([bench("bench_gpu_step", f"{models}/M", "--rounds", "100")], 150),
        "table": Stage([table], 400),
        "profile": Stage(
            [bench("bench_gpu_step", f"{models}/M", "--sequences", "256", "--profile")], 60
        ),
    }


def run(stage: Stage, limit: float, log: Path) -> str:
    """Run a stage for at most `limit` seconds, and say how it ended."""
    files = [log.with_name(f"{log.name}-{i}") for i in range(len(stage.commands))]
    begin = time.monotonic()
    processes = []
    for command, file in zip(stage.commands, files, strict=True):
        with file.open("wb") as output:
            processes.append(
                subprocess.Popen(
                    command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT,
                    start_new_session=True, env={**os.environ, "PYTHONUNBUFFERED": "1"},
                )
            )  # fmt: skip
    codes = []
    for process in processes:
        try:
            process.wait(max(begin + limit - time.monotonic(), 0.0))
            codes.append(str(process.returncode))
        except subprocess.TimeoutExpired:
            codes.append("out of time")
            _end(process)
    for file in files:
        print(file.read_text(errors="replace")[-4000:], flush=True)
    return f"{time.monotonic() - begin:.0f} s, exit {', '.join(codes)}"


def _end(process: subprocess.Popen[bytes]) -> None:
    """Interrupt a process and its session; kill what stays."""
    os.killpg(process.pid, signal.SIGINT)
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_all(planned: Mapping[str, Stage], seconds: float, out: Path) -> dict[str, str]:
    """How each stage ended."""
    end = time.monotonic() + seconds
    ended = {}
    for name, stage in planned.items():
        left = end - STOP_SECONDS - time.monotonic()
        print(f"\n=== {name}", flush=True)
        ended[name] = run(stage, min(stage.seconds, left), out / name) if left > 0 else "not begun"
    return ended


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.first_gpu_minutes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--models", type=Path, default=ROOT / ".cache" / "bench")
    parser.add_argument("--out", type=Path, default=ROOT / ".cache" / "gpu")
    parser.add_argument("--prefix", action="append", default=[], metavar="SERVER=FOLDER")
    parser.add_argument("--stages", nargs="+", help="default: all")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    planned = stages(options)
    for name in options.stages or ():
        if name not in planned:
            parser.error(f"no stage {name}; there are {', '.join(planned)}")
    chosen = {n: s for n, s in planned.items() if not options.stages or n in options.stages}
    ended = run_all(chosen, options.minutes * 60, options.out)
    print("\n| stage | |\n|---|---|")
    for name, how in ended.items():
        print(f"| {name} | {how} |")
    return int(any("exit 0" not in how for how in ended.values()))


if __name__ == "__main__":
    sys.exit(main())
