"""What a tenant may do within its limits to cost the others time, see `hostile_tenant`.

Owns the attacks of a VMM that declares its memory. Must not know who is served meanwhile.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from fakes.hostile_tenant import Size
from fakes.raw_client import READ, ConnectionClosed, RawConnection, intercept_message, request
from fakes.raw_vmm import PAGE, RawVmm, region, vma

PARTITIONS, VPS_EACH, VPS, BEGINS, NOTIFIERS = 64, 256, 4096, 1024, 64
"""What one attacker has: VPs and notifiers as a partition may, and partitions as its descriptors allow."""
REGIONS: Final = 100_000
VMAS: Final = 60_000
DESCRIPTORS: Final = 253
"""In one message (SCM_MAX_FD)."""
REFUSALS: Final = 400
"""Of which three times as many fill more than a uid's share of the log."""
READ_ONLY: Final = {"readable": True, "writable": False, "executable": False}
READ_WRITE: Final = READ_ONLY | {"writable": True}

# ------------------------------------------------ all VPs, all partitions


def answers_and_leaves(path: Path, size: Size) -> Iterator[None]:
    """As many VPs as a uid may have are answered in one round, and then leave at once."""
    vmms = [RawVmm(path) for _ in range(size.of(VPS // VPS_EACH, 2))]
    vps = [vmm.vp(index) for vmm in vmms for index in range(VPS_EACH)]
    yield
    size.rest()
    yield
    for _ in range(3):
        ask_all(vps, intercept(0))


def cuts_vmas(path: Path, size: Size) -> Iterator[None]:
    """Sixteen partitions have all of their 3,000 VMAs changed at once."""
    vmms = [RawVmm(path) for _ in range(size.of(16, 2))]
    controls = [vmm.connection for vmm in vmms]
    for index in range(size.of(3000, 500)):
        ask_all(controls, request("map_vma", vma(2 * index * PAGE, 1)))
    yield
    size.rest()
    yield
    for rights in (READ_ONLY, READ_WRITE) * 2:
        ask_all(controls, request("protect_vma", {"start_uaddr": 0, "page_count": 1 << 30, **rights}))
    yield


def ends_with_begins(path: Path, size: Size) -> Iterator[None]:
    """As many partitions, with their begins open and 256 regions touched each, end at once."""
    vmms = [RawVmm(path) for _ in range(size.of(PARTITIONS))]
    controls, vps = [vmm.connection for vmm in vmms], [vmm.vp() for vmm in vmms]
    notifiers = [vmm.notifier() for vmm in vmms]
    ask_all(controls, request("map_vma", vma(0, 1 << 20)))
    for index in range(size.of(256, 128)):
        ask_all(controls, request("add_region", region(16 * index, 8, 16 * index * PAGE)))
        ask_all(vps, intercept(16 * index))
    for index in range(size.of(BEGINS, 512)):
        ask_all(notifiers, request("invalidate_begin", {"start_uaddr": 16 * index * PAGE, "length": PAGE}))
    yield
    size.rest()
    yield


# ------------------------------------------------ one partition


def invalidates_nothing(path: Path, size: Size) -> Iterator[None]:
    """Each notifier invalidates a page behind 100,000 regions, none of which has it."""
    vmm = RawVmm(path)
    page = 1 << 12
    for index in range(size.of(REGIONS, 6500)):
        pages = 513 + index % 500
        vmm.add_region(1024 * index, pages, (page - pages - index % 11) * PAGE)
    notifiers = [vmm.notifier() for _ in range(size.of(NOTIFIERS))]
    yield
    size.rest()
    yield
    for _ in size.again_and_again():
        ask_all(notifiers, request("invalidate", {"start_uaddr": page * PAGE, "length": PAGE}))
    yield


def intercepts_beside_begins(path: Path, size: Size) -> Iterator[None]:
    """Intercepts of 64 VPs, without begins and then with as many as a partition may have."""
    vmm = RawVmm(path)
    page = 1 << 12
    vmm.add_region(0, page, page * PAGE)
    vps = [vmm.vp(index) for index in range(size.of(64, 32))]
    notifier = vmm.notifier()
    yield
    for _ in size.again_and_again():
        ask_all(vps, intercept(2000))
    for index in range(size.of(BEGINS, 512)):
        start, length = page + 2000 - 1023 + index // 32, 513 + index % 32
        notifier.ask("invalidate_begin", {"start_uaddr": start * PAGE, "length": length * PAGE})
    yield
    for _ in size.again_and_again():
        ask_all(vps, intercept(2000))
    yield


def is_refused_over_many_vmas(path: Path, size: Size) -> Iterator[None]:
    """map_vma over 60,000 VMAs is refused."""
    vmm = RawVmm(path)
    for index in range(size.of(VMAS, 8000)):
        vmm.map_vma(2 * index * PAGE, 1)
    yield
    size.rest()
    yield
    for _ in size.again_and_again():
        vmm.connection.refusal("map_vma", vma(0, 1 << 30))
    yield


def has_many_mappings(path: Path, size: Size) -> Iterator[None]:
    """It has 150,000, which others have shown or counted."""
    pages, aliases = 512, size.of(600)
    vmm = RawVmm(path)
    vp, notifier = vmm.vp(), vmm.notifier()
    vmm.map_vma(0, pages)
    for index in range(aliases):
        vmm.add_region(pages * index, pages, 0)
        vp.intercept(pages * index)
    for page in range(1, pages, 2):
        notifier.ask("invalidate", {"start_uaddr": page * PAGE, "length": PAGE})
    assert vmm.ask("statistics")["slat_extents"] > pages // 2 * (aliases - 1)
    yield
    size.rest()
    yield
    yield


# ------------------------------------------------ descriptors, the log


def sends_descriptors(path: Path, size: Size) -> Iterator[None]:
    """Intercepts of 32 VPs, without descriptors and then with as many as a message takes."""
    vmm = RawVmm(path)
    vps = [vmm.vp(index) for index in range(size.of(32, 16))]
    sent = [os.open(os.devnull, os.O_RDONLY)] * DESCRIPTORS
    yield
    for _ in size.again_and_again():
        ask_all(vps, intercept(0))
    yield
    for _ in size.again_and_again():
        for vp in vps:
            vp.send(intercept(0), sent)
        vps = [answered(vp, vmm, index) for index, vp in enumerate(vps)]
    yield


def answered(vp: RawConnection, vmm: RawVmm, index: int) -> RawConnection:
    """The VP once it is answered, or another one if the daemon has closed: the uid sent too many."""
    try:
        vp.receive()
    except ConnectionClosed:
        vp.close()
        return vmm.vp(index)
    return vp


def fills_the_log(path: Path, size: Size) -> Iterator[None]:
    """Each connection is refused with a text of its own."""
    yield
    size.rest()
    yield
    for _ in size.again_and_again():
        for _ in range(REFUSALS):
            with RawConnection(path) as connection, suppress(OSError):
                connection.refusal("hello", {"protocol": 1, "role": "n" * 10_000})
    yield


ATTACKS: Final = (
    answers_and_leaves,
    cuts_vmas,
    ends_with_begins,
    invalidates_nothing,
    intercepts_beside_begins,
    is_refused_over_many_vmas,
)
"""Those beside which nothing else need happen."""


# ------------------------------------------------ how


def intercept(gfn: int) -> bytes:
    return request("intercept", intercept_message(gfn, READ))


def ask_all(connections: Sequence[RawConnection], asked: bytes, descriptors: Sequence[int] = ()) -> None:
    """Have all of them ask the same at once, and wait for the answers."""
    for connection in connections:
        connection.send(asked, descriptors)
    for connection in connections:
        connection.receive()
