"""The hypervisor's answer that comes in a moment is taken where it was asked for, unless more came."""

from __future__ import annotations

import errno
import os
import socket as sockets
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import trio
from trio.testing import assert_no_checkpoints, wait_all_tasks_blocked

from fakes.raw_peer import RawPeer
from fakes.running import Running
from intercept_protocol import rpc
from intercept_protocol.addresses import GfnRange
from intercept_protocol.errors import ProtocolViolation, WireError
from interceptd.config.schema import Limits
from interceptd.connections import connection as connections
from interceptd.connections import moment
from interceptd.connections.closer import Closer
from interceptd.connections.connection import LATE, Connection
from interceptd.connections.fairness import ALONE, Turns
from interceptd.connections.hangup_watch import HangupWatch
from interceptd.connections.request_reader import RequestReader
from interceptd.connections.tenants import Tenants
from interceptd.connections.unread import LOOK_LIMIT
from interceptd.hypervisor import HypervisorError
from interceptd.hypervisor.remote import RemoteHypervisor, TimedOut

GFNS = GfnRange(start=0x10, end=0x12)
DONE = rpc.encode_result(1, None)
MSGID_BEFORE = 0x77


class LookedAt(sockets.socket):
    """Counts how often somebody looked at what is unread."""

    looks = 0

    def recv(self, size: int, flags: int = 0, /) -> bytes:
        self.looks += bool(flags & sockets.MSG_PEEK)
        return super().recv(size, flags)

    def recvmsg(self, size: int, ancillary: int = 0, flags: int = 0, /) -> Any:
        self.looks += bool(flags & sockets.MSG_PEEK)
        return super().recvmsg(size, ancillary, flags)


@dataclass
class Vmm:
    """A VMM that sends `sends` in the moment in which its answer is waited for, or nothing."""

    link: RemoteHypervisor
    closer: Closer
    """Of the VMM's uid."""
    socket: sockets.socket
    served: Running[None]
    sends: Callable[[sockets.socket], object] | None = None
    moments: list[int] = field(default_factory=list)

    def moment(self, descriptor: int) -> bool:
        self.moments.append(descriptor)
        if self.sends is not None:
            self.sends(self.socket)
        return self.sends is not None


@pytest.fixture
async def vmm(nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Vmm]:
    """Of the only VP that is busy."""
    ours, theirs = sockets.socketpair()
    link = RemoteHypervisor(deadline=lambda: 5)
    connection = Connection(ours, Tenants(Limits), HangupWatch())
    connection.let_send_descriptors()
    connection.expect_responses()
    turns = Turns()
    for _ in range(ALONE + 1):
        turns.running(connection)
    monkeypatch.setattr(connections, "_HOT_PATH", turns)
    vmm = Vmm(link, connection.tenant.closer, theirs, Running(nursery, link.serve, connection))
    monkeypatch.setattr(connections, "readable_in_a_moment", vmm.moment)
    await wait_all_tasks_blocked()
    yield vmm
    await vmm.served.cancel()
    connection.close()
    theirs.close()


async def test_an_answer_that_comes_in_a_moment_costs_no_checkpoint(vmm: Vmm) -> None:
    vmm.sends = lambda peer: peer.send(DONE)
    with assert_no_checkpoints():
        await vmm.link.unmap_gpas([GFNS])
    await wait_all_tasks_blocked()
    assert not vmm.served.done


async def test_an_answer_that_is_here_after_a_yield_is_not_waited_for(vmm: Vmm) -> None:
    vmm.socket.send(DONE)
    with assert_no_checkpoints():
        await vmm.link.unmap_gpas([GFNS])
    assert vmm.moments == []


async def test_only_its_deadline_ends_the_wait_for_an_answer(vmm: Vmm, nursery: trio.Nursery) -> None:
    """Nobody may see a change that is half made."""
    unmapping = Running(nursery, vmm.link.unmap_gpas, [GFNS])
    await wait_all_tasks_blocked()
    assert not await unmapping.cancel()
    with pytest.raises(TimedOut):
        await unmapping.result()


