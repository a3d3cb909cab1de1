"""Measures how long each map and unmap of a hypervisor takes.

Owns one wrapper with the behaviour of the hypervisor inside. Must not know who reads the figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter_ns

from intercept_protocol.addresses import GfnRange
from interceptd.hypervisor import Hypervisor, HypervisorCounters
from interceptd.pages.mapping import Mapping
from interceptd.telemetry.counters import PortCalls


class MeasuredHypervisor:
    """Counts a refused call like any other."""

    def __init__(self, inner: Hypervisor, calls: PortCalls) -> None:
        self._inner = inner
        self._calls = calls
        self.may_block = inner.may_block

    @property
    def pieces_per_call(self) -> int:
        return self._inner.pieces_per_call

    async def map_gpas(self, mappings: Sequence[Mapping]) -> None:
        began = perf_counter_ns()
        try:
            await self._inner.map_gpas(mappings)
        finally:
            self._calls.map_gpa.record(perf_counter_ns() - began)

    async def unmap_gpas(self, ranges: Sequence[GfnRange]) -> None:
        began = perf_counter_ns()
        try:
            await self._inner.unmap_gpas(ranges)
        finally:
            self._calls.unmap_gpa.record(perf_counter_ns() - began)

    def translate(self, gfn: int) -> Mapping | None:
        return self._inner.translate(gfn)

    async def discard(self) -> None:
        await self._inner.discard()

    def counters(self) -> HypervisorCounters:
        return self._inner.counters()
