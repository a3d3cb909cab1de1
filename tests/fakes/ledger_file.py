"""A ledger as a file of a few kilobytes: what is touched of it, compressed.

Owns how it is written and read. `PYTHONPATH=tests python -m fakes.ledger_file FILE RESTORED` writes the two
examples, in the format that this version writes; one that was released is not written again.
"""

from __future__ import annotations

import os
import struct
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

from intercept_protocol import rpc
from interceptd.ledger import records
from interceptd.ledger.ledger import SIZE, Ledger
from interceptd.ledger.records import Done, Record

INTERCEPT = rpc.encode_request(7, "intercept", [bytes(range(256))])
CALL = rpc.encode_request(8, "remove_region", [{"start_gfn": 256, "page_count": 16, "start_uaddr": 0x10000}])
EVENT = bytes(range(32))
REMOVAL = struct.pack("<B7x3Q", 0x15, 0x10000, 0x12000, 0)
"""A userfaultfd's message that pages are given back."""


def _example_log() -> Iterator[Record]:
    """Every kind of record, and every method that is logged."""
    uaddrs = {"start_uaddr": 0x10000, "page_count": 16}
    rights = {"readable": True, "writable": True, "executable": False}
    bar = {"start_gfn": 256, **uaddrs, "kind": "mmio", "writable": True, "executable": False}
    ram = {**bar, "start_gfn": 512, "kind": "auto", "executable": True}
    read_only = {**rights, "writable": False}
    rom = {**bar, "start_gfn": 768, "kind": "pinned", "writable": False}
    going = {"start_uaddr": 0x10000, "length": 0x2000}
    yield records.Opened(1001, "a VMM", 1)
    yield records.Created(1, 5, b"0123456789abcdef", {"address_space": "declared", "hypervisor": "vmm"})
    yield records.Joined(1, 1002, "hypervisor", 1, 0, lists=True)
    yield records.Joined(2, 1003, "vp", 1, 3)
    yield records.Joined(3, 1004, "notifier", 1)
    yield records.Joined(4, 1005, "notifier", 1)
    yield Done(0, 2, "attach_memory", {"promise_begin_end": True}, None)
    yield Done(0, 3, "map_vma", {**uaddrs, "start_pfn": 1000, **rights, "io": True}, None)
    more = [{"start_uaddr": 0x40000, "page_count": 8, "start_pfn": 2000, **rights, "io": False}]
    yield Done(0, 4, "map_vmas", {"vmas": more}, None)
    yield Done(0, 5, "unmap_vma", {"start_uaddr": 0x42000, "page_count": 1}, None)
    yield Done(0, 6, "protect_vma", {"start_uaddr": 0x44000, "page_count": 4, **read_only}, None)
    yield Done(0, 7, "add_region", bar, {"kind": "mmio"})
    yield Done(0, 8, "add_region", rom, {"kind": "pinned"})
    yield Done(0, 9, "remove_region", {"start_gfn": 256, **uaddrs}, None)
    yield Done(0, 10, "change_regions", {"remove": [], "add": [bar, ram]}, {"kinds": ["mmio", "movable"]})
    yield Done(3, 2, "invalidate_begin", going, None)
    yield Done(3, 3, "invalidate_begin", going, None)
    yield Done(4, 2, "invalidate_begin", going, None)
    yield Done(3, 4, "invalidate_end", going, None)
    yield records.Left(4)
    yield records.Changing([(256, 272)])
    yield records.Mapped(256, 272, 16, 3, "host", 1000, cached=False)
    yield records.Settled()
    yield records.Mapped(512, 528, 16, 0)
    yield records.Unmapped(260, 262)
    yield records.Changing([(264, 266), (270, 272)])
    yield records.Gone(1, 16, 18)
    yield records.Gone(2, 20, 21)
    yield records.Served(1)
    yield records.Dangling(768)
    yield records.Policy("page")
    yield records.KeptRegion(1024, 1040, 64, "movable", inferred=True, access=7, dangling=False)
    yield records.KeptVma(128, 144, 3000, 1, io=False)
    yield records.KeptBegin(3, 128, 130, 2)
    yield records.Attached(promised=False)


def _restored_log() -> Iterator[Record]:
    """Every kind of record of a restored guest."""
    request = {"around_pages": 8, "on_image_error": "kill"}
    yield records.Restoring(1000, 6, "a starter", 1024, request, (1001, 3))
    yield records.HandedOff(1006, [(0x10000, 0x300000, 0, 4096), (0x900000, 0x100000, 0x300000, 4096)])
    yield records.Mapped(0, 768, 16, 0)
    yield records.Mapped(768, 1024, 2304, 0)
    yield records.Mapped(4, 8, 20, 7, "image", 4)
    yield records.Gone(1, 20, 22)
    yield records.Unmapped(4, 6)
    yield records.Mapped(4, 6, 20, 0)
    yield records.Served(1)
    yield records.Mapped(4, 5, 20, 7, "zero", 20)
    yield records.Gone(2, 2400, 2402)
    yield records.Removed(2304, 2310)


def example() -> Ledger:
    """Of a daemon that died in the middle of things."""
    ledger = Ledger.create()
    for record in _example_log():
        ledger.append(records.encode(record))
    ledger.count_restart()
    ledger.last_msgid = 77
    ledger.event[:] = EVENT
    for number, received in ((0, CALL[:20]), (1, b""), (2, INTERCEPT), (3, b"")):
        inbox = ledger.inbox(number)
        inbox.clear()
        if received:
            [space] = inbox.space(4096)
            space[: len(received)] = received
    ledger.inbox(0).note(20)
    ledger.inbox(3).owe_hello()
    return ledger


def restored_example() -> Ledger:
    """The same, of a restored guest."""
    ledger = Ledger.create()
    for record in _restored_log():
        ledger.append(records.encode(record))
    ledger.event[:] = REMOVAL
    return ledger


def save(ledger: Ledger, file: Path) -> None:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        end = 0
        while True:
            try:
                start = os.lseek(ledger.descriptor, end, os.SEEK_DATA)
            except OSError:  # ENXIO: no more
                break
            end = os.lseek(ledger.descriptor, start, os.SEEK_HOLE)
            archive.writestr(str(start), os.pread(ledger.descriptor, end - start, start))


def parts(file: Path) -> Iterator[tuple[int, bytes]]:
    """What is touched of it: each piece with its place."""
    with zipfile.ZipFile(file) as archive:
        for start in archive.namelist():
            yield int(start), archive.read(start)


def load(file: Path) -> int:
    """A descriptor of the same memory, as a successor gets it."""
    descriptor = os.memfd_create("interceptd-ledger", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, SIZE)
    for start, part in parts(file):
        os.pwrite(descriptor, part, start)
    return descriptor


if __name__ == "__main__":
    save(example(), Path(sys.argv[1]))
    save(restored_example(), Path(sys.argv[2]))
