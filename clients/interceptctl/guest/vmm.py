"""What scenarios need of a VMM, in whatever language it is.

Owns the interface; must not know KVM, nor what is right. Addresses are the guest's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from types import TracebackType
from typing import Final, Protocol, Self

from intercept_client.kvm import Stop
from intercept_protocol.messages import RequestedKind
from intercept_protocol.outcomes import AnyAnswer

from .programs import Program

ENTRY: Final = 0x1000
PROGRAM_BYTES: Final = 0x100
"""Room for the program of one vCPU, in RAM from `ENTRY` on; each has its own copy."""
RAM_PAGES: Final = 16
BAR_GFN: Final = 0x200
"""2 MiB: the default address of a BAR."""
SCRATCH_GPA: Final = 0xFEB0_0000
"""Of the emulated device that a VMM answers for without asking the daemon."""
STRANGERS: Final = 0x99
"""Each byte of a stranger's memory."""


class Memory(Protocol):
    """Memory that the guest is shown, from a file that stays readable after an unmap; a region of its own."""

    @property
    def gpa(self) -> int: ...

    def read(self, offset: int, size: int) -> bytes: ...

    def write(self, offset: int, data: bytes) -> None: ...

    def word(self, offset: int) -> int:
        """Four bytes, little endian."""

    def move(self, gfn: int) -> None:
        """Remove the region, and add it at `gfn`."""

    def unmap(self) -> None:
        """Unmap it, announced, and remove the region."""

    def reuse(self) -> None:
        """After `unmap`: map a stranger's memory at its address."""

    def hand_over(self) -> None:
        """The address becomes a stranger's and the region goes, in one announced change."""

    def take_back(self) -> None:
        """After `hand_over`: the address and the region are as before."""


class Reports(Protocol):
    """What guests wrote to the report port."""

    @property
    def kept(self) -> list[int]:
        """The latest, oldest first."""

    def take_values(self) -> set[int]:
        """Each value that was reported since this was called last."""

    def wait(self, more: int = 1) -> list[int]:
        """Block until `more` further ones have come; returns them. Raises TimeoutError."""

    def wait_for(self, value: int) -> None:
        """Block until `value` is reported from now on. Raises TimeoutError."""


class Tally(Protocol):
    """What a vCPU did, in numbers."""

    @property
    def exits(self) -> Counter[str]:
        """By kind."""

    @property
    def intercepts(self) -> Counter[AnyAnswer]: ...

    @property
    def completed(self) -> int:
        """Accesses completed on the VMM's memory."""

    @property
    def forwarded(self) -> int:
        """Accesses that a device answered, or the bus where there is none."""

    @property
    def replayed(self) -> int:
        """Locked instructions that were run again."""

    @property
    def first_touches(self) -> Sequence[float]:
        """Seconds from an exit that led to a map until the guest could continue."""


class Vcpu(Protocol):
    @property
    def tally(self) -> Tally:
        """As it is now."""


class Running(Protocol):
    """A vCPU's run."""

    def result(self, timeout: float | None = None) -> Stop:
        """Block until it has ended; returns why. Raises TimeoutError after `timeout` seconds."""


class Vmm(Protocol):
    """One guest. Closing it stops its vCPUs first."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    @property
    def ram(self) -> Memory: ...

    @property
    def reports(self) -> Reports: ...

    @property
    def vcpus(self) -> Sequence[Vcpu]: ...

    @property
    def scratch_accesses(self) -> int: ...

    @property
    def memslots(self) -> int: ...

    def add_bar(
        self,
        page_count: int,
        *,
        at: int = BAR_GFN,
        kind: RequestedKind = RequestedKind.MMIO,
        writable: bool = True,
        executable: bool = False,
    ) -> Memory:
        """New memory, a region at gfn `at`."""

    def add_vcpu(self, program: Program, **registers: int) -> Vcpu:
        """A vCPU that will run `program`, its registers (`esi=...`) as given."""

    def start(self) -> Sequence[Running]:
        """Run all vCPUs that are not running."""

    def stop(self) -> list[Stop]:
        """Stop all vCPUs, and return why each stopped."""

    def mmio_exits(self, index: int) -> int | None:
        """Of a vCPU, by KVM's own count; None where the kernel has none."""

    def survived(self) -> tuple[int, int]:
        """How many restarts of the daemon, and how many invalidations are open."""
