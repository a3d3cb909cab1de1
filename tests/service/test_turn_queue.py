"""Long searches run one at a time, the uids in turns, and none waits long for one that is blocked."""

from __future__ import annotations

import pytest
import trio
import trio.lowlevel
from trio.testing import MockClock, wait_all_tasks_blocked

from fakes.running import Running
from interceptd.address_space.turn_queue import PATIENCE, TurnQueue

MANY, FEW = 1000, 1001
"""Two uids."""


@pytest.fixture
def queue() -> TurnQueue:
    return TurnQueue()


async def search(queue: TurnQueue, uid: int, begun: list[int], end: trio.Event | None = None) -> None:
    async with queue.turn(uid):
        begun.append(uid)
        if end is not None:
            await end.wait()


async def test_one_that_has_the_turn_keeps_all_others_waiting(
    queue: TurnQueue, nursery: trio.Nursery, mock_clock: MockClock
) -> None:
    begun: list[int] = []
    end = trio.Event()
    nursery.start_soon(search, queue, MANY, begun, end)
    await wait_all_tasks_blocked()
    other = Running(nursery, search, queue, FEW, begun)
    await wait_all_tasks_blocked()
    mock_clock.jump(PATIENCE / 2)
    await wait_all_tasks_blocked()
    assert begun == [MANY]
    end.set()
    await other.result()
    assert begun == [MANY, FEW]


async def test_a_uid_with_many_partitions_takes_turns_with_a_uid_with_one(
    queue: TurnQueue, nursery: trio.Nursery, mock_clock: MockClock
) -> None:
    begun: list[int] = []
    end = trio.Event()
    nursery.start_soon(search, queue, MANY, begun, end)
    await wait_all_tasks_blocked()
    others = [Running(nursery, search, queue, MANY, begun) for _ in range(8)]
    await wait_all_tasks_blocked()
    few = Running(nursery, search, queue, FEW, begun)
    await wait_all_tasks_blocked()
    assert mock_clock.current_time() == 0
    end.set()
    for each in (few, *others):
        await each.result()
    assert begun.index(FEW) <= 2


async def test_within_a_uid_the_first_that_came_has_the_first_turn(
    queue: TurnQueue, nursery: trio.Nursery, mock_clock: MockClock
) -> None:
    order: list[int] = []

    async def search_as(name: int) -> None:
        async with queue.turn(MANY):
            order.append(name)

    end = trio.Event()
    nursery.start_soon(search, queue, FEW, [], end)
    await wait_all_tasks_blocked()
    for name in range(4):
        nursery.start_soon(search_as, name)
        await wait_all_tasks_blocked()
    end.set()
    await wait_all_tasks_blocked()
    assert (order, mock_clock.current_time()) == ([0, 1, 2, 3], 0)


