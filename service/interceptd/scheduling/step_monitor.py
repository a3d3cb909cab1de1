"""How long the steps of the event loop take: what a task does between two waits.

Owns the clock of the running step, the number of the round (trio runs each ready task once in a round), and
the record of steps that took too long. Must not know what a task does, nor who waits for it.
"""

from __future__ import annotations

import resource
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from time import perf_counter_ns
from typing import Final, NamedTuple

import structlog
import trio

log = structlog.get_logger()

STEP_LIMIT_NS: Final = 5_000_000
"""A longer step is recorded: every guest waits for it."""
USAGE_INTERVAL_NS: Final = 1_000_000
"""Between two readings of what the thread has used, each of which is a system call."""
LOG_INTERVAL_NS: Final = 1_000_000_000


class Spent:
    """What the tasks of one context have spent of one round, in nanoseconds."""

    __slots__ = ("ns", "round")

    def __init__(self) -> None:
        self.round = 0
        self.ns = 0


SPENT: ContextVar[Spent | None] = ContextVar("spent", default=None)
"""What the running task's steps are charged to. A task inherits it from the one that starts it."""


class Usage(NamedTuple):
    """What a thread has used: CPU time, and how often it gave up its CPU to wait."""

    cpu_ns: int
    waits: int


def thread_usage() -> Usage:
    """Of the calling thread (getrusage(2), RUSAGE_THREAD)."""
    used = resource.getrusage(resource.RUSAGE_THREAD)
    return Usage(int((used.ru_utime + used.ru_stime) * 1e9), used.ru_nvcsw)


class LongStep(NamedTuple):
    """A step beyond `STEP_LIMIT_NS`. `cpu_ns` may include up to `USAGE_INTERVAL_NS` of earlier steps."""

    task: str
    wall_ns: int
    cpu_ns: int
    blocked: bool
    """Whether it waited in the kernel, or for the interpreter."""


class StepMonitor(trio.abc.Instrument):
    """An instrument of `trio.run`. `now` reads a clock in nanoseconds.

    Counts what a step does, not what is done to it: one that only had to wait for a CPU is not recorded.
    """

    def __init__(
        self, now: Callable[[], int] = perf_counter_ns, usage: Callable[[], Usage] = thread_usage
    ) -> None:
        self.now = now
        self._usage = usage
        self.round = 0
        self.step_began = now()
        self.longest_ns = 0
        self.long_steps: Counter[str] = Counter()
        """Steps beyond the limit, by the name of the task's function."""
        self.last: LongStep | None = None
        self._read_at = self.step_began
        self._read = usage()
        self._idle_waits = 0
        """Times since `_read` that trio may have waited for something to do."""
        self._logged_at = self.step_began - LOG_INTERVAL_NS

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Measure the running event loop within the context."""
        self.step_began = self.now()
        self._take_reading(self.step_began)
        trio.lowlevel.add_instrument(self)
        try:
            yield
        finally:
            with suppress(KeyError):  # trio has removed it because it failed, and has logged that
                trio.lowlevel.remove_instrument(self)

    def after_io_wait(self, timeout: float) -> None:
        """A round begins."""
        now = self.now()
        self.round += 1
        self.step_began = now
        if now - self._read_at >= USAGE_INTERVAL_NS:
            self._take_reading(now)
        elif timeout:
            self._idle_waits += 1

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        """A step ends; the next one of the round begins."""
        now = self.now()
        took = now - self.step_began
        self.step_began = now
        spent = task.context.get(SPENT)
        if spent is not None:
            if spent.round == self.round:
                spent.ns += took
            else:
                spent.round, spent.ns = self.round, took
        if took > STEP_LIMIT_NS:
            self._record(task, took, now)

    def _take_reading(self, now: int) -> Usage:
        """Read the usage; returns what was used since the last reading."""
        before, self._read, self._read_at = self._read, self._usage(), now
        waits = self._read.waits - before.waits - self._idle_waits
        self._idle_waits = 0
        return Usage(self._read.cpu_ns - before.cpu_ns, waits)

    def _record(self, task: trio.lowlevel.Task, took: int, now: int) -> None:
        used = self._take_reading(now)
        step = LongStep(task.name, took, used.cpu_ns, used.waits > 0)
        if step.cpu_ns <= STEP_LIMIT_NS and not step.blocked:
            return
        self.last = step
        self.longest_ns = max(self.longest_ns, took)
        self.long_steps[task.name] += 1
        if now - self._logged_at >= LOG_INTERVAL_NS:
            self._logged_at = now
            log.warning(
                "long_step",
                task=task.name,
                suspended_in=_suspended_in(task),
                wall_ms=took / 1e6,
                cpu_ms=step.cpu_ns / 1e6,
                blocked=step.blocked,
                long_steps=self.long_steps.total(),
            )


def _suspended_in(task: trio.lowlevel.Task) -> str | None:
    """The innermost of the daemon's functions in which the task waits now; None if it has ended."""
    innermost = None
    for frame, _ in task.iter_await_frames():
        if frame.f_globals.get("__name__", "").startswith("interceptd"):
            innermost = frame.f_code.co_qualname
    return innermost
