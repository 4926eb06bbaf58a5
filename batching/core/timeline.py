"""What happened to one request, in words, read along while its log is replayed."""

from __future__ import annotations

from batching.core.event_log import (
    Aborted,
    Added,
    Committed,
    Continued,
    Expired,
    Planned,
    Replayed,
)
from batching.core.types import Request, StepPlan, TokenEvent


class Timelines:
    """Feed it a replayed log; `lines` has the story of each sequence that was asked for.

    A client's request has a sequence for each of its choices: `name` is the id of one of them, or
    what their ids have in common, before the last hyphen.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._open: dict[str, _Story] = {}
        self.lines: dict[str, list[str]] = {}

    def read(self, replayed: Replayed) -> None:
        """Take in the next line of the log."""
        line, scheduler, events = replayed
        match line:
            case Added(now, request) if self._wanted(request.id):
                stats = scheduler.stats()
                others = f"{stats.running} run, {stats.waiting - 1} wait"
                self._begin(request).arrives(now, request, others)
            case Continued():
                for id, sequence in scheduler.unfinished.items():
                    if self._wanted(id) and id not in self._open:
                        text = f"when the log begins, {len(sequence.tokens)} tokens are known"
                        self._begin(sequence.request).lines.append(text)
            case Planned(now, plan) if plan is not None:
                for id, story in self._open.items():
                    story.planned(now, plan, scheduler.unfinished[id].slot)
        if isinstance(line, Aborted | Expired | Committed):
            step = line.result.step if isinstance(line, Committed) else None
            for event in events:
                if event.id in self._open:
                    self._open[event.id].hears(line.now, event, step)
                    if event.finish is not None:
                        del self._open[event.id]

    def _wanted(self, id: str) -> bool:
        return self._name in (id, id.rpartition("-")[0])

    def _begin(self, request: Request) -> _Story:
        story = self._open[request.id] = _Story(request.arrival)
        self.lines[request.id] = story.lines
        return story


class _Story:
    """One sequence's lines. Tokens that come one by one are summed up."""

    def __init__(self, arrival: float) -> None:
        self.lines: list[str] = []
        self._arrival = arrival
        self._resident = False
        self._passed = 0  # steps without it since it last computed something
        self._generated = 0
        self._last = 0.0  # when its last token came
        self._load: dict[int, str] = {}  # what uncommitted steps compute
        self._run: list[tuple[float, int]] = []  # gap before a token, and the step that made it

    def arrives(self, now: float, request: Request, others: str) -> None:
        known = len(request.prompt) + len(request.generated)
        more = request.params.max_tokens - len(request.generated)
        self._say(now, f"arrives with {known} tokens, may generate {more}; {others}")

    def planned(self, now: float, plan: StepPlan, slot: int) -> None:
        """A step was planned, in it or not, while it had this slot (negative: none)."""
        share = next((s for s in plan.sequences if s.slot == slot), None)
        others = len(plan.sequences) - (share is not None)
        tokens = plan.token_count - (share.count if share else 0)
        beside = f"beside {others} others with {tokens}"
        self._load[plan.step] = beside
        if slot < 0 and self._resident:
            self._resident = False
            self._sum_up(now)
            self._say(now, f"step {plan.step}: loses its place and blocks to others")
        if share is None:
            self._passed += 1
            return
        if not self._resident:
            self._resident = True
            self._say(
                now,
                f"step {plan.step}: enters after {self._passed} steps without it; "
                f"{share.start} of its tokens are in the cache",
            )
        self._passed = 0
        if share.count > 1 or not share.sample:
            self._sum_up(now)
            text = f"computes {share.count} tokens from {share.start}, {beside}"
            self._say(now, f"step {plan.step}: {text}")

    def hears(self, now: float, event: TokenEvent, step: int | None) -> None:
        """It got tokens, or its end; `step` is the one that was committed."""
        if event.tokens and step is not None:
            if self._generated:
                self._run.append((now - self._last, step))
            else:
                self._say(now, f"step {step}: gives its first token")
            self._generated += len(event.tokens)
            self._last = now
        if event.finish is not None:
            self._sum_up(self._last)
            reason = event.finish.value
            self._say(now, f"ends ({reason}) with {self._generated} tokens of this log")
        if not self._run and step is not None:
            self._load = {s: text for s, text in self._load.items() if s > step}

    def _sum_up(self, now: float) -> None:
        """Say what came one by one until `now`."""
        if not self._run:
            return
        run, self._run = self._run, []
        worst, step = max(run)
        mean = sum(gap for gap, _ in run) / len(run)
        self._say(
            now,
            f"steps {run[0][1]} to {run[-1][1]}: {len(run)} tokens, {mean * 1e3:.1f} ms apart, at "
            f"most {worst * 1e3:.1f} ms (step {step}, {self._load.get(step, 'unknown')})",
        )

    def _say(self, now: float, text: str) -> None:
        self.lines.append(f"{now - self._arrival:9.3f} s  {text}")
