"""A free lock is acquired without a checkpoint; a held one is granted in the order of arrival."""

from __future__ import annotations

import pytest
import trio
from trio.testing import assert_no_checkpoints, wait_all_tasks_blocked

from interceptd.eager_lock import EagerLock


async def test_a_new_lock_is_held_by_no_task() -> None:
    lock = EagerLock()
    assert (lock.locked(), lock.is_mine) == (False, False)


async def test_a_free_lock_is_taken_and_given_back_without_a_checkpoint() -> None:
    lock = EagerLock()
    with assert_no_checkpoints():
        async with lock:
            assert (lock.locked(), lock.is_mine) == (True, True)
    assert (lock.locked(), lock.is_mine) == (False, False)


async def test_a_waiter_gets_the_lock_before_later_callers(nursery: trio.Nursery) -> None:
    lock, order = EagerLock(), []

    async def take(name: str) -> None:
        async with lock:
            order.append(name)

    async with lock:
        nursery.start_soon(take, "first")
        await wait_all_tasks_blocked()
    await take("second")
    assert order == ["first", "second"]


async def test_a_lock_is_released_if_the_block_raises() -> None:
    lock = EagerLock()
    with pytest.raises(ValueError, match="here"):
        async with lock:
            raise ValueError("here")
    assert not lock.locked()


async def test_a_wait_for_the_lock_can_be_cancelled(nursery: trio.Nursery) -> None:
    lock = EagerLock()

    async def hold() -> None:
        async with lock:
            await trio.sleep(2)

    nursery.start_soon(hold)
    await wait_all_tasks_blocked()
    with trio.move_on_after(1) as scope:
        async with lock:
            pass
    assert (scope.cancelled_caught, lock.is_mine) == (True, False)
