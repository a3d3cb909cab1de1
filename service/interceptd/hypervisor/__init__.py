"""The port to the hypervisor, which edits the SLAT.

Owns the contract, as seen from the region manager, its only caller, which calls under its lock. Must not know
regions or uaddr invalidations.
"""

from __future__ import annotations

from typing import Protocol

import msgspec

from intercept_protocol.addresses import GfnRange
from interceptd.pages.mapping import Mapping


class HypervisorError(Exception):
    """The hypervisor refused; `number` is the errno of its status."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


class HypervisorCounters(msgspec.Struct):
    """Calls and their effect; `map_calls` and `unmap_calls` count hypercalls or requests, not port calls."""

    mapped_gfns: int = 0
    no_access_gfns: int = 0
    slat_extents: int = 0
    map_calls: int = 0
    unmap_calls: int = 0
    deposits: int = 0


class Hypervisor(Protocol):
    """Edits guest mappings. Both operations take ranges and may block, bounded by the implementation."""

    async def map_gpa(self, mapping: Mapping) -> None:
        """Map `mapping`, without access if it has no rights (NO_ACCESS).

        Replaces existing mappings; under remap `error`, a gfn that the guest can access must not be mapped
        again with access. On `HypervisorError` everything is as before the call: its own completed batches
        are undone, and the extents that they replaced, NO_ACCESS included, are restored.
        """

    async def unmap_gpa(self, gfns: GfnRange) -> None:
        """Unmap everything in `gfns`. Skips gfns that are not mapped, so it may be repeated.

        After `HypervisorError` it is unknown what the guest can still access: the partition must end.
        """

    @property
    def may_block(self) -> bool:
        """Whether an operation may block; if not, each is one step without a checkpoint."""

    def translate(self, gfn: int) -> Mapping | None:
        """The mapping through which the guest can access `gfn`; None if it cannot."""

    async def discard(self) -> None:
        """Free what is known of an ended partition, and let others run meanwhile."""

    def counters(self) -> HypervisorCounters:
        """A snapshot."""
