"""The faults of a restored guest: reads the userfaultfd, and has each missing page brought in.

Owns the order of one message from the read to the answer, and what is tried again when. It stands where the
VPs of another guest stand. Must not know how pages are kept, or where their bytes come from.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from intercept_protocol.messages import RestoreState
from intercept_protocol.outcomes import Answer
from interceptd.address_space.image import ImageAddressSpace
from interceptd.address_space.missing_faults import MissingFaults
from interceptd.hypervisor.userfaultfd import UserfaultfdHypervisor
from interceptd.memory.fault_handler import FaultHandler
from interceptd.memory.region import Region
from interceptd.mmu_notifier import MmuNotifier
from interceptd.telemetry.event_bus import PartitionPublisher
from interceptd.telemetry.histogram import InterceptLatency

READER_INDEX = 0
"""In views it stands where VP 0 does."""


class FaultReader:
    """`regions` are all of the guest, and stay. It has the attributes of a `VirtualProcessor` that views and
    the end of a partition use."""

    index = READER_INDEX

    def __init__(
        self,
        uffd: MissingFaults,
        *,
        regions: Sequence[Region],
        faults: FaultHandler,
        notifier: MmuNotifier,
        memory: ImageAddressSpace,
        hypervisor: UserfaultfdHypervisor,
        answers: Counter[Answer],
        event_bus: PartitionPublisher,
    ) -> None:
        self._uffd = uffd
        self._regions = regions
        self._faults = faults
        self._notifier = notifier
        self._memory = memory
        self._hypervisor = hypervisor
        self._answers = answers
        self._event_bus = event_bus
        self.latency = InterceptLatency()
        self.state = "running"
        self.restore_state = RestoreState.SERVING
        self.demand_pages = 0
        self.around_pages = 0
        self.prefetched_pages = 0
        self.zero_pages = 0
        self.retries = 0

    @property
    def intercepts(self) -> int:
        return self.latency.count

    async def run(self) -> None:
        """Serve until cancelled, or until the VMM's memory is gone. Raises `PartitionLost`."""
        raise NotImplementedError

    def kick(self) -> None:
        """Nothing: no VP of it can be stopped from here."""

    def fail(self) -> None:
        """Nothing: who waits goes on when its process ends, or when another daemon serves it."""

    def drain(self) -> None:
        """Nothing, as above."""

    async def wait_quiet(self) -> None:
        """Returns at once: nobody waits for an answer on a connection."""
