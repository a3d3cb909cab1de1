"""`statistics` of a VMM's own partition."""

from __future__ import annotations

from conformance.guests import GFN, PAGES, UADDR, WHOLE_MEMORY, RawVmm
from conformance.statements import needs, statement

GAUGES = {"regions", "vmas", "vps", "open_invalidations", "mapped_gfns", "no_access_gfns", "slat_extents"}
COUNTERS = {"map_calls", "unmap_calls", "deposits", "invalidations", "stale_attempts", "split_large_pages"}


@statement("P-25")
def test_they_are_integers_by_the_names_that_are_given(vmm: RawVmm) -> None:
    seen = vmm.ask("statistics")
    assert seen.keys() >= GAUGES | COUNTERS | {"restarts", "intercepts"}
    assert {type(seen[name]) for name in GAUGES | COUNTERS} == {int}


@statement("P-25")
def test_a_new_partition_has_survived_no_restart(vmm: RawVmm) -> None:
    assert (type(vmm.ask("statistics")["restarts"]), vmm.ask("statistics")["restarts"]) == (int, 0)


@statement("P-25")
@needs("notifier")
def test_statistics_count_current_objects(vmm: RawVmm) -> None:
    vmm.add_memory()
    vmm.vp(4).intercept(GFN)
    vmm.notifier().ask("invalidate_begin", {"start_uaddr": UADDR + (1 << 30), "length": 4096})
    seen = vmm.ask("statistics")
    told = {name: seen[name] for name in ("regions", "vmas", "vps", "open_invalidations", "mapped_gfns")}
    assert told == {"regions": 1, "vmas": 1, "vps": 1, "open_invalidations": 1, "mapped_gfns": PAGES}


@statement("P-25")
@needs("notifier")
def test_intercepts_are_counted_by_outcome_and_reason(vmm: RawVmm) -> None:
    vmm.add_memory()
    vp = vmm.vp()
    for gfn in (GFN, GFN, GFN, 0, 0):
        vp.intercept(gfn)
    vmm.notifier().ask("invalidate", WHOLE_MEMORY)
    seen = vmm.ask("statistics")
    assert seen["intercepts"]["resume"]["mapped"] == 1
    assert seen["intercepts"]["resume"]["already_mapped"] == 2
    assert seen["intercepts"]["forward"]["no_region"] == 2
    assert seen["invalidations"] == 1
