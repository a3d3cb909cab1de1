"""The software hypervisor, with map hypercalls that fail where a test says.

Owns which calls fail; the real hypervisor rolls back what the calls before them did. Must not know what is
right.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from intercept_protocol.messages import Remap
from interceptd.hypervisor.hv_status import HvStatus
from interceptd.hypervisor.software import MAP_BATCH_GFNS, SoftwareHypervisor
from interceptd.ledger.journal import Journal
from interceptd.pages.mapping import Mapping as MappedPages


class FailingHypervisor(SoftwareHypervisor):
    """The n-th map hypercall, counted from 1, fails with the status in `failing_calls`, and maps nothing of
    its own batch."""

    def __init__(
        self,
        *,
        remap: Remap,
        pool_pages: int,
        pool_limit: Callable[[], int],
        failing_calls: Mapping[int, HvStatus] | None = None,
        journal: Journal | None = None,
    ) -> None:
        super().__init__(remap=remap, pool_pages=pool_pages, pool_limit=pool_limit, journal=journal)
        self._failing_calls = failing_calls or {}

    def _map_hypercalls(self, mapping: MappedPages) -> tuple[int, HvStatus]:
        before = self._map_calls
        completed, status = super()._map_hypercalls(mapping)
        failing = min((n for n in self._failing_calls if before < n <= self._map_calls), default=None)
        if failing is None:
            return completed, status
        self._map_calls = failing
        return (failing - before - 1) * MAP_BATCH_GFNS, self._failing_calls[failing]
