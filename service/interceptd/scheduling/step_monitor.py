"""How long the steps of the event loop take: what a task does between two waits.

Owns the number of the round (trio runs each task that is ready once in a round), and the record of steps that
took too long. Must not know what a task does, nor who waits for it.

Two hooks per round would cost an intercept 4 % and more, one per step 6 %. So there is one per round, and
after a long round each step is measured for a while. A round is measured together with the idle wait that
follows it. If it did not compute, the thread's voluntary switches tell whether it was blocked; much traffic
may hide that.
"""

from __future__ import annotations

import resource
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from time import perf_counter_ns
from typing import Final, NamedTuple

import structlog
import trio

log = structlog.get_logger()

STEP_LIMIT_NS: Final = 5_000_000
"""A longer step is recorded: every guest waits for it."""
USAGE_INTERVAL_NS: Final = 1_000_000
"""Between two readings of what the thread has used, each of which is a system call."""
NAMING_NS: Final = 10_000_000_000
"""How long after a long round each step is measured."""
LOG_INTERVAL_NS: Final = 1_000_000_000
ANY: Final = "any"
"""Stands for the task in the record of a round whose long step was not measured."""


class Usage(NamedTuple):
    """What a thread has used: CPU time, how often it gave up its CPU to wait, and how often it lost it."""

    cpu_ns: int
    waits: int
    preemptions: int


def thread_usage() -> Usage:
    """Of the calling thread (getrusage(2), RUSAGE_THREAD)."""
    used = resource.getrusage(resource.RUSAGE_THREAD)
    return Usage(int((used.ru_utime + used.ru_stime) * 1e9), used.ru_nvcsw, used.ru_nivcsw)


class StepMonitor(trio.abc.Instrument):
    """An instrument of `trio.run`. `now` reads a clock in nanoseconds.

    Counts what a step does, not what is done to it: one that only had to wait for a CPU is not recorded.
    """

    def __init__(
        self, now: Callable[[], int] = perf_counter_ns, usage: Callable[[], Usage] = thread_usage
    ) -> None:
        self.now = now
        self.round = 0
        self.last_round_ns = 0
        """The last round, with the wait for something to do that followed it."""
        self.long_steps: Counter[str] = Counter()
        """By the name of the task's function, or `ANY`."""
        self._usage = usage
        self._steps = _Steps(self, self._record)
        self._named_until = 0
        self._naming = False
        self.began = self._read_at = now()
        self._read = usage()
        self._idle_waits = 0
        """How often, since `_read`, trio may have waited for something to do."""
        self._logged_at = self.began - LOG_INTERVAL_NS

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Measure the running event loop within the context."""
        self.began = self.now()
        self._take_reading(self.began)
        trio.lowlevel.add_instrument(self)
        try:
            yield
        finally:
            for instrument in (self, self._steps):
                with suppress(KeyError):  # trio has removed it after an error, which it has logged
                    trio.lowlevel.remove_instrument(instrument)

    def after_io_wait(self, timeout: float) -> None:
        """A round begins."""
        now = self.now()
        self.round += 1
        if timeout:
            self._idle_waits += 1
        self.last_round_ns = now - self.began
        if now - self._read_at > USAGE_INTERVAL_NS:
            self._look(now)
        self.began = now

    def _look(self, now: int) -> None:
        if self.last_round_ns > STEP_LIMIT_NS and not self._naming:
            self._record(ANY, now, self.last_round_ns, None)
        else:
            self._take_reading(now)
        if self._naming and now > self._named_until:
            self._naming = False
            trio.lowlevel.remove_instrument(self._steps)

    def _record(self, task: str, now: int, took: int, suspended_in: str | None) -> None:
        """A step, or a round with the wait after it, was longer than the limit. Record it if it was busy, or
        blocked in the kernel or by the interpreter. Its CPU time may include `USAGE_INTERVAL_NS` before it.
        """
        used = self._take_reading(now)
        blocked = used.waits > 0 or (task != ANY and not used.preemptions)
        blocked = blocked and used.cpu_ns < took // 2
        if used.cpu_ns <= STEP_LIMIT_NS and not blocked:
            return
        self._named_until = now + NAMING_NS
        if not self._naming:
            self._naming, self._steps.began = True, now
            trio.lowlevel.add_instrument(self._steps)
        self.long_steps[task] += 1
        if now - self._logged_at >= LOG_INTERVAL_NS:
            self._logged_at = now
            log.warning(
                "long_step",
                task=task,
                suspended_in=suspended_in,
                wall_ms=took / 1e6,
                cpu_ms=used.cpu_ns / 1e6,
                blocked=blocked,
                long_steps=self.long_steps.total(),
            )

    def _take_reading(self, now: int) -> Usage:
        """Read the usage; returns what was used since the last reading, without waits for work."""
        before, self._read, self._read_at = self._read, self._usage(), now
        idle, self._idle_waits = self._idle_waits, 0
        return Usage(
            self._read.cpu_ns - before.cpu_ns,
            self._read.waits - before.waits - idle,
            self._read.preemptions - before.preemptions,
        )


class _Steps(trio.abc.Instrument):
    """Measures each step."""

    def __init__(self, monitor: StepMonitor, record: Callable[[str, int, int, str | None], None]) -> None:
        self.began = monitor.now()
        self._monitor = monitor
        self._record = record

    def after_io_wait(self, timeout: float) -> None:  # noqa: ARG002 - trio's signature
        self.began = self._monitor.now()

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        now = self._monitor.now()
        if now - self.began > STEP_LIMIT_NS:
            self._record(task.name, now, now - self.began, _suspended_in(task))
        self.began = now


def _suspended_in(task: trio.lowlevel.Task) -> str | None:
    """The innermost of the daemon's functions in which the task waits now; None if it has ended."""
    innermost = None
    for frame, _ in task.iter_await_frames():
        if frame.f_globals.get("__name__", "").startswith("interceptd"):
            innermost = frame.f_code.co_qualname
    return innermost
