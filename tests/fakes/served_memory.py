"""A process that hands its memory over as a userfaultfd, and what serves it, in one `with`.

Owns the image's file and the hand-over. Must not know what is right.
"""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Concatenate, Final, ParamSpec, TypeVar

import trio

from fakes import faulting_vmm
from fakes.live_vmm import LiveVmm
from fakes.puppet import Puppet
from fakes.restored_guest import RestoredGuest
from intercept_protocol.addresses import PAGE_SIZE, UaddrRange
from interceptd.address_space.image import ImagePart
from interceptd.address_space.image_file import Image
from interceptd.address_space.missing_faults import MissingFaults
from interceptd.address_space.workers import Workers
from interceptd.config.schema import Limits
from interceptd.connections.tenants import Tenants

WORD: Final = 8
P = ParamSpec("P")
T = TypeVar("T")


def page_word(page: int) -> int:
    """What the first word of a page of the image holds."""
    return page + 1


@dataclass
class ServedMemory:
    vmm: Puppet
    guest: RestoredGuest
    regions: list[UaddrRange]
    image: Path
    _reported: dict[int, trio.Event] = field(default_factory=dict)

    async def do(
        self, verb: Callable[Concatenate[LiveVmm, P], T], /, *arguments: P.args, **options: P.kwargs
    ) -> T:
        """Have the VMM do it in a thread, and be served meanwhile."""
        pending = self.vmm.start(verb, *arguments, **options)
        self._reported[pending.number] = trio.Event()
        await self._reported[pending.number].wait()
        return pending.result()

    async def receive(self) -> None:
        """Take reports until cancelled, or until the VMM's end."""
        with suppress(EOFError, ConnectionResetError):
            while True:
                await trio.lowlevel.wait_readable(self.vmm)
                self._reported.pop(self.vmm.receive()).set()

    def forget_cached(self) -> None:
        """Have the page cache forget the image."""
        descriptor = os.open(self.image, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


@asynccontextmanager
async def served_memory(
    vmm: Puppet, directory: Path, counts: Sequence[int], *, around: int = 8, huge: bool = False
) -> AsyncIterator[ServedMemory]:
    """`counts` are the pages of the VMM's regions; the image has them one after the other."""
    path = directory / "image"
    with path.open("wb") as file:
        for page in range(sum(counts)):
            file.write(page_word(page).to_bytes(WORD, "little").ljust(PAGE_SIZE, b"\x55"))
        file.flush()
        os.fsync(file.fileno())
    regions, descriptor = await _hand_over(vmm, counts, huge=huge)
    try:
        limits = Limits()
        closer = Tenants(lambda: limits).of(0).closer
        unit = 512 if huge else 1
        workers = Workers(1, "ioctls", closer)
        uffd = MissingFaults(descriptor, workers, unit=unit)
        parts, at = [], 0
        for region in regions:
            parts.append(ImagePart(region.start, region.end, at))
            at += region.page_count
        image = Image(os.open(path, os.O_RDONLY), closer)
        guest = RestoredGuest(uffd, image, parts, around=around, unit=unit)
        memory = ServedMemory(vmm, guest, regions, path)
        async with guest.running(), trio.open_nursery() as nursery:
            nursery.start_soon(memory.receive)
            yield memory
            nursery.cancel_scope.cancel()
        workers.close()
    finally:
        os.close(descriptor)


async def _hand_over(vmm: Puppet, counts: Sequence[int], *, huge: bool) -> tuple[list[UaddrRange], int]:
    with tempfile.TemporaryDirectory() as directory, socket.socket(socket.AF_UNIX) as listener:
        address = str(Path(directory) / "uffd")
        listener.bind(address)
        listener.listen()
        pending = vmm.start(faulting_vmm.hand_over, address, list(counts), huge=huge)
        peer, _ = await trio.to_thread.run_sync(listener.accept)
        with peer:
            _, (descriptor,), _, _ = socket.recv_fds(peer, WORD, 1)
        return await trio.to_thread.run_sync(pending.result), descriptor
