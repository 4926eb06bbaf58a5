"""Recorded traffic: when requests came, how long they were, and which beginnings they shared.

Formats are told apart by their columns: Azure's LLM inference traces and BurstGPT (CSV), Mooncake
and Qwen-Bailian (JSON lines with the ids of prefix blocks).
"""

from __future__ import annotations

import csv
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import msgspec

_MOONCAKE_BLOCK = 512  # tokens that one id of a block stands for
_BAILIAN_BLOCK = 16
_T = TypeVar("_T")


class TraceRequest(msgspec.Struct, frozen=True, gc=False):
    """One recorded request. Equal `blocks` at equal places mean equal tokens.

    `blocks` are ids of `block_tokens` tokens each, of which the last may be cut.
    """

    offset: float  # seconds after the trace's first request
    input_tokens: int
    output_tokens: int
    group: str = "trace"
    blocks: tuple[int, ...] = ()
    block_tokens: int = 0


def load_trace(path: Path) -> list[TraceRequest]:
    """All requests of a file in order of time. Raises `ValueError` if it is no known trace."""
    try:
        with path.open(newline="") as file:
            head = file.readline()
            file.seek(0)
            found = list(_read_json(file) if head.startswith("{") else _read_csv(file))
    except KeyError as error:
        raise ValueError(f"{path} is not a trace: a request has no {error}") from error
    except (TypeError, ValueError, csv.Error) as error:
        raise ValueError(f"{path} is not a trace: {error}") from error
    if not found:
        raise ValueError(f"{path} has no requests")
    found.sort(key=lambda request: request.offset)
    start = found[0].offset
    return [msgspec.structs.replace(r, offset=r.offset - start) for r in found]


def _read_csv(file: Iterable[str]) -> Iterator[TraceRequest]:
    rows = csv.DictReader(file)
    columns = set(rows.fieldnames or ())
    if {"TIMESTAMP", "ContextTokens", "GeneratedTokens"} <= columns:
        for row in rows:
            tokens = int(row["ContextTokens"]), int(row["GeneratedTokens"])
            if min(tokens) > 0:
                yield TraceRequest(_azure_seconds(row["TIMESTAMP"]), *tokens)
        return
    if {"Timestamp", "Request tokens", "Response tokens"} <= columns:
        for row in rows:
            tokens = int(row["Request tokens"]), int(row["Response tokens"])
            if min(tokens) > 0:  # failed requests have no response tokens
                yield TraceRequest(
                    float(row["Timestamp"]), *tokens, group=row.get("Log Type") or "trace"
                )
        return
    raise ValueError(f"unknown columns {sorted(columns)}")


def _azure_seconds(text: str) -> float:
    """Their stamps have seven decimals, one more than a datetime keeps."""
    whole, _, fraction = text.partition(".")
    return datetime.fromisoformat(whole + "+00:00").timestamp() + float(f"0.{fraction or 0}")


def _read_json(file: Iterable[str]) -> Iterator[TraceRequest]:
    for line in file:
        row = msgspec.json.decode(line)
        tokens = int(row["input_length"]), int(row["output_length"])
        if min(tokens) < 1:
            continue
        blocks = tuple(int(block) for block in row.get("hash_ids", ()))
        if "chat_id" in row:
            group, size, unit = str(row.get("type") or "trace"), _BAILIAN_BLOCK, 1.0
        else:
            group, size, unit = "trace", _MOONCAKE_BLOCK, 1e-3
        yield TraceRequest(float(row["timestamp"]) * unit, *tokens, group, blocks, size)


def adapted(
    trace: Sequence[TraceRequest],
    *,
    start: float = 0.0,
    seconds: float | None = None,
    rate_scale: float = 1.0,
    time_scale: float = 1.0,
    length_scale: float = 1.0,
    seed: int = 0,
) -> list[TraceRequest]:
    """A window of a trace, made denser, slower or shorter.

    `rate_scale` changes how many requests there are in the same time: each is kept that often on
    average, copies moved by up to a second and with prefixes of their own. `time_scale` 2 lets the
    same requests take twice as long. `length_scale` shortens prompts and outputs alike.
    Raises `ValueError` if nothing is left.
    """
    end = float("inf") if seconds is None else start + seconds
    source = random.Random(seed)
    found: list[TraceRequest] = []
    for request in trace:
        if not start <= request.offset < end:
            continue
        copies = int(rate_scale) + (source.random() < rate_scale % 1)
        for copy in range(copies):
            moved = request.offset - start + (source.uniform(0, 1) if copy else 0.0)
            found.append(_resized(request, moved * time_scale, length_scale, copy))
    if not found:
        raise ValueError("no request of the trace is in this window")
    found.sort(key=lambda request: request.offset)
    return found


def _resized(request: TraceRequest, offset: float, scale: float, copy: int) -> TraceRequest:
    return TraceRequest(
        offset,
        max(1, round(request.input_tokens * scale)),
        max(1, round(request.output_tokens * scale)),
        request.group,
        tuple((copy << 40) + block for block in request.blocks),
        max(1, round(request.block_tokens * scale)),
    )


def clipped(trace: Sequence[TraceRequest], context: int) -> tuple[list[TraceRequest], int]:
    """Requests cut to fit a context (prompts first), and how many were cut."""
    fitting, cut = [], 0
    for request in trace:
        output = min(request.output_tokens, context // 2)
        tokens = min(request.input_tokens, context - output), output
        cut += tokens != (request.input_tokens, request.output_tokens)
        fitting.append(
            msgspec.structs.replace(request, input_tokens=tokens[0], output_tokens=tokens[1])
        )
    return fitting, cut


def prompt_of(
    request: TraceRequest, number: int, block: Callable[[Any, int], list[_T]]
) -> list[_T]:
    """The prompt as tokens: shared blocks, then tokens of its own.

    `block(name, size)` gives the same `size` tokens for the same name; `number` names the request.
    """
    tokens: list[_T] = []
    for name in request.blocks:
        if len(tokens) >= request.input_tokens:
            break
        tokens += block(name, request.block_tokens)
    missing = request.input_tokens - len(tokens)
    if missing > 0:
        tokens += block(("own", number), missing)
    return tokens[: request.input_tokens]
