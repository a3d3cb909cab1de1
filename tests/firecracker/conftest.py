"""What the tests on a real Firecracker share: one snapshot, one daemon, and the reason to skip."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fakes.daemon_process import DaemonProcess
from firecracker.binary import why_not
from firecracker.machine import Snapshot
from firecracker.restoring import SAVED_MIB, Restores, build_guest, save


@pytest.fixture(scope="session")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The guest that Firecracker boots. Skips where no Firecracker can run, with the reason."""
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    return build_guest(tmp_path_factory.mktemp("kernel"))


@pytest.fixture(scope="session")
def saved(kernel: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Snapshot]:
    """A guest that was booted, filled, with something in the balloon."""
    snapshot = save(kernel, tmp_path_factory.mktemp("saved"), SAVED_MIB)
    yield snapshot
    snapshot.memory.unlink()


@pytest.fixture(scope="session")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """One daemon for all; what a test did to it, the next one starts from."""
    with DaemonProcess(tmp_path_factory.mktemp("daemon")) as process:
        yield process.wait_serving()
        assert process.stop() == 0


@pytest.fixture
def restores(daemon: DaemonProcess, tmp_path: Path) -> Iterator[Restores]:
    """Restores guests by the daemon, which end with the test."""
    with Restores(daemon.socket, tmp_path) as restores:
        yield restores
