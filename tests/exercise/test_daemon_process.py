"""A daemon of our own is there when it is said to be, ends well, and is not left behind."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from intercept_client import TrioVmm
from interceptctl.exercise.daemon_process import DaemonFailed, running_daemon


async def test_a_running_daemon_answers_at_once_and_leaves_nothing() -> None:
    async with running_daemon() as path, TrioVmm.open(path) as vmm:
        assert vmm.hello.server == "interceptd"
    assert not Path(path).parent.exists()


async def test_a_daemon_of_our_own_inherits_nothing_that_is_meant_for_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not another daemon's configuration, the operator's socket, nor our service manager's."""
    for name in ("INTERCEPTD_OPERATOR_SOCKET", "INTERCEPTCTL_SOCKET", "NOTIFY_SOCKET"):
        monkeypatch.setenv(name, str(tmp_path / "of-another"))
    async with running_daemon() as path, TrioVmm.open(path):
        assert os.listdir(tmp_path) == []
        assert sorted(os.listdir(Path(path).parent)) == ["log", "operator.sock", "vmm.sock"]


async def test_a_daemon_that_cannot_start_is_shown_with_its_log() -> None:
    command = (sys.executable, "-c", "raise SystemExit('no such luck')")
    with pytest.raises(DaemonFailed, match="no such luck"):
        async with running_daemon(command):
            pass


async def test_a_daemon_that_ends_badly_fails_the_exercise(tmp_path: Path) -> None:
    script = tmp_path / "ends_badly.py"
    script.write_text(
        "import os, signal, socket, sys\n"
        "signal.signal(signal.SIGTERM, lambda *_: os._exit(3))\n"
        "listener = socket.socket(socket.AF_UNIX)\n"
        "listener.bind(sys.argv[-1])\n"
        "listener.listen()\n"
        "while True:\n"
        "    signal.pause()\n"
    )
    with pytest.raises(DaemonFailed, match="status 3"):
        async with running_daemon((sys.executable, str(script))):
            pass


async def test_what_fails_beside_a_daemon_comes_with_the_daemons_log() -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        async with running_daemon():
            raise ZeroDivisionError
    assert "daemon_started" in caught.value.__notes__[0]


async def test_a_daemon_that_is_gone_before_its_end_is_no_clean_end(tmp_path: Path) -> None:
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
