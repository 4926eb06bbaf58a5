"""Flags of `slipstream bench`."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from config.flags import OneLineParser

WORKLOADS = ("random", "chat", "long-mix", "structured", "embeddings")


def bench_parser(description: str | None) -> argparse.ArgumentParser:
    """The whole parser."""
    parser = OneLineParser(
        prog="slipstream bench",
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="server")
    parser.add_argument("--model", help="model name; the server's first one if not given")
    parser.add_argument("--api-key", help="bearer token")
    _load(parser)
    _workload(parser.add_argument_group("workload"))
    add_trace_flags(parser.add_argument_group("replay"))
    _measuring(parser)
    output = parser.add_argument_group("output")
    output.add_argument("--out", type=new_file, help="JSON file to write")
    output.add_argument("--html", type=new_file, help="report to write, one file readable offline")
    return parser


def _load(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("load")
    load = group.add_mutually_exclusive_group()
    load.add_argument("--rate", type=positive(float), help="open loop: requests/s")
    load.add_argument(
        "--concurrency", type=positive(int), help="closed loop: in flight (8 without any of these)"
    )
    load.add_argument(
        "--find-rate", type=positive(float), metavar="FIRST",
        help="find the highest rate that meets the SLO, beginning here",
    )  # fmt: skip
    group.add_argument(
        "--gaps", choices=("constant", "poisson", "gamma"), default="poisson", help="between sends"
    )
    group.add_argument("--cv", type=positive(float), default=1.0, help="variation of gamma gaps")
    group.add_argument(
        "--shape", default="steady",
        help="of the rate: steady, step:RATE@S, ramp:RATE@S, diurnal:SWING@PERIOD_S",
    )  # fmt: skip
    group.add_argument("--requests", type=positive(int), default=100, help="conversations measured")
    group.add_argument(
        "--warmup", type=natural(int), default=4, help="requests before, not measured"
    )
    group.add_argument("--max-connections", type=positive(int), default=1024, help="cap")
    group.add_argument("--timeout", type=positive(float), default=600.0, help="seconds a request")


def _workload(group: Any) -> None:
    group.add_argument("--workload", choices=WORKLOADS, default="random", help="what users do")
    group.add_argument("--input-tokens", type=positive(int), default=128, help="prompt length")
    group.add_argument("--output-tokens", type=positive(int), default=64, help="max_tokens")
    group.add_argument("--spread", type=share, default=0.0, help="lengths vary by this share")
    group.add_argument(
        "--prefix-tokens", type=natural(int), default=0, help="of the prompt, shared"
    )
    group.add_argument("--groups", type=positive(int), default=1, help="different shared prefixes")
    group.add_argument("--turns", type=positive(int), default=3, help="of a chat")
    group.add_argument(
        "--think", type=natural(float), default=1.0, help="seconds between turns, mean"
    )
    group.add_argument("--long-share", type=share, default=0.1, help="of long-mix: 8 times longer")
    group.add_argument("--words", action="store_true", help="send words, not exact token ids")
    group.add_argument(
        "--vocab-size", type=positive(int), default=2000, help="token ids are below this"
    )
    group.add_argument("--temperature", type=natural(float), default=0.0, help="0 is greedy")
    group.add_argument(
        "--ignore-eos",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="always generate the whole output, end tokens as text (not OpenAI fields)",
    )
    group.add_argument("--seed", type=int, default=0, help="of prompts and arrivals")


def add_trace_flags(group: Any, *, named: bool = True) -> None:
    """Which part of which trace, and how it is changed."""
    if named:
        text = "recorded traffic: Azure or BurstGPT csv, Mooncake or Bailian jsonl"
        group.add_argument("--trace", type=Path, help=text)
    group.add_argument(
        "--start", type=natural(float), default=0.0, help="first second of the window"
    )
    group.add_argument("--seconds", type=positive(float), help="length of the window")
    group.add_argument("--time-scale", type=positive(float), default=1.0, help="2: half as fast")
    group.add_argument("--rate-scale", type=positive(float), default=1.0, help="2: twice as many")
    group.add_argument(
        "--length-scale", type=positive(float), default=1.0, help="of prompts and outputs"
    )


def _measuring(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("measuring")
    group.add_argument("--slo", type=Path, help="YAML file of limits, for goodput")
    group.add_argument("--repeat", type=positive(int), default=1, help="runs, for confidence")
    group.add_argument("--chaos", action="store_true", help="mix in bad clients")


def positive(kind: type[int] | type[float]) -> Any:
    """An argparse type: a number above 0, and finite."""
    return _number(kind, lambda value: 0 < value < math.inf, "above 0")


def natural(kind: type[int] | type[float]) -> Any:
    """An argparse type: a finite number, 0 or more."""
    return _number(kind, lambda value: 0 <= value < math.inf, "0 or more")


def _number(
    kind: type[int] | type[float], fits: Callable[[float], bool], what: str
) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = kind(text)
        if not fits(value):
            raise argparse.ArgumentTypeError(f"{text} is not {what}")
        return value

    parse.__name__ = kind.__name__  # argparse names it where the text is no number
    return parse


def new_file(text: str) -> Path:
    """An argparse type: a file to write. That it cannot be is said before the work, not after."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text} cannot be written")
    return path


def share(text: str) -> float:
    """An argparse type: a number in [0, 1)."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 1)")
    return value
