"""Rate limits per uid: the excess is delayed in order, without delaying other uids."""

from __future__ import annotations

from functools import partial

import pytest
import structlog.testing
import trio
from trio.testing import assert_no_checkpoints

from fakes.running import Running
from interceptd.config.schema import Limits
from interceptd.connections.tenants import (
    BURST_SECONDS,
    REFUSAL_REQUESTS,
    Tenant,
    Tenants,
)
from interceptd.log_share import BYTES_PER_SECOND, LogShare, Severity
from interceptd.scheduling.step_monitor import StepMonitor
from interceptd.scheduling.time_share import TimeShares

RATE = 100
BURST = int(BURST_SECONDS * RATE)


def spent(tenant: Tenant, lines: int) -> None:
    """Its share of the log was used up, refused so many lines, and is whole again."""
    seconds = [0.0]
    tenant.log_share = LogShare(tenant.uid, lambda: seconds[0])
    tenant.log_share.charge(Severity.ORDINARY, 100 * BYTES_PER_SECOND)
    assert [tenant.log_share.admit(Severity.ORDINARY) for _ in range(lines)] == [False] * lines
    seconds[0] = 200.0


async def turns(tenant: Tenant, count: int) -> float:
    """When `count` requests, one behind the other, have had their turns."""
    for _ in range(count):
        await tenant.throttle()
    return trio.current_time()


async def test_a_burst_passes_at_once_and_later_requests_are_rate_limited(
    autojump_clock: trio.testing.MockClock,
) -> None:
    tenant, began = Tenants(lambda: Limits(control_requests_per_second=RATE)).of(1000), trio.current_time()
    assert await turns(tenant, BURST) == pytest.approx(began)
    assert await turns(tenant, 5) == pytest.approx(began + 5 / RATE)
    assert autojump_clock.rate == 0


