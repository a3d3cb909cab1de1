"""The port to the hypervisor, which edits the SLAT.

Owns the contract, as seen from the region manager, its only caller, which calls under its lock. Must not know
regions or uaddr invalidations.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import Protocol

import msgspec

from intercept_protocol.addresses import GfnRange
from interceptd.pages.mapping import Mapping


class HypervisorError(Exception):
    """The hypervisor refused. `number` is the errno of its status; `done` counts the pieces, from the first,
    that it did before."""

    def __init__(self, number: int, message: str, *, done: int = 0) -> None:
        super().__init__(message)
        self.number = number
        self.done = done


class MemoryChanging(HypervisorError):
    """The VMM is changing its memory, or what was to be mapped is not at hand any more: nothing was decided,
    so ask again a little later. The pieces before are mapped, and stay."""

    def __init__(self, message: str, *, done: int = 0) -> None:
        super().__init__(errno.EAGAIN, message, done=done)


class HypervisorCounters(msgspec.Struct):
    """Calls and their effect; `map_calls` and `unmap_calls` count hypercalls or requests, not port calls."""

    mapped_gfns: int = 0
    no_access_gfns: int = 0
    slat_extents: int = 0
    map_calls: int = 0
    unmap_calls: int = 0
    deposits: int = 0


def named(ranges: Sequence[GfnRange]) -> str:
    """The ranges of a call, for an error: the first, and how many more there are."""
    more = f" and {len(ranges) - 1} more" if len(ranges) > 1 else ""
    return f"gfns {ranges[0]}{more}"


class Hypervisor(Protocol):
    """Edits guest mappings. Both operations take a list of ranges, disjoint, at least one and at most
    `pieces_per_call`, and do them in order. They may block: an implementation that waits bounds the wait, and
    shields it from cancellation, because nobody may see a half-made change."""

    @property
    def pieces_per_call(self) -> int:
        """How many pieces one call takes; it may change between calls."""

    async def map_gpas(self, mappings: Sequence[Mapping]) -> None:
        """Map each of `mappings`, without access if it has no rights (NO_ACCESS).

        Replaces existing mappings; under remap `error`, a gfn that the guest can access must not be mapped
        again with access. On `HypervisorError` the first `done` are mapped, and at all other gfns everything
        is as before the call: of the one that was refused, its completed batches are undone, and the extents
        that they replaced, NO_ACCESS included, are restored.
        """

    async def unmap_gpas(self, ranges: Sequence[GfnRange]) -> None:
        """Unmap everything in `ranges`. Skips gfns that are not mapped, so it may be repeated.

        After `HypervisorError` the first `done` are unmapped, and it is unknown what of the others the guest
        can still access: the partition must end.
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
