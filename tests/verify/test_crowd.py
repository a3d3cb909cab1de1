"""A well-behaved VP beside a crowd of silent, slow and greedy clients: served, and memory stays bounded.

In turns, with the crowd and without, in one run; the VP is the load generator of `make bench`, in C. Its p99
is printed. It should be twice its own at most, or one request of somebody else's more, which the event loop
does not break off; but that is a figure of the machine as much as of ours. That a uid's requests wait for its
own, and for nobody else's, is judged by their order in `tests/service/test_tenants.py`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import pytest

from fakes import as_user
from fakes.child_process import TESTS
from fakes.crowd import KINDS, SILENT, SLOW
from fakes.daemon_process import DaemonProcess
from fakes.eventually import eventually
from fakes.puppet import ENVIRONMENT

pytestmark = [
    pytest.mark.verify,
    pytest.mark.alone,
    pytest.mark.skipif(shutil.which("gcc") is None, reason="the load generator is in C: needs gcc"),
    pytest.mark.skipif(
        not {0, 1} <= os.sched_getaffinity(0), reason="the crowd needs a CPU beside the VP's: CPUs 0 and 1"
    ),
]

CROWD_UID = 61001 if os.geteuid() == 0 else os.geteuid()
"""The crowd is another user than the VP where that can be had."""
CONFIG = f"""
socket_mode = 0o666
allowed_uids = [{os.geteuid()}, {CROWD_UID}]
limits.connections_without_hello = {SILENT + SLOW + 100}
limits.control_requests_per_second = 500
"""
AHEAD = ("nice", "-n", "-10", "taskset", "-c", "0")
"""The daemon and the VP share a CPU, before other work where we may say so, and the crowd has another one:
what is measured is the daemon's fairness, not that of the kernel's scheduler."""
ASIDE = ("taskset", "-c", "1")
SECONDS, ROUNDS = 0.5, 5
"""Of a run of the VP: some 20,000 intercepts."""
GROWTH_KIB = 32 * 1024
"""Of 1,110 connections and all that they send: some 20 KiB each, and what the allocator keeps."""


@pytest.fixture
def daemon() -> Iterator[DaemonProcess]:
    with tempfile.TemporaryDirectory(prefix="interceptd-") as directory:
        Path(directory).chmod(0o755)
        with DaemonProcess(
            Path(directory), config=CONFIG, launch=(*AHEAD, sys.executable, "-m", "interceptd")
        ) as process:
            yield process.wait_serving()


@pytest.fixture
def load(tmp_path: Path) -> Path:
    binary = tmp_path / "load"
    source, header = TESTS / "benchmarks" / "load.c", TESTS.parent / "clients" / "c"
    subprocess.run(["gcc", "-O2", "-pthread", f"-I{header}", "-o", binary, source], check=True)
    return binary


@contextmanager
def crowd(daemon: DaemonProcess, kind: str) -> Iterator[None]:
    """Within, everybody of the crowd is there."""
    launch = as_user.launch(CROWD_UID) if os.geteuid() == 0 else ()
    command = [*ASIDE, *launch, sys.executable, "-m", "fakes.crowd", str(daemon.socket), kind]
    with subprocess.Popen(
        command, env=os.environ | ENVIRONMENT, cwd=TESTS, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == b"here\n"
            yield
        finally:
            process.kill()
    eventually(lambda: daemon.statistics()["connections"], 1)  # the operator's


def p99_us(load: Path, daemon: DaemonProcess) -> float:
    """Of a VP in its own partition."""
    command: list[str | Path] = [*AHEAD, load, "-t", str(SECONDS), "already_mapped", daemon.socket]
    figures = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return float(figures["p99"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_vp_beside_a_crowd_is_served_and_memory_stays_bounded(
    daemon: DaemonProcess, load: Path, kind: str
) -> None:
    p99_us(load, daemon)
    before = daemon.resident_kib()
    alone, beside, resident = [], [], []
    for _ in range(ROUNDS):
        alone.append(p99_us(load, daemon))
        with crowd(daemon, kind):
            beside.append(p99_us(load, daemon))
            resident.append(daemon.resident_kib())
    ratio = median(with_crowd / without for with_crowd, without in zip(beside, alone, strict=True))
    growth = max(resident) - before
    print(f"\n10 of {kind}: p99 {median(alone):.0f} us alone, {median(beside):.0f} us beside, {ratio:.2f} x")
    print(f"alone {[round(us) for us in alone]}, beside {[round(us) for us in beside]}")
    print(f"VmRSS {before} KiB before, {[kib - before for kib in resident]} KiB more in the rounds")
    assert growth < GROWTH_KIB
