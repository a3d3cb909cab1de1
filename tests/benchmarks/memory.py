"""What the daemon's memory grows by for one more of each thing that it counts, with a keeper and without.

Owns these measurements; `interceptd.memory_budget` has constants above what they find. The growth is that of
the resident set, in which a ledger counts as well. `python tests/benchmarks/memory.py`, one minute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from declared import create_partition
from report import CONSOLE
from rich.table import Table
from running import Place, child_of, daemon_command, kept_daemon, resident_kib, server

from intercept_client import BlockingNotifier, BlockingVmm, BlockingVp, DeclaredVma, NewRegion
from intercept_protocol.addresses import GfnRange, UaddrRange
from intercept_protocol.messages import InvalidateBegin, RequestedKind
from intercept_protocol.outcomes import Access
from interceptd.memory_budget import Cost

MANY, LIST, CONNECTED = 40_000, 128, 128
WARM_UP: Final = 4


class Vmm:
    """A VMM whose requests make more of one thing."""

    def __init__(self, path: Path, held: ExitStack) -> None:
        self._path = path
        self._held = held
        self._client = held.enter_context(BlockingVmm.open(path))
        self._partition = create_partition(self._client)

    def regions(self, count: int) -> None:
        """Movable, of a page each, with a gap between any two."""
        regions = [
            NewRegion(
                gfns=GfnRange.of(page, 1),
                uaddrs=UaddrRange(start=page, end=page + 1),
                kind=RequestedKind.MOVABLE,
                writable=True,
                executable=False,
            )
            for page in range(0, 2 * count, 2)
        ]
        for begin in range(0, count, LIST):
            self._client.add_regions(regions[begin : begin + LIST])

    def vmas(self, count: int) -> None:
        """Of a page each, with a gap between any two."""
        vmas = [
            DeclaredVma(UaddrRange(start=page, end=page + 1), page, Access.READ)
            for page in range(0, 2 * count, 2)
        ]
        for begin in range(0, count, LIST):
            self._client.map_vmas(vmas[begin : begin + LIST])

    def mappings(self, count: int) -> None:
        """Of a page each, in one movable region: what is between any two is an entry of the SLAT, too."""
        self._client.add_region(
            GfnRange.of(0, 2 * count),
            UaddrRange(start=0, end=2 * count),
            RequestedKind.MOVABLE,
            writable=False,
            executable=False,
        )
        self._client.prefault(GfnRange.of(0, 2 * count))

    def invalidations(self, count: int) -> None:
        notifier = self._held.enter_context(BlockingNotifier.open(self._path, self._partition))
        for page in range(0, 2 * count, 2):
            notifier.call(InvalidateBegin(start_uaddr=page << 12, length=4096))

    def notifiers(self, count: int) -> None:
        for _ in range(count):
            self._held.enter_context(BlockingNotifier.open(self._path, self._partition))

    def vps(self, count: int) -> None:
        for index in range(count):
            self._held.enter_context(BlockingVp.open(self._path, self._partition, vp_index=index))

    def partitions(self, count: int) -> None:
        for _ in range(count):
            create_partition(self._held.enter_context(BlockingVmm.open(self._path, name="n" * 64)))


@contextmanager
def daemon(scratch: Path, *, is_kept: bool) -> Iterator[tuple[Path, int]]:
    """Its socket and pid."""
    with TemporaryDirectory(dir=scratch) as directory, ExitStack() as running:
        path = Path(directory, "vmm.sock")
        if is_kept:
            yield path, child_of(running.enter_context(kept_daemon(path, Place.ANY_CPU)))
        else:
            yield path, running.enter_context(server(daemon_command(path), path, Place.ANY_CPU)).pid


def bytes_of_one(
    scratch: Path,
    make: Callable[[Vmm, int], None],
    count: int,
    before: Callable[[Vmm, int], None] | None,
    *,
    is_kept: bool,
) -> float:
    """How much the daemon grows by for each of `count` that `make` makes, after `before`."""
    with daemon(scratch, is_kept=is_kept) as (path, pid), ExitStack() as held:
        for _ in range(WARM_UP):
            Vmm(path, held)
        vmm = Vmm(path, held)
        if before is not None:
            before(vmm, count)
        at_first = resident_kib(pid)
        make(vmm, count)
        return (resident_kib(pid) - at_first) * 1024 / count


def main() -> None:
    table = Table("one more", "bytes without a keeper", "with", "Cost", title_justify="left")
    with TemporaryDirectory(prefix="interceptd-memory-") as directory:
        for name, make, count, before, cost in (
            ("region", Vmm.regions, MANY, None, Cost.REGION),
            ("VMA", Vmm.vmas, MANY, None, Cost.VMA),
            ("mapping", Vmm.mappings, MANY, Vmm.vmas, Cost.MAPPING),
            ("open invalidation", Vmm.invalidations, 1024, None, Cost.OPEN_INVALIDATION),
            ("notifier", Vmm.notifiers, 64, None, Cost.CONNECTION),
            ("VP", Vmm.vps, CONNECTED, None, Cost.CONNECTION + Cost.VP),
            (
                "VMM with a partition",
                Vmm.partitions,
                CONNECTED,
                None,
                Cost.CONNECTION + Cost.VMM + Cost.PARTITION,
            ),
        ):
            unkept, kept = (
                bytes_of_one(Path(directory), make, count, before, is_kept=is_kept)
                for is_kept in (False, True)
            )
            table.add_row(name, f"{unkept:,.0f}", f"{kept:,.0f}", f"{cost:,}")
    CONSOLE.print(table)


if __name__ == "__main__":
    main()
