"""Jobs for the twin: from a trace, or from what a bench result says was sent."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loadtest.conversations import COMPLETIONS, Common, Conversation
from loadtest.events import Outcome
from loadtest.flags import bench_parser
from loadtest.scenario import scenario
from loadtest.traces import TraceRequest, prompt_of
from loadtest.twin.fleet import Fleet, Job
from loadtest.twin.routing import ROUTERS

if TYPE_CHECKING:
    from loadtest.twin.simulate import Twin


def trace_jobs(trace: Sequence[TraceRequest]) -> list[Job]:
    """Prompts are numbers that are equal where the trace's blocks are; they mean nothing."""
    return [
        Job(_trace_prompt(request, number), request.output_tokens, request.group, request.offset)
        for number, request in enumerate(trace)
    ]


def _trace_prompt(request: TraceRequest, number: int) -> Callable[[], list[int]]:
    return partial(prompt_of, request, number, _block)


def _block(name: Any, size: int) -> list[int]:
    """The same number throughout: cheap, and different from that of every other block."""
    return [name if isinstance(name, int) else -1 - name[1]] * size


def jobs_like(
    measured: dict[str, Any], twin: Twin, routing: str, replicas: int
) -> tuple[list[Outcome], Fleet, str]:
    """Simulate the load of a result of `bench`: warm-up, then the same prompts at the same times.

    Raises `ValueError` if it had turns, which depend on answers.
    """
    flags = vars(bench_parser(None).parse_args([])) | measured["options"]
    if flags["trace"] is not None:
        flags["trace"] = Path(flags["trace"])
    options = argparse.Namespace(**flags)
    if options.workload not in {"random", "long-mix"} or options.words:
        raise ValueError("only loads of token ids can be simulated from a result")
    if options.find_rate is not None:
        raise ValueError("a search for a rate is no single load")
    plan = scenario(options, Common(""), twin.limits.max_model_len, options.seed)
    fleet = Fleet(twin.limits, twin.step_time, ROUTERS[routing](), replicas, twin.front)
    fleet.closed_loop(_jobs(plan.warmup, None), plan.concurrency)
    jobs = _jobs(plan.measured, plan.offsets)
    every = max(measured["summary"]["seconds"] / 100, 1e-3)
    if plan.offsets is None:
        outcomes = fleet.closed_loop(jobs, plan.concurrency, every)
    else:
        outcomes = fleet.open_loop(jobs, every)
    return outcomes, fleet, measured["load"]


def _jobs(conversations: Sequence[Conversation], offsets: Sequence[float] | None) -> list[Job]:
    jobs = []
    for number, conversation in enumerate(conversations):
        (turn,) = conversation.turns
        assert turn.path == COMPLETIONS
        prompt: list[int] = turn.fields["prompt"]
        offset = 0.0 if offsets is None else offsets[number]
        jobs.append(Job(partial(list, prompt), turn.output, conversation.group, offset))
    return jobs
