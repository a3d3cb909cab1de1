"""An atomic change of regions: what a guest and an operator see of it before, meanwhile and afterwards."""

from __future__ import annotations

import pytest

from explorer.inspection import disorder, misrecorded
from explorer.model_partition import addition, removal
from fakes.model_partition import ModelPartition
from fakes.one_region import GFN, PAGE, PAGES, PFN, with_region
from intercept_protocol.messages import RegionKind
from intercept_protocol.outcomes import Answer

ELSEWHERE = GFN + 0x100
"""Where a BAR moves to."""
ROM = PAGE + 0x100
"""What else may stand behind the gfns, and where it leads to."""
ROM_PFN = PFN + 0x100
LOOKED_AT = [*range(GFN - 1, GFN + PAGES + 1), *range(ELSEWHERE - 1, ELSEWHERE + PAGES + 1)]
NOTHING = [None] * PAGES
THE_REGION = removal(GFN, PAGES, PAGE)
KINDS = pytest.mark.parametrize("kind", RegionKind)


async def mapped(model: ModelPartition, kind: RegionKind = RegionKind.MMIO) -> None:
    """The region, with all of its memory mapped, and a ROM beside it."""
    await with_region(model, kind)
    await model.fault(GFN)
    await model.map_vma(ROM, PAGES, ROM_PFN)
    model.hypervisor.events.clear()


def is_consistent(model: ModelPartition) -> bool:
    counted = sum(region.mapped_gfns for region in model.regions.first_regions(100))
    return (
        disorder(model) is None
        and misrecorded(model, LOOKED_AT) is None
        and counted == model.mappings._record.page_count
        and model.tenant.regions.count == model.regions.region_count
        and not model.notifier._windows
        and not model.regions.busy
        and model.mappings._change is None
    )


# ------------------------------------------------ afterwards


@KINDS
async def test_a_bar_that_moves_is_reached_at_its_new_place_only(
    model: ModelPartition, kind: RegionKind
) -> None:
    await mapped(model, kind)
    assert await model.change_regions([THE_REGION], [addition(ELSEWHERE, PAGES, PAGE, kind)]) == [kind]
    assert model.pfns(GFN, PAGES) == NOTHING
    assert await model.fault(GFN) is Answer.NO_REGION
    assert await model.fault(ELSEWHERE) in (Answer.MAPPED, Answer.ALREADY_MAPPED)
    assert model.pfns(ELSEWHERE, PAGES) == [*range(PFN, PFN + PAGES)]
    assert is_consistent(model)


@KINDS
async def test_a_shadow_over_a_region_is_what_the_guest_reaches_then(
    model: ModelPartition, kind: RegionKind
) -> None:
    await mapped(model, kind)
    await model.change_regions([THE_REGION], [addition(GFN, PAGES, ROM, kind)])
    assert await model.fault(GFN) in (Answer.MAPPED, Answer.ALREADY_MAPPED)
    assert model.pfns(GFN, PAGES) == [*range(ROM_PFN, ROM_PFN + PAGES)]
    assert is_consistent(model)
