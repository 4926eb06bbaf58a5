"""Measure this server beside others, one at a time and taking turns, on the same machine.

    python -m tests.bench.side_by_side --models FOLDER --prefix vllm=ENV --prefix llama.cpp=BUILD

FOLDER holds the models S and M; they are made there when missing. Servers are described in
servers.yaml, workloads in workloads.py, the machine's limits in machine.py. In each round and for
each model every server is started, warmed up, left alone for a while, measured and stopped, in an
order that rotates.
Writes JSON after every server, and the tables as Markdown beside it. Exit code 1 if a server that
is installed failed.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from loadtest.client import Client
from tests.bench.machine import model_size
from tests.bench.report import markdown
from tests.bench.servers import NotInstalledError, descriptions
from tests.bench.workloads import CASES, Case, run_case, warmed_up

_ROOT = Path(__file__).resolve().parents[2]
_CACHE = _ROOT / ".cache" / "bench"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark. Returns the exit code."""
    options = _parser().parse_args(arguments)
    cases = [case for case in CASES if case.key in options.cases]
    if options.quick:
        options.servers, options.rounds = options.servers[:1], 1
        cases = [case.shortened() for case in cases]
    models = list(dict.fromkeys(case.model for case in cases))
    _make_models(options.models, models)
    result = _header(options, models)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    failed = False
    for number in range(options.rounds):
        result["machine"].append(_machine())
        for model in models:
            own = [case for case in cases if case.model == model]
            for name in _rotated(options.servers, number):
                try:
                    run = asyncio.run(_serve_and_measure(options, name, model, own))
                except NotInstalledError as error:
                    _note(result, f"{name}, {model}: skipped: {error}")
                    continue
                except (OSError, RuntimeError) as error:
                    _note(result, f"{name}, {model}: FAILED: {error}")
                    failed = True
                    continue
                failed |= _keep(result, run | {"round": number})
                options.out.write_bytes(
                    msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n"
                )
    result["runs"].sort(key=lambda run: options.servers.index(run["server"]))
    text = markdown(result, cases)
    options.out.with_suffix(".md").write_text(text)
    print(f"\n{text}")
    return int(failed)


def _parser() -> argparse.ArgumentParser:
    known = descriptions()
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.side_by_side",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--servers",
        nargs="+",
        default=["slipstream", "vllm", "llama.cpp"],
        choices=list(known),
        help="the first is 'ours' in ratios (default: slipstream vllm llama.cpp)",
    )
    parser.add_argument(
        "--prefix",
        action="append",
        default=[],
        metavar="SERVER=FOLDER",
        help="where a server is installed, if not on PATH; its executable is in FOLDER or its bin",
    )
    parser.add_argument("--models", type=Path, default=_CACHE, help="folder of S and M")
    parser.add_argument("--rounds", type=int, default=3, help="medians are over these")
    parser.add_argument(
        "--settle", type=float, default=20.0, help="idle seconds of every server after warming up"
    )
    keys = [case.key for case in CASES]
    parser.add_argument("--cases", nargs="+", default=keys, choices=keys, help="rows to measure")
    parser.add_argument(
        "--quick", action="store_true", help="first server only, one round, fewer requests"
    )
    parser.add_argument("--out", type=Path, default=_CACHE / "side_by_side.json", help="JSON file")
    return parser


def _header(options: argparse.Namespace, models: list[str]) -> dict[str, Any]:
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=_ROOT, capture_output=True, text=True
    ).stdout.strip()
    return {
        "schema": 1,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit or "unknown",
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "rounds": options.rounds,
        "quick": options.quick,
        "settle": options.settle,
        "models": {
            name: {"size": msgspec.to_builtins(model_size(options.models / name))}
            for name in models
        },
        "machine": [],
        "runs": [],
        "notes": [],
    }


async def _serve_and_measure(
    options: argparse.Namespace, name: str, model: str, cases: Sequence[Case]
) -> dict[str, Any]:
    """Start one server, run the cases of one model, stop it."""
    longest = descriptions()[name].request_tokens
    async with warmed_up(options, name, model, cases) as (server, client, run):
        await asyncio.sleep(options.settle)
        run["peak_gb"] = server.peak_bytes() / 1e9
        for seed, case in enumerate(cases):
            if case.request_tokens > longest:
                run["cases"][case.key] = {"skipped": "its requests are shorter"}
                continue
            figures = await _measured(client, case, seed)
            run["cases"][case.key] = figures
            print(f"  {case.key}: {_line(figures)}", flush=True)
            run["peak_gb"] = server.peak_bytes() / 1e9
        return run


async def _measured(client: Client, case: Case, seed: int) -> dict[str, Any]:
    try:
        return await run_case(client, case, seed)
    except RuntimeError as error:
        return {"error": str(error)}


def _line(figures: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {value:.1f}" if isinstance(value, float) else f"{name} {value}"
        for name, value in figures.items()
    )


def _keep(result: dict[str, Any], run: dict[str, Any]) -> bool:
    """Add a run and notes on what is wrong with it. True if a case failed."""
    result["runs"].append(run)
    failed = False
    for key, figures in run["cases"].items():
        where = f"{run['server']}, {key}"
        if "error" in figures:
            _note(result, f"{where}: FAILED: {figures['error']}")
            failed = True
        if "skipped" in figures:
            _note(result, f"{where}: skipped: {figures['skipped']}")
        for doubt in figures.get("doubts", ()):
            _note(result, f"{where}: {doubt}")
    return failed


def _note(result: dict[str, Any], text: str) -> None:
    if text not in result["notes"]:
        result["notes"].append(text)
        print(text, file=sys.stderr, flush=True)


def _rotated(names: Sequence[str], turns: int) -> list[str]:
    turns %= len(names)
    return [*names[turns:], *names[:turns]]


def _machine() -> dict[str, float]:
    """In a process of its own, so that torch's threads and memory are gone afterwards."""
    command = [sys.executable, "-m", "tests.bench.machine"]
    done = subprocess.run(command, cwd=_ROOT, check=True, stdout=subprocess.PIPE)
    limits: dict[str, float] = msgspec.json.decode(done.stdout)
    print(f"machine: {_line(limits)}", flush=True)
    return limits


def _make_models(folder: Path, names: Sequence[str]) -> None:
    missing = [name for name in names if not (folder / name / "config.json").exists()]
    if missing:
        command = [sys.executable, "-m", "tests.bench.make_models", str(folder.resolve()), *missing]
        subprocess.run(command, cwd=_ROOT, check=True)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown CPU"
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "unknown CPU")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that servers are stopped too
    sys.exit(main())
