"""Lists on the hypervisor connection: what the VMM is asked, and what each of its answers comes to."""

from __future__ import annotations

import errno
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from fakes.raw_peer import RawPeer
from fakes.running import Running
from intercept_protocol import rpc
from intercept_protocol.addresses import PAGE_SHIFT
from intercept_protocol.errors import ProtocolViolation, WireError
from intercept_protocol.messages import PIECES_LIMIT
from intercept_protocol.outcomes import Access
from interceptd.config.schema import Limits
from interceptd.connections.connection import Connection
from interceptd.connections.hangup_watch import HangupWatch
from interceptd.connections.tenants import Tenants
from interceptd.errors import PartitionLost
from interceptd.hypervisor import HypervisorError
from interceptd.hypervisor.remote import RemoteHypervisor
from interceptd.pages.mapping import Frame, Mapping

RW = Access.READ | Access.WRITE
MAPPINGS = [
    Mapping(0x10, 0x12, Frame("host", 0x700), 0x9000, RW),
    Mapping(0x20, 0x21, Frame("file", 3), 0x9010, RW),
    Mapping(0x30, 0x31, None, 0x9020, Access.NONE),
]
GFNS = [mapping.gfns for mapping in MAPPINGS]
MAP_PIECES = [
    {
        "start_gfn": 0x10,
        "page_count": 2,
        "start_uaddr": 0x9000 << PAGE_SHIFT,
        "start_pfn": 0x700,
        "access": 3,
    },
    {"start_gfn": 0x20, "page_count": 1, "start_uaddr": 0x9010 << PAGE_SHIFT, "access": 3},
    {"start_gfn": 0x30, "page_count": 1, "start_uaddr": 0x9020 << PAGE_SHIFT, "access": 0},
]
UNMAP_PIECES = [
    {"start_gfn": 0x10, "page_count": 2},
    {"start_gfn": 0x20, "page_count": 1},
    {"start_gfn": 0x30, "page_count": 1},
]


@dataclass
class Vmm:
    """The VMM's end, and the daemon's as the core sees it."""

    link: RemoteHypervisor
    peer: RawPeer
    served: Running[None]
    nursery: trio.Nursery

    def call(self, call: Callable[[], Awaitable[None]]) -> Running[None]:
        return Running(self.nursery, call)

    def map(self) -> Running[None]:
        return self.call(lambda: self.link.map_gpas(MAPPINGS))

    def unmap(self) -> Running[None]:
        return self.call(lambda: self.link.unmap_gpas(GFNS))

    async def asked(self) -> rpc.Request:
        request = await self.peer.receive()
        assert isinstance(request, rpc.Request)
        return request

    async def answer(self, error: object = None) -> tuple[str, object]:
        """Answer the next request; returns its method and its only field."""
        msgid, method, (fields,) = await self.asked()
        assert isinstance(fields, dict)
        await self.answer_to(msgid, error)
        return method, fields["pieces"]

    async def answer_to(self, msgid: int, error: object = None) -> None:
        refusal = WireError(errno.ENOMEM, "no slot", **error) if isinstance(error, dict) else None
        await self.peer.send(
            rpc.encode_result(msgid, None) if refusal is None else rpc.encode_error(msgid, refusal)
        )

    @property
    def reached(self) -> list[int]:
        """The gfns that the daemon believes the guest to reach."""
        return [gfn for gfns in GFNS for gfn in range(gfns.start, gfns.end) if self.link.translate(gfn)]


@pytest.fixture
async def vmm(nursery: trio.Nursery) -> AsyncIterator[Vmm]:
    ours, theirs = socket.socketpair()
    link = RemoteHypervisor(deadline=lambda: 5)
    link.takes_lists = True
    connection = Connection(ours, Tenants(Limits), HangupWatch())
    connection.expect_responses()
    served = Running(nursery, link.serve, connection)
    await wait_all_tasks_blocked()
    vmm = Vmm(link, RawPeer.of(theirs), served, nursery)
    yield vmm
    await served.cancel()
    connection.close()
    vmm.peer.close()


async def mapped(vmm: Vmm) -> None:
    mapping = vmm.map()
    await vmm.answer()
    await mapping.result()


def test_only_a_vmm_that_says_so_is_asked_for_several_pieces() -> None:
    link = RemoteHypervisor(deadline=lambda: 5)
    assert link.pieces_per_call == 1
    link.takes_lists = True
    assert link.pieces_per_call == PIECES_LIMIT == 64


async def test_several_pieces_are_one_request_and_one_answer(vmm: Vmm) -> None:
    mapping = vmm.map()
    assert await vmm.answer() == ("map_gpas", MAP_PIECES)
    await mapping.result()
    assert vmm.reached == [0x10, 0x11, 0x20]
    unmapping = vmm.unmap()
    assert await vmm.answer() == ("unmap_gpas", UNMAP_PIECES)
    await unmapping.result()
    counters = vmm.link.counters()
    assert (vmm.reached, counters.slat_extents) == ([], 0)
    assert (counters.map_calls, counters.unmap_calls) == (1, 1)


async def test_a_single_piece_is_a_request_of_its_own_kind(vmm: Vmm) -> None:
    mapping = vmm.call(lambda: vmm.link.map_gpas(MAPPINGS[:1]))
    request = await vmm.asked()
    await vmm.answer_to(request.msgid)
    await mapping.result()
    unmapping = vmm.call(lambda: vmm.link.unmap_gpas(GFNS[:1]))
    another = await vmm.asked()
    await vmm.answer_to(another.msgid)
    await unmapping.result()
    assert (request.method, request.params) == ("map_gpa", MAP_PIECES[:1])
    assert (another.method, another.params) == ("unmap_gpa", UNMAP_PIECES[:1])


