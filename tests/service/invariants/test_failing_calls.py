"""The hypervisor fails at the n-th piece of a life, for each n: what was asked fails, or the partition is
lost, and nothing else ever.

The pieces are counted in a life that none fails in.
"""

from __future__ import annotations

from collections.abc import Awaitable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

import pytest
import trio
from structlog.testing import capture_logs
from trio.testing import MockClock

from explorer.inspection import misrecorded
from fakes.model_partition import ModelPartition
from fakes.one_region import GFN, PAGE, PAGES, PFN
from intercept_protocol.errors import WireError
from intercept_protocol.messages import RegionKind
from intercept_protocol.outcomes import Access, Answer

LOOKED_AT = range(GFN - 1, GFN + PAGES + 1)
DEVICE, MEMORY, PINNED = GFN, GFN + PAGES, GFN + 2 * PAGES
"""One region of each kind over the same memory."""


@dataclass
class Told:
    """What a VMM and its VPs were told: the answers, and the errors of the calls that failed."""

    answers: list[Answer] = field(default_factory=list)
    errors: list[WireError] = field(default_factory=list)

    async def ask(self, call: Awaitable[object]) -> None:
        try:
            await call
        except WireError as error:
            self.errors.append(error)


async def live(model: ModelPartition, told: Told) -> None:
    """A life with everything in it that calls the hypervisor."""
    await model.map_vma(PAGE, PAGES, PFN)
    await told.ask(model.add_region(DEVICE, PAGES, PAGE, RegionKind.MMIO))
    await told.ask(model.add_region(MEMORY, PAGES, PAGE, RegionKind.MOVABLE))
    await told.ask(model.add_region(PINNED, PAGES, PAGE, RegionKind.PINNED))
    for _ in range(2):
        told.answers += [await model.fault(gfn + 1) for gfn in (DEVICE, MEMORY, PINNED)]
    await told.ask(model.protect_vma(PAGE + 4, 4, Access.READ))
    told.answers += [await model.fault(gfn + 5) for gfn in (DEVICE, MEMORY)]
    await told.ask(model.invalidate(PAGE, PAGES))
    told.answers += [await model.fault(gfn + 9) for gfn in (DEVICE, MEMORY)]
    await told.ask(model.remove_region(DEVICE, PAGES, PAGE))
    await told.ask(model.unmap_vma(PAGE, PAGES))
    told.answers += [await model.fault(gfn + 9) for gfn in (DEVICE, MEMORY)]


ASKED: Final = 12
"""Intercepts of a life."""


async def lived(model: ModelPartition) -> tuple[Told, WireError | None]:
    """What was told in a whole life, and how it ended."""
    told = Told()
    try:
        await model.partition.run(lambda: live(model, told))
    except WireError as error:
        return told, error
    return told, None


def partition(pieces_per_call: int) -> ModelPartition:
    model = ModelPartition()
    model.hypervisor.pieces_per_call = pieces_per_call
    return model


def pieces_of_a_life(pieces_per_call: int) -> int:
    model = partition(pieces_per_call)
    with capture_logs():
        trio.run(lived, model, clock=MockClock(autojump_threshold=0))
    return len(model.hypervisor.events)


FAILING: Final = [
    (pieces_per_call, nth)
    for pieces_per_call in (1, 3)
    for nth in range(1, pieces_of_a_life(pieces_per_call) + 1)
]
"""Each piece of a life, for a hypervisor that takes one at a time and for one that takes three."""


@pytest.mark.parametrize("pieces_per_call", [1, 3])
async def test_without_failing_calls_there_are_many_pieces_and_no_error(pieces_per_call: int) -> None:
    model = partition(pieces_per_call)
    told, end = await lived(model)
    assert (told.errors, end, len(told.answers)) == ([], None, ASKED)
    assert Answer.HYPERVISOR_ERROR not in told.answers
    assert len(model.hypervisor.events) > 15
    assert max(map(len, model.hypervisor.calls)) == pieces_per_call


@pytest.mark.parametrize(("pieces_per_call", "nth"), FAILING)
async def test_a_failed_call_is_reported_to_its_caller_or_loses_the_partition(
    pieces_per_call: int, nth: int
) -> None:
    model = partition(pieces_per_call)
    model.hypervisor.failing_calls = {nth}
    before = trio.lowlevel.current_statistics().tasks_living
    with capture_logs() as logs:
        told, end = await lived(model)
    assert trio.lowlevel.current_statistics().tasks_living == before
    assert len(model.notifier._windows) == 0
    assert not model.partition.admits(model.partition.token, model.partition.owner)
    failures = told.answers.count(Answer.HYPERVISOR_ERROR) + len(told.errors)
    lost = "partition_lost" in [entry["event"] for entry in logs]
    left = "mappings_left" in [entry["event"] for entry in logs]
    assert (failures > 0) + lost + left == 1
    assert (end is not None) == lost == model.partition.lost


@pytest.mark.parametrize(("pieces_per_call", "nth"), FAILING)
async def test_a_partition_whose_call_failed_is_consistent_after_every_step(
    pieces_per_call: int, nth: int
) -> None:
    model = partition(pieces_per_call)
    model.hypervisor.failing_calls = {nth}
    violations: list[object] = []

    async def inspected(told: Told, step: Awaitable[object]) -> None:
        await told.ask(step)
        violations.extend(filter(None, [misrecorded(model, LOOKED_AT)]))

    async def steps() -> None:
        told = Told()
        await inspected(told, model.map_vma(PAGE, PAGES, PFN))
        for gfn, kind in (
            (DEVICE, RegionKind.MMIO),
            (MEMORY, RegionKind.MOVABLE),
            (PINNED, RegionKind.PINNED),
        ):
            await inspected(told, model.add_region(gfn, PAGES, PAGE, kind))
        for gfn in (DEVICE, MEMORY, PINNED, DEVICE):
            await inspected(told, model.fault(gfn + 1))
        await inspected(told, model.invalidate(PAGE, PAGES))
        await inspected(told, model.fault(MEMORY + 1))
        await inspected(told, model.remove_region(MEMORY, PAGES, PAGE))

    with capture_logs(), suppress(WireError):
        await model.partition.run(steps)
    assert violations == []
