"""The longest step of the event loop for each request among maximal partitions. Part of `make bench-scale`.

Owns a daemon in this process, partitions filled to the limits of their uid, and an instrument that reads the
thread's CPU time around each step: neither the machine nor the clients, which are other threads, count. What
fills a partition is the daemon's own code, called without the wire. Can be run by itself.
"""

from __future__ import annotations

import gc
import socket
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click
import trio
from report import CONSOLE
from rich.table import Table

from intercept_client import BlockingNotifier, BlockingOperator, BlockingVmm, BlockingVp
from intercept_protocol.addresses import GfnRange, UaddrRange
from intercept_protocol.errors import WireError
from intercept_protocol.events import EventName
from intercept_protocol.messages import (
    AddressSpaceKind,
    Histograms,
    HypervisorKind,
    MmioGranularity,
    PartitionCredentials,
    RegionKind,
    VpSelection,
)
from intercept_protocol.outcomes import Access
from interceptd.address_space.declared import DeclaredAddressSpace, Vma
from interceptd.config.live import Settings
from interceptd.config.schema import Config, Log, Metrics
from interceptd.connections.listen_address import ListenAddress
from interceptd.daemon import Daemon
from interceptd.hypervisor import HypervisorError
from interceptd.logs.configure import configure_logs
from interceptd.memory.attempt import Attempt
from interceptd.memory.region import KindOrigin, Region
from interceptd.partition.partition import Partition
from interceptd.process import Reloader
from interceptd.systemd.notify import ServiceManager

LIMIT = 1 << 20
RW = Access.READ | Access.WRITE
VPS = 256
PARTITIONS = 64
PIECES = 64
FREE = 1 << 30
"""A page that nothing lies behind."""
COLLECTION = "a full pass of the garbage collector"
"""Which the daemon makes while few are connected."""
BATCH = 256
"""Pages that are filled before the daemon's other tasks run."""


class LongestStep(trio.abc.Instrument):
    """In CPU time, of any task since `forget`. A round is what all tasks did between two looks at the I/O."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self.step_ns = self.round_ns = self._this_round = 0
        self.task = ""
        self._began = time.thread_time_ns()

    def found(self) -> tuple[int, int, str]:
        """Nanoseconds of the longest step and of the longest round, and the step's task."""
        return self.step_ns, self.round_ns, self.task

    def after_io_wait(self, timeout: float) -> None:  # noqa: ARG002 - trio's signature
        self._this_round = 0
        self._began = time.thread_time_ns()

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        now = time.thread_time_ns()
        took, self._began = now - self._began, now
        self._this_round += took
        self.round_ns = max(self.round_ns, self._this_round)
        if took > self.step_ns:
            self.step_ns, self.task = took, task.name.rpartition(".")[2]


@dataclass
class Bench:
    """The running daemon, from a client's thread."""

    daemon: Daemon
    reloader: Reloader
    token: trio.lowlevel.TrioToken
    longest: LongestStep
    path: Path

    def section(self, title: str) -> None:
        """Begin a table."""
        self._table = Table("", "step, ms", "round, ms", "task", title=title, title_justify="left")

    def show(self) -> None:
        CONSOLE.print(self._table)

    def run(self, work: Callable[[], Awaitable[object]]) -> None:
        """In the daemon's event loop."""
        trio.from_thread.run(work, trio_token=self.token)

    def row(self, name: str, request: Callable[[], object]) -> None:
        """Measure `request`; a refusal is an answer like any other."""
        trio.from_thread.run_sync(self.longest.forget, trio_token=self.token)
        with suppress(WireError):
            request()
        step, whole, task = trio.from_thread.run_sync(self.longest.found, trio_token=self.token)
        self._table.add_row(name, f"{step / 1e6:.2f}", f"{whole / 1e6:.2f}", task)

    def find(self, credentials: PartitionCredentials) -> Partition:
        found = self.daemon.partitions.find(credentials.partition_id)
        assert found is not None
        return found


# ------------------------------------------------ filling


def region(first: int, pages: int, uaddr_page: int) -> Region:
    uaddrs = UaddrRange(start=uaddr_page, end=uaddr_page + pages)
    gfns = GfnRange(start=first, end=first + pages)
    return Region(gfns, uaddrs, RegionKind.MMIO, KindOrigin.STATED, RW)


async def fill(partition: Partition, count: int, regions: Iterable[Region]) -> None:
    """`count` VMAs of a page, and these regions."""
    memory = partition.memory
    assert isinstance(memory, DeclaredAddressSpace)
    for page in range(count):
        memory.map_vma(Vma(page, page + 1, 2 * page, RW, io=True))
        if page % BATCH == 0:
            await trio.lowlevel.checkpoint()
    for added in regions:
        await partition.regions.add(added)
        if added.gfns.start % BATCH == 0:
            await trio.lowlevel.checkpoint()