async def test_one_that_does_not_end_is_waited_for_once(
    queue: TurnQueue, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    begun: list[int] = []
    stuck = trio.Event()
    nursery.start_soon(search, queue, MANY, begun, stuck)
    await wait_all_tasks_blocked()
    for uid in (MANY, FEW, MANY):
        await search(queue, uid, begun)
    assert begun == [MANY, MANY, FEW, MANY]
    assert autojump_clock.current_time() == PATIENCE
    stuck.set()


async def test_one_that_ends_late_does_not_end_the_turn_that_has_begun_meanwhile(
    queue: TurnQueue, nursery: trio.Nursery, mock_clock: MockClock
) -> None:
    begun: list[int] = []
    ends = [trio.Event() for _ in range(3)]
    for end in ends:
        nursery.start_soon(search, queue, MANY, begun, end)
        await wait_all_tasks_blocked()
    mock_clock.jump(PATIENCE)
    await wait_all_tasks_blocked()
    assert len(begun) == 2
    ends[0].set()
    await wait_all_tasks_blocked()
    assert len(begun) == 2
    ends[1].set()
    await wait_all_tasks_blocked()
    assert len(begun) == 3
    ends[2].set()


async def test_a_uid_of_which_no_search_ends_costs_another_uid_two_waits_at_most(
    queue: TurnQueue, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    begun: list[int] = []
    stuck = trio.Event()
    for _ in range(4):
        nursery.start_soon(search, queue, MANY, begun, stuck)
        await wait_all_tasks_blocked()
    await search(queue, FEW, begun)
    assert autojump_clock.current_time() == 2 * PATIENCE
    assert begun.index(FEW) == 2
    stuck.set()


@pytest.mark.parametrize("given_up", range(3))
async def test_a_search_that_is_cancelled_while_it_waits_or_has_the_turn_keeps_no_other_from_it(
    queue: TurnQueue, nursery: trio.Nursery, mock_clock: MockClock, given_up: int
) -> None:
    begun: list[int] = []
    scopes = [trio.CancelScope() for _ in range(3)]
    end = trio.Event()

    async def search_in(scope: trio.CancelScope) -> None:
        with scope:
            await search(queue, MANY, begun, end)

    for scope in scopes:
        nursery.start_soon(search_in, scope)
        await wait_all_tasks_blocked()
    scopes[given_up].cancel()
    await wait_all_tasks_blocked()
    end.set()
    await search(queue, FEW, begun)
    assert begun == [MANY] * (3 if given_up == 0 else 2) + [FEW]
    assert (queue._holder, queue._waiting, mock_clock.current_time()) == (None, {}, 0)


async def test_behind_a_search_that_is_cancelled_the_next_one_waits_for_a_blocked_one_no_longer(
    queue: TurnQueue, nursery: trio.Nursery, mock_clock: MockClock
) -> None:
    begun: list[int] = []
    stuck, scope = trio.Event(), trio.CancelScope()

    async def be_cancelled() -> None:
        with scope:
            await search(queue, MANY, [], stuck)

    nursery.start_soon(search, queue, MANY, begun, stuck)
    await wait_all_tasks_blocked()
    nursery.start_soon(be_cancelled)
    await wait_all_tasks_blocked()
    nursery.start_soon(search, queue, MANY, begun, stuck)
    await wait_all_tasks_blocked()
    scope.cancel()
    await wait_all_tasks_blocked()
    mock_clock.jump(PATIENCE)
    await wait_all_tasks_blocked()
    assert begun == [MANY, MANY]
    stuck.set()


async def test_a_search_that_is_cancelled_as_it_gets_the_turn_passes_it_on(
    queue: TurnQueue, nursery: trio.Nursery, mock_clock: MockClock
) -> None:
    begun: list[int] = []
    end, scope = trio.Event(), trio.CancelScope()

    async def be_cancelled() -> None:
        with scope:
            async with queue.turn(MANY):
                await trio.lowlevel.checkpoint()
                begun.append(MANY)

    nursery.start_soon(search, queue, FEW, begun, end)
    await wait_all_tasks_blocked()
    nursery.start_soon(be_cancelled)
    await wait_all_tasks_blocked()
    last = Running(nursery, search, queue, FEW, begun)
    await wait_all_tasks_blocked()
    end.set()
    scope.cancel()
    await last.result()
    assert (begun, mock_clock.current_time()) == ([FEW, FEW], 0)


@pytest.mark.parametrize("draw", range(16))
async def test_a_turn_that_passes_on_before_its_task_has_run_is_two_searches_at_once(
    queue: TurnQueue, nursery: trio.Nursery, mock_clock: MockClock, draw: int
) -> None:
    """The event loop was late. Which of the two tasks runs first is drawn."""
    begun: list[int] = []
    ends = [trio.Event() for _ in range(3)]

    async def end_late() -> None:
        async with queue.turn(MANY):
            await ends[0].wait()
        mock_clock.jump(PATIENCE)

    nursery.start_soon(end_late)
    await wait_all_tasks_blocked()
    for end in ends[1:]:
        nursery.start_soon(search, queue, MANY, begun, end)
        await wait_all_tasks_blocked()
    ends[0].set()
    await wait_all_tasks_blocked()
    assert begun == [MANY, MANY], draw
    for end in ends[1:]:
        end.set()
    await wait_all_tasks_blocked()
    assert (queue._holder, queue._waiting) == (None, {})
