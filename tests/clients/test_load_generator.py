"""The load generator of the benchmarks measures what it says, against a real daemon."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from fakes.daemon_process import DaemonProcess
from fakes.eventually import PATIENCE

HERE = Path(__file__).parent
HEADER = HERE.parents[1] / "clients" / "c"
SOURCE = HERE.parent / "benchmarks" / "load.c"


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Path:
    gcc = shutil.which("gcc")
    if gcc is None:
        pytest.skip("gcc is missing: the load generator cannot be built")
    binary = tmp_path_factory.mktemp("load") / "load"
    flags = ["-Wall", "-Wextra", "-Werror", "-g", "-pthread", "-fsanitize=address,undefined", f"-I{HEADER}"]
    subprocess.run([gcc, *flags, "-o", binary, SOURCE], check=True, timeout=PATIENCE)
    return binary


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    with DaemonProcess(tmp_path_factory.mktemp("daemon")) as process:
        yield process.wait_serving()


def run(load: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command: list[str | Path] = [load, "-t", "0.01", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)


@pytest.mark.parametrize(
    ("scenario", "outcome", "reason"),
    [
        ("already_mapped", "resume", "already_mapped"),
        ("permission", "forward", "permission"),
        ("no_region", "forward", "no_region"),
        ("first_touch", "resume", "mapped"),
        ("invalidate", "resume", "mapped"),
        ("unmap_vma", "resume", "mapped"),
    ],
)
def test_a_scenario_is_made_of_the_answers_that_it_is_named_for(
    load: Path, daemon: DaemonProcess, scenario: str, outcome: str, reason: str
) -> None:
    before = daemon.statistics()["intercepts"]
    done = run(load, "-r", 4, "-m", 4, scenario, daemon.socket)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["p50"] > 0
    assert daemon.statistics()["intercepts"][outcome][reason] > before[outcome][reason]


def test_several_partitions_share_the_vps(load: Path, daemon: DaemonProcess) -> None:
    before = daemon.statistics()["partitions_created"]
    done = run(load, "-v", 6, "-p", 3, "no_region", daemon.socket)
    created = daemon.statistics()["partitions_created"] - before
    assert (done.returncode, created) == (0, 3), done.stderr


@pytest.mark.parametrize("scenario", ["first_touch", "invalidate", "unmap_vma"])
def test_a_workload_that_undoes_its_work_is_refused_for_several_vps(
    load: Path, tmp_path: Path, scenario: str
) -> None:
    done = run(load, "-v", 2, scenario, tmp_path / "not-there.sock")
    assert (done.returncode, done.stderr) == (2, f"{scenario}: one VP would undo what another waits for\n")


def test_an_answer_that_the_scenario_does_not_expect_ends_the_run(load: Path, daemon: DaemonProcess) -> None:
    """One page, asked for again and again: the 17th answer is no_progress."""
    done = run(load, "-t", 60, "-g", 1, "already_mapped", daemon.socket)
    assert done.returncode == 1
    assert "no_progress instead of already_mapped" in done.stderr
