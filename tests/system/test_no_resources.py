"""The system refuses the daemon threads, or memory for a ledger: what needs neither goes on."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from fakes import as_user
from fakes.daemon_process import DaemonProcess
from fakes.kept_daemon import KeptDaemon
from fakes.live_vmm import GFN, LiveVmm
from fakes.other_user import as_uid
from fakes.puppet import ENVIRONMENT, Puppet, VmmFailed
from fakes.scraper import ask, scrape
from fakes.surviving_vmm import Mode, SurvivingVmm
from fakes.witness import Witness
from intercept_client import ConnectionLost
from intercept_client.memory import Watch
from intercept_protocol.outcomes import Answer

USER: Final = 61003
"""Of nobody else: what is limited is counted for a user."""
THREADS: Final = 64
MARGIN: Final = 64 << 20
"""Bytes: much more than the daemon needs to go on, much less than the map of a ledger."""


@pytest.fixture
def daemon() -> Iterator[DaemonProcess]:
    """One that may start no thread, until its user lets it."""
    directory = Path(tempfile.mkdtemp(prefix="interceptd-"))
    directory.chmod(0o755)
    os.chown(directory, USER, USER)
    limited = ("prlimit", f"--nproc=1:{THREADS}", *as_user.launch(USER), sys.executable, "-m", "interceptd")
    config = f'allowed_uids = [0, {USER}]\nmetrics.listen = "unix:{directory}/metrics.sock"\n'
    with DaemonProcess(directory, config=config, launch=limited, environment=ENVIRONMENT) as process:
        yield process.wait_serving()
        assert process.stop() == 0
    shutil.rmtree(directory)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")
def test_a_daemon_that_gets_no_thread_does_what_needs_none_and_the_rest_when_it_gets_one(
    daemon: DaemonProcess,
) -> None:
    metrics = daemon.socket.with_name("metrics.sock")
    with Witness(daemon.socket) as witness, Puppet() as vmm:
        vmm.do(LiveVmm.connect, daemon.socket)
        with pytest.raises(VmmFailed, match="no thread to ask with: can't start new thread"):
            vmm.do(LiveVmm.attach, Watch.NONE, promise=True)
        assert witness.serve() == Witness.SERVED
        assert ask(metrics, "/healthz").status == 200
        assert "process_open_fds" not in scrape(metrics).families
        daemon.signal(signal.SIGHUP)
        daemon.wait_event("configuration_not_reloaded")
        assert daemon.log_lines()[-1]["error"] == "can't start new thread"
        as_uid(USER, resource.prlimit, daemon.pid, resource.RLIMIT_NPROC, (THREADS, THREADS))
        vmm.do(LiveVmm.attach, Watch.NONE, promise=True)
        vmm.do(LiveVmm.add_region, GFN, vmm.do(LiveVmm.map, 1))
        assert vmm.do(LiveVmm.fault, GFN) is Answer.MAPPED
        assert "process_open_fds" in scrape(metrics).families


def test_a_vmm_without_memory_for_its_ledger_is_served_and_ends_with_its_daemon(tmp_path: Path) -> None:
    with KeptDaemon(tmp_path) as kept, SurvivingVmm(kept.wait_serving().socket, Mode.DECLARED) as earlier:
        status = Path(f"/proc/{kept.daemon}/status").read_text()
        [kib] = [int(line.split()[1]) for line in status.splitlines() if line.startswith("VmSize:")]
        room = (kib << 10) + MARGIN
        resource.prlimit(kept.daemon, resource.RLIMIT_AS, (room, room))
        with SurvivingVmm(kept.socket, Mode.DECLARED) as vmm:
            vmm.touch(vmm.add(vmm.new_region(1)))
            [line] = [line for line in kept.log() if line["event"] == "partition_not_kept"]
            assert "Cannot allocate memory" in line["reason"]
            kept.kill()
            with pytest.raises(ConnectionLost):
                vmm.vmm.statistics()
        assert earlier.vmm.statistics().restarts == 1
