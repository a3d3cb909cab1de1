"""A daemon that was stopped for a while (a signal, a debugger, a suspended machine) blames no peer for it.

It runs again with every deadline past and what its peers said meanwhile unread: both at once.
"""

from __future__ import annotations

import socket

import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from fakes.raw_peer import RawPeer
from fakes.running import Running
from fakes.served import serving
from intercept_protocol import rpc
from intercept_protocol.addresses import GfnRange
from interceptd.config.schema import Limits
from interceptd.connections.connection import Connection
from interceptd.connections.hangup_watch import HangupWatch
from interceptd.connections.tenants import Tenants
from interceptd.hypervisor.remote import RemoteHypervisor

LONG = 60.0
"""Seconds, beyond every deadline."""


def stop_the_daemon() -> None:
    """Let time pass without a step of any task."""
    clock = trio.lowlevel.current_clock()
    assert isinstance(clock, MockClock)
    clock.jump(LONG)


async def test_a_hello_that_came_in_time_is_welcomed() -> None:
    async with serving() as served:
        peer = await served.connect()
        await wait_all_tasks_blocked()
        peer.send_now(rpc.encode_request(1, "hello", [{"protocol": 1, "role": "vmm"}]))
        stop_the_daemon()
        response = await peer.response()
        assert (response.msgid, response.error) == (1, None)


async def test_a_hypervisors_answer_that_came_in_time_counts(nursery: trio.Nursery) -> None:
    ours, theirs = socket.socketpair()
    connection, vmm = (
        Connection(ours, Tenants(Limits), HangupWatch()),
        RawPeer.of(theirs),
    )
    link = RemoteHypervisor(deadline=lambda: 5)
    connection.expect_responses()
    answers = Running(nursery, link.serve, connection)
    await wait_all_tasks_blocked()
    unmapping = Running(nursery, link.unmap_gpas, [GfnRange(start=1, end=2)])
    request = await vmm.receive()
    assert isinstance(request, rpc.Request)
    vmm.send_now(rpc.encode_result(request.msgid, None))
    stop_the_daemon()
    await unmapping.result()
    assert request.method == "unmap_gpa"
    await answers.cancel()
    connection.close()
    vmm.close()


async def test_an_intercept_that_timed_out_while_stopped_is_retry() -> None:
    async with serving() as served:
        guest = await served.guest()
        await served.mmio(guest)
        vp, notifier = await served.vp(guest), await served.notifier(guest)
        await notifier.ask("invalidate_begin", start_uaddr=0x9000000, length=0x1000)
        await vp.send_intercept(0x100)
        await wait_all_tasks_blocked()
        stop_the_daemon()
        assert (await vp.answer()).outcome == "retry"
        await notifier.ask("invalidate_end", start_uaddr=0x9000000, length=0x1000)
        assert (await vp.intercept(0x100)).outcome == "resume"
