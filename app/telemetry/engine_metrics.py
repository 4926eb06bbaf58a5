"""What an engine does with its time, under names of our own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from prometheus_client.metrics_core import Metric

from app.telemetry.families import Families
from app.telemetry.histogram import (
    ERROR_EDGES,
    SEQUENCE_EDGES,
    STEP_TOKEN_EDGES,
    Histogram,
    SplitHistogram,
)
from batching.core.types import EngineStats, StepSummary

_LONG_WAIT_SECONDS = 2.0  # for a first token: whoever waits longer would like another server
_STAGES = ("inbox", "plan", "submit", "wait", "commit", "outbox")


class StepMetrics:
    """Counts steps as their results come."""

    def __init__(self) -> None:
        self._tokens = Histogram(
            "vllm:iteration_tokens_total", "Tokens computed in a step.", STEP_TOKEN_EDGES
        )
        self._error = SplitHistogram(
            "slipstream_step_time_error_seconds",
            "How far the forecast of a step was off, by whether it ended early or late.",
            ERROR_EDGES,
            "side",
            ("early", "late"),
        )
        self._sequences = SplitHistogram(
            "slipstream_batch_sequences",
            "Sequences of a step whose prompts it computed, and that it took one token further.",
            SEQUENCE_EDGES,
            "kind",
            ("prefill", "decode"),
        )
        self._computed = Counter({"prefill": 0, "decode": 0})  # tokens

    def on_step(self, stats: EngineStats, step: StepSummary | None) -> None:
        """Take in what the engine said after a step, or in an idle second."""
        if step is None:
            return
        decodes = step.sequences - len(step.chunks)
        self._sequences.observe("prefill", len(step.chunks))
        self._sequences.observe("decode", decodes)
        self._computed["prefill"] += sum(count for _, _, count in step.chunks)
        self._computed["decode"] += decodes
        self._tokens.observe(stats.step_tokens)
        if stats.predicted_step_seconds:
            self._error.observe_error(stats.predicted_step_seconds, stats.step_seconds)

    def families(self, families: Families) -> Iterator[Metric]:
        """As of now."""
        for histogram in (self._tokens, self._error, self._sequences):
            yield histogram.family(families.labels)
        yield families.counters(
            "slipstream_batch_tokens", "Tokens computed.", "kind", self._computed
        )


def engine_families(
    families: Families, stats: EngineStats, phases: Mapping[str, float], restarts: int, resumed: int
) -> Iterator[Metric]:
    """What both kinds of engine have. `phases` are those of its start, in seconds."""
    yield families.gauges(
        "slipstream_startup_seconds", "What the engine's start took.", "phase", phases
    )
    for name, help, value in (
        ("forward_seconds", "Time in the model.", stats.forward_seconds),
        ("idle_seconds", "Time without anything to do.", stats.idle_seconds),
        ("engine_restarts", "Engines started after one died or hung.", restarts),
        ("resumed_streams", "Requests continued by another engine.", resumed),
    ):
        yield families.counter(f"slipstream_{name}", help, value)


def stage_family(families: Families, stats: EngineStats) -> Metric:
    """Where the loop of a generating engine spends the time in which it is not idle."""
    seconds = {stage: getattr(stats, f"{stage}_seconds") for stage in _STAGES}
    return families.counters(
        "slipstream_scheduler_stage_seconds",
        "Where the engine's loop spends its time; submit and wait are the model's.",
        "stage",
        seconds,
    )


def load_ratio(stats: EngineStats, max_sequences: int, wait: float) -> float:
    """Demand by capacity: 1 is full; above, somebody waits for others.

    The scarcest counts: slots, KV blocks, or the time that newcomers `wait` for those before them.
    Who waits is taken to need as many blocks as those who run have on average.
    """
    wanted = stats.running + stats.waiting
    blocks = stats.kv_usage * wanted / stats.running if stats.running else 0.0
    return max(wanted / max_sequences, blocks, wait / _LONG_WAIT_SECONDS)
