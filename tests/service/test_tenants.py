"""Rate limits per uid: the excess is delayed in order, without delaying other uids."""

from __future__ import annotations

from functools import partial

import pytest
import structlog.testing
import trio

from interceptd.config.schema import Limits
from interceptd.connections.tenants import (
    BURST_SECONDS,
    REFUSAL_REQUESTS,
    REFUSALS_LOGGED_PER_SECOND,
    Tenant,
    Tenants,
)

RATE = 100
BURST = int(BURST_SECONDS * RATE)


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


async def test_refusals_logged_per_second_are_limited_and_the_next_line_counts_the_rest(
    autojump_clock: trio.testing.MockClock,
) -> None:
    tenant = Tenants(lambda: Limits(control_requests_per_second=RATE)).of(1000)
    with structlog.testing.capture_logs() as lines:
        for _ in range(REFUSALS_LOGGED_PER_SECOND + 5):
            tenant.log_refusal("hello_refused", pid=7)
        await trio.sleep(1)
        tenant.log_refusal("hello_refused", pid=8)
        tenant.log_refusal("hello_refused", pid=9)
    assert len(lines) == REFUSALS_LOGGED_PER_SECOND + 2
    assert [line.get("not_logged") for line in lines[-3:]] == [None, 5, None]
    assert autojump_clock.rate == 0
