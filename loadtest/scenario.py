"""From flags to what is sent and when."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Literal

from loadtest.arrivals import Arrivals
from loadtest.conversations import (
    Common,
    Conversation,
    chats,
    embeddings,
    long_mix,
    replayed,
    single,
    structured,
)
from loadtest.traces import adapted, clipped, load_trace
from loadtest.workloads import Workload

DEFAULT_CONCURRENCY = 8


@dataclass
class Scenario:
    """What is sent; with `offsets` at these times, without them closed loop."""

    warmup: list[Conversation]
    measured: list[Conversation]
    offsets: list[float] | None
    concurrency: int
    notes: list[str]


def scenario(
    options: argparse.Namespace,
    common: Common,
    context: int | None,
    seed: int,
) -> Scenario:
    """The run that the flags describe. Raises `ValueError` for what cannot be, `OSError`.

    `context` is the model's, where known.
    """
    concurrency = options.concurrency or DEFAULT_CONCURRENCY
    if options.trace is not None:
        return _replay(options, common, context, seed, concurrency)
    found = _conversations(options, common, options.warmup + options.requests, seed)
    warmup, measured = found[: options.warmup], found[options.warmup :]
    offsets = None
    if options.rate is not None:
        arrivals = Arrivals(options.rate, options.gaps, options.cv, options.shape)
        offsets = arrivals.times(len(measured), seed)
    return Scenario(warmup, measured, offsets, concurrency, [])


def _replay(
    options: argparse.Namespace,
    common: Common,
    context: int | None,
    seed: int,
    concurrency: int,
) -> Scenario:
    if options.rate is not None or options.find_rate is not None:
        raise ValueError("a trace has its own times: use --time-scale or --rate-scale")
    trace = adapted(
        load_trace(options.trace),
        start=options.start,
        seconds=options.seconds,
        rate_scale=options.rate_scale,
        time_scale=options.time_scale,
        length_scale=options.length_scale,
        seed=seed,
    )
    notes = []
    if context is not None:
        trace, cut = clipped(trace, context)
        if cut:
            notes.append(f"{cut} of {len(trace)} requests were cut to the context of {context}")
    form: Literal["ids", "words"] = "words" if options.words else "ids"
    measured = replayed(common, trace, seed, options.vocab_size, form)
    warmup = single(
        common, Workload(64, 16, form=form, vocab_size=options.vocab_size), options.warmup, seed
    )
    closed = options.concurrency is not None
    offsets = None if closed else [request.offset for request in trace]
    return Scenario(warmup, measured, offsets, concurrency, notes)


def _conversations(
    options: argparse.Namespace, common: Common, count: int, seed: int
) -> list[Conversation]:
    workload = Workload(
        input_tokens=options.input_tokens,
        output_tokens=options.output_tokens,
        spread=options.spread,
        prefix_tokens=options.prefix_tokens,
        groups=options.groups if options.prefix_tokens else 0,
        form="words" if options.words else "ids",
        vocab_size=options.vocab_size,
    )
    match options.workload:
        case "chat":
            return chats(common, workload, count, seed, options.turns, options.think)
        case "long-mix":
            return long_mix(common, workload, count, seed, options.long_share)
        case "structured":
            return structured(common, workload, count, seed)
        case "embeddings":
            return embeddings(common, workload, count, seed)
    return single(common, workload, count, seed)


def describe(options: argparse.Namespace) -> str:
    """The load in one line."""
    if options.find_rate is not None:
        load = "highest rate"
    elif options.concurrency is None and (options.rate or options.trace):
        gaps = {"gamma": f"gamma (cv {options.cv:g})", "poisson": "Poisson"}
        kind = gaps.get(options.gaps, options.gaps)
        load = f"open loop, {kind} {options.rate:g} requests/s" if options.rate else "open loop"
        load += "" if options.shape == "steady" else f", {options.shape}"
    else:
        load = f"closed loop, {options.concurrency or DEFAULT_CONCURRENCY} at once"
    if options.trace is not None:
        return f"{load}, replay of {options.trace.name}"
    prefix = f" ({options.prefix_tokens} shared)" if options.prefix_tokens else ""
    kind = "" if options.workload == "random" else f"{options.workload}, "
    out = "" if options.workload == "embeddings" else f", {options.output_tokens} out"
    return f"{load}, {kind}{options.input_tokens}{prefix} tokens in{out}"
