"""What a tenant does within its limits to cost the others time, and what work that is at most for the daemon.

The attacks are those of `tests/verify/test_tenants.py`, smaller. The daemon's clock is its own work
(`fakes.counting_daemon`), so the machine's load decides nothing.
"""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from fakes import attacks, before_passrights, counting_daemon, live_attacks
from fakes.daemon_process import DaemonProcess
from fakes.eventually import eventually
from fakes.good_vp import GoodVp
from fakes.hostile_tenant import QUICK, Attack, HostileTenant
from fakes.scraper import scrape
from interceptd.log_share import BURST_SECONDS, BYTES_PER_SECOND
from interceptd.scheduling.step_monitor import STEP_LIMIT_NS

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")

TENANT: Final = 61001
ROUND_LIMIT_NS: Final = 2 * STEP_LIMIT_NS
"""What one uid may take of a round while others wait."""


@pytest.fixture(scope="module")
def daemon() -> Iterator[DaemonProcess]:
    with tempfile.TemporaryDirectory(prefix="interceptd-") as directory:
        Path(directory).chmod(0o755)  # other users may enter
        config = (
            f"socket_mode = 0o666\nallowed_uids = [0, {TENANT}]\n"
            f'metrics.listen = "unix:{directory}/metrics.sock"'
        )
        launch, environment = counting_daemon.LAUNCH, before_passrights.ENVIRONMENT
        with DaemonProcess(Path(directory), config=config, launch=launch, environment=environment) as process:
            yield process.wait_serving()
            assert process.stop() == 0


def longest(daemon: DaemonProcess) -> dict[str, Any]:
    """What took longest since the last time, in work."""

    def told() -> list[dict[str, Any]]:
        return [line for line in daemon.log_lines() if line["event"] == "longest"]

    before = len(told())
    daemon.signal(signal.SIGUSR1)
    eventually(lambda: len(told()) > before, True)
    return told()[-1]


def is_bounded(daemon: DaemonProcess, attack: Attack, meanwhile: Callable[[], object] = lambda: None) -> bool:
    """Whether every step is within its bound. Asserts the rest: that a good VP is answered meanwhile."""
    longest(daemon)
    with HostileTenant(attack, daemon.socket, TENANT, QUICK) as hostile:
        assert hostile.go_on()
        vp = GoodVp(daemon.socket)
        with vp.measured() as figures:
            assert hostile.go_on()
            if hostile.go_on():
                meanwhile()
        vp.close()
    eventually(lambda: daemon.statistics()["partitions"], 0)
    found = longest(daemon)
    print(f"{attack.__name__}: {found}")
    assert figures[0].asked, "no good VP was served"
    assert found["slow_closes"] == 0, "on the thread of the event loop"
    step_ns, round_ns = int(found["step_ns"]), int(found["round_ns"])
    return 0 < step_ns <= STEP_LIMIT_NS and round_ns <= ROUND_LIMIT_NS


@pytest.mark.parametrize("attack", [*attacks.ATTACKS, *live_attacks.ATTACKS, attacks.sends_descriptors])
def test_no_step_is_long_beside_a_hostile_tenant(daemon: DaemonProcess, attack: Attack) -> None:
    assert is_bounded(daemon, attack)


def test_no_step_is_long_while_an_operator_looks_at_many_mappings(daemon: DaemonProcess) -> None:
    def look() -> None:
        for partition_id in daemon.partition_ids():
            daemon.vp_states(partition_id)
        scrape(daemon.socket.with_name("metrics.sock"))

    assert is_bounded(daemon, attacks.has_many_mappings, look)


def test_a_tenant_that_is_refused_without_end_writes_its_share_of_the_log(daemon: DaemonProcess) -> None:
    before = len(daemon.log_text())
    assert is_bounded(daemon, attacks.fills_the_log)
    written = len(daemon.log_text()) - before
    assert 0 < written < 2 * BURST_SECONDS * BYTES_PER_SECOND
