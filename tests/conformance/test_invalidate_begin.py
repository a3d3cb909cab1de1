"""`invalidate_begin`: answered when the guest can no longer reach the range; faults in it wait."""

from __future__ import annotations

import pytest

from conformance.guests import GFN, PAGE, PAGES, UADDR, WHOLE_MEMORY, RawVmm, pages, waits
from conformance.statements import needs, statement

pytestmark = needs("notifier")

ELSEWHERE = pages(UADDR + (1 << 40), 3)


@statement("N-2")
@pytest.mark.parametrize("kind", ["mmio", "movable", "pinned"])
def test_it_is_answered_when_the_guest_reaches_nothing_of_the_range(vmm: RawVmm, kind: str) -> None:
    vmm.map_vma(UADDR, PAGES)
    vmm.add_region(GFN, PAGES, UADDR, kind)
    vmm.vp().intercept(GFN)
    vmm.notifier().ask("invalidate_begin", pages(UADDR + PAGE, 2))
    reached = [vmm.ask("translate", gfn=GFN + page) is not None for page in range(4)]
    assert reached == [True, False, False, True]


@statement("N-2", "P-7")
def test_it_reaches_every_region_that_has_the_uaddrs(vmm: RawVmm) -> None:
    vmm.add_memory()
    vmm.add_region(GFN + PAGES, PAGES, UADDR, "mmio")
    vp = vmm.vp()
    assert (vp.intercept(GFN), vp.intercept(GFN + PAGES)) == (["resume", "mapped"], ["resume", "mapped"])
    vmm.notifier().ask("invalidate_begin", WHOLE_MEMORY)
    assert vmm.ask("statistics")["mapped_gfns"] == 0


@statement("N-2")
def test_faults_in_the_range_wait_for_the_end(vmm: RawVmm) -> None:
    vmm.add_memory()
    notifier, vp = vmm.notifier(), vmm.vp()
    notifier.ask("invalidate_begin", pages(UADDR, 2))
    assert waits(vmm, vp, GFN + 1)
    notifier.ask("invalidate_end", pages(UADDR, 2))
    assert vp.answer() == ["resume", "mapped"]


@statement("N-2")
def test_faults_beside_the_range_do_not_wait_and_map_nothing_of_it(vmm: RawVmm) -> None:
    vmm.add_memory()
    vmm.notifier().ask("invalidate_begin", pages(UADDR + 4 * PAGE, 2))
    assert vmm.vp().intercept(GFN) == ["resume", "mapped"]
    assert [vmm.ask("translate", gfn=GFN + page) is None for page in (3, 4, 5)] == [False, True, True]


@statement("N-2")
def test_a_region_that_is_added_in_the_range_waits_as_well(vmm: RawVmm) -> None:
    notifier, vp = vmm.notifier(), vmm.vp()
    notifier.ask("invalidate_begin", WHOLE_MEMORY)
    vmm.add_memory()
    assert waits(vmm, vp, GFN)
    notifier.ask("invalidate_end", WHOLE_MEMORY)
    assert vp.answer() == ["resume", "mapped"]


@statement("N-1", "E-2")
@pytest.mark.parametrize("method", ["invalidate_begin", "invalidate_end", "invalidate"])
@pytest.mark.parametrize(
    ("start", "length", "field"),
    [
        (UADDR, 0, "length"),
        (UADDR, 4095, "length"),
        (UADDR + 1, PAGE, "start_uaddr"),
        (2**64 - PAGE, 2 * PAGE, "length"),
    ],
)
def test_a_range_that_is_not_whole_pages_empty_or_wraps_is_einval(
    vmm: RawVmm, method: str, start: int, length: int, field: str
) -> None:
    refusal = vmm.notifier().refusal(method, {"start_uaddr": start, "length": length})
    assert (refusal.name, refusal.details.get("field")) == ("EINVAL", field)
    assert vmm.ask("statistics")["open_invalidations"] == 0


@statement("N-5")
def test_ranges_may_lie_nowhere_overlap_and_be_nested(vmm: RawVmm) -> None:
    notifier = vmm.notifier()
    for fields in (ELSEWHERE, WHOLE_MEMORY, pages(UADDR + PAGE, 2), pages(UADDR - PAGE, 4)):
        assert notifier.ask("invalidate_begin", fields) is None
    assert vmm.ask("statistics")["open_invalidations"] == 4


@statement("N-5")
def test_faults_wait_for_the_end_of_every_range_that_has_their_page(vmm: RawVmm) -> None:
    vmm.add_memory()
    notifier, vp = vmm.notifier(), vmm.vp()
    notifier.ask("invalidate_begin", WHOLE_MEMORY)
    notifier.ask("invalidate_begin", pages(UADDR, 1))
    notifier.ask("invalidate_end", WHOLE_MEMORY)
    assert waits(vmm, vp, GFN)
    notifier.ask("invalidate_end", pages(UADDR, 1))
    assert vp.answer() == ["resume", "mapped"]


@statement("N-6")
def test_open_begins_end_with_their_connection(vmm: RawVmm) -> None:
    vmm.add_memory()
    leaving, vp = vmm.notifier(), vmm.vp()
    leaving.ask("invalidate_begin", WHOLE_MEMORY)
    leaving.ask("invalidate_begin", WHOLE_MEMORY)
    assert waits(vmm, vp, GFN)
    leaving.close()
    assert vp.answer() == ["resume", "mapped"]


@statement("N-7", "L-1")
def test_one_too_many_of_all_connections_together_is_enospc(vmm: RawVmm, limits: dict[str, int]) -> None:
    limit = limits["open_invalidations_per_partition"]
    one, other = vmm.notifier(), vmm.notifier()
    for number in range(limit):
        (one, other)[number % 2].ask("invalidate_begin", WHOLE_MEMORY)
    refusal = one.refusal("invalidate_begin", ELSEWHERE)
    assert (refusal.name, refusal.details.get("limit")) == ("ENOSPC", "open_invalidations_per_partition")
    other.ask("invalidate_end", WHOLE_MEMORY)
    assert one.ask("invalidate_begin", ELSEWHERE) is None
