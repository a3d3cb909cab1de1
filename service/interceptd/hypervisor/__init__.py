"""The port to whoever edits the SLAT.

Owns the contract, seen from the region manager, which is its only caller and calls under its lock. Must not
know regions or uaddr invalidations.
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
    """Edits guest mappings. Both operations are on ranges and may block, bounded by the implementation."""

    async def map_gpa(self, mapping: Mapping) -> None:
        """Make the guest reach `mapping`, or nothing if it has no rights (NO_ACCESS).

        What was mapped there before is replaced; under remap `error`, a gfn that the guest can reach is not
        mapped again with access. On `HypervisorError` all is as it was before the call: this call's own
        batches are undone, and the extents that they replaced, NO_ACCESS included, are put back.
        """

    async def unmap_gpa(self, gfns: GfnRange) -> None:
        """Leave the guest nothing in `gfns`. Gfns that are not mapped are skipped, so it may be repeated.

        On `HypervisorError` nobody knows what the guest still reaches: the partition cannot go on.
        """

    @property
    def may_block(self) -> bool:
        """Whether one of the two may wait for anybody; if not, each is one step without a checkpoint."""

    def translate(self, gfn: int) -> Mapping | None:
        """What the guest would reach at `gfn`; None for nothing."""

    def counters(self) -> HypervisorCounters:
        """A snapshot."""
