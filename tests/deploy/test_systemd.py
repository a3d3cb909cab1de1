"""The systemd units, judged by systemd's own tools."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from configparser import ConfigParser
from contextlib import contextmanager
from pathlib import Path

import pytest

from fakes.daemon_process import DaemonProcess
from fakes.eventually import PATIENCE, eventually
from fakes.scraper import free_port, scrape
from interceptd.keeper import store as keeper_store
from interceptd.systemd import fd_store
from interceptd.vital import EX_SOFTWARE, EX_TEMPFAIL

SYSTEMD = Path(__file__).parents[2] / "deploy" / "systemd"
ANALYZE = shutil.which("systemd-analyze")
needs_analyze = pytest.mark.skipif(
    ANALYZE is None, reason="needs systemd-analyze, of Debian's systemd package"
)
SERVICES = ["interceptd.service", "interceptd@web.service", "interceptd-metrics.service"]
ACTIVATE = shutil.which("systemd-socket-activate")
PROXYD = Path("/lib/systemd/systemd-socket-proxyd")
PROXIED = re.compile(r"^ExecStart=\S+ .* /run/interceptd/metrics\.sock$", re.MULTILINE)
SAFE = 1.0
"""Exposure, of 10, that a service may have."""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A file system with our units and their command, and systemd's own units beside them."""
    shutil.copytree("/lib/systemd/system", tmp_path / "usr/lib/systemd/system", symlinks=True)
    for unit in SYSTEMD.glob("interceptd*.s*"):
        shutil.copy(unit, tmp_path / "usr/lib/systemd/system")
    for name in ("usr/bin/interceptd", "usr/lib/systemd/systemd-socket-proxyd", "bin/kill", "bin/sh"):
        command = tmp_path / name
        command.parent.mkdir(exist_ok=True)
        command.touch(0o755)
    return tmp_path


def analyze(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(ANALYZE), "--no-pager", *arguments[:1], f"--root={root}", *arguments[1:]]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def directives(name: str) -> Sequence[tuple[str, str]]:
    """Every directive of a unit file, in order."""
    lines = (SYSTEMD / name).read_text().splitlines()
    return [(key, value) for key, _, value in (line.partition("=") for line in lines) if key.isalpha()]


@needs_analyze
@pytest.mark.parametrize("unit", [*SERVICES, "interceptd.socket", "interceptd-metrics.socket"])
def test_systemd_finds_nothing_wrong_with_a_unit(root: Path, unit: str) -> None:
    verified = analyze(root, "verify", "--man=no", "--recursive-errors=no", unit)
    assert (verified.returncode, verified.stdout, verified.stderr) == (0, "", "")


@needs_analyze
@pytest.mark.parametrize("unit", SERVICES)
def test_a_service_is_hardly_exposed(root: Path, unit: str) -> None:
    judged = analyze(root, "security", "--offline=true", unit)
    score = re.search(r"exposure level for \S+: ([\d.]+)", judged.stdout)
    assert score is not None, judged.stdout + judged.stderr
    assert float(score[1]) <= SAFE


@pytest.mark.parametrize("name", ["interceptd.service", "interceptd@.service"])
@pytest.mark.parametrize("breaking", ["PrivateUsers", "ProtectProc", "ProcSubset"])
def test_settings_that_would_break_the_daemon_are_not_in_the_unit(name: str, breaking: str) -> None:
    assert breaking not in dict(directives(name))


def test_the_instances_are_hardened_as_the_service_is() -> None:
    own = {"Description", "After", "ExecStart", "ExecReload", "LimitNOFILE", "MemoryMax", "Also"}
    own |= {"RuntimeDirectory", "RuntimeDirectoryPreserve", "TemporaryFileSystem", "BindPaths"}
    shared, instance = (
        [pair for pair in directives(name) if pair[0] not in own]
        for name in ("interceptd.service", "interceptd@.service")
    )
    assert instance == shared


@pytest.mark.parametrize("name", ["interceptd.service", "interceptd@.service"])
def test_a_service_that_makes_way_or_dies_is_followed_by_one_that_gets_its_descriptors(
    name: str,
) -> None:
    unit = dict(directives(name))
    assert (unit["Restart"], unit["RestartSec"]) == ("on-abort", "0")
    assert unit["SuccessExitStatus"] == str(EX_TEMPFAIL)
    assert unit["RestartForceExitStatus"] == f"1 2 {EX_SOFTWARE} {EX_TEMPFAIL} EXEC SIGABRT"
    assert unit["StartLimitIntervalSec"] == "0"  # a limit would let go of everything, and fail the socket
    assert unit["Environment"] == f"{fd_store.KEEP_VARIABLE}=yes"  # systemd 253 and older set no $FDSTORE
    assert int(unit["FileDescriptorStoreMax"]) == fd_store.CAPACITY == keeper_store.CAPACITY


@pytest.mark.parametrize("name", ["interceptd.service", "interceptd@.service"])
@pytest.mark.parametrize(
    ("status", "paused"),
    [("0", ""), (str(EX_TEMPFAIL), ""), ("1", "1"), (str(EX_SOFTWARE), "1"), ("ABRT", "1"), ("KILL", "1")],
)
def test_a_daemon_that_fails_is_followed_after_a_pause_and_one_that_makes_way_without(
    name: str, status: str, paused: str, tmp_path: Path
) -> None:
    (tmp_path / "sleep").write_text('#!/bin/sh\nprintf %s "$1"\n')
    (tmp_path / "sleep").chmod(0o755)
    command = shlex.split(dict(directives(name))["ExecStopPost"].replace("$$", "$"))
    ended = subprocess.run(
        command,
        env={"PATH": str(tmp_path), "EXIT_STATUS": status},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
    )
    assert ended.stdout == paused


def test_the_socket_unit_passes_the_vmms_socket_under_its_name() -> None:
    unit = ConfigParser(interpolation=None)
    unit.read(SYSTEMD / "interceptd.socket")
    assert (unit["Socket"]["ListenStream"], unit["Socket"]["FileDescriptorName"]) == (
        "/run/interceptd/vmm.sock",
        "vmm",
    )


def test_the_metrics_port_is_of_the_loopback_alone() -> None:
    unit = ConfigParser(interpolation=None)
    unit.read(SYSTEMD / "interceptd-metrics.socket")
    assert unit["Socket"]["ListenStream"].startswith("127.0.0.1:")
    assert PROXIED.search((SYSTEMD / "interceptd-metrics.service").read_text())


@pytest.mark.skipif(
    ACTIVATE is None or not PROXYD.exists(),
    reason="needs systemd-socket-activate and systemd-socket-proxyd, of Debian's systemd package",
)
def test_the_metrics_are_reached_by_the_port_that_the_proxy_carries(tmp_path: Path) -> None:
    place = tmp_path / "metrics.sock"
    port = free_port()
    with (
        DaemonProcess(tmp_path, config=f'metrics.listen = "unix:{place}"') as daemon,
        running([str(ACTIVATE), "-l", f"127.0.0.1:{port}", str(PROXYD), str(place)]),
    ):
        daemon.wait_serving()
        eventually(lambda: listens(port), True)
        assert scrape(("127.0.0.1", port)).value("interceptd_draining") == 0


@contextmanager
def running(command: Sequence[str]) -> Iterator[None]:
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            yield
        finally:
            process.kill()


def listens(port: int) -> bool:
    """Whether a process listens on a loopback port, without connecting."""
    wanted = f" 0100007F:{port:04X} 00000000:0000 0A "
    return wanted in Path("/proc/net/tcp").read_text()
