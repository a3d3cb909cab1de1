"""`interceptd keep`, the command: around a real daemon."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner

from fakes.daemon_process import DaemonProcess
from fakes.eventually import PATIENCE, eventually
from fakes.keeper_process import children
from fakes.witness import Witness
from interceptd.cli import main

KEEP = (sys.executable, "-m", "interceptd", "keep", "--patience", "60", "--")
KEEPER = (sys.executable, "-X", "importtime", "-m", "interceptd.keeper", "60")
"""What that command becomes, with a line in its log for each module that it loads."""
LOADED = re.compile(r"^import time:[ \d]+\|[ \d]+\| *([\w.]+)$", re.MULTILINE)


def packages(log: str) -> set[str]:
    return {name.partition(".")[0] for name in LOADED.findall(log)}


@contextmanager
def kept(directory: Path, launch: Sequence[str] = KEEP) -> Iterator[DaemonProcess]:
    """The keeper of a daemon; neither outlives the test."""
    with DaemonProcess(directory, launch=launch) as keeper:
        try:
            yield keeper
        finally:
            for child in children(keeper.pid) if keeper.status is None else []:
                os.kill(child, signal.SIGKILL)


def test_a_daemon_that_is_killed_is_followed_by_another_and_a_signal_to_end_drains_it(tmp_path: Path) -> None:
    with kept(tmp_path) as keeper:
        keeper.wait_serving()
        (first,) = children(keeper.pid)
        os.kill(first, signal.SIGKILL)
        eventually(lambda: keeper.events().count("daemon_started"), 2)
        with Witness(keeper.socket) as witness:
            assert witness.serve() == Witness.SERVED
        assert first not in children(keeper.pid)
        assert keeper.stop() == 0
        assert keeper.events()[-2:] == ["daemon_ended", "daemon_process_ended"]


def test_a_restart_for_a_configuration_that_is_wrong_is_refused_and_the_daemon_goes_on(
    tmp_path: Path,
) -> None:
    with kept(tmp_path) as keeper:
        keeper.wait_serving()
        daemon = children(keeper.pid)
        (tmp_path / "interceptd.toml").write_text("limits.operators = 0")
        keeper.signal(signal.SIGUSR1)
        eventually(lambda: '"event": "restart_refused"' in keeper.log_text(), True)
        assert "limits.operators: expected `int` >= 1" in keeper.log_text()
        assert children(keeper.pid) == daemon


def test_a_restart_exchanges_the_daemon_and_its_clients_stay(tmp_path: Path) -> None:
    with kept(tmp_path) as keeper, ExitStack() as clients:
        keeper.wait_serving()
        before = children(keeper.pid)
        witness = clients.enter_context(Witness(keeper.socket))
        assert witness.serve() == Witness.SERVED
        keeper.signal(signal.SIGUSR1)
        eventually(lambda: keeper.events().count("daemon_started"), 2)
        assert Witness.SERVED in (witness.serve(), witness.serve())  # its VP may have been kicked once (P-16)
        assert set(before).isdisjoint(children(keeper.pid))
        assert '"how": "status 75"' in keeper.log_text()


def test_the_keeper_loads_the_standard_library_alone(tmp_path: Path) -> None:
    with kept(tmp_path, KEEPER) as keeper:
        eventually(keeper.operator_socket.exists, True)
        loaded = packages(keeper.log_text())
    bare = subprocess.run([*KEEPER[:3], "-c", "pass"], stderr=subprocess.PIPE, text=True, check=True).stderr
    assert loaded - packages(bare) - sys.stdlib_module_names == {"interceptd"}


@pytest.mark.parametrize("arguments", [[], ["--", "check-config"], ["--patience", "-1", "--", "serve"]])
def test_what_cannot_be_kept_is_wrong_usage(arguments: list[str]) -> None:
    assert CliRunner().invoke(main, ["keep", *arguments]).exit_code == 2


def test_a_daemon_that_cannot_start_ends_the_command_with_its_status(tmp_path: Path) -> None:
    command = [*KEEP, "serve", "--socket", str(tmp_path / "none" / "vmm.sock")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert (ended.returncode, "the directory for the socket does not exist" in ended.stderr) == (1, True)
