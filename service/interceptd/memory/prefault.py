"""Maps guest pages before a guest touches them, as if each had been read.

Owns the order of the pages, and when to stop. Each page is a separate fault in the fault handler, as a VP's
would be. Must not know VPs, connections or messages.
"""

from __future__ import annotations

import errno
from typing import NamedTuple

import trio

from intercept_protocol.addresses import GfnRange
from intercept_protocol.errors import WireError
from intercept_protocol.outcomes import Access, Answer
from interceptd.memory.fault_handler import Fault, FaultHandler
from interceptd.memory.region_manager import RegionManager
from interceptd.pages.mapping import Mapping
from interceptd.scheduling.time_share import give_way

LOOKS = 4096
"""Pages, mappings and gaps between regions that one call looks at."""
SECONDS = 0.1
"""After which a call looks at nothing more. The fault that it is in ends first."""


class Progress(NamedTuple):
    """How many pages from the start were gone through, and how many of those the guest could then read."""

    page_count: int
    mapped_gfns: int


async def prefault(gfns: GfnRange, faults: FaultHandler, regions: RegionManager) -> Progress:
    """Go through the pages of `gfns`, at least one, until they or the bounds above are reached.

    May block as long as one fault. It waits for other maps, and for no invalidation: a page that is being
    invalidated is passed over like one that is not backed or not decided. Cancelling is safe at any time.
    Raises EIO if the hypervisor refuses to map the first page, and stops before a later one.
    """
    deadline = trio.current_time() + SECONDS
    gfn, mapped = gfns.start, 0
    for _ in range(LOOKS):
        found = faults.lookup(gfn, Access.READ)
        if not isinstance(found, Mapping | Answer):
            answer = await _fault(faults, Fault(gfn, Access.READ, found))
            if answer is Answer.HYPERVISOR_ERROR:
                if gfn > gfns.start:
                    break
                raise WireError(errno.EIO, f"the hypervisor refused to map gfn {gfn:#x}", start_gfn=gfn)
            found = faults.lookup(gfn, Access.READ)
        match found:
            case Mapping():
                end = min(found.end, gfns.end)
                mapped += end - gfn
            case Answer():  # of all pages before the next region, or what is left of a dangling one
                following = [each.gfns for each in regions.first_regions(1, gfn + 1)]
                if found is Answer.UNBACKED:
                    following += [each.gfns for each in regions.first_mappings(1, gfn + 1)]
                end = min([gfns.end, *(each.start for each in following)])
            case _:
                end = gfn + 1
        gfn = end
        if gfn == gfns.end or trio.current_time() >= deadline:
            break
        await give_way()
    return Progress(gfn - gfns.start, mapped)


async def _fault(faults: FaultHandler, fault: Fault) -> Answer:
    return await faults.handle_nowait(fault) or await faults.handle(fault, _if_invalidating)


def _if_invalidating(answer: Answer) -> Answer | None:
    """An invalidation may last as long as the VMM likes, which waits for this call."""
    return answer if answer is Answer.INVALIDATING else None
