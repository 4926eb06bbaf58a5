"""Prometheus metrics under vLLM's names, so that its dashboards and autoscalers work unchanged.

Counters of tokens advance exactly by what responses report as usage. Times are the flight
recorder's. Everything else is read from the engine's last statistics when
somebody scrapes, and costs nothing until then.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from app.access.admission import Admission
from app.access.backlog import Backlog
from app.access.quota import EXCEEDED
from app.engine_protocol import Engine
from app.flights.record import Lane
from app.telemetry.engine_info import info_family
from app.telemetry.engine_metrics import (
    StepMetrics,
    engine_families,
    load_ratio,
    stage_family,
)
from app.telemetry.families import Families
from app.telemetry.histogram import (
    ERROR_EDGES,
    INTER_TOKEN_EDGES,
    N_EDGES,
    REQUEST_EDGES,
    TTFT_EDGES,
    Histogram,
    SplitHistogram,
    length_edges,
)
from batching.core.types import EngineStats
from batching.engine.messages import StepOutput
from batching.worker.protocol import Capabilities

_FINISH_REASONS = ("stop", "length", "abort", "error")
_REJECTIONS = ("max_num_queued_reqs", "max_num_queued_tokens", "deadline_unmeetable", EXCEEDED)
# Refused by forecast; dropped without a first token; ended on the way.
_DEADLINE_MISSES = ("refused", "unserved", "timeout")


class Metrics(Collector):
    """All counters of one served model. `on_step` belongs to the engine client's callback."""

    def __init__(self, model_name: str) -> None:
        self.model_name = model_name
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.generation_tokens = 0
        self.finished: Counter[str] = Counter()
        self.deadline_misses: Counter[str] = Counter()  # of HTTP requests, by what became of them
        self._families = Families(model_name)
        self._steps = StepMetrics()
        self._engine: Engine | None = None
        self._admission: Admission | None = None
        self._backlog: Backlog | None = None
        self._forecast_error = SplitHistogram(
            "slipstream_predicted_ttft_error_seconds",
            "How far the forecast of a request's first tokens was off, by where they came.",
            ERROR_EDGES,
            "side",
            ("early", "late"),
        )
        self._make_histograms(max_model_len=1 << 20)

    def _make_histograms(self, max_model_len: int) -> None:
        lengths = length_edges(max_model_len)

        def make(name: str, help: str, edges: Iterable[float]) -> Histogram:
            return Histogram(f"vllm:{name}", help, tuple(edges))

        seconds = REQUEST_EDGES
        self._ttft = make("time_to_first_token_seconds", "Arrival to first token.", TTFT_EDGES)
        self._itl = make("inter_token_latency_seconds", "Between tokens.", INTER_TOKEN_EDGES)
        self._tpot = make(
            "request_time_per_output_token_seconds", "Mean between tokens.", INTER_TOKEN_EDGES
        )
        self._e2e = make("e2e_request_latency_seconds", "Arrival to last token.", seconds)
        self._queue = make("request_queue_time_seconds", "Arrival to first step.", seconds)
        self._prefill = make("request_prefill_time_seconds", "First step to token.", seconds)
        self._decode = make("request_decode_time_seconds", "First token to last.", seconds)
        self._inference = make("request_inference_time_seconds", "First step to end.", seconds)
        self._prompt_lengths = make("request_prompt_tokens", "Prompt tokens.", lengths)
        self._output_lengths = make("request_generation_tokens", "Generated tokens.", lengths)
        self._longest = make(
            "request_max_num_generation_tokens", "Of a prompt's longest sample.", lengths
        )
        self._max_tokens = make("request_params_max_tokens", "Asked max_tokens.", lengths)
        self._n = make("request_params_n", "Asked n.", N_EDGES)
        self._histograms = [v for v in vars(self).values() if isinstance(v, Histogram)]

    def serve(
        self, capabilities: Capabilities, engine: Engine, admission: Admission, backlog: Backlog
    ) -> None:
        """From now on there is an engine to read gauges from."""
        self._engine = engine
        self._admission = admission
        self._backlog = backlog
        self._make_histograms(capabilities.max_model_len)

    def generation_started(self, n: int, prompt_tokens: int) -> None:
        """The first news of an HTTP request's generation; each prompt counts once."""
        self.prompt_tokens += prompt_tokens
        self._n.observe(n)

    def first_token(self, seconds: float) -> None:
        """A sequence has its first token, so long after its request arrived."""
        self._ttft.observe(seconds)

    def later_tokens(self, seconds: float, count: int) -> None:
        """So many tokens came, each so long after the one before."""
        self._itl.observe(seconds, count)

    def lane_ended(self, lane: Lane, tokens: int) -> None:
        """The answer of a sequence is over, after so many tokens that the client got."""
        reason = lane.finish or ""
        self.finished[reason] += 1
        self._prompt_lengths.observe(lane.prompt)
        self._output_lengths.observe(tokens)
        self._max_tokens.observe(lane.max_tokens)
        if lane.scheduled:
            self._queue.observe(lane.scheduled - lane.arrival)
            self._inference.observe(lane.ended - lane.scheduled)
        if not lane.first:
            return
        self._prefill.observe(lane.first - lane.scheduled)
        if reason not in ("stop", "length"):
            return
        self._e2e.observe(lane.last - lane.received)
        self._decode.observe(lane.last - lane.first)
        if tokens > 1:
            self._tpot.observe((lane.last - lane.first) / (tokens - 1))

    def forecast_came_true(self, forecast: float, seconds: float) -> None:
        """All first tokens of an HTTP request, forecast when it arrived, have come."""
        self._forecast_error.observe_error(forecast, seconds)

    def generation_ended(self, counts: Sequence[int], samples: int) -> None:
        """All sequences of an HTTP request have; they come in groups with the same prompt."""
        for i in range(0, len(counts), samples):
            self._longest.observe(max(counts[i : i + samples]))

    def on_step(self, output: StepOutput) -> None:
        """Take in a message of the engine."""
        self._steps.on_step(output.stats, output.step)

    def collect(self) -> Iterator[Metric]:
        """All families, read now: a restarted engine's capabilities may differ."""
        if (engine := self._engine) is None:
            yield from self.families(EngineStats(), None)
        else:
            yield from self.families(engine.stats, engine.capabilities)

    def families(self, stats: EngineStats, capabilities: Capabilities | None) -> Iterator[Metric]:
        """The same with these of the engine."""
        yield from self._gauges(stats, capabilities)
        yield from self._counters(stats)
        for histogram in self._histograms:
            yield histogram.family(self._families.labels)
        yield from self._steps.families(self._families)
        yield self._forecast_error.family(self._families.labels)
        yield from self._own(stats, capabilities)

    def _gauges(self, stats: EngineStats, capabilities: Capabilities | None) -> Iterator[Metric]:
        families = self._families
        yield families.gauge("vllm:num_requests_running", "Requests computed now.", stats.running)
        yield families.gauge(
            "vllm:num_requests_waiting", "Requests not yet computed.", stats.waiting
        )
        by_reason = {"capacity": stats.waiting, "deferred": 0}
        yield families.gauges(
            "vllm:num_requests_waiting_by_reason", "Why they wait.", "reason", by_reason
        )
        yield families.gauge(
            "vllm:kv_cache_usage_perc", "Share of KV blocks owned, 0 to 1.", stats.kv_usage
        )
        if (c := capabilities) is not None:
            facts = {
                "block_size": str(c.block_size),
                "num_gpu_blocks": str(c.num_blocks),
                "cache_dtype": c.kv_dtype or c.dtype,
            }
            yield families.info("vllm:cache_config_info", "The KV cache.", facts)

    def _counters(self, stats: EngineStats) -> Iterator[Metric]:
        families = self._families
        for name, help, value in (
            ("prompt_tokens", "Prompt tokens of answered requests.", self.prompt_tokens),
            ("prompt_tokens_cached", "Of these, found in the cache.", self.cached_tokens),
            ("generation_tokens", "Generated tokens.", self.generation_tokens),
            ("num_preemptions", "Sequences interrupted for others.", stats.preemptions),
            ("prefix_cache_queries", "Prompt tokens looked up.", stats.prefix_queries),
            ("prefix_cache_hits", "Prompt tokens found.", stats.prefix_hits),
        ):
            yield families.counter(f"vllm:{name}", help, value)
        finished = {reason: self.finished[reason] for reason in _FINISH_REASONS}
        yield families.counters(
            "vllm:request_success", "Ended sequences.", "finished_reason", finished
        )
        rejections = self._admission.rejections if self._admission is not None else Counter()
        rejected = {reason: rejections[reason] for reason in _REJECTIONS}
        yield families.counters(
            "vllm:admission_rejections", "Refused with 429.", "reason", rejected
        )

    def _own(self, stats: EngineStats, capabilities: Capabilities | None) -> Iterator[Metric]:
        engine = self._engine
        phases = capabilities.phases if capabilities is not None else {}
        restarts = engine.restarts if engine is not None else 0
        resumed = engine.resumed_streams if engine is not None else 0
        yield from engine_families(self._families, stats, phases, restarts, resumed)
        yield stage_family(self._families, stats)
        yield info_family(self._families, capabilities)
        slots = capabilities.max_sequences if capabilities is not None else 1
        wait = (self._backlog.drain_seconds() or 0.0) if self._backlog is not None else 0.0
        yield self._families.gauge(
            "slipstream_predicted_wait_seconds", "Until all who wait now are taken up.", wait
        )
        yield self._families.gauge(
            "slipstream_load_ratio", "Demand by capacity; above 1 some wait.",
            load_ratio(stats, slots, wait),
        )  # fmt: skip
        missed = {reason: self.deadline_misses[reason] for reason in _DEADLINE_MISSES}
        yield self._families.counters(
            "slipstream_deadline_misses", "Requests that were not served in time.", "reason", missed
        )


def exported_families() -> list[Metric]:
    """Every family of `/metrics`, with samples."""
    capabilities = Capabilities("", "", 1, 1, 1, 1, 1, 1, "", "", "", phases={"weights": 0.0})
    return list(Metrics("").families(EngineStats(), capabilities))


def exported_names() -> list[str]:
    """Every sample name of `/metrics`, as dashboards refer to it, in order, without repeats."""
    return list(dict.fromkeys(s.name for family in exported_families() for s in family.samples))