async def test_a_request_whose_turn_it_is_at_once_keeps_the_pace_too(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Each in a round that is young."""
    monitor, began = StepMonitor(now=lambda: 0), trio.current_time()
    limits = Limits(control_requests_per_second=RATE)
    tenant = Tenants(lambda: limits, TimeShares(monitor)).of(1000)
    with assert_no_checkpoints():
        await turns(tenant, BURST - 1)
    assert await turns(tenant, 6) == pytest.approx(began + 5 / RATE)
    assert autojump_clock.rate == 0


async def test_a_request_does_not_overtake_one_that_waits(nursery: trio.Nursery) -> None:
    tenant = Tenants(Limits, TimeShares(StepMonitor(now=lambda: 0))).of(1000)
    async with tenant._queue:  # as one that waits for the pace
        later = Running(nursery, tenant.throttle)
        await trio.testing.wait_all_tasks_blocked()
        assert not later.done
    await later.result()


async def test_a_uid_that_was_quiet_has_its_burst_again(autojump_clock: trio.testing.MockClock) -> None:
    tenant = Tenants(lambda: Limits(control_requests_per_second=RATE)).of(1000)
    await turns(tenant, BURST + 5)
    await trio.sleep(BURST_SECONDS)
    began = trio.current_time()
    assert await turns(tenant, BURST) == pytest.approx(began)
    assert autojump_clock.rate == 0


async def test_the_connections_of_a_uid_share_its_pace_in_the_order_of_coming(
    autojump_clock: trio.testing.MockClock,
) -> None:
    tenants, order = Tenants(lambda: Limits(control_requests_per_second=RATE)), []
    began = trio.current_time()

    async def ask(name: int) -> None:
        await tenants.of(1000).throttle()
        order.append(name)

    await turns(tenants.of(1000), BURST)
    async with trio.open_nursery() as nursery:
        for name in range(5):
            nursery.start_soon(ask, name)
            await trio.testing.wait_all_tasks_blocked()
    assert order == list(range(5))
    assert trio.current_time() == pytest.approx(began + 5 / RATE)
    assert autojump_clock.rate == 0


async def test_a_uid_over_its_pace_keeps_no_other_waiting(autojump_clock: trio.testing.MockClock) -> None:
    tenants, began = Tenants(lambda: Limits(control_requests_per_second=RATE)), trio.current_time()
    async with trio.open_nursery() as nursery:
        for _ in range(50):
            nursery.start_soon(partial(turns, tenants.of(1000), 10))
        await trio.testing.wait_all_tasks_blocked()
        assert await turns(tenants.of(1001), BURST) == pytest.approx(began)
        nursery.cancel_scope.cancel()
    assert autojump_clock.rate == 0


async def test_a_uid_with_many_requests_and_one_with_few_take_turns() -> None:
    tenants, order = Tenants(lambda: Limits(control_requests_per_second=1_000_000)), []

    async def ask(uid: int) -> None:
        await tenants.of(uid).throttle()
        order.append(uid)

    async with trio.open_nursery() as nursery:
        for uid in [1000] * 100 + [1001] * 3:
            nursery.start_soon(ask, uid)
    assert order[:20].count(1001) == 3


async def test_a_turn_that_is_given_up_holds_up_nobody(autojump_clock: trio.testing.MockClock) -> None:
    tenant = Tenants(lambda: Limits(control_requests_per_second=RATE)).of(1000)
    await turns(tenant, BURST)
    with trio.move_on_after(0.5 / RATE):
        await tenant.throttle()
    began = trio.current_time()
    assert await turns(tenant, 1) <= began + 2 / RATE
    assert autojump_clock.rate == 0


async def test_a_fine_is_paid_by_who_comes_next(autojump_clock: trio.testing.MockClock) -> None:
    tenant = Tenants(lambda: Limits(control_requests_per_second=RATE)).of(1000)
    began = await turns(tenant, BURST)
    tenant.charge()
    assert await turns(tenant, 1) == pytest.approx(began + (1 + REFUSAL_REQUESTS) / RATE)
    assert autojump_clock.rate == 0


async def test_the_pace_is_asked_at_every_turn(autojump_clock: trio.testing.MockClock) -> None:
    rates = iter([RATE] * BURST + [10 * RATE] * 5)
    began = trio.current_time()
    tenant = Tenants(lambda: Limits(control_requests_per_second=next(rates))).of(1000)
    await turns(tenant, BURST + 5)
    assert trio.current_time() == pytest.approx(began + 5 / (10 * RATE))
    assert autojump_clock.rate == 0


async def test_a_uid_is_forgotten_once_it_is_gone_and_has_its_burst_again(
    autojump_clock: trio.testing.MockClock,
) -> None:
    tenants = Tenants(lambda: Limits(control_requests_per_second=RATE))
    gone = tenants.of(1000)
    await turns(gone, BURST)
    busy = tenants.of(1001)
    busy.connections.acquire()
    tenants.of(1002)
    assert tenants.of(1000) is gone
    await trio.sleep(2 * BURST_SECONDS)
    tenants.of(1003)
    assert (tenants.of(1000) is gone, tenants.of(1001) is busy, tenants.connections) == (False, True, 1)
    assert autojump_clock.rate == 0


async def test_a_forgotten_uid_and_the_daemons_end_say_how_many_lines_were_not_logged(
    autojump_clock: trio.testing.MockClock,
) -> None:
    tenants = Tenants(lambda: Limits(control_requests_per_second=RATE))
    for uid, not_logged in ((1000, 3), (1001, 2)):
        tenants.of(uid).connections.acquire()
        spent(tenants.of(uid), not_logged)
    tenants.of(1000).connections.release()
    with structlog.testing.capture_logs() as lines:
        tenants.of(1002)
        tenants.of(1003)
        told_of_1000 = list(lines)
        tenants.tell_not_logged()
    assert [(line["uid"], line["not_logged"]) for line in told_of_1000] == [(1000, 3)]
    assert [(line["uid"], line["not_logged"]) for line in lines] == [(1000, 3), (1001, 2)]
    assert autojump_clock.rate == 0


async def test_a_uid_is_remembered_until_its_share_of_the_log_is_whole_again() -> None:
    tenants = Tenants(lambda: Limits(control_requests_per_second=RATE))
    known = tenants.of(1000)
    known.log_share.charge(Severity.ORDINARY, 100 * BYTES_PER_SECOND)
    tenants.of(1001)
    assert tenants.of(1000) is known