async def touch(partition: Partition, count: int) -> None:
    """Map the first `count` gfns, each as its own mapping, although they may lie in one region."""
    for gfn in range(count):
        found = partition.faults.lookup(gfn, Access.READ)
        assert isinstance(found, Region)
        uaddrs = found.uaddrs_of(GfnRange(start=gfn, end=gfn + 1))
        attempt = partition.regions.begin(found, gfn, Access.READ)
        extent = await partition.address_space.resolve(uaddrs.start, uaddrs, found.uaddrs)
        assert isinstance(attempt, Attempt)
        assert extent is not None
        await partition.regions.commit(attempt, [extent])
        partition.regions.finish(attempt)
        if gfn % BATCH == 0:
            await trio.lowlevel.checkpoint()


# ------------------------------------------------ clients


@contextmanager
def vmm(bench: Bench, name: str) -> Iterator[tuple[BlockingVmm, PartitionCredentials]]:
    with BlockingVmm.open(bench.path, name=name) as client:
        yield client, client.create_partition(AddressSpaceKind.DECLARED, HypervisorKind.SOFTWARE)


def ended(bench: Bench, end: Callable[[], object]) -> None:
    """Until no partition is left."""
    end()
    bench.run(bench.daemon.partitions.wait_empty)


async def announce(partition: Partition, pieces: list[UaddrRange]) -> None:
    """What so many notifier connections announce at once."""
    for piece in pieces:
        batch = partition.notifier.invalidate(piece)
    await batch.done.wait()


def lose(partition: Partition) -> None:
    """From now on the hypervisor refuses to take anything away."""

    async def refuse(_: object) -> None:
        raise HypervisorError(5, "refused")

    partition.hypervisor.unmap_gpas = refuse  # type: ignore[method-assign, assignment]


def operators_requests(bench: Bench, partition_id: int) -> None:
    with BlockingOperator.open(bench.path.with_name("operator.sock")) as operator:
        policy = partial(operator.set_policy, partition_id, mmio_granularity=MmioGranularity.VMA)
        bench.row("list", operator.list_partitions)
        bench.row("inspect", partial(operator.inspect_partition, partition_id))
        bench.row("statistics of the daemon", operator.statistics)
        bench.row("histograms", partial(operator.call, Histograms(partition_id=partition_id)))
        bench.row("set_policy", policy)
        bench.row("subscribe", partial(operator.subscribe, list(EventName)))
    bench.row("scrape", partial(scrape, bench.path.with_name("metrics.sock")))
    bench.row("reload", partial(bench.run, partial(bench.reloader.reload, bench.daemon.status)))


