"""Fixtures of the system tests: daemons as processes, and a witness that must be served meanwhile.

The daemon under attack is one for all tests that can do with the default limits, on purpose: whatever a test
did to it, the next one starts from there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import pytest

from fakes.daemon_process import DaemonProcess, StartDaemon
from fakes.eventually import eventually
from fakes.raw_client import Connect, RawConnection
from fakes.raw_vmm import RawVmm
from fakes.witness import Witness


@pytest.fixture(scope="session")
def shared_daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """One daemon with the default configuration; a graceful end is the last thing that is asked of it."""
    with DaemonProcess(tmp_path_factory.mktemp("shared")) as process:
        process.wait_serving()
        yield process
        assert process.stop() == 0


@pytest.fixture
def daemon(shared_daemon: DaemonProcess) -> DaemonProcess:
    """The daemon under attack; a module that needs other limits overrides this."""
    return shared_daemon


@pytest.fixture
def witness(daemon: DaemonProcess) -> Iterator[Witness]:
    """Is served before and after the test, which leaves no task, descriptor or partition behind."""
    idle = daemon.footprint()
    with Witness(daemon.socket) as witness:
        assert witness.serve() == Witness.SERVED
        with_witness = daemon.footprint()
        yield witness
        assert witness.serve() == Witness.SERVED
        eventually(daemon.footprint, with_witness)
    eventually(daemon.footprint, idle)


@pytest.fixture
def connect(daemon: DaemonProcess, witness: Witness) -> Iterator[Connect]:  # noqa: ARG001 - it looks before and after
    """Opens connections to the VMMs' socket that close before the witness is asked again."""
    with ExitStack() as connections:
        yield lambda: connections.enter_context(RawConnection(daemon.socket))


@pytest.fixture
def vmm(daemon: DaemonProcess, witness: Witness) -> Iterator[RawVmm]:  # noqa: ARG001 - it looks before and after
    """A partition to misuse."""
    with RawVmm(daemon.socket) as vmm:
        yield vmm


@pytest.fixture
def start_daemon(tmp_path: Path) -> Iterator[StartDaemon]:
    """Starts daemons in the test's own directory and waits until they serve."""
    with ExitStack() as processes:

        def start(
            *, config: str = "", environment: Mapping[str, str] | None = None, umask: int = -1
        ) -> DaemonProcess:
            process = DaemonProcess(tmp_path, config=config, environment=environment, umask=umask)
            return processes.enter_context(process).wait_serving()

        yield start
