"""`invalidate`: begin and end at once, for a change that has already happened."""

from __future__ import annotations

import pytest

from conformance.guests import GFN, PAGES, UADDR, WHOLE_MEMORY, RawVmm
from conformance.statements import needs, statement

pytestmark = needs("notifier")


@statement("N-4")
@pytest.mark.parametrize("kind", ["mmio", "movable"])
def test_it_is_answered_when_the_guest_reaches_nothing_and_leaves_nothing_open(
    vmm: RawVmm, kind: str
) -> None:
    vmm.map_vma(UADDR, PAGES)
    vmm.add_region(GFN, PAGES, UADDR, kind)
    vp = vmm.vp()
    vp.intercept(GFN)
    assert vmm.notifier().ask("invalidate", WHOLE_MEMORY) is None
    seen = vmm.ask("statistics")
    assert (vmm.ask("translate", gfn=GFN), seen["mapped_gfns"], seen["open_invalidations"]) == (None, 0, 0)
    assert vp.intercept(GFN) == ["resume", "mapped"]


@statement("P-8")
def test_a_pinned_region_that_is_hit_is_not_mapped_again(vmm: RawVmm) -> None:
    """The VMM promised not to move it: anything may be there now."""
    vmm.map_vma(UADDR, PAGES)
    vmm.add_region(GFN, PAGES, UADDR, "pinned")
    vmm.notifier().ask("invalidate", WHOLE_MEMORY)
    assert vmm.vp().intercept(GFN) == ["forward", "unbacked"]


@statement("P-3")
def test_another_method_on_a_notifier_is_enosys(vmm: RawVmm) -> None:
    notifier = vmm.notifier()
    refusal = notifier.refusal("translate", {"gfn": 1})
    assert (refusal.name, set(refusal.details["methods"])) == (
        "ENOSYS",
        {"invalidate_begin", "invalidate_end", "invalidate", "kick"},
    )
    assert notifier.ask("invalidate", WHOLE_MEMORY) is None