@pytest.mark.parametrize(("done", "reached"), [(0, []), (1, [0x10, 0x11]), (2, [0x10, 0x11, 0x20])])
async def test_a_refusal_that_says_how_many_were_done_leaves_those(
    vmm: Vmm, done: int, reached: list[int]
) -> None:
    mapping = vmm.map()
    await vmm.answer({"done": done})
    with pytest.raises(HypervisorError, match="map_gpas: no slot") as refused:
        await mapping.result()
    assert (refused.value.done, refused.value.number) == (done, errno.ENOMEM)
    assert vmm.reached == reached
    assert vmm.link.counters().unmap_calls == 0


@pytest.mark.parametrize(
    "details", [{}, {"done": 3}, {"done": -1}, {"done": True}, {"done": "1"}, {"done": None}], ids=str
)
async def test_a_refusal_that_does_not_say_so_has_everything_unmapped(
    vmm: Vmm, details: dict[str, object]
) -> None:
    await mapped(vmm)
    mapping = vmm.map()
    await vmm.answer(details)
    assert await vmm.answer() == ("unmap_gpas", UNMAP_PIECES)
    with pytest.raises(HypervisorError, match="map_gpas: no slot") as refused:
        await mapping.result()
    assert (refused.value.done, vmm.reached) == (0, [])


async def test_a_late_list_is_unmapped_for_its_whole_range_and_answered_in_order(vmm: Vmm) -> None:
    await mapped(vmm)
    mapping = vmm.map()
    late = await vmm.asked()
    undoing = await vmm.asked()
    assert (undoing.method, undoing.params) == ("unmap_gpas", [{"pieces": UNMAP_PIECES}])
    await vmm.answer_to(late.msgid, {"done": 1})
    await vmm.answer_to(undoing.msgid)
    with pytest.raises(HypervisorError, match="map_gpas: no answer within 5 s") as refused:
        await mapping.result()
    assert (refused.value.done, vmm.reached) == (0, [])


@pytest.mark.parametrize("details", [{}, {"done": 2}])
async def test_a_late_list_that_cannot_be_undone_loses_the_partition(
    vmm: Vmm, details: dict[str, object]
) -> None:
    mapping = vmm.map()
    late = await vmm.asked()
    undoing = await vmm.asked()
    await vmm.answer_to(late.msgid)
    await vmm.answer_to(undoing.msgid, details)
    with pytest.raises(PartitionLost, match=r"a late map of gfns \[0x10, 0x12\) and 2 more could not be"):
        await mapping.result()


async def test_an_answer_that_overtakes_a_late_list_breaks_the_protocol(vmm: Vmm) -> None:
    mapping = vmm.map()
    late = await vmm.asked()
    undoing = await vmm.asked()
    await vmm.answer_to(undoing.msgid)
    with pytest.raises(ProtocolViolation, match=f"request {late.msgid} must be answered first"):
        await vmm.served.result()
    with pytest.raises(PartitionLost):
        await mapping.result()


@pytest.mark.parametrize(
    ("details", "done", "reached"),
    [({}, 0, [0x10, 0x11, 0x20]), ({"done": 1}, 1, [0x20]), ({"done": 7}, 0, [0x10, 0x11, 0x20])],
)
async def test_an_unmap_that_is_refused_says_what_is_gone(
    vmm: Vmm, details: dict[str, object], done: int, reached: list[int]
) -> None:
    await mapped(vmm)
    unmapping = vmm.unmap()
    await vmm.answer(details)
    with pytest.raises(HypervisorError, match="unmap_gpas: no slot") as refused:
        await unmapping.result()
    assert (refused.value.done, vmm.reached) == (done, reached)


async def test_an_unmap_that_is_not_answered_says_that_nothing_is_gone(vmm: Vmm) -> None:
    await mapped(vmm)
    with pytest.raises(HypervisorError, match="unmap_gpas: no answer within 5 s") as refused:
        await vmm.link.unmap_gpas(GFNS)
    assert (refused.value.done, vmm.reached) == (0, [0x10, 0x11, 0x20])


async def test_a_list_that_is_out_when_the_connection_closes_was_not_done(vmm: Vmm) -> None:
    mapping = vmm.map()
    await vmm.asked()
    vmm.peer.close()
    with pytest.raises(HypervisorError, match="map_gpas: the hypervisor connection closed") as refused:
        await mapping.result()
    assert (refused.value.number, refused.value.done) == (errno.ENOTCONN, 0)


async def test_a_list_as_long_as_allowed_fits_into_a_message(vmm: Vmm) -> None:
    mappings = [
        Mapping(start, start + 1, Frame("host", (1 << 52) - 1), (1 << 52) - 1, RW)
        for start in range((1 << 52) - PIECES_LIMIT, 1 << 52)
    ]
    mapping = vmm.call(lambda: vmm.link.map_gpas(mappings))
    msgid, method, (fields,) = await vmm.asked()
    await vmm.answer_to(msgid)
    await mapping.result()
    assert method == "map_gpas"
    assert isinstance(fields, dict)
    assert len(fields["pieces"]) == PIECES_LIMIT
    assert vmm.link.translate((1 << 52) - 1) == mappings[-1]
