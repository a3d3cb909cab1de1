"""A daemon that stops at a barrier, so that a test can observe what happens meanwhile.

Owns the places; what it runs otherwise is the real command. Arguments: the place, the barrier's directory,
and those of `interceptd`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

import trio

from fakes.barrier import Barrier
from intercept_protocol.addresses import UaddrRange
from intercept_protocol.outcomes import Access
from interceptd.address_space import Unresolved, process
from interceptd.address_space.attachment import Attachment
from interceptd.cli import main
from interceptd.hypervisor.software import SoftwareHypervisor
from interceptd.pages.mapping import Mapping as GuestMapping


def in_the_hypervisor(barrier: Barrier) -> None:
    """Every taking away of movable memory stops, with the region lock held."""
    map_gpas = SoftwareHypervisor.map_gpas

    async def held(self: SoftwareHypervisor, mappings: Sequence[GuestMapping]) -> None:
        if mappings[0].access is Access.NONE and self.counters().mapped_gfns:
            barrier.arrive()
            await trio.lowlevel.wait_readable(barrier.passes)
            barrier.pass_through()
        await map_gpas(self, mappings)

    SoftwareHypervisor.map_gpas = held  # type: ignore[method-assign]


def in_resolve(barrier: Barrier) -> None:
    """Every look at the VMM's memory stops in its worker thread, with the answer in hand."""
    look = process._lookup

    def held(
        attachment: Attachment, page: int, window: UaddrRange, region: UaddrRange
    ) -> process.Found | Unresolved:
        found = look(attachment, page, window, region)
        barrier.arrive()
        barrier.pass_through()
        return found

    process._lookup = held


PLACES: Final[Mapping[str, Callable[[Barrier], None]]] = {
    "in-the-hypervisor": in_the_hypervisor,
    "in-resolve": in_resolve,
}


def launch(place: str, directory: Path) -> tuple[str, ...]:
    """The command of a daemon that is held at `place`, no arguments; run with `puppet.ENVIRONMENT`."""
    return sys.executable, "-m", "fakes.held_daemon", place, str(directory)


if __name__ == "__main__":
    PLACES[sys.argv.pop(1)](Barrier(Path(sys.argv.pop(1))))
    main()