def scrape(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as asking:
        asking.connect(str(path))
        asking.sendall(b"GET /metrics HTTP/1.1\r\nHost: daemon\r\nConnection: close\r\n\r\n")
        while asking.recv(1 << 16):
            pass


async def collect() -> None:
    gc.collect()


# ------------------------------------------------ partitions


def pages(bench: Bench, most: int) -> None:
    """A region, a VMA and a mapping for each page; 256 VPs."""
    everything = UaddrRange(start=0, end=most)
    page, free = UaddrRange(start=0, end=1), UaddrRange(start=FREE, end=FREE + 1)
    with ExitStack() as held:
        client, credentials = held.enter_context(vmm(bench, "pages"))
        partition = bench.find(credentials)
        for index in range(VPS):
            held.enter_context(BlockingVp.open(bench.path, credentials, vp_index=index))
        bench.run(partial(fill, partition, most, (region(gfn, 1, gfn) for gfn in range(most - 1))))
        bench.run(partial(touch, partition, most - 1))
        bench.section(f"{most:,} regions, VMAs and mappings of a page each, {VPS} VPs")
        operators_requests(bench, credentials.partition_id)
        gfns = GfnRange(start=FREE, end=FREE + 1)
        bench.row("add_region", partial(add, client, gfns, free))
        bench.row("remove_region", partial(client.remove_region, gfns, free))
        bench.row(
            "add_region in the way",
            partial(add, client, GfnRange(start=0, end=FREE), UaddrRange(start=FREE, end=2 * FREE)),
        )
        bench.row("map_vma in the way of all", partial(client.map_vma, everything, 0, RW))
        bench.row("unmap_vma of one", partial(client.unmap_vma, page))
        bench.row("map_vma", partial(client.map_vma, page, 0, RW, io=True))
        bench.row("statistics", client.statistics)
        bench.row("translate", partial(client.translate, most // 2))
        bench.row("kick all", partial(client.kick, VpSelection.ALL))
        with BlockingNotifier.open(bench.path, credentials) as notifier:
            bench.row("invalidate of nothing", partial(notifier.invalidate, free))
            bench.row("begin and end", partial(begin_and_end, notifier, page_of(most // 2)))
            pieces = [page_of(most // PIECES * piece) for piece in range(PIECES)]
            bench.row(
                f"invalidate of {PIECES} pieces", partial(bench.run, partial(announce, partition, pieces))
            )
            bench.row("protect_vma of everything", partial(client.protect_vma, everything, Access.READ))
        bench.run(partial(touch, partition, most - 1))
        bench.row("the end", partial(ended, bench, held.close))


def one_region(bench: Bench, most: int) -> None:
    everything = UaddrRange(start=0, end=most)
    with ExitStack() as held:
        client, credentials = held.enter_context(vmm(bench, "one region"))
        partition = bench.find(credentials)
        bench.run(partial(fill, partition, most, [region(0, most, 0)]))
        bench.run(partial(touch, partition, most))
        bench.section(f"one region of {most:,} pages, a VMA and a mapping for each")
        gfns = GfnRange(start=0, end=most)
        bench.row("add_region in the way", partial(add, client, gfns, everything))
        bench.row(COLLECTION, partial(bench.run, collect))
        with BlockingNotifier.open(bench.path, credentials) as notifier:
            bench.row("invalidate of everything", partial(notifier.invalidate, everything))
        bench.run(partial(touch, partition, most))
        bench.row("remove_region", partial(client.remove_region, gfns, everything))
        bench.row("add_region, pinned: all mapped", partial(add, client, gfns, everything))
        bench.row("unmap_vma of everything", partial(client.unmap_vma, everything))
        bench.row("the end", partial(ended, bench, held.close))


def aliases(bench: Bench, most: int) -> None:
    with ExitStack() as held:
        client, credentials = held.enter_context(vmm(bench, "aliases"))
        partition = bench.find(credentials)
        bench.run(partial(fill, partition, 1, (region(gfn, 1, 0) for gfn in range(most - 1))))
        bench.run(partial(touch, partition, most - 1))
        bench.section(f"{most:,} regions behind one page, all mapped")
        gfns = GfnRange(start=FREE, end=FREE + 1)
        bench.row("add_region", partial(add, client, gfns, page_of(0)))
        bench.row("remove_region", partial(client.remove_region, gfns, page_of(0)))
        with BlockingNotifier.open(bench.path, credentials) as notifier:
            bench.row("invalidate of the page", partial(notifier.invalidate, page_of(0)))
        bench.row(COLLECTION, partial(bench.run, collect))
        bench.row("the end", partial(ended, bench, held.close))


def many(bench: Bench, most: int) -> None:
    """Partitions of one uid, which end together."""
    each = most // PARTITIONS
    for lost in (False, True):
        with ExitStack() as held:
            for number in range(PARTITIONS):
                _, credentials = held.enter_context(vmm(bench, f"partition {number}"))
                partition = bench.find(credentials)
                for index in range(VPS // PARTITIONS):
                    held.enter_context(BlockingVp.open(bench.path, credentials, vp_index=index))
                bench.run(partial(fill, partition, each, (region(gfn, 1, gfn) for gfn in range(each))))
                bench.run(partial(touch, partition, each))
                if lost:
                    lose(partition)
            if lost:
                bench.row("the loss of all at once", partial(ended, bench, held.close))
            else:
                bench.section(f"{PARTITIONS} partitions with {each:,} regions, VMAs and mappings each")
                operators_requests(bench, credentials.partition_id)
                bench.row("the end of all at once", partial(ended, bench, held.close))


def page_of(page: int) -> UaddrRange:
    return UaddrRange(start=page, end=page + 1)


def add(client: BlockingVmm, gfns: GfnRange, uaddrs: UaddrRange) -> None:
    client.add_region(gfns, uaddrs, RegionKind.PINNED, writable=True, executable=False)


def begin_and_end(notifier: BlockingNotifier, uaddrs: UaddrRange) -> None:
    with notifier.invalidation(uaddrs):
        pass


# ------------------------------------------------ the daemon


LAYOUTS = {"pages": pages, "one": one_region, "aliases": aliases, "many": many}


async def measure(directory: Path, most: int, layouts: Iterable[str]) -> None:
    """Print a table for each layout."""
    path = directory / "vmm.sock"
    config = Config(
        socket=str(path),
        log=Log(level="error"),
        metrics=Metrics(listen=ListenAddress(f"unix:{directory / 'metrics.sock'}")),
    )
    configure_logs(config.log)
    settings = Settings(config)
    daemon = Daemon(settings)
    longest = LongestStep()
    reloader = Reloader(settings, lambda: config, ServiceManager())
    bench = Bench(daemon, reloader, trio.lowlevel.current_trio_token(), longest, path)
    async with trio.open_nursery() as nursery:
        await nursery.start(daemon.run)
        await daemon.started.wait()
        trio.lowlevel.add_instrument(longest)
        for layout in layouts:
            await trio.to_thread.run_sync(LAYOUTS[layout], bench, most)
            bench.show()
        daemon.drain(0)


def show(most: int = LIMIT, layouts: Iterable[str] = tuple(LAYOUTS)) -> None:
    """Measure all and print."""
    with tempfile.TemporaryDirectory(prefix="interceptd-longest-step-") as directory:
        gc.freeze()  # as the command does
        trio.run(measure, Path(directory), most, layouts)


@click.command()
@click.option("--most", default=LIMIT, show_default=True, help="Regions, VMAs and mappings.")
@click.argument("layouts", nargs=-1, type=click.Choice(tuple(LAYOUTS)))
def main(most: int, layouts: tuple[str, ...]) -> None:
    """The longest step and the longest round for each request."""
    show(most, layouts or tuple(LAYOUTS))


if __name__ == "__main__":
    main()
