"""A VMM that changes its regions as fast as it can, and VPs that fault on them as fast as they can.

Owns the race. Everybody is a task of one thread. So each VP knows which changes had been answered before it
asked, and which had begun when it was answered; an answer that is true of none of their layouts is wrong.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle, product
from pathlib import Path
from typing import Final

import trio

from fakes.live_vmm import LiveVmm
from fakes.outside import truth_of
from fakes.region_toggles import PAGES, Findings, How, Kind, Toggle, all_at_once, answer_to, page_behind
from intercept_client import TrioVmm, TrioVp, build_memory_intercept, libc
from intercept_client.libc import Sharing
from intercept_client.memory import Watch, own_memory
from intercept_protocol.addresses import PAGE_SHIFT, UaddrRange
from intercept_protocol.messages import AddressSpaceKind, HypervisorKind, PartitionCredentials
from intercept_protocol.outcomes import Access, Answer, AnyAnswer, Outcome

VPS: Final = 8
RW: Final = Access.READ | Access.WRITE
PFN: Final = 0x5000
PAGE: Final = 0x7000_0000
"""Where declared memory lies."""
Frames = Mapping[int, tuple[str, int]]
"""What the VMM has at its pages."""


class Race:
    """One partition. `frames` is what the VMM has in its memory."""

    def __init__(
        self, path: Path, vmm: TrioVmm, partition: PartitionCredentials, toggle: Toggle, frames: Frames
    ) -> None:
        self._path = path
        self._vmm = vmm
        self._partition = partition
        self._toggle = toggle
        self._frames = frames
        self._begun = 0
        """Changes that were asked for; so far those of `_found.changes` were answered."""
        self._answered = trio.lowlevel.ParkingLot()
        self._is_over = False
        self._found = Findings()

    async def run(self, changes: int, how: How) -> Findings:
        """None begins before each VP, on average, has been answered once more."""
        gfns = self._toggle.gfns()
        await self._vmm.add_regions(self._toggle.after(0))
        async with trio.open_nursery() as nursery:
            for index in range(VPS):
                await nursery.start(self._fault, index)
            for change in range(changes):
                await self._change(change, how)
                await self._look(gfns[change // 2 % len(gfns)])
                while self._found.accesses < VPS * self._found.changes:
                    await self._answered.park()
            self._is_over = True
        for gfn in gfns:
            await self._look(gfn)
        return self._found

    async def _change(self, change: int, how: How) -> None:
        removed, added = self._toggle.removed(change), self._toggle.added(change)
        self._begun += 1
        if how is How.IN_ONE_STEP:
            await self._vmm.change_regions(remove=removed, add=added)
        else:
            for gfns, uaddrs in removed:
                await self._vmm.remove_region(gfns, uaddrs)
            await self._vmm.add_regions(added)
        self._found.changes += 1

    async def _fault(self, index: int, task_status: trio.TaskStatus[None]) -> None:
        """A VP, which begins its round where no other does."""
        accesses = list(product(self._toggle.gfns(), (Access.READ, Access.WRITE)))
        start = index * len(accesses) // VPS
        async with TrioVp.open(self._path, self._partition, vp_index=index) as vp:
            task_status.started()
            for gfn, access in cycle(accesses[start:] + accesses[:start]):
                message = build_memory_intercept(gpa=gfn << PAGE_SHIFT, access=access, vp_index=index)
                first = self._found.changes
                answer = await vp.intercept(message)
                self._judge(gfn, access, answer, range(first, self._begun + 1))
                if self._is_over:
                    break

    def _judge(self, gfn: int, access: Access, answer: AnyAnswer, changes: range) -> None:
        """`changes`: after how many of them the answer may have been true."""
        self._found.accesses += 1
        self._answered.unpark_all()
        self._found.answers[answer] += 1
        self._found.during_a_change += len(changes) > 1
        seen = Answer.MAPPED if answer.outcome is Outcome.RESUME else answer
        right = {answer_to(self._toggle.after(change), gfn, access) for change in changes[:2]}
        if seen in right or seen.outcome is Outcome.RETRY:
            return
        self._found.gaps += seen is Answer.NO_REGION and self._toggle.covers_always(gfn)
        self._found.object(
            f"gfn {gfn:#x}, {access.name}: {answer}, not {' or '.join(sorted(map(str, right)))}"
        )

    async def _look(self, gfn: int) -> None:
        """No change is under way: what the guest reaches is of the last one's layout."""
        held = await self._vmm.translate(gfn)
        if held is None:
            return
        self._found.pages_reached += 1
        layout = self._toggle.after(self._found.changes)
        page = page_behind(layout, gfn)
        frame = None if page is None else self._frames[page]
        may_write = answer_to(layout, gfn, Access.WRITE) is Answer.MAPPED
        if tuple(held.frame) != frame or (held.access & Access.WRITE and not may_write):
            self._found.object(f"gfn {gfn:#x}: {held}, not {frame}")


async def race_in_declared_memory(path: Path, kinds: Sequence[Kind], changes: int, how: How) -> Findings:
    async with TrioVmm.open(path) as vmm:
        partition = await vmm.create_partition(AddressSpaceKind.DECLARED, HypervisorKind.SOFTWARE)
        memory = UaddrRange(start=PAGE, end=PAGE + PAGES * len(kinds))
        await vmm.map_vma(memory, PFN, RW)
        frames = {PAGE + n: ("host", PFN + n) for n in range(memory.page_count)}
        return await Race(path, vmm, partition, all_at_once(kinds, memory.start), frames).run(changes, how)


def race_in_own_memory(vmm: LiveVmm, path: Path, kinds: Sequence[Kind], changes: int, how: How) -> Findings:
    """In the memory of the VMM's process, which a userfaultfd watches. Each toggle has half of its pages in a
    file, and half in memory of its own."""
    file = vmm.memfd(PAGES * len(kinds))
    memory = vmm.map(PAGES * len(kinds))
    for first in range(0, memory.page_count, PAGES):
        part = UaddrRange(start=memory.start + first, end=memory.start + first + PAGES // 2)
        libc.mmap(part, RW, Sharing.SHARED, flags=libc.MAP_FIXED, file=file, offset=first << PAGE_SHIFT)
    return trio.run(_race_in_own_memory, path, memory, kinds, changes, how)


async def _race_in_own_memory(
    path: Path, memory: UaddrRange, kinds: Sequence[Kind], changes: int, how: How
) -> Findings:
    async with TrioVmm.open(path) as vmm:
        partition = await vmm.create_partition(AddressSpaceKind.PROCESS, HypervisorKind.SOFTWARE)
        with own_memory(Watch.REQUIRED) as own:
            await vmm.attach_memory(own, promise_begin_end=False)
        truth = truth_of("self", range(memory.start, memory.end))
        frames = {page: there.frame for page, there in truth.items()}
        return await Race(path, vmm, partition, all_at_once(kinds, memory.start), frames).run(changes, how)
