"""A private daemon serves when it is said to, ends properly, and is not left behind."""

from __future__ import annotations

import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Final

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from intercept_client import TrioVmm
from interceptctl.exercise.daemon_process import DaemonFailed, running_daemon

LONG: Final = 60.0
"""Seconds: what a daemon on a busy machine may take, and more than that."""
LISTEN_UNTIL_SIGTERM: Final = """
import os, signal, socket, sys
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[-1])
listener.listen()
signal.sigwait({signal.SIGTERM})
"""
"""A program. It blocks the signal first: a signal that comes just before `signal.pause` would not wake it."""


async def open_slowly(pipe: Path, clock: MockClock) -> None:
    """Keep a process that reads `pipe` waiting for LONG, in virtual time; then time is real."""
    opened = await trio.to_thread.run_sync(partial(os.open, pipe, os.O_WRONLY))
    await wait_all_tasks_blocked()
    clock.jump(LONG)
    await wait_all_tasks_blocked()
    os.close(opened)
    clock.rate = 1


async def test_a_running_daemon_answers_at_once_and_leaves_nothing() -> None:
    async with running_daemon() as daemon, TrioVmm.open(daemon.path) as vmm:
        assert vmm.hello.server == "interceptd"
    assert not Path(daemon.path).parent.exists()


async def test_a_private_daemon_inherits_no_variable_meant_for_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not another daemon's configuration, the operator's socket, nor our service manager's."""
    for name in ("INTERCEPTD_OPERATOR_SOCKET", "INTERCEPTCTL_SOCKET", "NOTIFY_SOCKET"):
        monkeypatch.setenv(name, str(tmp_path / "of-another"))
    async with running_daemon() as daemon, TrioVmm.open(daemon.path):
        assert os.listdir(tmp_path) == []
        assert sorted(os.listdir(Path(daemon.path).parent)) == ["log", "operator.sock", "vmm.sock"]


async def test_a_daemon_that_cannot_start_is_shown_with_its_log() -> None:
    command = (sys.executable, "-c", "raise SystemExit('no such luck')")
    with pytest.raises(DaemonFailed, match="no such luck"):
        async with running_daemon(command):
            pass


async def test_a_daemon_that_ends_badly_fails_the_exercise(tmp_path: Path) -> None:
    script = tmp_path / "ends_badly.py"
    script.write_text(LISTEN_UNTIL_SIGTERM + "os._exit(3)\n")
    with pytest.raises(DaemonFailed, match="status 3"):
        async with running_daemon((sys.executable, str(script))):
            pass


async def test_a_daemon_that_starts_slowly_is_waited_for_as_long_as_it_lives(
    tmp_path: Path, mock_clock: MockClock
) -> None:
    pipe, script = tmp_path / "pipe", tmp_path / "starts_slowly.py"
    os.mkfifo(pipe)
    script.write_text(f"open({str(pipe)!r}).read()\nfrom interceptd.cli import main\nmain()\n")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(open_slowly, pipe, mock_clock)
        async with running_daemon((sys.executable, str(script))) as daemon, TrioVmm.open(daemon.path) as vmm:
            assert vmm.hello.server == "interceptd"


async def test_a_daemon_that_ends_slowly_is_not_killed(tmp_path: Path, mock_clock: MockClock) -> None:
    pipe, script = tmp_path / "pipe", tmp_path / "ends_slowly.py"
    os.mkfifo(pipe)
    script.write_text(LISTEN_UNTIL_SIGTERM + f"open({str(pipe)!r}).read()\n")
    async with trio.open_nursery() as nursery:
        mock_clock.rate = 1
        async with running_daemon((sys.executable, str(script))) as daemon:
            mock_clock.rate = 0
            nursery.start_soon(open_slowly, pipe, mock_clock)
        assert not Path(daemon.path).parent.exists()


async def test_an_exception_in_the_block_carries_the_daemons_log() -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        async with running_daemon():
            raise ZeroDivisionError
    assert "daemon_started" in caught.value.__notes__[0]


async def test_a_daemon_that_exits_early_did_not_end_cleanly(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    script = tmp_path / "tells_its_pid.py"
    script.write_text(
        "import os, sys\n"
        "from pathlib import Path\n"
        f"Path({str(pid_file)!r}).write_text(str(os.getpid()))\n"
        "from interceptd.cli import main\n"
        "main()\n"
    )
    with pytest.raises(DaemonFailed, match="status -9"):
        async with running_daemon((sys.executable, str(script))):
            os.kill(int(pid_file.read_text()), signal.SIGKILL)
