"""A limit that is reached shows: in the log at a pace, and in the metrics by method and error."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fakes.daemon_process import DaemonProcess, StartDaemon
from fakes.eventually import eventually
from fakes.raw_client import RawConnection
from fakes.raw_vmm import MODEL, RawVmm
from fakes.scraper import scrape

REFUSED = "interceptd_requests_refused_total"


def warnings(daemon: DaemonProcess) -> list[dict[str, Any]]:
    """What the log says of refused requests, without the time."""
    lines = [line for line in daemon.log_lines() if line["event"] == "request_refused"]
    assert all(line.pop("level") == "warning" and line.pop("timestamp") for line in lines)
    return lines


def test_refusals_are_counted_and_a_limit_that_is_reached_is_logged_once_a_minute(
    start_daemon: StartDaemon, tmp_path: Path
) -> None:
    place = tmp_path / "metrics.sock"
    daemon = start_daemon(
        config=f'metrics.listen = "unix:{place}"\n[limits]\npartitions_per_uid = 1\nvmms_per_uid = 2'
    )
    with RawVmm(daemon.socket) as vmm, RawConnection(daemon.socket) as second:
        second.say_hello("vmm")
        for _ in range(3):
            assert second.refusal("create_partition", MODEL).name == "ENOSPC"
        with RawConnection(daemon.socket) as third:
            assert third.refusal("hello", {"protocol": 1, "role": "vmm"}).name == "ENOSPC"
        vmm.connection.refusal("translate", {})
        vmm.connection.refusal("made_up", {})
        eventually(lambda: len(warnings(daemon)), 2)
        figures = scrape(place)
    assert warnings(daemon) == [
        {
            "event": "request_refused", "method": method, "error": "ENOSPC", "limit": limit,
            "uid": os.getuid(), "pid": os.getpid(), "not_warned": 0,
        }
        for method, limit in (("create_partition", "partitions_per_uid"), ("hello", "vmms_per_uid"))
    ]  # fmt: skip
    assert figures.value(REFUSED, method="create_partition", error="ENOSPC") == 3
    assert figures.value(REFUSED, method="hello", error="ENOSPC") == 1
    assert figures.value(REFUSED, method="translate", error="EINVAL") == 1
    assert figures.value(REFUSED, method="unknown", error="ENOSYS") == 1
    assert figures.value(REFUSED, method="add_region", error="ENOSPC") == 0
