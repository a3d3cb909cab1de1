"""Floods: other peers are served, and memory and descriptors stay bounded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from fakes.child_process import child_process
from fakes.daemon_process import DaemonProcess, StartDaemon
from fakes.eventually import eventually
from fakes.raw_client import RawConnection, request
from fakes.raw_vmm import GFN, PAGES, RawVmm
from fakes.rude_peers import stop_reading
from fakes.witness import Witness

FLOOD = 600
GROWTH_KIB = 8 * 1024
"""What an allocator may keep of a flood that is over. One that were never freed would be 64 MiB."""


@pytest.fixture
def flood(daemon: DaemonProcess, witness: Witness) -> Iterator[list[RawConnection]]:  # noqa: ARG001 - it looks before and after
    """600 connections that say nothing."""
    with ExitStack() as opened:
        yield [opened.enter_context(RawConnection(daemon.socket)) for _ in range(FLOOD)]


def test_600_silent_connections_are_512_waited_for_and_the_rest_eagain(
    daemon: DaemonProcess, witness: Witness, flood: list[RawConnection]
) -> None:
    eventually(lambda: daemon.statistics()["connections_without_hello"], 512)
    assert witness.serve() == Witness.SERVED
    assert [connection.farewell().name for connection in flood[512:]] == ["EAGAIN"] * (FLOOD - 512)


def test_a_flood_that_leaves_makes_room_at_once(
    daemon: DaemonProcess, witness: Witness, flood: list[RawConnection]
) -> None:
    eventually(lambda: daemon.statistics()["connections_without_hello"], 512)
    for connection in flood:
        connection.close()
    eventually(lambda: daemon.statistics()["connections_without_hello"], 0)
    with witness.vp(1) as vp:
        assert vp.intercept(GFN)[0] == "resume"


def test_a_flood_that_stays_is_timed_out_and_makes_room(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(config="timeouts.hello_ms = 3000")
    with Witness(daemon.socket) as witness, ExitStack() as opened:
        flood = [opened.enter_context(RawConnection(daemon.socket)) for _ in range(FLOOD)]
        assert witness.serve() == Witness.SERVED
        assert {connection.farewell().name for connection in flood[:512]} == {"ETIMEDOUT"}
        assert witness.vp(1).intercept(GFN)[0] == "resume"


def test_a_vp_that_does_not_read_its_answers_delays_no_other(
    daemon: DaemonProcess, vmm: RawVmm, witness: Witness
) -> None:
    vmm.add_memory()
    stop_reading(daemon, vmm.vp(0), gfn=0)
    assert witness.serve() == Witness.SERVED
    assert vmm.vp(1).intercept(GFN) == ["resume", "mapped"]
    assert vmm.notifier().ask("invalidate", {"start_uaddr": 0, "length": 4096}) is None
    assert vmm.ask("kick", vp_index="all") is None


def test_vps_that_send_without_pause_delay_no_other(daemon: DaemonProcess, witness: Witness) -> None:
    with (
        child_process("fakes.hammering_vp", daemon.socket),
        child_process("fakes.hammering_vp", daemon.socket),
        RawVmm(daemon.socket) as newcomer,
    ):
        assert [witness.serve() for _ in range(20)] == [Witness.SERVED] * 20
        assert newcomer.vp().intercept(0) == ["forward", "no_region"]


def test_a_peer_that_sends_without_end_and_reads_nothing_is_cut_off(vmm: RawVmm, witness: Witness) -> None:
    vp = vmm.vp()
    vp.send(request("intercept", bytes(256)) * 10_000)
    assert witness.serve() == Witness.SERVED
    assert vp.receive_all()[-1][:2] == [1, 0]


def test_memory_does_not_grow_with_floods_of_messages_that_are_never_finished(
    daemon: DaemonProcess, witness: Witness
) -> None:
    def flood_with_halves() -> None:
        with ExitStack() as opened:
            for _ in range(200):
                connection = opened.enter_context(RawConnection(daemon.socket))
                connection.send(b"\x94\x00\x01\xa5hello\x91\xc5\xff\xf0" + bytes(60_000))
            assert witness.serve() == Witness.SERVED
        eventually(lambda: daemon.statistics()["connections_without_hello"], 0)

    flood_with_halves()
    before = daemon.resident_kib()
    for _ in range(4):
        flood_with_halves()
    assert daemon.resident_kib() - before < GROWTH_KIB


def test_memory_does_not_grow_with_partitions_that_come_and_go(
    daemon: DaemonProcess, witness: Witness
) -> None:
    def come_and_go(times: int) -> None:
        for _ in range(times):
            with RawVmm(daemon.socket) as vmm:
                for number in range(8):
                    vmm.add_region(number * PAGES, PAGES, 0)
                vmm.vp()
                vmm.notifier().ask("invalidate_begin", {"start_uaddr": 0, "length": 4096})
        eventually(daemon.partition_ids, [witness.partition_id])

    come_and_go(20)
    before = daemon.resident_kib()
    come_and_go(100)
    assert daemon.resident_kib() - before < GROWTH_KIB // 4
