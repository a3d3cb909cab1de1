"""What a peer may send where a hand-off is awaited, and for how long."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator

import pytest
import trio
import trio.testing

from fakes.closers import closer
from fakes.others import Others
from fakes.used_up_time import time_used_up_every
from intercept_protocol.handoff import BYTES_LIMIT, HandoffRegion, Refused
from interceptd.connections.received_fds import ReceivedFds
from interceptd.sessions.handoff_listener import HANDOFF_SECONDS, look_at_handoff

REGION = {"base_host_virt_addr": 1 << 40, "size": 1 << 22, "offset": 0, "page_size": 4096}
WHOLE = json.dumps([REGION]).encode()


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    """The daemon's, and the VMM's."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with ours, theirs:
        yield ours, theirs


class Dribbling(ReceivedFds):
    """Finds one byte more at each look."""

    def look(self, source: socket.socket, size: int) -> bytes:  # noqa: ARG002
        return super().look(source, 1)


async def test_a_dribbled_hand_off_takes_turns(
    ends: tuple[socket.socket, socket.socket], nursery: trio.Nursery
) -> None:
    ours, theirs = ends
    theirs.send(WHOLE)
    others = Others(nursery)
    with time_used_up_every(len(WHOLE) // 8):
        whole = await look_at_handoff(ours, Dribbling(closer(), 1))
    assert whole.regions == [HandoffRegion(**REGION)]
    assert others.turns >= 6


async def test_a_hand_off_that_is_never_whole_is_awaited_for_a_time(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = ends
    theirs.send(WHOLE[:-1])
    began = trio.current_time()
    with pytest.raises(Refused, match="the hand-off was not whole within 10 s"):
        await look_at_handoff(ours, ReceivedFds(closer(), 1))
    assert trio.current_time() - began == HANDOFF_SECONDS


async def test_more_than_a_hand_off_may_have_is_refused(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = ends
    theirs.setblocking(False)
    theirs.send(b"[" + BYTES_LIMIT * b" " + b" unread")
    with pytest.raises(Refused, match="more than 65536 bytes"):
        await look_at_handoff(ours, ReceivedFds(closer(), 1))


async def test_a_hand_off_in_pieces_is_looked_at_and_left_for_a_successor(
    ends: tuple[socket.socket, socket.socket], nursery: trio.Nursery
) -> None:
    """The descriptor comes with the first piece, and a look at it takes nothing away."""
    ours, theirs = ends
    socket.send_fds(theirs, [WHOLE[:1]], [theirs.fileno()])
    for successor in (False, True):
        received = ReceivedFds(closer(), 1)
        looked: list[object] = []

        async def look(into: ReceivedFds = received, found: list[object] = looked) -> None:
            found.append(await look_at_handoff(ours, into))

        nursery.start_soon(look)
        await trio.testing.wait_all_tasks_blocked()
        if not successor:
            assert looked == []
            theirs.send(WHOLE[1:])
            await trio.sleep(1)
        assert len(looked) == 1
        [descriptor] = received.take()
        os.close(descriptor)
    assert ours.recv(BYTES_LIMIT) == WHOLE[:1], "and the rest behind the descriptor"
