"""The long race over live memory: guests reach only what their VMM has, and mutant daemons are detected."""

from __future__ import annotations

from pathlib import Path

import pytest

from fakes.daemon_process import DaemonProcess
from fakes.live_race import Drain, Findings, Mode, Stop, race
from fakes.live_vmm import LiveVmm
from fakes.mutant_live_daemon import launch
from fakes.puppet import ENVIRONMENT, Puppet

pytestmark = pytest.mark.verify

SECONDS = 60.0
SECONDS_TO_DETECTION = 60.0
SECONDS_OF_SLOW_SERVING = 15.0


def raced(
    daemon: DaemonProcess, mode: Mode, seconds: float, stop: Stop = Stop.NEVER, drain: Drain = Drain.FIRST
) -> Findings:
    with Puppet() as vmm:
        vmm.do(LiveVmm.connect, daemon.wait_serving().socket)
        return vmm.start(race, mode, seconds, stop, drain).result(patience=seconds + 60)


@pytest.mark.parametrize("mode", list(Mode))
def test_a_race_of_changes_and_faults_leaves_nothing_stale(tmp_path: Path, mode: Mode) -> None:
    with DaemonProcess(tmp_path) as daemon:
        found = raced(daemon, mode, SECONDS)
    print(f"\n{mode.name}: {found}")
    assert found.stale == []
    assert found.rounds > 0
    assert found.pages_reached > found.rounds


@pytest.mark.parametrize(
    "mutant", ["without-second-registration", "without-second-look", "without-staleness-check"]
)
def test_a_mutant_without_one_ordering_leaves_stale_pages(tmp_path: Path, mutant: str) -> None:
    with DaemonProcess(tmp_path, launch=launch(mutant), environment=ENVIRONMENT) as daemon:
        found = raced(daemon, Mode.WATCHED, SECONDS_TO_DETECTION, Stop.AT_THE_FIRST_STALE_PAGE)
    print(f"\n{mutant}: {found}")
    assert found.stale


def raced_beside_slow_serving(directory: Path, drain: Drain) -> Findings:
    with DaemonProcess(directory, launch=launch("slow-to-serve"), environment=ENVIRONMENT) as daemon:
        return raced(daemon, Mode.WATCHED, SECONDS_OF_SLOW_SERVING, Stop.AT_THE_FIRST_STALE_PAGE, drain)


def test_a_check_before_the_notifier_has_drained_finds_stale_pages(tmp_path: Path) -> None:
    """Watching alone does not promise more: a munmap returns when its event was read, not served."""
    found = raced_beside_slow_serving(tmp_path, Drain.NOT_AT_ALL)
    print(f"\nnot drained: {found}")
    assert found.stale


def test_a_check_after_a_slow_notifier_has_drained_finds_no_stale_page(
    tmp_path: Path,
) -> None:
    assert raced_beside_slow_serving(tmp_path, Drain.FIRST).stale == []
