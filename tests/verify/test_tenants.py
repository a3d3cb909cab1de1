"""A well-behaved VP beside a tenant that does all it may to cost it time, at the limits of the defaults.

Its waits are compared with those before the attack, on the same daemon. The bounds are far beyond a busy
machine's noise, and far below what each of these attacks once cost. The figures are printed. What work the
same attacks cause, smaller, is judged in `tests/system/test_hostile_tenants.py`, crowds in `test_crowd.py`.
"""

from __future__ import annotations

import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fakes import attacks, before_passrights, live_attacks
from fakes.daemon_process import DaemonProcess
from fakes.eventually import eventually
from fakes.good_vp import NICE, GoodVp, Waits
from fakes.hostile_tenant import FILES, FULL, Attack, HostileTenant
from fakes.scraper import scrape
from interceptd.log_share import BURST_SECONDS, BYTES_PER_SECOND

pytestmark = [
    pytest.mark.verify,
    pytest.mark.alone,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user"),
]

TENANT = 61001
CONFIG = f"socket_mode = 0o666\nallowed_uids = [0, {TENANT}]\n"
TIMES = 3.0
"""What a wait may be longer beside an attack."""
P99_MS, LONGEST_MS = 20.0, 200.0
"""Milliseconds that it may take anyway: a busy machine takes some of them."""


@pytest.fixture
def directory() -> Iterator[Path]:
    """One that other users may enter."""
    with tempfile.TemporaryDirectory(prefix="interceptd-") as made:
        Path(made).chmod(0o755)
        yield Path(made)


@pytest.fixture
def launch() -> tuple[str, ...]:
    return sys.executable, "-m", "interceptd"


@pytest.fixture
def daemon(directory: Path, launch: tuple[str, ...]) -> Iterator[DaemonProcess]:
    config = f'{CONFIG}metrics.listen = "unix:{directory}/metrics.sock"'
    environment = before_passrights.ENVIRONMENT
    with DaemonProcess(directory, config=config, launch=launch, environment=environment) as process:
        os.setpriority(os.PRIO_PROCESS, process.pid, NICE)
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (FILES, FILES))
        yield process.wait_serving()


@pytest.fixture
def good_vp(daemon: DaemonProcess) -> Iterator[GoodVp]:
    vp = GoodVp(daemon.socket)
    yield vp
    vp.close()


def beside(
    daemon: DaemonProcess, vp: GoodVp, attack: Attack, meanwhile: Callable[[], object] = lambda: None
) -> bool:
    """Whether it is served as before. Measures before the attack and during it, in which `meanwhile` is
    called once, and prints the figures."""
    with HostileTenant(attack, daemon.socket, TENANT) as hostile:
        assert hostile.go_on()
        long_before = long_steps(daemon)
        with vp.measured() as before:
            assert hostile.go_on()
        with vp.measured() as during:
            if hostile.go_on():
                meanwhile()
            else:
                eventually(lambda: daemon.statistics()["partitions"], 1)
    [before_it], [beside_it] = before, during
    new = long_steps(daemon)[len(long_before) :]
    print(f"\n{attack.__name__}: before {before_it}; with {beside_it}; CPU of long steps: {new}")
    return is_served_as_before(before_it, beside_it)


def is_served_as_before(before: Waits, beside: Waits) -> bool:
    return beside.p99 <= max(TIMES * before.p99, P99_MS) and beside.longest <= max(
        TIMES * before.longest, LONGEST_MS
    )


def long_steps(daemon: DaemonProcess) -> list[str]:
    lines = [line for line in daemon.log_lines() if line["event"] == "long_step"]
    return [f"{line['task'].rpartition('.')[2]} {line['cpu_ms']:.1f} ms" for line in lines]


@pytest.mark.parametrize("attack", [*attacks.ATTACKS, *live_attacks.ATTACKS])
def test_a_vp_is_served_beside_a_hostile_tenant(
    daemon: DaemonProcess, good_vp: GoodVp, attack: Attack
) -> None:
    assert beside(daemon, good_vp, attack)


@pytest.mark.parametrize("launch", [before_passrights.LAUNCH])
def test_a_vp_is_served_beside_descriptors_with_every_intercept(
    daemon: DaemonProcess, good_vp: GoodVp
) -> None:
    assert beside(daemon, good_vp, attacks.sends_descriptors)


def test_a_vp_is_served_while_an_operator_looks_at_many_mappings(
    daemon: DaemonProcess, good_vp: GoodVp, directory: Path
) -> None:
    def look() -> None:
        for _ in FULL.again_and_again():
            for partition_id in daemon.partition_ids():
                daemon.vp_states(partition_id)
            scrape(directory / "metrics.sock")

    assert beside(daemon, good_vp, attacks.has_many_mappings, look)


def test_a_tenant_that_is_refused_without_end_writes_its_share_of_the_log(
    daemon: DaemonProcess, good_vp: GoodVp
) -> None:
    before, began = len(daemon.log_text()), time.monotonic()
    assert beside(daemon, good_vp, attacks.fills_the_log)
    written, seconds = len(daemon.log_text()) - before, time.monotonic() - began
    print(f"{written} bytes of log in {seconds:.1f} s")
    assert 0 < written < 1.5 * (BURST_SECONDS + seconds) * BYTES_PER_SECOND
