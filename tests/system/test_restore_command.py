"""`interceptctl restore` with a daemon and a VMM: what one run touches is in before the next touches it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from fakes.daemon_process import DaemonProcess
from fakes.eventually import PATIENCE, eventually
from fakes.kept_daemon import KeptDaemon
from fakes.restoring_vmm import PAGE, RestoringVmm, image_bytes
from intercept_client import BlockingVmm, RestoreState
from intercept_protocol.working_set import RUN, decode
from interceptctl.cli import main

pytestmark = pytest.mark.skipif(
    not os.access("/dev/userfaultfd", os.R_OK | os.W_OK), reason="/dev/userfaultfd cannot be opened"
)

PAGES = 256
TOUCHED = (200, 40, 41)


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    with DaemonProcess(tmp_path_factory.mktemp("daemon")) as daemon:
        yield daemon.wait_serving()


class Run:
    """The command, once the daemon waits for the VMM."""

    def __init__(self, daemon: DaemonProcess | KeptDaemon, directory: Path, *arguments: object) -> None:
        self.listen = directory / "fc.sock"
        command = ["restore", "--listen", self.listen, "--image", directory / "image", *arguments]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "interceptctl", "--socket", daemon.operator_socket, *map(str, command)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._process.stderr is not None
        line = self._process.stderr.readline()
        assert line.endswith(f"waiting for a VMM at {self.listen}\n"), line
        self.partition_id = int(line.split()[1].rstrip(":"))

    def end(self) -> Any:
        """What it prints at its end."""
        printed, said = self._process.communicate(timeout=PATIENCE)
        assert self._process.returncode == 0, said
        return json.loads(printed)


def test_what_one_run_touches_is_brought_in_before_the_next_touches_it(
    daemon: DaemonProcess, tmp_path: Path
) -> None:
    (tmp_path / "image").write_bytes(image_bytes(PAGES))
    recorded = tmp_path / "touched"
    first = Run(daemon, tmp_path, "--record", recorded, "--around", 1, "--json")
    with RestoringVmm(first.listen, [100, PAGES - 100]) as vmm:
        assert [vmm.ask("read", page, 1) for page in TOUCHED] == [str(page) for page in TOUCHED]
        vmm.ask("give_back", 60, 2)
        assert vmm.ask("read", 60, 1) == "0"
    told = first.end()
    assert (told["restore"]["faults"], told["restore"]["zero_pages"]) == (4, 1)
    assert told["recorded"]["pages"] == 3
    assert list(RUN.iter_unpack(decode(recorded.read_bytes()).stored_runs)) == [(200, 1), (40, 2)]

    second = Run(daemon, tmp_path, "--prefetch", recorded, "--around", 1, "--json")
    with (
        RestoringVmm(second.listen, [100, PAGES - 100]) as vmm,
        BlockingVmm.open(daemon.socket) as asker,
    ):
        eventually(lambda: asker.restore_progress(second.partition_id).prefetched_pages, len(TOUCHED))
        assert asker.restore_progress(second.partition_id).state == RestoreState.SERVING
        assert [vmm.ask("read", page, 1) for page in TOUCHED] == [str(page) for page in TOUCHED]
    told = second.end()
    assert (told["restore"]["faults"], told["restore"]["prefetched_pages"]) == (0, 3)


def test_a_restore_is_followed_through_a_death_of_the_daemon(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(image_bytes(PAGES))
    with KeptDaemon(tmp_path) as kept:
        run = Run(kept.wait_serving(), tmp_path, "--around", 1, "--json")
        with RestoringVmm(run.listen, [100, PAGES - 100]) as vmm:
            assert vmm.ask("read", 7, 1) == "7"
            vmm.ask("give_back", 30, 2)
            kept.wait_idle().kill()
            assert vmm.ask("read", 8, 2) == "8 9"
        told = run.end()["restore"]
    assert (told["state"], told["error"], told["pid"]) == ("ended", "", vmm.pid)
    assert (told["pages_in"], told["removed_pages"], told["faults"]) == (3, 2, 2)


def test_nobody_in_time_is_said(daemon: DaemonProcess, tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(bytes(PAGE))
    paths = ["--listen", tmp_path / "fc.sock", "--image", tmp_path / "image"]
    command = ["--socket", daemon.operator_socket, "restore", *paths, "--wait", 0.001]
    ended = CliRunner().invoke(main, [str(word) for word in command])
    assert ended.exit_code == 1, ended.output
    assert "Error: the restore ended: " in ended.stderr
    assert "as backend_path; --wait gives it more time" in ended.stderr
    assert not (tmp_path / "fc.sock").exists()
