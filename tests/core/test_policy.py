"""Order keys and the waiting queue."""

from __future__ import annotations

import pytest

from batching.core.policy import (
    NO_DEADLINE_SECONDS,
    PRIORITY_STEP_SECONDS,
    WaitingQueue,
    deadline,
    fcfs,
    priority,
)
from batching.core.sequence import Sequence
from tests.core.harness import limits, request


def test_first_come_first_served() -> None:
    assert fcfs(request("a", [1], arrival=1.0)) < fcfs(request("b", [1], arrival=2.0, priority=-1))


def test_lower_priority_goes_first_unless_the_other_waited_its_step() -> None:
    urgent = request("a", [1], arrival=10.0, priority=0)
    recent = request("b", [1], arrival=1.0, priority=1)
    aged = request("c", [1], arrival=9.0 - PRIORITY_STEP_SECONDS, priority=1)
    assert priority(aged) < priority(urgent) < priority(recent)


def test_earliest_deadline_goes_first_and_none_last() -> None:
    soon = request("a", [1], arrival=5.0, deadline=6.0)
    later = request("b", [1], arrival=0.0, deadline=9.0)
    none = request("c", [1], arrival=0.0)
    much_later = request("d", [1], arrival=NO_DEADLINE_SECONDS, deadline=NO_DEADLINE_SECONDS + 1)
    assert deadline(soon) < deadline(later) < deadline(none) < deadline(much_later)


class Queue:
    """A waiting queue and the sequences made for it."""

    def __init__(self, policy: str) -> None:
        self.queue = WaitingQueue(policy)
        self.made = 0

    def join(self, id: str, tenant: str = "", arrival: float = 0.0) -> Sequence:
        value = request(id, [1], tenant=tenant, arrival=arrival)
        sequence = Sequence(value, (self.queue.order(value), self.made), limits())
        self.made += 1
        self.queue.join(sequence)
        return sequence

    def pop(self) -> Sequence:
        head = self.queue.head()
        assert head is not None
        self.queue.remove(head)
        return head

    def end(self, sequence: Sequence) -> None:
        self.queue.leave(sequence)


def test_unknown_policies_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"'lifo'.*fcfs"):
        WaitingQueue("lifo")


def test_equal_keys_keep_the_order_of_adding() -> None:
    queue = Queue("fcfs")
    for id in "bac":
        queue.join(id)
    assert [queue.pop().id for _ in range(3)] == ["b", "a", "c"]
    assert queue.queue.head() is None
    assert len(queue.queue) == 0


def test_a_preempted_sequence_returns_to_the_head() -> None:
    queue = Queue("fcfs")
    for n, id in enumerate("abc"):
        queue.join(id, arrival=float(n))
    first = queue.pop()
    queue.queue.push(first)
    assert queue.queue.head() is first


def test_removing_what_is_not_queued_is_an_error() -> None:
    queue = Queue("fcfs")
    queue.join("a")
    popped = queue.pop()
    with pytest.raises(KeyError):
        queue.queue.remove(popped)


def test_fair_serves_the_tenant_served_least() -> None:
    queue = Queue("fair")
    for n in range(4):
        queue.join(f"a{n}", "a")
    queue.join("b0", "b")
    first = queue.pop()
    queue.queue.charge(first, 100)
    assert queue.pop().id == "b0"
    assert queue.pop().id == "a1"


def test_idling_saves_up_no_credit() -> None:
    queue = Queue("fair")
    worker = queue.join("a0", "a")
    queue.pop()
    queue.queue.charge(worker, 1000)
    queue.join("a1", "a")
    newcomer = queue.join("b0", "b")
    assert queue.queue.rank(newcomer)[0] == 1000


def test_leaving_and_returning_forgives_no_debt() -> None:
    queue = Queue("fair")
    greedy, modest = queue.join("a0", "a"), queue.join("b0", "b")
    queue.queue.charge(greedy, 1000)
    queue.queue.charge(modest, 10)
    queue.queue.remove(greedy)
    queue.end(greedy)
    again = queue.join("a1", "a")
    assert queue.queue.rank(again)[0] == 1000


def test_idle_tenants_do_not_pile_up() -> None:
    queue = Queue("fair")
    long = queue.join("long", "long")
    for n in range(5000):
        queue.queue.charge(long, 1)
        passing = queue.join(f"p{n}", f"p{n}")
        queue.queue.remove(passing)
        queue.end(passing)
    assert len(queue.queue._served) < 1100


def test_idle_tenants_with_debts_do_not_pile_up_and_the_largest_are_remembered() -> None:
    queue = Queue("fair")
    queue.join("poor", "poor")
    for n in range(5000):
        passing = queue.join(f"p{n}", f"p{n}")
        queue.queue.charge(passing, 1 + n)
        queue.queue.remove(passing)
        queue.end(passing)
    assert len(queue.queue._served) < 1100
    assert queue.queue.rank(queue.join("again", "p4999"))[0] == 5000


def test_a_tenant_is_not_forgotten_as_it_joins() -> None:
    queue = Queue("fair")
    for n in range(3000):
        passing = queue.join(f"p{n}", f"p{n}")
        assert queue.queue.rank(passing)[0] == 0
        queue.queue.remove(passing)
        queue.end(passing)