async def test_a_refusal_that_comes_in_a_moment_is_a_refusal(vmm: Vmm) -> None:
    vmm.sends = lambda peer: peer.send(rpc.encode_error(1, WireError(errno.ENOMEM, "no slot")))
    with pytest.raises(HypervisorError) as refused:
        await vmm.link.unmap_gpas([GFNS])
    assert refused.value.number == errno.ENOMEM


async def test_a_second_answer_behind_it_ends_the_connection(vmm: Vmm) -> None:
    vmm.sends = lambda peer: peer.send(DONE + DONE)
    with pytest.raises(HypervisorError):
        await vmm.link.unmap_gpas([GFNS])
    with pytest.raises(ProtocolViolation, match="no request 1 waits"):
        await vmm.served.result()


async def test_a_descriptor_that_comes_with_an_answer_is_closed(vmm: Vmm) -> None:
    read, write = os.pipe()
    vmm.sends = lambda peer: sockets.send_fds(peer, [DONE], [write])
    await vmm.link.unmap_gpas([GFNS])
    os.close(write)
    assert os.read(read, 1) == b"", "nobody holds the other end"
    os.close(read)
    assert not vmm.served.done


async def test_descriptors_that_are_too_many_end_the_connection_that_brought_them(vmm: Vmm) -> None:
    """The VP whose map was answered so has done nothing wrong."""
    read, write = os.pipe()
    vmm.sends = lambda peer: sockets.send_fds(peer, [DONE], [write])
    vmm.closer.hold(Limits().unclosed_descriptors_per_uid)
    with pytest.raises(HypervisorError, match="connection closed"):
        await vmm.link.unmap_gpas([GFNS])
    with pytest.raises(ProtocolViolation, match="take too long to close"):
        await vmm.served.result()
    os.close(read)
    os.close(write)


def test_what_is_long_is_not_looked_at_for_the_answer() -> None:
    """A look walks through all of it, and holds up the event loop."""
    end, theirs = sockets.socketpair()
    with LookedAt(fileno=end.detach()) as ours, theirs:
        theirs.send(bytes(LOOK_LIMIT + 1))
        assert not RequestReader(ours).take(DONE)
        assert ours.looks == 0
        ours.recv(LOOK_LIMIT + 1)
        theirs.send(DONE)
        assert RequestReader(ours).take(DONE)
        assert ours.looks == 1


async def test_a_vmm_that_was_late_is_not_waited_for_again_for_a_while(vmm: Vmm) -> None:
    peer = RawPeer.of(vmm.socket)
    for msgid in range(1, LATE + 3):
        if msgid == LATE + 2:
            vmm.sends = lambda peer: peer.send(rpc.encode_result(LATE + 2, None))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(vmm.link.unmap_gpas, [GFNS])
            await peer.receive()
            if vmm.sends is None:
                await peer.send(rpc.encode_result(msgid, None))
    assert len(vmm.moments) == 2


async def test_nobody_is_waited_for_while_several_vps_are_busy(vmm: Vmm, nursery: trio.Nursery) -> None:
    connections._HOT_PATH.running(object())
    unmapping = Running(nursery, vmm.link.unmap_gpas, [GFNS])
    await wait_all_tasks_blocked()
    vmm.socket.send(DONE)
    await unmapping.result()
    assert vmm.moments == []


async def test_an_answer_to_a_request_that_timed_out_is_not_taken_for_the_next(
    vmm: Vmm, nursery: trio.Nursery
) -> None:
    """The late one comes first, and is nobody's."""
    vmm.link._late.append(MSGID_BEFORE)
    unmapping = Running(nursery, vmm.link.unmap_gpas, [GFNS])
    await wait_all_tasks_blocked()
    vmm.socket.send(rpc.encode_result(MSGID_BEFORE, None))
    await wait_all_tasks_blocked()
    assert not unmapping.done
    vmm.socket.send(DONE)
    await unmapping.result()
    assert vmm.moments == []


def test_a_moment_ends_with_what_comes_or_by_itself() -> None:
    ours, theirs = sockets.socketpair()
    with ours, theirs:
        assert not moment.readable_in_a_moment(ours.fileno())
        theirs.send(b"x")
        assert moment.readable_in_a_moment(ours.fileno())
