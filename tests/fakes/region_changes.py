"""A model partition whose regions are changed in one step, and what must hold of it afterwards.

Owns the regions and what stands behind them. Must not know which change is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import pytest

from explorer.inspection import disorder, misrecorded
from explorer.model_partition import removal
from fakes.model_partition import ModelPartition
from fakes.one_region import GFN, PAGE, PAGES, PFN, with_region
from intercept_protocol.messages import AddRegion, RegionKind, RemoveRegion
from intercept_protocol.outcomes import Answer

ELSEWHERE: Final = GFN + 0x100
"""Where a BAR moves to."""
ROM: Final = PAGE + 0x100
"""What else may stand behind the gfns, and where it leads to."""
ROM_PFN: Final = PFN + 0x100
LOOKED_AT = [*range(GFN - 1, GFN + PAGES + 1), *range(ELSEWHERE - 1, ELSEWHERE + PAGES + 1)]
NOTHING = [None] * PAGES
MEMORY, SHADOW = [*range(PFN, PFN + PAGES)], [*range(ROM_PFN, ROM_PFN + PAGES)]
SERVED = (Answer.MAPPED, Answer.ALREADY_MAPPED)
THE_REGION: Final = removal(GFN, PAGES, PAGE)
KINDS = pytest.mark.parametrize("kind", RegionKind)


async def with_mapped(model: ModelPartition, kind: RegionKind = RegionKind.MMIO) -> None:
    """The region, with all of its memory mapped, and the ROM."""
    await with_region(model, kind)
    await model.fault(GFN)
    await model.map_vma(ROM, PAGES, ROM_PFN)
    model.hypervisor.events.clear()


def is_consistent(model: ModelPartition) -> bool:
    """Nothing is counted, recorded, waited for or held that is not there."""
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


# ------------------------------------------------ what is refused changes nothing


Asked = tuple[Sequence[RemoveRegion], Sequence[AddRegion]]
