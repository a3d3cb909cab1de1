"""`interceptctl exercise` from its command line to its output and exit status."""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from exercise.running import WITHOUT_INVALIDATION
from fakes.daemon_process import DaemonProcess
from fakes.eventually import eventually
from interceptctl.cli import main
from interceptctl.exercise import live, program
from interceptctl.exercise.daemon_process import running_daemon
from interceptctl.exercise.scenario import DEFAULT_KILLS


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["exercise", *arguments])


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """The private daemon is a mutant that revokes nothing."""
    monkeypatch.setattr(program, "running_daemon", lambda: running_daemon(WITHOUT_INVALIDATION))


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    with DaemonProcess(tmp_path, config="[limits]\nvps_per_partition = 3\n") as process:
        yield process.wait_serving()


def test_a_good_daemon_is_status_0_with_progress_a_summary_and_a_verdict(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(live, "LINE_EVERY", 0.01)
    result = run("--steps", "100", "--vps", "2")
    assert result.exit_code == 0
    assert "starting a private daemon: 2 VPs, seed 1" in result.stdout
    assert re.search(r"^ +\d+ s  steps [\d,]+  intercepts ", result.stdout, re.MULTILINE)
    assert ["stale", "reads", "0"] in [line.split() for line in result.stdout.splitlines()]
    assert result.stdout.splitlines()[-1].startswith("PASS")
    assert result.stdout.splitlines()[-1].endswith(f" page checks and {DEFAULT_KILLS} kills")
    assert re.search(
        r"^ +\d+ s  \d+ kills? of the daemon: \d+ intercepts? waited", result.stdout, re.MULTILINE
    )


@pytest.mark.usefixtures("broken")
def test_a_bad_daemon_is_status_1_with_counterexamples() -> None:
    result = run("--steps", "100", "--kills", "0", "--quiet")
    assert result.exit_code == 1
    assert "got: reaches file " in result.stdout
    assert result.stdout.splitlines()[-1].startswith("FAIL")


def test_json_is_the_report_alone() -> None:
    result = run("--steps", "30", "--vps", "2", "--seed", "7", "--kills", "0", "--json")
    report = json.loads(result.stdout)
    assert (report["seed"], report["vps"], report["stale_reads"]) == (7, 2, 0)
    assert report["intercepts"]["resume"]["mapped"] > 0


def test_a_running_daemon_is_exercised_and_left_unchanged(daemon: DaemonProcess) -> None:
    result = run("--vmm-socket", str(daemon.socket), "--steps", "30", "--vps", "3", "--quiet")
    (line,) = result.stdout.splitlines()
    assert line.startswith("PASS")
    assert result.exit_code == 0
    eventually(lambda: len(daemon.partition_ids()), 0)


def test_a_daemon_that_refuses_is_status_1_with_its_reason(daemon: DaemonProcess) -> None:
    result = run("--vmm-socket", str(daemon.socket), "--vps", "4")
    assert result.exit_code == 1
    assert "refused: EINVAL: vp_index must be below 3" in result.stderr


def test_only_a_private_daemon_is_killed(daemon: DaemonProcess) -> None:
    result = run("--vmm-socket", str(daemon.socket), "--kills", "1")
    assert result.exit_code == 2
    assert "--kills is for a private daemon" in result.stderr
    assert daemon.status is None


def test_an_absent_socket_is_status_3_and_says_what_to_check(tmp_path: Path) -> None:
    result = run("--vmm-socket", str(tmp_path / "nobody"))
    assert result.exit_code == 3
    assert (
        f"{tmp_path / 'nobody'}: no such file; is interceptd running with --socket set to this path?"
        in result.stderr
    )


def test_a_socket_without_write_permission_is_status_3_and_names_the_keys_that_decide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: str, *_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr(program, "exercise", refuse)
    result = run("--vmm-socket", str(tmp_path / "vmm.sock"))
    assert result.exit_code == 3
    assert "permission denied; see socket_mode and socket_group" in result.stderr


def test_another_system_error_is_status_3_with_its_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(program, "exercise", fail)
    result = run("--vmm-socket", str(tmp_path / "vmm.sock"))
    assert (result.exit_code, "Cannot allocate memory" in result.stderr) == (3, True)
