"""A VMM process in the middle of everything, for a test to kill: `python -m fakes.doomed_vmm SOCKET`.

Owns getting there. It holds a VMM, VP and notifier connections and has an intercept waiting, a begin, an
unmap and half a request out, none of which it reads the answer of; then it prints its partition and waits.
"""

from __future__ import annotations

import signal
import sys

from fakes.raw_client import READ, WRITE, intercept_message, request
from fakes.raw_vmm import GFN, PAGE, PAGES, UADDR, WHOLE_MEMORY, RawVmm

VMAS = 64


def main(path: str) -> None:
    with RawVmm(path) as vmm:
        vmm.add_memory()
        for number in range(PAGES, PAGES + VMAS):
            vmm.map_vma(UADDR + number * PAGE, 1, start_pfn=2 * number)
        vmm.add_region(GFN + PAGES, VMAS, UADDR + PAGES * PAGE)
        busy = vmm.vp(1)
        for number in range(VMAS):
            busy.intercept(GFN + PAGES + number)
        holding, beginning = vmm.notifier(), vmm.notifier()
        holding.ask("invalidate_begin", WHOLE_MEMORY)
        waiting, halfway = vmm.vp(0), vmm.vp(2)
        waiting.send(request("intercept", intercept_message(GFN, WRITE)))
        halfway.send(request("intercept", intercept_message(GFN, READ))[:100])
        busy.send(request("intercept", intercept_message(GFN + PAGES, WRITE)))
        beginning.send(request("invalidate_begin", {"start_uaddr": UADDR, "length": (PAGES + VMAS) * PAGE}))
        vmm.connection.send(request("unmap_vma", {"start_uaddr": UADDR, "page_count": PAGES + VMAS}))
        print(vmm.partition_id, flush=True)
        signal.pause()


if __name__ == "__main__":
    main(sys.argv[1])
