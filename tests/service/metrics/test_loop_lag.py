"""The lag of the event loop, by trio's mock clock."""

from __future__ import annotations

import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from interceptd.metrics.loop_lag import PERIOD_SECONDS, LoopLag


async def test_a_loop_that_is_on_time_has_no_lag(nursery: trio.Nursery, mock_clock: MockClock) -> None:
    lag = LoopLag()
    nursery.start_soon(lag.run)
    await wait_all_tasks_blocked()
    mock_clock.jump(PERIOD_SECONDS)
    await wait_all_tasks_blocked()
    assert (lag.histogram.count, lag.histogram.total_ns, lag.longest_ns) == (1, 0, 0)


async def test_the_lag_is_how_much_later_than_due_the_task_was_run(
    nursery: trio.Nursery, mock_clock: MockClock
) -> None:
    lag = LoopLag()
    nursery.start_soon(lag.run)
    for late in (0.5, 0.125):
        await wait_all_tasks_blocked()
        mock_clock.jump(PERIOD_SECONDS + late)
    await wait_all_tasks_blocked()
    assert (lag.histogram.count, lag.histogram.total_ns, lag.longest_ns) == (2, 625_000_000, 500_000_000)
