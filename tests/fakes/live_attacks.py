"""What a tenant may do with its own memory to cost the others time, see `hostile_tenant`.

Owns the attacks of a VMM that hands over its memory. Must not know who is served meanwhile.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from fakes.hostile_tenant import Size
from fakes.live_vmm import GFN, LiveVmm
from intercept_client import libc
from intercept_client.memory import Watch
from intercept_protocol.addresses import GfnRange, UaddrRange
from intercept_protocol.errors import WireError
from intercept_protocol.messages import RequestedKind
from intercept_protocol.outcomes import Access, Answer

VMAS: Final = 60_000
"""A process may have 65,530 (vm.max_map_count)."""
MADV_POPULATE_READ: Final = 22


def unmaps_watched_memory(path: Path, size: Size) -> Iterator[None]:
    """512 threads unmap pages, unwatched ones and then watched ones."""
    threads, each = size.of(512, 128), 20
    vmm = LiveVmm()
    vmm.connect(path)
    vmm.attach(Watch.REQUIRED, promise=False)
    unwatched, watched = (vmm.map(2 * threads * each) for _ in range(2))
    vmm.add_region(GFN, watched)
    assert vmm.fault(GFN) is Answer.MAPPED
    threading.stack_size(1 << 16)
    yield
    storm(unwatched, threads)
    size.rest()
    yield
    storm(watched, threads)
    yield


def has_smaps_searched(path: Path, size: Size) -> Iterator[None]:
    """Six partitions of a process with 60,000 VMAs have the last of them searched."""
    vmms = [LiveVmm() for _ in range(6)]
    vmas = size.of(VMAS)
    memory = vmms[0].map(2 * vmas)
    for page in range(memory.start, memory.start + vmas, 2):
        libc.mprotect(UaddrRange(start=page, end=page + 1), Access.READ)
    for vmm in vmms:
        vmm.connect(path)
        vmm.attach(Watch.NONE, promise=True)
    last = UaddrRange(start=memory.end - 1, end=memory.end)

    def search(vmm: LiveVmm) -> None:
        gfns = iter(range(1 << 20))
        for _ in size.again_and_again():
            with suppress(WireError):  # its turn did not come in time
                vmm.vmm.add_region(
                    GfnRange.of(next(gfns), 1), last, RequestedKind.AUTO, writable=True, executable=False
                )

    yield
    size.rest()
    yield
    at_once([lambda vmm=vmm: search(vmm) for vmm in vmms])  # type: ignore[misc]
    yield


def leaves_while_its_memory_is_locked(path: Path, size: Size) -> Iterator[None]:
    """VMMs leave while a thread populates memory, which holds the lock that their userfaultfds need."""
    vmms = [LiveVmm() for _ in range(8)]
    for vmm in vmms:
        vmm.connect(path)
        vmm.attach(Watch.REQUIRED, promise=False)
        vmm.add_region(GFN, vmms[0].map(16))
        assert vmm.fault(GFN) is Answer.MAPPED
    large = vmms[0].map(size.of(4 << 20))
    yield
    size.rest()
    yield
    populating = threading.Thread(target=libc.madvise, args=(large, MADV_POPULATE_READ))
    populating.start()
    for vmm in vmms:
        vmm.vmm.close()
    populating.join()
    yield


ATTACKS: Final = (unmaps_watched_memory, has_smaps_searched, leaves_while_its_memory_is_locked)


def at_once(acts: Sequence[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=act) for act in acts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def storm(memory: UaddrRange, threads: int) -> None:
    """Unmap every second page, each thread its own part."""
    each = memory.page_count // threads

    def unmap(start: int) -> None:
        for page in range(start, start + each, 2):
            libc.munmap(UaddrRange(start=page, end=page + 1))

    at_once([lambda start=memory.start + each * n: unmap(start) for n in range(threads)])  # type: ignore[misc]
