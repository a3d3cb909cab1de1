"""The wall clock is set back and forth while a VMM is served: it only dates events and log lines."""

from __future__ import annotations

import time
from pathlib import Path

from fakes import jumping_clock
from fakes.daemon_process import DaemonProcess
from fakes.puppet import ENVIRONMENT
from fakes.raw_client import RawConnection
from fakes.witness import Witness

ROUNDS = 50


def test_a_vmm_is_served_as_ever_while_the_wall_clock_jumps(tmp_path: Path) -> None:
    with DaemonProcess(tmp_path, launch=jumping_clock.LAUNCH, environment=ENVIRONMENT) as daemon:
        daemon.wait_serving()
        with RawConnection(daemon.operator_socket) as operator:
            operator.say_hello("operator")
            operator.ask("subscribe", {"events": ["range_invalidated"]})
            with Witness(daemon.socket) as witness:
                assert [witness.serve() for _ in range(ROUNDS)] == [Witness.SERVED] * ROUNDS
            dates = [operator.receive()[2][0]["time_ms"] for _ in range(ROUNDS)]
        assert daemon.statistics()["uptime_ms"] < jumping_clock.YEAR_NS / 1e6
        assert daemon.stop() == 0
    now = time.time_ns() // 10**6
    assert {date > now for date in dates} == {False, True}, "it did not jump"
