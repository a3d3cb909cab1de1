"""A uid whose time on the event loop is used up after so many questions whether it is: no clock, so the
turns that long work takes can be counted."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

from interceptd.scheduling.step_monitor import StepMonitor, Usage
from interceptd.scheduling.time_share import SHARE, SLICE_NS, TimeShares


@contextmanager
def time_used_up_every(questions: int) -> Iterator[None]:
    """For the running task and those that it starts: each question takes a part of the slice."""
    ticks = itertools.count(0, SLICE_NS // questions + 1)
    monitor = StepMonitor(now=lambda: next(ticks), usage=lambda: Usage(0, 0, 0))
    token = SHARE.set(TimeShares(monitor).share())
    with monitor.installed():
        yield
    SHARE.reset(token)
