"""What the tests with real memory share: one daemon process, and VMMs that are processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from fakes.daemon_process import DaemonProcess
from fakes.live_vmm import LiveVmm
from fakes.low_crowd import low_crowd
from fakes.puppet import Puppet, StartVmm
from intercept_client.memory import Watch
from intercept_protocol.addresses import UaddrRange


@pytest.fixture
def crowd() -> Iterator[list[UaddrRange]]:
    """Many small VMAs of this process, first in its maps file."""
    with low_crowd() as vmas:
        yield vmas


@pytest.fixture(scope="session")
def shared_daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """One daemon for all; what a test did to it, the next one starts from."""
    with DaemonProcess(tmp_path_factory.mktemp("live")) as process:
        yield process.wait_serving()
        assert process.stop() == 0


@pytest.fixture
def daemon(shared_daemon: DaemonProcess) -> DaemonProcess:
    return shared_daemon


@pytest.fixture
def own_daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    """A daemon of the test's own, which it may harm."""
    with DaemonProcess(tmp_path) as process:
        yield process.wait_serving()


@pytest.fixture
def unattached_to_own(start_vmm: StartVmm, own_daemon: DaemonProcess) -> Puppet:
    """As `unattached`, of the test's own daemon."""
    vmm = start_vmm()
    vmm.do(LiveVmm.connect, own_daemon.socket)
    return vmm


@pytest.fixture
def start_vmm() -> Iterator[StartVmm]:
    with ExitStack() as processes:

        def start(launch: Sequence[str] = ()) -> Puppet:
            return processes.enter_context(Puppet(launch))

        yield start


@pytest.fixture
def unattached(start_vmm: StartVmm, daemon: DaemonProcess) -> Puppet:
    """A VMM with a partition, which has not handed over its memory."""
    vmm = start_vmm()
    vmm.do(LiveVmm.connect, daemon.socket)
    return vmm


@pytest.fixture
def watched(unattached: Puppet) -> Puppet:
    """A VMM whose userfaultfd the daemon reads, and which announces nothing."""
    unattached.do(LiveVmm.attach, Watch.REQUIRED, promise=False)
    return unattached


@pytest.fixture
def cooperative(unattached: Puppet) -> Puppet:
    """A VMM without a userfaultfd, which promises to announce every change."""
    unattached.do(LiveVmm.attach, Watch.NONE, promise=True)
    return unattached
