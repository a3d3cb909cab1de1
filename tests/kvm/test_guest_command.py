"""`interceptctl guest`, as a user runs it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from fakes.daemon_process import DaemonProcess
from intercept_client.kvm import _machine as machine
from interceptctl.cli import main


def guest(*arguments: str, seconds: float = 120) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "interceptctl", "guest", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)


def test_all_guests_pass_at_a_daemon_of_their_own(kvm: None) -> None:  # noqa: ARG001 - for its skip
    done = guest()

    assert done.returncode == 0, done.stdout + done.stderr
    assert "PASS: 10 guests, memory announced" in done.stdout
    assert done.stderr == ""


def test_guests_whose_memory_is_watched_pass(daemon: DaemonProcess) -> None:
    done = guest("pattern", "unmap", "--coverage", "watched", "--quiet", "--vmm-socket", str(daemon.socket))

    assert (done.returncode, done.stdout) == (0, "PASS: 2 guests, memory watched\n")


def test_a_named_guest_at_another_daemon_is_reported_as_json(daemon: DaemonProcess) -> None:
    done = guest("sweep", "--json", "--vmm-socket", str(daemon.socket))

    assert done.returncode == 0, done.stdout + done.stderr
    (sweep,) = json.loads(done.stdout)["scenarios"]
    (vcpu,) = sweep["vcpus"]
    assert (sweep["name"], sweep["passed"], vcpu["kvm_mmio_exits"]) == ("sweep", True, 1)
    assert len(vcpu["first_touch_us"]) == 2
    assert vcpu["stopped"] == "halted"


def test_a_guest_runs_on_the_vmm_in_c(daemon: DaemonProcess) -> None:
    if shutil.which("cc") is None:
        pytest.skip("cc is missing: the VMM in C cannot be built")
    done = guest("sweep", "--vmm", "c", "--vmm-socket", str(daemon.socket))

    assert done.returncode == 0, done.stdout + done.stderr
    assert "sweep: 1 intercept for 512 accesses" in done.stdout
    assert "PASS: 1 guest of the VMM in C, memory announced" in done.stdout


@pytest.mark.parametrize(
    ("compiler", "says"), [("no-such-cc", "there is no no-such-cc"), ("false", "false does not build")]
)
def test_without_a_compiler_that_works_the_command_says_so(
    kvm: None,  # noqa: ARG001 - for its skip
    monkeypatch: pytest.MonkeyPatch,
    compiler: str,
    says: str,
) -> None:
    monkeypatch.setenv("CC", compiler)

    result = CliRunner().invoke(main, ["guest", "sweep", "--vmm", "c"])

    assert result.exit_code == 4
    assert "cannot run guests" in result.output
    assert says in result.output


def test_without_kvm_the_command_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "DEVICE", str(tmp_path / "kvm"))

    result = CliRunner().invoke(main, ["guest", "sweep"])

    assert result.exit_code == 4
    assert "cannot run guests" in result.output


def test_an_unknown_name_is_a_usage_error() -> None:
    result = CliRunner().invoke(main, ["guest", "nobody"])

    assert result.exit_code == 2
    assert "unknown guest 'nobody'; the guests are: sweep," in result.output


def test_somebody_elses_daemon_is_not_killed(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["guest", "restart", "--vmm-socket", str(tmp_path / "vmm.sock")])

    assert result.exit_code == 2
    assert "unknown guest 'restart'" in result.output


def test_an_absent_daemon_is_named(kvm: None, tmp_path: Path) -> None:  # noqa: ARG001
    result = CliRunner().invoke(main, ["guest", "sweep", "--vmm-socket", str(tmp_path / "none.sock")])

    assert result.exit_code == 3
    assert f"{tmp_path / 'none.sock'}: no such file; is interceptd running" in result.output


def test_the_list_says_what_each_guest_checks() -> None:
    result = CliRunner().invoke(main, ["guest", "--list"])

    assert "sweep: 1 intercept per VMA" in result.output
