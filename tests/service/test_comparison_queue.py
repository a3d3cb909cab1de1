"""Comparisons run one at a time, the uids in turns, and none waits long for one that is blocked."""

from __future__ import annotations

import pytest
import trio
import trio.lowlevel
from trio.testing import MockClock, wait_all_tasks_blocked

from fakes.running import Running
from interceptd.address_space.comparison_queue import PATIENCE, ComparisonQueue

MANY, FEW = 1000, 1001
"""Two uids."""


@pytest.fixture
def queue() -> ComparisonQueue:
    return ComparisonQueue()


async def compare(queue: ComparisonQueue, uid: int, begun: list[int], end: trio.Event | None = None) -> None:
    async with queue.turn(uid):
        begun.append(uid)
        if end is not None:
            await end.wait()


async def test_one_that_has_the_turn_keeps_all_others_waiting(
    queue: ComparisonQueue, nursery: trio.Nursery, mock_clock: MockClock
) -> None:
    begun: list[int] = []
    end = trio.Event()
    nursery.start_soon(compare, queue, MANY, begun, end)
    await wait_all_tasks_blocked()
    other = Running(nursery, compare, queue, FEW, begun)
    await wait_all_tasks_blocked()
    mock_clock.jump(PATIENCE / 2)
    await wait_all_tasks_blocked()
    assert begun == [MANY]
    end.set()
    await other.result()
    assert begun == [MANY, FEW]


async def test_a_uid_with_many_partitions_takes_turns_with_a_uid_with_one(
    queue: ComparisonQueue, nursery: trio.Nursery, mock_clock: MockClock
) -> None:
    begun: list[int] = []
    end = trio.Event()
    nursery.start_soon(compare, queue, MANY, begun, end)
    await wait_all_tasks_blocked()
    others = [Running(nursery, compare, queue, MANY, begun) for _ in range(8)]
    await wait_all_tasks_blocked()
    few = Running(nursery, compare, queue, FEW, begun)
    await wait_all_tasks_blocked()
    assert mock_clock.current_time() == 0
    end.set()
    for each in (few, *others):
        await each.result()
    assert begun.index(FEW) <= 2


async def test_one_that_does_not_end_is_waited_for_a_bounded_time(
    queue: ComparisonQueue, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    begun: list[int] = []
    stuck = trio.Event()
    nursery.start_soon(compare, queue, MANY, begun, stuck)
    await wait_all_tasks_blocked()
    for uid in (MANY, FEW):
        await compare(queue, uid, begun)
    assert begun == [MANY, MANY, FEW]
    assert autojump_clock.current_time() <= 4 * PATIENCE
    stuck.set()


async def test_a_turn_that_is_cancelled_leaves_nothing_locked(queue: ComparisonQueue) -> None:
    with trio.CancelScope() as scope:
        async with queue.turn(MANY):
            scope.cancel()
            await trio.sleep_forever()
    begun: list[int] = []
    with trio.fail_after(5):
        await compare(queue, FEW, begun)
    assert begun == [FEW]
    assert queue._lines == {}
