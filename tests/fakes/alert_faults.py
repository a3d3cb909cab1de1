"""What each alert is for, done to a real daemon whose metrics a real Prometheus scrapes.

Owns the faults: each is a generator that first waits for what must have been scraped before, and goes on with
its fault until it is closed. Must not know the alerts' conditions.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Final, NamedTuple

import pytest

from fakes import fuse_image
from fakes.daemon_process import DaemonProcess
from fakes.eventually import PATIENCE, eventually
from fakes.kept_daemon import KeptDaemon
from fakes.live_vmm import GFN, LiveVmm
from fakes.prometheus_process import PrometheusProcess
from fakes.puppet import ENVIRONMENT, Puppet
from fakes.raw_client import READ, RawConnection, Refused
from fakes.raw_vmm import MODEL, PAGE, WHOLE_MEMORY, RawVmm, region
from fakes.restore_asker import PAGES, Asker, listening
from fakes.restoring_vmm import RestoringVmm, image_bytes
from fakes.spoiling_keeper import SPOILT
from fakes.surviving_vmm import Mode, SurvivingVmm, Table
from fakes.witness import Witness
from intercept_client import ConnectionLost
from intercept_client.memory import Watch
from intercept_protocol.addresses import GfnRange, UaddrRange
from intercept_protocol.errors import WireError
from intercept_protocol.outcomes import Access

DESCRIPTORS: Final = 128
MAP_SECONDS, UNMAP_SECONDS, STOP_SECONDS = 0.2, 1.5, 0.3
WORKERS: Final = 4
MEMORY_MIB: Final = 48
"""Not much more than a daemon takes at its start."""
LIST: Final = 100
"""Regions of one request."""


class Scene(NamedTuple):
    """Where a daemon is to be, and who scrapes it."""

    directory: Path
    port: int
    instance: str
    prometheus: PrometheusProcess

    @property
    def config(self) -> str:
        return f'metrics.listen = "127.0.0.1:{self.port}"\n'

    def daemon(self, config: str = "", launch: Sequence[str] = ()) -> DaemonProcess:
        launch = launch or (sys.executable, "-m", "interceptd")
        return DaemonProcess(
            self.directory, config=self.config + config, launch=launch, environment=ENVIRONMENT
        )

    def troubled(self, trouble: str) -> DaemonProcess:
        return self.daemon(launch=(sys.executable, "-m", "fakes.troubled_daemon", trouble))

    def scraped(self, metric: str) -> float | None:
        return self.prometheus.value(f'{metric}{{instance="{self.instance}"}}')

    def wait_scraped(self, metric: str, value: float) -> None:
        eventually(lambda: self.scraped(metric), value)


@contextmanager
def again_and_again(do: Callable[[], object]) -> Iterator[None]:
    """In a thread, until the block is left. Ends early if the daemon does."""
    over = threading.Event()

    def run() -> None:
        with suppress(OSError, EOFError):
            while not over.is_set():
                do()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(PATIENCE)


class SlowTable(Table):
    """Of a hypervisor that takes long."""

    def __init__(self, map_seconds: float, unmap_seconds: float) -> None:
        super().__init__()
        self._map_seconds, self._unmap_seconds = map_seconds, unmap_seconds
        self._never = threading.Event()

    def map(self, gfns: GfnRange, uaddrs: UaddrRange, access: Access, start_pfn: int | None) -> None:
        self._never.wait(self._map_seconds if access else self._unmap_seconds)
        super().map(gfns, uaddrs, access, start_pfn)

    def unmap(self, gfns: GfnRange) -> None:
        self._never.wait(self._unmap_seconds)
        super().unmap(gfns)


# ------------------------------------------------ the daemon's end


def dies_and_nobody_starts_it_again(scene: Scene) -> Iterator[None]:
    with scene.daemon() as daemon, Witness(daemon.wait_serving().socket):
        scene.wait_scraped("interceptd_partitions", 1)
        daemon.signal(signal.SIGKILL)
        yield


def dies_four_times(scene: Scene) -> Iterator[None]:
    with (
        KeptDaemon(scene.directory, config=scene.config) as kept,
        SurvivingVmm(kept.wait_serving().socket, Mode.DECLARED),
    ):
        start = 0.0
        for _ in range(4):
            eventually(lambda: (scene.scraped("process_start_time_seconds") or 0) > start, True)  # noqa: B023
            start = scene.scraped("process_start_time_seconds") or 0
            scene.wait_scraped("interceptd_partitions", 1)
            kept.kill()
        yield


def dies_with_what_it_had_and_is_started_anew(scene: Scene) -> Iterator[None]:
    with scene.daemon() as daemon, Witness(daemon.wait_serving().socket):
        scene.wait_scraped("interceptd_partitions", 1)
        daemon.signal(signal.SIGKILL)
        daemon.wait_ended()
        with scene.daemon() as another:
            another.wait_serving()
            yield


def cannot_read_what_its_predecessor_left(scene: Scene) -> Iterator[None]:
    with (
        KeptDaemon(
            scene.directory, config=scene.config, launch=(sys.executable, "-m", "fakes.spoiling_keeper")
        ) as kept,
        ExitStack() as vmms,
    ):
        kept.wait_serving()
        for _ in range(len(SPOILT) + 2):
            vmms.enter_context(SurvivingVmm(kept.socket, Mode.DECLARED))
        scene.wait_scraped("interceptd_partitions", len(SPOILT) + 2)
        kept.kill()
        yield


# ------------------------------------------------ intercepts and invalidations


def a_hypervisor_refuses_an_unmap(scene: Scene) -> Iterator[None]:
    with scene.daemon() as daemon, SurvivingVmm(daemon.wait_serving().socket, Mode.DECLARED_VMM) as vmm:
        region = vmm.add(vmm.new_region(3))
        vmm.touch(region)
        scene.wait_scraped("interceptd_partitions_lost_total", 0)

        def refuse() -> None:
            raise WireError(errno.EIO, "the page tables are gone")

        vmm.table.meanwhile = refuse
        with suppress(ConnectionLost):
            vmm.remove(region)
        yield


def a_hypervisor_refuses_a_map(scene: Scene) -> Iterator[None]:
    with scene.daemon() as daemon, SurvivingVmm(daemon.wait_serving().socket, Mode.DECLARED_VMM) as vmm:
        region = vmm.add(vmm.new_region(3))
        vmm.table.refuse(region.uaddrs.start)
        scene.wait_scraped("interceptd_partitions", 1)
        assert vmm.ask(region.gfns.start)[0] == "fail"
        yield


def an_invalidation_stays_open(scene: Scene) -> Iterator[None]:
    with (
        scene.daemon() as daemon,
        RawVmm(daemon.wait_serving().socket, invalidate_timeout_ms=50) as vmm,
        vmm.vp() as vp,
    ):
        vmm.add_memory()
        vmm.notifier().ask("invalidate_begin", WHOLE_MEMORY)
        with again_and_again(lambda: vp.intercept(GFN)):
            yield


def a_hypervisor_is_slow(scene: Scene) -> Iterator[None]:
    table = SlowTable(MAP_SECONDS, UNMAP_SECONDS)
    with (
        scene.daemon() as daemon,
        SurvivingVmm(daemon.wait_serving().socket, Mode.DECLARED_VMM, table) as vmm,
    ):
        regions = [vmm.add(vmm.new_region(1)) for _ in range(5)]

        def touch_and_invalidate() -> None:
            for region in regions:
                vmm.touch(region)
            vmm.notifier.invalidate(regions[0].uaddrs)

        with again_and_again(touch_and_invalidate):
            yield


# ------------------------------------------------ restored guests


@contextmanager
def restored(scene: Scene, daemon: DaemonProcess, **options: object) -> Iterator[RestoringVmm]:
    """A VMM that has handed over its memory, of which no page is in."""
    if os.geteuid() != 0 or not Path("/dev/userfaultfd").exists():
        pytest.skip("needs /dev/userfaultfd, which root alone may open")
    with RawConnection(daemon.wait_serving().socket) as connection:
        scene.wait_scraped("interceptd_partitions", 0)
        asker = Asker(connection, scene.directory)
        asker.restore(**options)
        with RestoringVmm(asker.listener, [PAGES]) as vmm:
            yield vmm


def has_an_image_that_does_not_answer(scene: Scene) -> Iterator[None]:
    if (reason := fuse_image.needs()) is not None:
        pytest.skip(reason)
    content = scene.directory / "content"
    content.write_bytes(image_bytes(PAGES))
    with (
        fuse_image.fuse_image(content) as image,
        scene.daemon() as daemon,
        RawConnection(daemon.wait_serving().socket) as connection,
    ):
        asker = Asker(connection, scene.directory)
        with listening(asker.listener) as listener:
            asker.ask(image.file, listener.fileno())
        with RestoringVmm(asker.listener, [PAGES]) as vmm:
            image.reads(fuse_image.Order.HOLD)
            vmm.say("read", 0, 1)
            try:
                yield
            finally:  # or the daemon cannot end
                image.reads(fuse_image.Order.SERVE)


def has_an_image_that_fails(scene: Scene) -> Iterator[None]:
    with scene.daemon() as daemon, restored(scene, daemon) as vmm:
        os.truncate(scene.directory / "image", 0)
        vmm.say("read", 0, 1)
        yield


def fails_a_restored_guest(scene: Scene) -> Iterator[None]:
    with scene.troubled("failing_restores") as daemon, restored(scene, daemon):
        yield


def waits_for_a_vmm_in_vain(scene: Scene) -> Iterator[None]:
    with scene.daemon() as daemon, RawConnection(daemon.wait_serving().socket) as connection:
        scene.wait_scraped("interceptd_partitions", 0)
        Asker(connection, scene.directory).restore(connect_timeout_ms=1)
        yield


# ------------------------------------------------ the event loop and its threads


def gets_no_cpu(scene: Scene) -> Iterator[None]:
    with scene.daemon() as daemon:
        daemon.wait_serving()
        never = threading.Event()

        def hold_up() -> None:
            daemon.signal(signal.SIGSTOP)
            never.wait(STOP_SECONDS)
            daemon.signal(signal.SIGCONT)
            never.wait(STOP_SECONDS)

        with again_and_again(hold_up):
            yield


def has_long_steps(scene: Scene) -> Iterator[None]:
    with (
        scene.troubled("long_steps") as daemon,
        Witness(daemon.wait_serving().socket) as witness,
        again_and_again(witness.serve),
    ):
        yield


def has_workers_that_wait(scene: Scene) -> Iterator[None]:
    with scene.troubled("held_mmap_locks") as daemon, Puppet() as vmm:
        vmm.do(LiveVmm.connect, daemon.wait_serving().socket)
        vmm.do(LiveVmm.attach, Watch.NONE, promise=True)
        vmm.do(LiveVmm.add_region, GFN, vmm.do(LiveVmm.map, WORKERS))
        daemon.signal(signal.SIGUSR1)
        faults = [vmm.start(LiveVmm.fault, GFN + n, READ, n) for n in range(WORKERS)]
        yield
        del faults


def has_a_vmm_without_userfaultfd(scene: Scene) -> Iterator[None]:
    """It promises nothing either, like one in a container that knows no better."""
    with scene.daemon() as daemon, Puppet() as vmm:
        vmm.do(LiveVmm.connect, daemon.wait_serving().socket)
        vmm.do(LiveVmm.attach, Watch.NONE, promise=False)
        yield


# ------------------------------------------------ limits


def reaches_a_limit(scene: Scene) -> Iterator[None]:
    with scene.daemon("limits.partitions_per_uid = 1\n") as daemon, RawVmm(daemon.wait_serving().socket):
        scene.wait_scraped("interceptd_partitions", 1)
        with RawConnection(daemon.socket) as another:
            another.say_hello("vmm")
            assert another.refusal("create_partition", MODEL).details["limit"] == "partitions_per_uid"
            yield


def has_a_uid_that_takes_all_memory(scene: Scene) -> Iterator[None]:
    config = f"limits.memory_mib = {MEMORY_MIB}\n"
    with scene.daemon(config) as daemon, RawVmm(daemon.wait_serving().socket) as vmm:
        with pytest.raises(Refused) as refused:
            add_regions_for_ever(vmm)
        assert refused.value.refusal.details["limit"] == "memory_mib"
        yield


def add_regions_for_ever(vmm: RawVmm) -> None:
    for first in count(0, 2 * LIST):
        gfns = range(first, first + 2 * LIST, 2)
        vmm.ask("change_regions", remove=[], add=[region(gfn, 1, gfn * PAGE) for gfn in gfns])


# ------------------------------------------------ connections


def is_asked_by_strangers(scene: Scene) -> Iterator[None]:
    with scene.daemon() as daemon:
        daemon.wait_serving()

        def ask() -> None:
            with RawConnection(daemon.socket) as stranger:
                stranger.send(b"GET / HTTP/1.1\r\n\r\n")
                stranger.farewell()

        with again_and_again(ask):
            yield


def has_few_descriptors(scene: Scene) -> Iterator[None]:
    limit = ("prlimit", f"--nofile={DESCRIPTORS}:{DESCRIPTORS}", sys.executable, "-m", "interceptd")
    with scene.daemon(launch=limit) as daemon, RawVmm(daemon.wait_serving().socket) as vmm:
        index = 0
        while daemon.footprint().descriptors <= 0.72 * DESCRIPTORS:  # VMMs may take three quarters
            vmm.vp(index)
            index += 1
        yield


FAULTS: Final[dict[str, Sequence[Callable[[Scene], Iterator[None]]]]] = {
    "InterceptdDown": [dies_and_nobody_starts_it_again],
    "InterceptdRestarts": [dies_four_times],
    "InterceptdPartitionsEnded": [
        dies_with_what_it_had_and_is_started_anew,
        cannot_read_what_its_predecessor_left,
    ],
    "InterceptdPartitionLost": [a_hypervisor_refuses_an_unmap],
    "InterceptdInterceptsFail": [a_hypervisor_refuses_a_map],
    "InterceptdMemoryNotWatched": [has_a_vmm_without_userfaultfd],
    "InterceptdRestoredGuestWaits": [has_an_image_that_does_not_answer],
    "InterceptdImageFails": [has_an_image_that_fails],
    "InterceptdGuestLeftFrozen": [fails_a_restored_guest],
    "InterceptdRestoresNotClaimed": [waits_for_a_vmm_in_vain],
    "InterceptdRetries": [an_invalidation_stays_open],
    "InterceptdInterceptsSlow": [a_hypervisor_is_slow],
    "InterceptdInvalidationsSlow": [a_hypervisor_is_slow],
    "InterceptdEventLoopLags": [gets_no_cpu],
    "InterceptdLongSteps": [has_long_steps],
    "InterceptdWorkersStuck": [has_workers_that_wait],
    "InterceptdConnectionsRefused": [is_asked_by_strangers],
    "InterceptdLimitReached": [reaches_a_limit],
    "InterceptdMemoryRunsOut": [has_a_uid_that_takes_all_memory],
    "InterceptdDescriptorsRunOut": [has_few_descriptors],
}
"""By alert."""
