"""A VMM's hypervisor, played by a test.

Owns the server's requests and the answers. The test remembers what is mapped.
"""

from __future__ import annotations

from typing import Any

from conformance.guests import GFN, PAGES, UADDR, RawVmm
from conformance.wire import READ, RawConnection, intercept_message, pack, request

REFUSAL = [12, "ENOMEM", "no slot is free", {}]


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
