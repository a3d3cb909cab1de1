"""A VMM made of raw connections: a partition, and what its token opens.

Owns the order of opening; the methods' fields are spelled out here once, so that a test shows only what it is
about.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

from conformance.exchange import NotOffered
from conformance.wire import READ, RawConnection, intercept_message, request

PAGE = 4096
GFN, UADDR, PFN, PAGES = 0x100, 0x7F00_0000_0000, 0x5000, 16
"""The memory of `add_memory`."""
MODEL = {"address_space": "declared", "hypervisor": "software"}
"""The fields of `create_partition` that need nothing of the machine."""
FEATURES = {"address_space": "address_spaces", "hypervisor": "hypervisors", "architecture": "architectures"}
"""Fields of `create_partition`, each with the feature that lists its values."""
PATIENT = {"invalidate_timeout_ms": 600_000}
"""Longer than any test waits, so that no wait ends by its timeout."""


def require_offered(hello: Any, fields: Mapping[str, object]) -> None:
    """Raise `NotOffered` if the server's hello says that it does not offer a partition with these fields."""
    features = hello.get("features") if isinstance(hello, dict) else None
    for field, feature in FEATURES.items():
        offered = features.get(feature) if isinstance(features, dict) else None
        wanted = fields.get(field)
        if isinstance(offered, list) and wanted is not None and wanted not in offered:
            raise NotOffered(f"features.{feature} has no {wanted}")


class RawVmm:
    """A partition whose waits do not time out; its VPs and notifiers close with it."""

    def __init__(self, path: str | os.PathLike[str], **fields: object) -> None:
        self.path = path
        self._connections = ExitStack()
        self.connection = self._connections.enter_context(RawConnection(path))
        try:
            require_offered(self.connection.say_hello("vmm"), MODEL | fields)
            created = self.connection.ask("create_partition", MODEL | PATIENT | fields)
        except BaseException:
            self.close()
            raise
        self.partition_id: int = created["partition_id"]
        self.token: bytes = created["token"]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._connections.close()

    @property
    def credentials(self) -> dict[str, object]:
        """The fields of a hello that joins this partition."""
        return {"partition_id": self.partition_id, "token": self.token}

    def vp(self, vp_index: int = 0) -> RawConnection:
        vp = self._connections.enter_context(RawConnection(self.path))
        vp.say_hello("vp", vp_index=vp_index, **self.credentials)
        return vp

    def link(self, **fields: object) -> RawConnection:
        """The hypervisor connection: the server sends requests, and the test answers."""
        link = self._connections.enter_context(RawConnection(self.path))
        link.say_hello("hypervisor", **self.credentials, **fields)
        return link

    def notifier(self) -> RawConnection:
        notifier = self._connections.enter_context(RawConnection(self.path))
        notifier.say_hello("notifier", **self.credentials)
        return notifier

    def ask(self, method: str, **fields: object) -> Any:
        return self.connection.ask(method, fields)

    def add_memory(self) -> None:
        """Back the gfns from `GFN` on with `PAGES` pages at `UADDR`."""
        self.map_vma(UADDR, PAGES)
        self.add_region(GFN, PAGES, UADDR)

    def map_vma(self, start_uaddr: int, page_count: int, start_pfn: int = PFN, **rights: object) -> None:
        self.ask("map_vma", **vma(start_uaddr, page_count, start_pfn) | rights)

    def add_region(self, start_gfn: int, page_count: int, start_uaddr: int, kind: str = "movable") -> None:
        self.ask("add_region", **region(start_gfn, page_count, start_uaddr, kind=kind))


def waits(vmm: RawVmm, vp: RawConnection, gfn: int) -> bool:
    """Whether an intercept of `gfn` stays unanswered while others are answered."""
    vp.send(request("intercept", intercept_message(gfn, READ)))
    for _ in range(5):
        vmm.ask("statistics")
    return not vp.is_readable()


WHOLE_MEMORY = {"start_uaddr": UADDR, "length": PAGES * PAGE}
"""The fields of an invalidation of all that `add_memory` backs."""


def pages(start_uaddr: int, page_count: int) -> dict[str, object]:
    """The fields of an invalidation of these pages."""
    return {"start_uaddr": start_uaddr, "length": page_count * PAGE}


def region(start_gfn: int, page_count: int, start_uaddr: int, **more: object) -> dict[str, object]:
    """The fields of `add_region`."""
    ranges = {"start_gfn": start_gfn, "page_count": page_count, "start_uaddr": start_uaddr}
    return {**ranges, "kind": "movable", "writable": True, "executable": False, **more}


def vma(start_uaddr: int, page_count: int, start_pfn: int = PFN) -> dict[str, object]:
    """The fields of `map_vma`, for memory that may be read and written."""
    ranges = {"start_uaddr": start_uaddr, "page_count": page_count, "start_pfn": start_pfn}
    return {**ranges, "readable": True, "writable": True, "executable": False, "io": False}
