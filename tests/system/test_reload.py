"""SIGHUP: live keys change, an invalid file changes nothing, the service manager is notified."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fakes.daemon_process import DaemonProcess, StartDaemon
from fakes.eventually import eventually
from fakes.locked_directory import is_waiting_for_a_lock, locked
from fakes.raw_client import RawConnection, intercept_message, request
from fakes.raw_vmm import GFN, WHOLE_MEMORY, RawVmm, region
from fakes.rude_peers import stop_reading
from fakes.witness import Witness


def reload(daemon: DaemonProcess, config: str, event: str = "configuration_reloaded") -> dict[str, Any]:
    """The line that the daemon logs about a new file."""
    heard = daemon.events().count(event)
    (daemon.socket.parent / "interceptd.toml").write_text(config)
    daemon.signal(signal.SIGHUP)
    eventually(lambda: daemon.events().count(event), heard + 1)
    return [line for line in daemon.log_lines() if line["event"] == event][-1]


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.settimeout(20)
        manager.bind(str(tmp_path / "notify"))
        yield manager


def hear(manager: socket.socket) -> dict[str, str]:
    return dict(line.split("=", 1) for line in manager.recv(4096).decode().splitlines())


def test_one_line_lists_changes_with_old_and_new_values_and_what_needs_a_restart(
    start_daemon: StartDaemon,
) -> None:
    daemon = start_daemon(config="limits.operators = 4")
    line = reload(daemon, 'limits.operators = 5\nsocket_mode = 0o600\n[log]\nlevel = "debug"')
    assert (line["changed"], line["needs_restart"]) == (
        ["limits.operators: 4 -> 5", "log.level: info -> debug"],
        ["socket_mode: 0o660 -> 0o600"],
    )


def test_limits_are_others_for_new_and_for_present_connections(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(config="limits.regions_per_partition = 1")
    with RawVmm(daemon.socket) as vmm, RawConnection(daemon.socket) as newcomer:
        vmm.add_region(0, 1, 0)
        assert vmm.connection.refusal("add_region", region(1, 1, 0)).name == "ENOSPC"
        reload(daemon, "limits.regions_per_partition = 2\nlimits.vps_per_partition = 1")
        vmm.add_region(1, 1, 0)
        stated = newcomer.say_hello("vmm")["limits"]
        assert (stated["regions_per_partition"], stated["vps_per_partition"]) == (2, 1)


def test_usage_above_a_lowered_limit_stays(start_daemon: StartDaemon) -> None:
    daemon = start_daemon()
    with Witness(daemon.socket) as witness:
        reload(daemon, "limits.regions_per_uid = 1\nlimits.vps_per_uid = 1\nlimits.connections_per_uid = 1")
        assert witness.serve() == Witness.SERVED
        assert witness.connection.refusal("add_region", region(0, 1, 0)).details == {
            "limit": "regions_per_uid"
        }


def test_changed_allowed_users_apply_to_the_next_connection(start_daemon: StartDaemon) -> None:
    daemon = start_daemon()
    with Witness(daemon.socket) as witness, RawConnection(daemon.socket) as before:
        before.say_hello("vmm")
        reload(daemon, f"allowed_uids = [{os.geteuid() + 1}]")
        with RawConnection(daemon.socket) as connection:
            assert connection.farewell().name == "EACCES"
        assert witness.serve() == Witness.SERVED


def test_a_lower_log_level_logs_more_at_once(start_daemon: StartDaemon) -> None:
    daemon = start_daemon()
    reload(daemon, 'log.level = "debug"')
    RawConnection(daemon.socket).close()
    eventually(lambda: "connection_gone" in daemon.events(), True)


def test_a_higher_log_level_logs_less_at_once(start_daemon: StartDaemon) -> None:
    daemon = start_daemon()
    (daemon.socket.parent / "interceptd.toml").write_text('limits.operators = 9\nlog.level = "error"')
    daemon.signal(signal.SIGHUP)
    eventually(lambda: stated_limits(daemon)["operators"], 9)
    with RawConnection(daemon.socket) as connection:
        connection.send(b"GET / HTTP/1.1")
        connection.farewell()
    assert daemon.stop() == 0
    assert daemon.events() == ["daemon_started"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("limits.operators = 0", "limits.operators: expected `int` >= 1"),
        ("[limits", "is not valid TOML"),
        ('limits.operators = 9\nlog.level = "loud"', "log.level: expected one of debug"),
    ],
)
def test_an_invalid_file_changes_nothing_and_the_log_says_why(
    start_daemon: StartDaemon, text: str, why: str
) -> None:
    daemon = start_daemon(config="limits.operators = 4")
    with Witness(daemon.socket) as witness:
        line = reload(daemon, text, "configuration_not_reloaded")
        assert (line["level"], why in line["error"], "interceptd.toml" in line["error"]) == (
            "error",
            True,
            True,
        )
        with RawConnection(daemon.socket) as connection:
            assert connection.say_hello("vmm")["limits"]["operators"] == 4
        assert witness.serve() == Witness.SERVED
    assert reload(daemon, "limits.operators = 5")["changed"] == ["limits.operators: 4 -> 5"]


def test_a_deleted_file_changes_nothing(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(config="limits.operators = 4")
    (daemon.socket.parent / "interceptd.toml").unlink()
    daemon.signal(signal.SIGHUP)
    daemon.wait_event("configuration_not_reloaded")
    assert "cannot be read: No such file" in daemon.log_lines()[-1]["error"]


def test_the_environment_still_goes_before_the_file(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(environment={"INTERCEPTD_LIMITS__OPERATORS": "7"})
    assert reload(daemon, "limits.operators = 5")["changed"] == []


def test_an_intercept_that_waits_while_it_reloads_has_its_answer(start_daemon: StartDaemon) -> None:
    daemon = start_daemon()
    with RawVmm(daemon.socket) as vmm:
        vmm.add_memory()
        notifier, vp = vmm.notifier(), vmm.vp()
        notifier.ask("invalidate_begin", WHOLE_MEMORY)
        vp.send(request("intercept", intercept_message(GFN, 0)))
        eventually(lambda: daemon.vp_states(vmm.partition_id), ["waiting"])
        reload(daemon, "timeouts.invalidate_ms = 1")
        notifier.ask("invalidate_end", WHOLE_MEMORY)
        assert vp.answer() == ["resume", "mapped"]


@pytest.mark.parametrize("config", ["limits.operators = 5", "limits.operators = 0"])
def test_a_manager_hears_reloading_with_the_time_and_then_ready_whatever_came_of_it(
    start_daemon: StartDaemon, manager: socket.socket, config: str
) -> None:
    daemon = start_daemon(environment={"NOTIFY_SOCKET": manager.getsockname()})
    assert hear(manager)["READY"] == "1"
    (daemon.socket.parent / "interceptd.toml").write_text(config)
    daemon.signal(signal.SIGHUP)
    reloading, ready = hear(manager), hear(manager)
    assert ({*reloading}, reloading["RELOADING"]) == ({"RELOADING", "MONOTONIC_USEC"}, "1")
    assert int(reloading["MONOTONIC_USEC"]) > 0
    assert ready == {"READY": "1", "STATUS": "serving 0 partitions, 0 VPs"}


def test_a_sighup_while_the_daemon_starts_is_obeyed_once_it_is_up(
    tmp_path: Path, manager: socket.socket
) -> None:
    with locked(tmp_path):
        daemon = DaemonProcess(tmp_path, environment={"NOTIFY_SOCKET": manager.getsockname()})
        eventually(lambda: is_waiting_for_a_lock(daemon.pid, tmp_path), True)
        (tmp_path / "interceptd.toml").write_text("limits.operators = 5")
        daemon.signal(signal.SIGHUP)
    with daemon:
        assert [set(hear(manager)) & {"READY", "RELOADING"} for _ in range(3)] == [
            {"READY"},
            {"RELOADING"},
            {"READY"},
        ]
        assert daemon.wait_serving().log_lines()[-1]["changed"] == ["limits.operators: 32 -> 5"]
        assert daemon.stop() == 0


def test_a_sighup_during_the_drain_changes_nothing_and_the_drain_continues(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(config="timeouts.drain_ms = 600000")
    with RawVmm(daemon.socket) as vmm:
        vmm.add_region(0x9000, 1, 0)
        stop_reading(daemon, vmm.vp(), 0x9000)
        daemon.signal(signal.SIGTERM)
        daemon.wait_event("drain_started")
        line = reload(daemon, "timeouts.drain_ms = 1", "configuration_not_reloaded")
        assert "draining" in line["error"]
        assert daemon.status is None
    assert daemon.wait_ended() == 0


def test_a_hundred_sighups_end_with_the_last_file(start_daemon: StartDaemon) -> None:
    daemon = start_daemon()
    with Witness(daemon.socket) as witness:
        for operators in range(1, 101):
            (daemon.socket.parent / "interceptd.toml").write_text(f"limits.operators = {operators}")
            daemon.signal(signal.SIGHUP)
        eventually(lambda: stated_limits(daemon)["operators"], 100)
        assert witness.serve() == Witness.SERVED


def stated_limits(daemon: DaemonProcess) -> dict[str, int]:
    with RawConnection(daemon.socket) as connection:
        stated: dict[str, int] = connection.say_hello("vmm")["limits"]
        return stated
