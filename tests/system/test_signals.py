"""The end of a daemon: it drains on the first SIGTERM or SIGINT, and the second one ends it at once."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from fakes.daemon_process import DaemonProcess, StartDaemon
from fakes.eventually import eventually
from fakes.locked_directory import is_waiting_for_a_lock, locked
from fakes.raw_client import READ, RawConnection, intercept_message, request
from fakes.raw_vmm import GFN, MODEL, WHOLE_MEMORY, RawVmm
from fakes.rude_peers import stop_reading

END_SIGNALS = [signal.SIGTERM, signal.SIGINT]
UNBACKED_GFN = 0x9000
LONG_DRAIN = "timeouts.drain_ms = 600000"


def wait_for_memory(daemon: DaemonProcess, vmm: RawVmm, vps: int) -> list[RawConnection]:
    """VPs whose intercepts wait for an invalidation that does not end."""
    vmm.add_memory()
    vmm.notifier().ask("invalidate_begin", WHOLE_MEMORY)
    waiting = [vmm.vp(index) for index in range(vps)]
    for vp in waiting:
        vp.send(request("intercept", intercept_message(GFN, READ)))
    eventually(lambda: daemon.vp_states(vmm.partition_id), ["waiting"] * vps)
    return waiting


def hold_the_drain(daemon: DaemonProcess, vmm: RawVmm) -> None:
    """Leave an intercept in flight whose answer is not read: the drain waits for it."""
    vmm.add_region(UNBACKED_GFN, 1, 0)
    stop_reading(daemon, vmm.vp(), UNBACKED_GFN)


def sockets_of(daemon: DaemonProcess) -> list[Path]:
    """The sockets that are there."""
    return [path for path in (daemon.socket, daemon.operator_socket) if path.exists()]


@pytest.mark.parametrize("number", END_SIGNALS)
def test_an_idle_daemon_that_is_signalled_ends_with_status_0_and_unlinks_its_sockets(
    start_daemon: StartDaemon, number: signal.Signals
) -> None:
    daemon = start_daemon()
    daemon.signal(number)
    assert daemon.wait_ended() == 0
    assert sockets_of(daemon) == []
    assert daemon.events()[-2:] == ["drain_started", "daemon_ended"]


@pytest.mark.parametrize("number", END_SIGNALS)
def test_intercepts_in_flight_are_answered_draining(
    start_daemon: StartDaemon, number: signal.Signals
) -> None:
    daemon = start_daemon(config=LONG_DRAIN)
    with RawVmm(daemon.socket) as vmm:
        waiting = wait_for_memory(daemon, vmm, vps=8)
        daemon.signal(number)
        assert [vp.answer() for vp in waiting] == [["retry", "draining"]] * 8
        assert [vp.receive_all() for vp in waiting] == [[]] * 8
        assert daemon.wait_ended() == 0


def test_an_operators_drain_ends_the_daemon_with_status_0(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(config=LONG_DRAIN)
    with RawVmm(daemon.socket) as vmm:
        (waiting,) = wait_for_memory(daemon, vmm, vps=1)
        assert daemon.operator().ask("drain", {"timeout_ms": 10_000}) is None
        assert waiting.answer() == ["retry", "draining"]
        assert daemon.wait_ended() == 0
    assert sockets_of(daemon) == []


@pytest.mark.parametrize("second", END_SIGNALS)
def test_a_second_signal_ends_at_once_with_status_128_and_its_number(
    start_daemon: StartDaemon, second: signal.Signals
) -> None:
    daemon = start_daemon(config=LONG_DRAIN)
    with RawVmm(daemon.socket) as vmm:
        hold_the_drain(daemon, vmm)
        daemon.signal(signal.SIGTERM)
        daemon.wait_event("drain_started")
        daemon.signal(second)
        assert daemon.wait_ended() == 128 + second
    assert sockets_of(daemon) == []


def test_a_drain_is_cut_short_when_its_time_is_up(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(config="timeouts.drain_ms = 300")
    with RawVmm(daemon.socket) as vmm:
        hold_the_drain(daemon, vmm)
        daemon.signal(signal.SIGTERM)
        assert daemon.wait_ended() == 0
    assert sockets_of(daemon) == []


def test_a_new_partition_during_the_drain_is_refused(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(config=LONG_DRAIN)
    with RawVmm(daemon.socket) as vmm, RawConnection(daemon.socket) as late:
        late.say_hello("vmm")
        hold_the_drain(daemon, vmm)
        daemon.signal(signal.SIGTERM)
        daemon.wait_event("drain_started")
        assert late.refusal("create_partition", MODEL).name == "ESHUTDOWN"
        vmm.close()
        assert daemon.wait_ended() == 0


def test_a_signal_that_comes_while_the_daemon_starts_is_not_lost(tmp_path: Path) -> None:
    with locked(tmp_path):
        daemon = DaemonProcess(tmp_path)
        eventually(lambda: is_waiting_for_a_lock(daemon.pid, tmp_path), True)
        daemon.signal(signal.SIGTERM)
    with daemon:
        assert daemon.wait_ended() == 0
    assert sockets_of(daemon) == []


def test_a_hundred_signals_at_the_end_do_not_change_the_status(start_daemon: StartDaemon) -> None:
    daemon = start_daemon()
    daemon.signal(signal.SIGTERM)
    daemon.wait_event("daemon_ended")
    for _ in range(100):
        daemon.signal(signal.SIGTERM)
    assert daemon.wait_ended() == 0
