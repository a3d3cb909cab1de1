"""A tenant that asks for all the memory that it can get is refused, and nobody else notices."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest

from fakes.daemon_process import DaemonProcess
from fakes.eventually import PATIENCE, eventually
from fakes.hostile_tenant import HostileTenant, Size
from fakes.kept_daemon import KeptDaemon
from fakes.live_vmm import LiveVmm
from fakes.puppet import ENVIRONMENT, Puppet
from fakes.raw_client import RawConnection, Refused
from fakes.raw_vmm import GFN, PAGE, RawVmm, region, vma
from fakes.scraper import scrape
from fakes.witness import Witness
from intercept_client import (
    Access,
    AddressSpaceKind,
    BlockingNotifier,
    BlockingVmm,
    GfnRange,
    HypervisorKind,
    RequestedKind,
    UaddrRange,
    WireError,
)
from intercept_client.memory import Watch
from interceptd.memory_budget import Cost

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")

TENANT: Final = 61001
LIMIT_MIB: Final = 96
BUDGET_MIB: Final = 72
"""Three quarters."""
CGROUPS: Final = Path("/sys/fs/cgroup/memory")
LIST: Final = 128
FAR: Final = 1 << 30


@pytest.fixture
def cgroup() -> Iterator[Path | None]:
    """Where the kernel kills what takes more than `LIMIT_MIB`; None if none can be made here."""
    group = CGROUPS / f"interceptd-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(LIMIT_MIB << 20))
    except OSError:
        yield None
        return
    yield group
    group.rmdir()


@pytest.fixture
def daemon(cgroup: Path | None) -> Iterator[DaemonProcess]:
    """In the cgroup it finds its budget itself."""
    with tempfile.TemporaryDirectory(prefix="interceptd-") as directory:
        Path(directory).chmod(0o755)  # other users may enter
        config = (
            f"socket_mode = 0o666\nallowed_uids = [0, {TENANT}]\n"
            f'metrics.listen = "unix:{directory}/metrics.sock"\n'
        )
        enter = "" if cgroup is None else f"echo $$ > {cgroup}/cgroup.procs && "
        config += f"limits.memory_mib = {BUDGET_MIB}\n" if cgroup is None else ""
        launch = ("/bin/sh", "-c", f'{enter}exec "$0" "$@"', sys.executable, "-m", "interceptd")
        with DaemonProcess(Path(directory), config=config, launch=launch) as process:
            yield process.wait_serving()
            assert process.stop() == 0


def take_everything(path: Path, _: Size) -> Iterator[None]:
    """Regions, VMAs, begins and connections, until each is refused."""
    with RawVmm(path) as vmm:
        vp, notifier = vmm.vp(), vmm.notifier()
        vmm.ask("map_vma", **vma(0, 1 << 20))
        vmm.ask("add_region", **region(0, 2, 0))
        yield
        page = iter(range(FAR, 1 << 40, 2))

        def regions(count: int) -> None:
            added = [region(gfn, 1, gfn * PAGE) for gfn in (next(page) for _ in range(count))]
            vmm.ask("change_regions", remove=[], add=added)

        def vmas(count: int) -> None:
            vmm.ask("map_vmas", vmas=[vma(next(page) * PAGE, 1) for _ in range(count)])

        def begins(_: int) -> None:
            notifier.ask("invalidate_begin", {"start_uaddr": next(page) * PAGE, "length": PAGE})

        assert [refused_limit(take) for take in (regions, vmas, begins)] == ["memory_mib"] * 3
        with RawConnection(path) as connection:
            assert connection.farewell().details["limit"] == "memory_mib"
        assert vp.intercept(1) == ["fail", "hypervisor_error"]
        yield
        vmm.ask("remove_region", start_gfn=FAR, page_count=1, start_uaddr=FAR * PAGE)
        vmm.ask("unmap_vma", start_uaddr=0, page_count=1 << 20)
        yield


def refused_limit(take: Callable[[int], None]) -> object:
    """The limit that is named when no more is given, not even one."""
    count = LIST
    while True:
        try:
            take(count)
        except Refused as refused:
            if count == 1:
                return refused.refusal.details.get("limit")
            count //= 2


def test_a_tenant_that_takes_all_memory_is_refused_and_nobody_else_notices(
    daemon: DaemonProcess, cgroup: Path | None
) -> None:
    metrics = daemon.socket.with_name("metrics.sock")
    with Witness(daemon.socket) as witness, HostileTenant(take_everything, daemon.socket, TENANT) as tenant:
        assert tenant.go_on()
        before = scrape(metrics).value("interceptd_memory_estimated_bytes")
        assert tenant.go_on()
        figures = scrape(metrics)
        budget = figures.value("interceptd_memory_budget_bytes")
        estimated = figures.value("interceptd_memory_estimated_bytes")
        assert (budget, before < estimated) == (BUDGET_MIB << 20, True)
        assert daemon.resident_kib() << 10 <= estimated <= budget
        assert figures.value("interceptd_requests_refused_total", method="change_regions", error="ENOSPC") > 0
        assert {"memory_mib"} <= {
            line["limit"] for line in daemon.log_lines() if line["event"] == "request_refused"
        }
        assert witness.serve() == Witness.SERVED
        with RawVmm(daemon.socket) as newcomer:
            newcomer.add_memory()
            assert newcomer.vp().intercept(GFN)[0] == "resume"
        assert tenant.go_on()
        assert scrape(metrics).value("interceptd_memory_estimated_bytes") < estimated
    if cgroup is not None:
        killed = (cgroup / "memory.oom_control").read_text()
        assert "oom_kill 0" in killed


def test_a_limit_that_is_raised_while_the_daemon_runs_counts_from_the_next_reload(
    daemon: DaemonProcess, cgroup: Path | None
) -> None:
    if cgroup is None:
        pytest.skip("needs the memory cgroup of version 1, writable")
    (cgroup / "memory.limit_in_bytes").write_text(str(2 * LIMIT_MIB << 20))
    daemon.signal(signal.SIGHUP)
    daemon.wait_event("configuration_reloaded")
    assert daemon.log_lines()[-1]["changed"] == [f"limits.memory_mib: {BUDGET_MIB} -> {2 * BUDGET_MIB}"]


def test_what_a_restart_brings_back_beyond_the_budget_goes_on(tmp_path: Path) -> None:
    """Only more is refused: what lets memory go is not."""
    gfns, uaddrs, more = GfnRange.of(0, 16), UaddrRange(start=0, end=16), GfnRange.of(64, 1)
    access = {"writable": True, "executable": False}
    with KeptDaemon(tmp_path, config="limits.memory_mib = 4096") as kept:
        kept.wait_serving()
        with BlockingVmm.open(kept.socket, timeout=PATIENCE) as vmm:
            partition = vmm.create_partition(AddressSpaceKind.DECLARED, HypervisorKind.SOFTWARE)
            vmm.map_vma(uaddrs, 0, Access.READ | Access.WRITE)
            vmm.add_region(gfns, uaddrs, RequestedKind.MOVABLE, **access)
            with BlockingNotifier.open(kept.socket, partition, timeout=PATIENCE) as notifier:
                kept.config.write_text("limits.memory_mib = 1")
                kept.kill()
                assert (vmm.statistics().regions, vmm.statistics().restarts) == (1, 1)
                with pytest.raises(WireError) as refused:
                    vmm.add_region(more, UaddrRange(start=0, end=1), RequestedKind.MOVABLE, **access)
                assert refused.value.details == {"limit": "memory_mib"}
                notifier.invalidate(uaddrs)
                vmm.remove_region(gfns, uaddrs)
                vmm.unmap_vma(uaddrs)
                assert (vmm.statistics().regions, vmm.statistics().vmas) == (0, 0)


def test_what_is_remembered_of_live_memory_counts_until_its_partition_ends(tmp_path: Path) -> None:
    place = tmp_path / "metrics.sock"

    def estimated() -> float:
        return scrape(place).value("interceptd_memory_estimated_bytes")

    def of_the_partition(daemon: DaemonProcess) -> int:
        [partition] = daemon.operator().ask("list_partitions")["partitions"]
        memory: int = partition["memory_bytes"]
        return memory

    config = f'metrics.listen = "unix:{place}"'
    with DaemonProcess(tmp_path, config=config, environment=ENVIRONMENT) as daemon:
        daemon.wait_serving().operator()
        at_first = estimated()
        with Puppet() as vmm:
            vmm.do(LiveVmm.connect, daemon.socket)
            vmm.do(LiveVmm.attach, Watch.NONE, promise=True)
            page = vmm.do(LiveVmm.map, 1)
            alone, before = of_the_partition(daemon), estimated()
            vmm.do(LiveVmm.add_region, GFN, page, "auto")
            more = estimated() - before
            assert more >= Cost.REGION + Cost.CACHED_VMA
            assert of_the_partition(daemon) == alone + more
        eventually(estimated, at_first)
