"""What a peer may send where a hand-off is awaited, and for how long."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator

import pytest
import trio

from fakes.closers import closer
from fakes.others import Others
from fakes.used_up_time import time_used_up_every
from intercept_protocol.handoff import BYTES_LIMIT, HandoffRegion, Refused
from interceptd.connections.received_fds import ReceivedFds
from interceptd.sessions.handoff_listener import HANDOFF_SECONDS, read_handoff

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

    def receive(self, source: socket.socket, size: int, inbox: object = None) -> bytes:  # noqa: ARG002
        return super().receive(source, 1)


async def test_a_dribbled_hand_off_takes_turns(
    ends: tuple[socket.socket, socket.socket], nursery: trio.Nursery
) -> None:
    ours, theirs = ends
    theirs.send(WHOLE)
    others = Others(nursery)
    with time_used_up_every(len(WHOLE) // 8):
        whole = await read_handoff(ours, Dribbling(closer(), 1))
    assert whole.regions == [HandoffRegion(**REGION)]
    assert others.turns >= 6


async def test_a_hand_off_that_is_never_whole_is_awaited_for_a_time(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = ends
    theirs.send(WHOLE[:-1])
    began = trio.current_time()
    with pytest.raises(Refused, match="the hand-off was not whole within 10 s"):
        await read_handoff(ours, ReceivedFds(closer(), 1))
    assert trio.current_time() - began == HANDOFF_SECONDS


async def test_no_more_is_read_than_a_hand_off_may_have(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = ends
    theirs.setblocking(False)
    theirs.send(b"[" + BYTES_LIMIT * b" " + b" unread")
    with pytest.raises(Refused, match="more than 65536 bytes"):
        await read_handoff(ours, ReceivedFds(closer(), 1))
    assert ours.recv(64) == b" unread"
