"""What users are promised: limits per group of requests, and how often they were kept."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from loadtest.events import Outcome


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Most milliseconds of one request; None is no limit."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    e2e_ms: float | None = None


class Slo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file of promises. `share` of the requests must keep the limits of their group.

    `default` holds for groups that `groups` does not name.
    """

    default: Limits = Limits()
    groups: dict[str, Limits] = {}
    share: float = 0.95

    def of(self, group: str) -> Limits:
        return self.groups.get(group, self.default)


def load_slo(path: Path) -> Slo:
    """A YAML (or JSON) file. Raises `ValueError` that names the wrong field, or `OSError`."""
    import yaml

    try:
        slo = msgspec.convert(yaml.safe_load(path.read_text()), Slo)
    except (yaml.YAMLError, msgspec.ValidationError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
    if not 0 < slo.share <= 1:
        raise ValueError(f"{path}: share must be above 0 and at most 1")
    return slo


def kept(outcome: Outcome, slo: Slo) -> bool:
    """Whether a request kept its group's limits; a failed one did not."""
    if outcome.error is not None:
        return False
    limits = slo.of(outcome.group)
    figures = (
        (limits.ttft_ms, ttft(outcome)),
        (limits.tpot_ms, tpot(outcome)),
        (limits.e2e_ms, outcome.ended - outcome.scheduled),
    )
    return all(
        limit is None or seconds is None or seconds * 1e3 <= limit for limit, seconds in figures
    )


def ttft(outcome: Outcome) -> float | None:
    """Seconds from the scheduled time to the first text."""
    return outcome.chunk_times[0] - outcome.scheduled if outcome.chunk_times else None


def tpot(outcome: Outcome) -> float | None:
    """Mean seconds per token after the first."""
    if not outcome.chunk_times or outcome.output_tokens is None or outcome.output_tokens < 2:
        return None
    return (outcome.chunk_times[-1] - outcome.chunk_times[0]) / (outcome.output_tokens - 1)


def goodput(outcomes: Sequence[Outcome], slo: Slo, seconds: float) -> dict[str, Any]:
    """Requests per second that kept their limits, and the share of each group that did."""
    good = [o for o in outcomes if kept(o, slo)]
    groups = sorted({o.group for o in outcomes})
    return {
        "requests_per_second": len(good) / seconds,
        "output_tokens_per_second": sum(o.output_tokens or 0 for o in good) / seconds,
        "share": len(good) / len(outcomes),
        "met": meets(outcomes, slo),
        "groups": {
            group: _share(kept(o, slo) for o in outcomes if o.group == group) for group in groups
        },
    }


def meets(outcomes: Sequence[Outcome], slo: Slo) -> bool:
    """Whether enough requests of every group kept their limits, in both halves of the run.

    The second half by itself, because in an overload the first requests are still fine.
    """
    by_time = sorted(outcomes, key=lambda o: o.scheduled)
    halves = by_time[: len(by_time) // 2], by_time[len(by_time) // 2 :]
    for group in {o.group for o in outcomes}:
        for half in halves:
            members = [kept(o, slo) for o in half if o.group == group]
            if members and _share(members) < slo.share:
                return False
    return True


def _share(values: Iterable[bool]) -> float:
    found = list(values)
    return sum(found) / len(found)
