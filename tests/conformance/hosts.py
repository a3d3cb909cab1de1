"""A VMM's hypervisor, played by a test.

Owns the server's requests and the answers. The test remembers what is mapped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from conformance.exchange import NotOffered
from conformance.guests import GFN, PAGE, PAGES, PFN, UADDR, RawVmm, region
from conformance.wire import READ, RawConnection, intercept_message, pack, request

REFUSAL = [12, "ENOMEM", "no slot is free", {}]
LISTS = {"map_gpas": "map_gpa", "unmap_gpas": "unmap_gpa"}
"""The requests of several pieces, each with that of one."""
MOST_PIECES = 64
SPREAD = 3
"""Pieces that no single range could be."""


def refusal_after(done: object) -> list[object]:
    """A list is refused when so many of its pieces were done."""
    return [12, "ENOMEM", "no slot is free", {"done": done}]


@dataclass(frozen=True, slots=True)
class Asked:
    """A request of the server: its pieces, and the method of one."""

    msgid: int
    method: str
    pieces: list[dict[str, Any]]

    @property
    def starts(self) -> list[int]:
        return [piece["start_gfn"] for piece in self.pieces]


class ListHost:
    """A VMM whose hypervisor takes lists, or says nothing of them, with memory of `SPREAD` frames apart."""

    def __init__(self, vmm: RawVmm, **hello: object) -> None:
        self.vmm = vmm
        self.link = vmm.link(**hello)
        self.notifier = vmm.notifier()
        self.vp = vmm.vp()
        for page in range(SPREAD):
            vmm.map_vma(UADDR + page * PAGE, 1, PFN + 2 * page)

    def asked(self) -> Asked:
        kind, msgid, method, (fields,) = self.link.receive()
        assert kind == 0
        if method not in LISTS:
            return Asked(msgid, method, [fields])
        assert fields.keys() == {"pieces"}
        assert 1 <= len(fields["pieces"]) <= MOST_PIECES
        return Asked(msgid, LISTS[method], fields["pieces"])

    def answer(self, asked: Asked, error: object = None) -> None:
        self.link.send(pack([1, asked.msgid, error, None]))

    def asked_for_all(self, method: str) -> list[dict[str, Any]]:
        """Carry out requests until all of the memory was asked for; returns the pieces."""
        pieces: list[dict[str, Any]] = []
        while len(pieces) < SPREAD:
            asked = self.asked()
            assert asked.method == method
            pieces += asked.pieces
            self.answer(asked)
        return pieces

    def asked_for_a_list(self, method: str) -> Asked:
        """All of the memory in one request. The server may ask for single pieces instead."""
        asked = self.asked()
        if len(asked.pieces) < SPREAD:
            raise NotOffered("the server asks for single pieces")
        assert asked.method == method
        return asked

    def map(self) -> None:
        """Add a region for each page, and touch it."""
        for page in range(SPREAD):
            self.vmm.add_region(GFN + 2 * page, 1, UADDR + page * PAGE, "mmio")
            self.vp.send(request("intercept", intercept_message(GFN + 2 * page, READ)))
            self.answer(self.asked())
            assert self.vp.answer() == ["resume", "mapped"]

    def add_pinned(self) -> None:
        """Ask for a region over all of the memory; it is answered when that is mapped."""
        self.vmm.connection.send(request("add_region", region(GFN, SPREAD, UADDR, kind="pinned")))


class Host:
    """A partition with an MMIO region of which nothing is mapped yet."""

    def __init__(self, vmm: RawVmm) -> None:
        self.vmm = vmm
        self.link = vmm.link()
        self.notifier = vmm.notifier()
        self.vp = vmm.vp()
        vmm.map_vma(UADDR, PAGES)
        vmm.add_region(GFN, PAGES, UADDR, "mmio")

    def fault(self) -> None:
        self.vp.send(request("intercept", intercept_message(GFN, READ)))

    def asked(self) -> tuple[int, str, dict[str, Any]]:
        """The server's request: msgid, method and fields."""
        kind, msgid, method, (fields,) = self.link.receive()
        assert kind == 0
        return msgid, method, fields

    def answer(self, msgid: int, error: object = None) -> None:
        self.link.send(pack([1, msgid, error, None]))

    def map(self) -> None:
        """Carry out the mapping of the first fault."""
        self.fault()
        msgid, method, _ = self.asked()
        self.answer(msgid)
        assert (method, self.vp.answer()) == ("map_gpa", ["resume", "mapped"])

    def is_lost(self) -> bool:
        """Whether the VMM got the report that its partition is lost, and all its connections are closed."""
        farewell = self.vmm.connection.farewell()
        connections: list[RawConnection] = [self.vp, self.notifier]
        for connection in connections:
            connection.receive_all()
        return farewell.name == "EIO"
