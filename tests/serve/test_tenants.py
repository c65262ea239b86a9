"""TenantQueue: tenants take turns, and each one's things keep their order."""

from __future__ import annotations

from collections.abc import Sequence

from multi_token.serve.tenants import TenantQueue


def queue_of(names: Sequence[str]) -> TenantQueue[str]:
    """A queue of these things, whose first letter is their tenant."""
    queue: TenantQueue[str] = TenantQueue()
    for name in names:
        queue.add(name, name[0])
    return queue


NAMES = ("a1", "a2", "a3", "b1", "c1", "b2")


def test_tenants_take_turns() -> None:
    queue = queue_of(NAMES)
    assert list(queue.in_turn()) == ["a1", "b1", "c1", "a2", "b2", "a3"]
    assert queue.heads() == ["a1", "b1", "c1"]
    assert queue.take("a1") == "a1"
    assert list(queue.in_turn()) == ["b1", "c1", "a2", "b2", "a3"]
    queue.take("b1")
    queue.add("b3", "b")
    assert queue.heads() == ["c1", "a2", "b2"] and len(queue) == 5


def test_things_that_run_count_as_turns() -> None:
    assert list(queue_of(NAMES).in_turn({"a": 2})) == ["b1", "c1", "b2", "a1", "a2", "a3"]


def test_the_tenant_that_had_no_turn_for_longest_is_next() -> None:
    queue = queue_of(("a1", "b1"))
    queue.take("a1")
    queue.take("b1")
    for name in ("b2", "a2", "c1", "d1"):
        queue.add(name, name[0])
    assert queue.heads() == ["c1", "d1", "a2", "b2"]


def test_a_thing_that_waits_no_more_is_gone_and_its_tenant_keeps_its_turn() -> None:
    queue = queue_of(NAMES)
    queue.discard("a1")
    queue.discard("unknown")
    assert list(queue.in_turn()) == ["a2", "b1", "c1", "a3", "b2"]
    queue.discard("c1")
    assert queue.heads() == ["a2", "b1"] and len(queue) == 4
