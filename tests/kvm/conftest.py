"""What the tests of KVM guests share: daemons as processes, small VMMs, and the reason to skip where there is
no KVM."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from fakes.daemon_process import DaemonProcess
from fakes.small_vmms import StartVmm
from fakes.vcpu_rig import RW, Rig
from intercept_client import libc
from intercept_client.kvm import KvmUnavailable, Machine, PartitionSetting
from intercept_client.libc import Sharing
from intercept_protocol.addresses import UaddrRange
from interceptctl.guest.small_vmm import SmallVmm


@pytest.fixture(scope="session")
def kvm() -> None:
    """Skips without KVM, with the reason."""
    try:
        Machine.open().close()
    except KvmUnavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture
def machine(kvm: None) -> Iterator[Machine]:  # noqa: ARG001 - for its skip
    """A VM without a daemon."""
    with Machine.open() as machine:
        yield machine


@pytest.fixture(scope="session")
def daemon(kvm: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:  # noqa: ARG001
    """One daemon for all; what a test did to it, the next one starts from."""
    with DaemonProcess(tmp_path_factory.mktemp("kvm")) as process:
        yield process.wait_serving()
        assert process.stop() == 0


@pytest.fixture
def own_daemon(kvm: None, tmp_path: Path) -> Iterator[DaemonProcess]:  # noqa: ARG001 - for its skip
    """A daemon of the test's own, which it may kill."""
    with DaemonProcess(tmp_path) as process:
        yield process.wait_serving()


@pytest.fixture
def start_vmm(daemon: DaemonProcess) -> Iterator[StartVmm]:
    """Opens VMMs at the shared daemon, which end with the test."""
    with ExitStack() as vmms:

        def start(setting: PartitionSetting | None = None) -> SmallVmm:
            return vmms.enter_context(SmallVmm(daemon.socket, setting or PartitionSetting()))

        yield start


@pytest.fixture
def vmm(start_vmm: StartVmm) -> SmallVmm:
    """In the default setting: announced, `vma`."""
    return start_vmm()


@pytest.fixture
def rig() -> Iterator[Rig]:
    uaddrs = libc.mmap(UaddrRange.of_pages(0, 2), RW, Sharing.PRIVATE)
    yield Rig(uaddrs)
    libc.munmap(uaddrs)
