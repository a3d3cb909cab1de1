"""Peers that disconnect midway: what they held is released, and waiters continue."""

from __future__ import annotations

import os
import socket

import pytest

from fakes.daemon_process import DaemonProcess
from fakes.eventually import eventually
from fakes.raw_client import READ, Connect, RawConnection, intercept_message, request
from fakes.raw_vmm import GFN, PAGE, UADDR, WHOLE_MEMORY, RawVmm
from fakes.rude_peers import stop_reading
from fakes.witness import Witness

INTERCEPT = request("intercept", intercept_message(GFN, READ))


@pytest.fixture
def daemon(older_daemon: DaemonProcess) -> DaemonProcess:
    """One whose kernel does not refuse the descriptors that these tests send."""
    return older_daemon


@pytest.fixture
def vmm(vmm: RawVmm) -> RawVmm:
    vmm.add_memory()
    return vmm


def attached_vps(vmm: RawVmm) -> int:
    vps: int = vmm.ask("statistics")["vps"]
    return vps


def send_and_wait_until_it_waits(daemon: DaemonProcess, vmm: RawVmm, vp: RawConnection) -> None:
    vp.send(INTERCEPT)
    eventually(lambda: "waiting" in daemon.vp_states(vmm.partition_id), True)


@pytest.mark.parametrize("leave", [RawConnection.close, RawConnection.half_close])
def test_a_vp_that_leaves_while_its_intercept_waits_is_gone_at_once(
    daemon: DaemonProcess, vmm: RawVmm, leave: object
) -> None:
    notifier, vp = vmm.notifier(), vmm.vp()
    notifier.ask("invalidate_begin", WHOLE_MEMORY)
    send_and_wait_until_it_waits(daemon, vmm, vp)
    leave(vp)  # type: ignore[operator] # one of two methods
    eventually(lambda: attached_vps(vmm), 0)
    assert vmm.ask("statistics")["open_invalidations"] == 1


def test_a_vp_that_leaves_answers_unread_is_noticed_at_once(daemon: DaemonProcess, vmm: RawVmm) -> None:
    """Its own end lies in what the daemon has still to read, and keeps the connection open: nobody may wait
    there for the answers to be read."""
    vp = vmm.vp()
    vp.intercept(GFN)
    stop_reading(daemon, vp, GFN)
    with socket.socket(fileno=os.dup(vp.fileno())) as duplicate:
        vp.close()
        socket.send_fds(duplicate, [b"\x94"], [duplicate.fileno()])
    eventually(lambda: attached_vps(vmm), 0)


def test_faults_continue_after_a_notifier_leaves_between_begin_and_end(
    daemon: DaemonProcess, vmm: RawVmm
) -> None:
    notifier, vp = vmm.notifier(), vmm.vp()
    for _ in range(3):
        notifier.ask("invalidate_begin", WHOLE_MEMORY)
    send_and_wait_until_it_waits(daemon, vmm, vp)
    notifier.close()
    assert vp.answer() == ["resume", "mapped"]
    assert vmm.ask("statistics")["open_invalidations"] == 0


def test_a_notifier_that_leaves_does_not_end_the_begins_of_another(vmm: RawVmm) -> None:
    staying, leaving = vmm.notifier(), vmm.notifier()
    staying.ask("invalidate_begin", WHOLE_MEMORY)
    leaving.ask("invalidate_begin", WHOLE_MEMORY)
    leaving.close()
    eventually(lambda: vmm.ask("statistics")["open_invalidations"], 1)
    assert staying.ask("invalidate_end", WHOLE_MEMORY) is None


def test_a_vmm_that_leaves_ends_its_vps_and_notifiers(daemon: DaemonProcess, vmm: RawVmm) -> None:
    notifier, waiting, idle = vmm.notifier(), vmm.vp(0), vmm.vp(1)
    notifier.ask("invalidate_begin", WHOLE_MEMORY)
    send_and_wait_until_it_waits(daemon, vmm, waiting)
    vmm.connection.close()
    assert waiting.answer() == ["retry", "draining"]
    assert [peer.receive_all() for peer in (waiting, idle, notifier)] == [[], [], []]
    eventually(lambda: vmm.partition_id in daemon.partition_ids(), False)


@pytest.mark.parametrize("role", ["vmm", "operator"])
def test_a_peer_that_half_closes_after_hello_is_answered_and_closed(
    daemon: DaemonProcess, witness: Witness, role: str
) -> None:
    assert witness.serve() == Witness.SERVED
    paths = {"vmm": daemon.socket, "operator": daemon.operator_socket}
    with RawConnection(paths[role]) as connection:
        connection.send(request("hello", {"protocol": 1, "role": role}))
        connection.half_close()
        (message,) = connection.receive_all()
    assert message[3]["server"] == "interceptd"


def test_a_vmm_that_half_closes_ends_its_partition(daemon: DaemonProcess, vmm: RawVmm) -> None:
    vmm.connection.half_close()
    assert vmm.connection.receive_all() == []
    eventually(lambda: vmm.partition_id in daemon.partition_ids(), False)


def test_peers_that_leave_before_their_hello_is_answered_are_forgotten(
    connect: Connect, witness: Witness
) -> None:
    for _ in range(50):
        connection = connect()
        connection.send(request("hello", {"protocol": 1, "role": "vmm"}))
        connection.close()
    assert witness.serve() == Witness.SERVED


def test_vps_that_leave_before_they_are_welcomed_free_their_index(daemon: DaemonProcess, vmm: RawVmm) -> None:
    hello = request("hello", {"protocol": 1, "role": "vp", "vp_index": 0, **vmm.credentials})

    def welcomed() -> bool:
        with RawConnection(daemon.socket) as connection:
            connection.send(hello)
            _, _, error, _ = connection.receive()
        return error is None

    for _ in range(20):
        with RawConnection(daemon.socket) as connection:
            connection.send(hello)
    eventually(welcomed, True)


def test_a_vmm_that_leaves_in_the_middle_of_an_unmap_leaves_nothing(
    daemon: DaemonProcess, vmm: RawVmm
) -> None:
    vmm.vp().intercept(GFN)
    vmm.connection.send(request("unmap_vma", {"start_uaddr": UADDR, "page_count": 1}))
    vmm.connection.close()
    eventually(lambda: vmm.partition_id in daemon.partition_ids(), False)


def test_a_kick_answers_the_intercept_that_waits(daemon: DaemonProcess, vmm: RawVmm) -> None:
    notifier, vp = vmm.notifier(), vmm.vp()
    notifier.ask("invalidate_begin", {"start_uaddr": UADDR, "length": PAGE})
    send_and_wait_until_it_waits(daemon, vmm, vp)
    assert vmm.ask("kick", vp_index=0) is None
    assert vp.answer() == ["retry", "kicked"]
