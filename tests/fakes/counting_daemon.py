"""A daemon whose clock is its own work: `python -m fakes.counting_daemon serve ...`.

Each function that its event loop calls, and each return, takes `EVENT_NS`, as on a slow machine, and nothing
else takes any time. So neither the machine nor its load decides how its time is divided, nor what its step
monitor sees. Peers can send it descriptors on every connection, as on Linux before 6.16. On SIGUSR1 it logs
`longest` and begins anew.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading
from contextlib import suppress
from typing import Any, Final

import structlog
import trio

from interceptd.scheduling.step_monitor import StepMonitor, Usage

EVENT_NS: Final = 400
LAUNCH: Final = (sys.executable, "-m", "fakes.counting_daemon")


class Work(trio.abc.Instrument):
    """What the event loop's thread does."""

    def __init__(self) -> None:
        self.events = 0
        self._began = self._round_began = 0
        self.forget()

    def forget(self) -> None:
        self.step, self.task, self.round = 0, "", 0
        self.slow_closes = 0
        """Of userfaultfds, and of what peers sent."""

    def count(self, *_: object) -> None:
        """For sys.setprofile."""
        self.events += 1

    def now(self) -> int:
        return self.events * EVENT_NS

    def usage(self) -> Usage:
        """Of a thread that is never blocked."""
        return Usage(self.now(), 0, 0)

    def after_io_wait(self, timeout: float) -> None:  # noqa: ARG002 - trio's signature
        self._began = self._round_began = self.events

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        if self.events - self._began > self.step:
            self.step, self.task = self.events - self._began, task.name
        self.round = max(self.round, self.events - self._round_began)
        self._began = self.events

    def tell(self, *_: object) -> None:
        """A signal handler."""
        structlog.get_logger().info(
            "longest",
            step_ns=self.step * EVENT_NS,
            round_ns=self.round * EVENT_NS,
            task=self.task,
            slow_closes=self.slow_closes,
        )
        self.forget()


def count(work: Work) -> None:
    """Make the step monitor of this process look at `work`, and not at a clock."""
    init, installed = StepMonitor.__init__, StepMonitor.installed
    close, close_range = os.close, os.closerange

    def init_counting(monitor: StepMonitor) -> None:
        init(monitor, work.now, work.usage)

    def installed_counting(monitor: StepMonitor) -> Any:
        trio.lowlevel.add_instrument(work)
        sys.setprofile(work.count)
        return installed(monitor)

    def here() -> bool:
        return threading.current_thread() is threading.main_thread()

    def close_counting(descriptor: int) -> None:
        with suppress(OSError):
            work.slow_closes += here() and "userfaultfd" in os.readlink(f"/proc/self/fd/{descriptor}")
        close(descriptor)

    def close_range_counting(first: int, last: int) -> None:
        work.slow_closes += here()
        close_range(first, last)

    StepMonitor.__init__ = init_counting  # type: ignore[method-assign, assignment]
    StepMonitor.installed = installed_counting  # type: ignore[method-assign, assignment]
    os.close, os.closerange = close_counting, close_range_counting  # type: ignore[assignment]


if __name__ == "__main__":
    counted = Work()
    count(counted)
    signal.signal(signal.SIGUSR1, counted.tell)
    runpy.run_module("fakes.before_passrights", run_name="__main__", alter_sys=True)
