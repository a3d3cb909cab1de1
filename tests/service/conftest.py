"""What the tests of the daemon share: virtual time, and a model partition that runs.

Every async test here runs on a clock that jumps when nothing else can happen, so none sleeps and one that
waits in vain ends at once.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from inspect import iscoroutinefunction

import pytest
import trio
from trio.abc import Clock, Instrument
from trio.testing import MockClock

from fakes.model_partition import ModelPartition

PATIENCE = 3600.0
"""Virtual seconds, far above every timeout of the daemon: only a test that hangs gets there."""


def run_in_virtual_time(
    test: Callable[[], Awaitable[None]], *, clock: Clock | None, instruments: Sequence[Instrument]
) -> None:
    """What `trio.run` is to the tests of this folder."""

    async def bounded() -> None:
        with trio.fail_after(PATIENCE):
            await test()

    trio.run(bounded, clock=clock or MockClock(autojump_threshold=0), instruments=instruments)


def pytest_itemcollected(item: pytest.Item) -> None:
    if isinstance(item, pytest.Function) and iscoroutinefunction(item.obj):
        item.add_marker(pytest.mark.trio(run=run_in_virtual_time), append=False)


@pytest.fixture
async def model() -> AsyncIterator[ModelPartition]:
    """An empty partition whose region manager runs."""
    async with ModelPartition().running() as running:
        yield running
