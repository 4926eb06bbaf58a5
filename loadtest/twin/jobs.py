"""Jobs for the twin: from a trace, or from what a bench result says was sent."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loadtest.conversations import COMPLETIONS, Common, Conversation
from loadtest.events import Outcome
from loadtest.flags import bench_parser
from loadtest.scenario import scenario
from loadtest.traces import TraceRequest, prompt_of
from loadtest.twin.fleet import Fleet, Job
from loadtest.twin.replica import GENERATED
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

    Of chats only the words are known: how many tokens they and the answers came to on average, the
    server has counted. Raises `ValueError` for what cannot be simulated.
    """
    if not isinstance(measured.get("options"), dict) or "load" not in measured:
        raise ValueError("the result does not say what its load was")
    flags = vars(bench_parser(None).parse_args([])) | measured["options"]
    if flags["trace"] is not None:
        flags["trace"] = Path(flags["trace"])
    options = argparse.Namespace(**flags)
    if options.workload == "embeddings" or options.words:
        raise ValueError("only chats and loads of token ids can be simulated from a result")
    if options.find_rate is not None:
        raise ValueError("a search for a rate is no single load")
    plan = scenario(options, Common(""), twin.limits.max_model_len, options.seed)
    fleet = Fleet(twin.limits, twin.step_time, ROUTERS[routing](), replicas, twin.front)
    chats = options.workload in {"chat", "structured"}
    make = partial(_chats, measured["summary"], count(1)) if chats else _jobs
    fleet.closed_loop(make(plan.warmup, None), plan.concurrency)
    fleet.later.clear()
    jobs = make(plan.measured, plan.offsets)
    every = max(measured["summary"]["seconds"] / 100, 1e-3)
    if plan.offsets is None:
        outcomes = fleet.closed_loop(jobs, plan.concurrency, every)
    else:
        outcomes = fleet.open_loop(jobs, every)
    return outcomes + fleet.later, fleet, measured["load"]


def _chats(
    summary: dict[str, Any],
    names: Iterator[int],
    conversations: Sequence[Conversation],
    offsets: Sequence[float] | None,
) -> list[Job]:
    """Each prompt is that of the turn before, its answer, and as many tokens more in every turn."""
    tokens, requests = summary["tokens"], summary["requests"]["completed"]
    output = max(1, round(tokens["output"] / requests))
    jobs = []
    for number, conversation in enumerate(conversations):
        turns = len(conversation.turns)
        mean = tokens["input"] / requests
        added = max(1, round((mean - output * (turns - 1) / 2) / ((turns + 1) / 2)))
        name, job = next(names), None
        for turn in reversed(range(turns)):
            offset = 0.0 if offsets is None or turn else offsets[number]
            prompt = partial(_history, name, turn, added, output)
            think = conversation.turns[turn].think
            job = Job(prompt, output, conversation.group, offset, job, think)
        assert job is not None
        jobs.append(job)
    return jobs


def _history(name: int, turn: int, added: int, output: int) -> list[int]:
    said = [GENERATED + name] * added
    return (said + [GENERATED] * output) * turn + said


def _jobs(conversations: Sequence[Conversation], offsets: Sequence[float] | None) -> list[Job]:
    jobs = []
    for number, conversation in enumerate(conversations):
        (turn,) = conversation.turns
        assert turn.path == COMPLETIONS
        prompt: list[int] = turn.fields["prompt"]
        offset = 0.0 if offsets is None else offsets[number]
        jobs.append(Job(partial(list, prompt), turn.output, conversation.group, offset))
    return jobs
