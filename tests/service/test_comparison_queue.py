"""Comparisons run one at a time, the uids in turns, and none waits long for one that is blocked."""

from __future__ import annotations

import pytest
import trio
import trio.lowlevel
from trio.testing import wait_all_tasks_blocked

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


@pytest.mark.usefixtures("autojump_clock")
async def test_one_that_has_the_turn_keeps_all_others_waiting(
    queue: ComparisonQueue, nursery: trio.Nursery
) -> None:
    begun: list[int] = []
    end = trio.Event()
    nursery.start_soon(compare, queue, MANY, begun, end)
    await wait_all_tasks_blocked()
    nursery.start_soon(compare, queue, FEW, begun)
    await trio.sleep(PATIENCE / 2)
    assert begun == [MANY]
    end.set()
    await trio.lowlevel.checkpoint()
    await trio.lowlevel.checkpoint()
    assert begun == [MANY, FEW]


@pytest.mark.usefixtures("autojump_clock")
async def test_a_uid_with_many_partitions_takes_turns_with_a_uid_with_one(
    queue: ComparisonQueue, nursery: trio.Nursery
) -> None:
    begun: list[int] = []
    end = trio.Event()
    nursery.start_soon(compare, queue, MANY, begun, end)
    await wait_all_tasks_blocked()
    for _ in range(8):
        nursery.start_soon(compare, queue, MANY, begun)
    await trio.sleep(PATIENCE / 4)
    nursery.start_soon(compare, queue, FEW, begun)
    await trio.sleep(PATIENCE / 4)
    end.set()
    await trio.sleep(PATIENCE)
    assert begun.index(FEW) <= 2
    assert len(begun) == 10


@pytest.mark.usefixtures("autojump_clock")
async def test_one_that_does_not_end_is_waited_for_a_bounded_time(
    queue: ComparisonQueue, nursery: trio.Nursery
) -> None:
    begun: list[int] = []
    stuck = trio.Event()
    nursery.start_soon(compare, queue, MANY, begun, stuck)
    await wait_all_tasks_blocked()
    for uid in (MANY, FEW):
        await compare(queue, uid, begun)
    assert begun == [MANY, MANY, FEW]
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
