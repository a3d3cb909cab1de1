"""What the step monitor records: steps that were busy, or blocked, for too long, and who made them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
import trio
from structlog.testing import capture_logs

from interceptd.scheduling.step_monitor import (
    ANY,
    LOG_INTERVAL_NS,
    NAMING_NS,
    STEP_LIMIT_NS,
    USAGE_INTERVAL_NS,
    StepMonitor,
    Usage,
    thread_usage,
)

LONG = 2 * STEP_LIMIT_NS


class Machine:
    """A clock, and what the thread has used, as a step says."""

    def __init__(self) -> None:
        self.now = 0
        self.cpu = 0
        self.waits = 0
        self.preemptions = 0

    def usage(self) -> Usage:
        return Usage(self.cpu, self.waits, self.preemptions)

    def compute(self, ns: int) -> None:
        self.now += ns
        self.cpu += ns

    def block(self, ns: int) -> None:
        self.now += ns
        self.waits += 1

    def lose_the_cpu(self, ns: int) -> None:
        self.now += ns
        self.preemptions += 1


@pytest.fixture
def machine() -> Machine:
    return Machine()


def monitor_of(machine: Machine) -> StepMonitor:
    return StepMonitor(now=lambda: machine.now, usage=machine.usage)


async def rounds(count: int = 2) -> None:
    for _ in range(count):
        await trio.lowlevel.checkpoint()


async def busy(machine: Machine) -> None:
    machine.compute(LONG)


async def tenths(machine: Machine) -> None:
    """As much work, in steps."""
    for _ in range(10):
        machine.compute(LONG // 10)
        await trio.lowlevel.checkpoint()


async def run(*steps: Callable[[Machine], Awaitable[object]], machine: Machine) -> None:
    """Each in a task and a round of its own."""
    for step in steps:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(step, machine)
        await rounds()


async def test_a_step_that_is_busy_for_too_long_is_recorded_and_the_next_by_name(machine: Machine) -> None:
    monitor = monitor_of(machine)
    with monitor.installed():
        await run(busy, busy, machine=machine)
    assert monitor.long_steps == {ANY: 1, f"{__name__}.busy": 1}


async def test_as_much_work_in_several_steps_is_not_recorded(machine: Machine) -> None:
    monitor = monitor_of(machine)
    with monitor.installed():
        await run(tenths, machine=machine)
    assert monitor.long_steps == {}


@pytest.mark.parametrize(("how", "recorded"), [(Machine.block, 1), (Machine.lose_the_cpu, 0)])
async def test_a_step_that_waits_is_recorded_if_it_waits_itself(
    machine: Machine, how: Callable[[Machine, int], None], recorded: int
) -> None:
    """One that another program keeps from its CPU does nothing wrong."""

    async def waiting(machine: Machine) -> None:
        how(machine, LONG)

    monitor = monitor_of(machine)
    with monitor.installed():
        await run(waiting, machine=machine)
    assert monitor.long_steps.total() == recorded


@pytest.mark.parametrize(("waits", "recorded"), [(1, 0), (2, 1)])
async def test_the_wait_for_something_to_do_is_not_a_long_step(
    machine: Machine, waits: int, recorded: int
) -> None:
    """While trio waits, so does the thread, once."""
    monitor = monitor_of(machine)
    with monitor.installed():
        machine.now += LONG
        machine.waits += waits
        monitor.after_io_wait(timeout=1)
    assert monitor.long_steps.total() == recorded


async def test_steps_are_measured_for_a_while_only(machine: Machine) -> None:
    monitor = monitor_of(machine)
    with monitor.installed():
        await run(busy, machine=machine)
        machine.lose_the_cpu(NAMING_NS)
        await rounds()
        machine.compute(USAGE_INTERVAL_NS + 1)
        await rounds()
        await run(busy, machine=machine)
    assert monitor.long_steps == {ANY: 2}


async def test_the_log_names_one_a_second_and_counts_all(machine: Machine) -> None:
    monitor = monitor_of(machine)
    with monitor.installed(), capture_logs() as logs:
        await run(busy, busy, busy, machine=machine)
        machine.lose_the_cpu(LOG_INTERVAL_NS)
        await run(busy, machine=machine)
    assert [(line["event"], line["task"], line["long_steps"]) for line in logs] == [
        ("long_step", ANY, 1),
        ("long_step", f"{__name__}.busy", 4),
    ]
    assert [(line["cpu_ms"], line["blocked"]) for line in logs] == [(LONG / 1e6, False)] * 2


def test_the_kernel_counts_cpu_time_and_waits_of_this_thread() -> None:
    before = thread_usage()
    trio.run(trio.sleep, 0.001)
    after = thread_usage()
    assert after.waits > before.waits
    assert after.cpu_ns > before.cpu_ns
