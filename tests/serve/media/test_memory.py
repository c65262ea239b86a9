"""MediaMemory: leases wait, never exceed the budget, and cannot block each other."""

from __future__ import annotations

import random
import threading
from concurrent.futures import CancelledError

import pytest

from multi_token.serve.media.memory import (
    MediaMemory,
    MemoryLease,
    RequestMemory,
    Stage,
    source_bytes,
)
from multi_token.types import Conversation, Media, Message, Text


def acquired(memory: MediaMemory, stage: Stage, num_bytes: int, tenant: str = "") -> MemoryLease:
    lease = memory.lease(stage, tenant)
    lease.acquire(num_bytes)
    return lease


def test_leases_wait_in_the_order_of_their_arrival() -> None:
    memory = MediaMemory(800)
    first, second, large, small = (
        acquired(memory, Stage.BODY, num_bytes) for num_bytes in (200, 200, 150, 10)
    )
    assert [lease.granted.done() for lease in (first, second, large, small)] == [1, 1, 0, 0]
    assert (memory.num_bytes, memory.num_waiting) == (400, 2)
    first.shrink(100)
    assert not large.granted.done() and not small.granted.done(), "no small one overtakes"
    first.release()
    first.release()
    assert large.granted.done() and small.granted.done()
    assert memory.num_bytes == 360


@pytest.mark.parametrize("order", [tuple(Stage), tuple(reversed(Stage))])
def test_each_stage_gets_its_part_and_no_more_in_any_order(order: tuple[Stage, ...]) -> None:
    memory = MediaMemory(800)
    assert [memory.largest(stage) for stage in Stage] == [400, 100, 100, 200]
    for stage in order:
        for _ in range(9):
            acquired(memory, stage, memory.largest(stage) // 2)
    assert memory.num_bytes == memory.capacity
    counts = [sum(stage is s for s in Stage) for stage in Stage]
    assert counts == [1, 1, 1, 1] and memory.num_waiting == 4 * 7


def test_a_lease_larger_than_its_part_is_granted_once_the_part_is_free() -> None:
    memory = MediaMemory(800)
    assert acquired(memory, Stage.PREPARED, 5_000).num_bytes == 200


def test_a_lease_that_is_released_while_it_waits_waits_no_more() -> None:
    memory = MediaMemory(800)
    holder, leaver, next_one = (acquired(memory, Stage.BODY, 400) for _ in range(3))
    leaver.release()
    with pytest.raises(CancelledError):
        leaver.granted.result(0)
    holder.release()
    assert next_one.granted.done() and memory.num_bytes == 400
    with pytest.raises(CancelledError):
        holder_again = memory.lease(Stage.BODY)
        holder_again.release()
        holder_again.acquire(1).result(0)


def test_tenants_take_turns_and_leave_a_half_to_each_other() -> None:
    memory = MediaMemory(800, is_shared=True)
    greedy = [acquired(memory, Stage.BODY, 100, "a") for _ in range(4)]
    assert [lease.granted.done() for lease in greedy] == [True, True, False, False]
    other = [acquired(memory, Stage.BODY, 100, "b") for _ in range(3)]
    assert [lease.granted.done() for lease in other] == [True, True, False]
    greedy[0].release()
    other[0].release()
    assert greedy[2].granted.done() and other[2].granted.done() and not greedy[3].granted.done()
    turns = MediaMemory(800, is_shared=True)
    full = acquired(turns, Stage.PREPARED, 100)
    fill = [acquired(turns, Stage.PREPARED, 100)]
    waiting = [acquired(turns, Stage.PREPARED, 100, name) for name in "aab"]
    full.release()
    fill[0].release()
    assert [lease.granted.done() for lease in waiting] == [True, False, True]


@pytest.mark.parametrize("stage", Stage)
def test_small_leases_of_others_overtake_a_large_one_by_no_more_than_its_own_bytes(
    stage: Stage,
) -> None:
    memory = MediaMemory(8_000)
    large, small = memory.largest(stage), memory.largest(stage) // 10
    held = [acquired(memory, stage, small, "small") for _ in range(10)]
    waiting = acquired(memory, stage, large, "large")
    num_overtook, later = 0, []
    # A tenant that sends another one whenever one of its leases is released.
    while held and num_overtook < 100:
        later.append(acquired(memory, stage, small, "small"))
        held.pop(0).release()
        if later[0].granted.done():
            held.append(later.pop(0))
            num_overtook += 1
    assert num_overtook == 10 and waiting.granted.done()
    waiting.release()
    assert len(later) == 10 and all(lease.granted.done() for lease in later)


def test_a_lease_that_waits_for_its_own_tenant_holds_up_no_other() -> None:
    memory = MediaMemory(800, is_shared=True)
    acquired(memory, Stage.BODY, 150, "greedy")
    waiting = acquired(memory, Stage.BODY, 100, "greedy")
    others = [acquired(memory, Stage.BODY, 100, "other") for _ in range(2)]
    for _ in range(10):
        others.append(acquired(memory, Stage.BODY, 100, "other"))
        others.pop(0).release()
        assert others[-2].granted.done() and not waiting.granted.done()


def test_a_request_keeps_the_bytes_of_its_items_only() -> None:
    memory = MediaMemory(80_000)
    request = RequestMemory(memory)
    request.body.acquire(5_000)
    request.parse.acquire(10_000)
    request.keep(3_000)
    assert memory.num_bytes == 3_000
    numbers = RequestMemory(memory)
    numbers.body.acquire(1_000)
    numbers.parse.acquire(10_000)
    numbers.keep(6_400)
    assert memory.num_bytes == 3_000 + 6_400
    request.release()
    numbers.release()
    assert memory.num_bytes == 0


def test_sources_are_counted_in_bytes() -> None:
    sources = (bytes(10), [0.5] * 3, [[1, 2], [3, 4]], "http://a.example/b")
    parts = (Text("text"), *(Media("m", source) for source in sources))
    conversation = Conversation((Message("user", parts),))
    assert source_bytes(conversation) == 10 + 3 * 64 + 4 * 64 + 18


def test_many_threads_never_exceed_the_budget_and_all_get_their_turn() -> None:
    memory = MediaMemory(1_000)
    most: list[int] = []
    num_done: list[int] = []

    def pass_all_stages(seed: int) -> None:
        numbers = random.Random(seed)
        for _ in range(50):
            leases: list[MemoryLease] = []
            for stage in Stage:
                leases.append(memory.lease(stage, str(seed)))
                leases[-1].acquire(numbers.randint(1, 300)).result(30)
                most.append(memory.num_bytes)
                if numbers.random() < 0.3:
                    leases[0].shrink(10)
            for lease in leases:
                lease.release()
        num_done.append(seed)

    threads = [threading.Thread(target=pass_all_stages, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(num_done) == 8 and memory.num_bytes == 0 and memory.num_waiting == 0
    assert 500 < max(most) <= 1_000
