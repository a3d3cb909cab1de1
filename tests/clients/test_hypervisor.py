"""The VMM's end of the hypervisor connection: it does what the daemon asks, in order; nonsense ends it."""

from __future__ import annotations

import errno
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field

import msgpack
import pytest
import trio

from fakes.daemon_process import DaemonProcess
from fakes.eventually import PATIENCE
from fakes.kvm_ports import FakeSlots
from fakes.running import Running
from intercept_client import (
    AddressSpaceKind,
    Answer,
    BlockingVmm,
    BlockingVp,
    ConnectionLost,
    HypervisorKind,
    OwnRegions,
    RequestedKind,
    TrioHypervisor,
    TrioVmm,
    TrioVp,
    _blocking_hypervisor,
    _trio_hypervisor,
    build_memory_intercept,
)
from intercept_client._blocking_hypervisor import BlockingHypervisor, _carry_out
from intercept_client._errors import ConnectionEnded
from intercept_client._hypervisor_session import HypervisorSession, MapRequest, UnmapRequest, refused_after
from intercept_client._trio_hypervisor import _carry_out as carry_out_for_trio
from intercept_client.kvm._guest_memory import GuestMemory
from intercept_client.kvm._hypervisor_thread import HypervisorThread
from intercept_protocol import rpc
from intercept_protocol.addresses import PAGE_SIZE, GfnRange, UaddrRange
from intercept_protocol.errors import ProtocolViolation, WireError
from intercept_protocol.messages import PartitionCredentials
from intercept_protocol.outcomes import Access

PARTITION = PartitionCredentials(partition_id=7, token=bytes(range(16)))
WELCOME = rpc.encode_result(
    1, {"protocol": 1, "server": "interceptd", "version": "0", "limits": {}, "features": {}}
)
MAP = {"start_gfn": 0x10, "page_count": 4, "start_uaddr": 0x7000 * PAGE_SIZE, "access": 3}
UNMAP = {"start_gfn": 0x11, "page_count": 1}
RAM = UaddrRange.of_pages(MAP["start_uaddr"], 4)
OTHER_GFN = 0x100


class Link:
    """A session on fake slots, of a VMM that has two regions backed by the same memory."""

    def __init__(self, slots: FakeSlots | None = None) -> None:
        self.regions = OwnRegions()
        for start_gfn in (MAP["start_gfn"], OTHER_GFN):
            self.regions.add(GfnRange.of(start_gfn, 4), RAM, writable=True, executable=False)
        self.slots = slots or FakeSlots()
        self.memory = GuestMemory(self.slots)
        self.session = HypervisorSession(PARTITION, self.regions)

    def welcomed(self) -> Link:
        self.session.receive_data(WELCOME)
        assert self.session.data_to_send() == b""
        return self

    def take(self, data: bytes) -> None:
        self.session.receive_data(data)
        while (request := self.session.next_request()) is not None:
            self.session.answer(_carry_out(self.memory, request))

    def answers(self, data: bytes) -> list[object]:
        self.take(data)
        unpacker = msgpack.Unpacker()
        unpacker.feed(self.session.data_to_send())
        return list(unpacker)


def ask(msgid: int, method: str, fields: Mapping[str, object]) -> bytes:
    return rpc.encode_request(msgid, method, [fields])


def test_the_hello_names_the_partition_and_its_token() -> None:
    assert msgpack.unpackb(Link().session.hello()) == [
        0,
        1,
        "hello",
        [{"role": "hypervisor", "protocol": 1, "partition_id": 7, "token": PARTITION.token, "lists": True}],
    ]


def test_requests_are_carried_out_and_answered_in_order_however_they_arrive() -> None:
    link = Link().welcomed()
    data = ask(1, "map_gpa", MAP) + ask(2, "unmap_gpa", UNMAP)

    assert link.answers(data[:30]) == []
    assert link.answers(data[30:]) == [[1, 1, None, None], [1, 2, None, None]]
    assert sorted(link.slots.reached()) == [0x10, 0x12, 0x13]


def test_requests_right_behind_the_welcome_are_answered() -> None:
    link = Link()

    assert link.answers(WELCOME + ask(1, "map_gpa", MAP)) == [[1, 1, None, None]]


def test_a_welcome_that_comes_again_is_passed_over_wherever_it_is_cut() -> None:
    """After a restart of the daemon (T-12)."""
    stream = WELCOME + WELCOME + ask(1, "map_gpa", MAP) + WELCOME + ask(2, "unmap_gpa", UNMAP) + WELCOME
    for cut in range(len(stream) + 1):
        link = Link()
        answers = [
            answer for piece in (stream[:cut], stream[cut:]) if piece for answer in link.answers(piece)
        ]
        assert answers == [[1, 1, None, None], [1, 2, None, None]]


@pytest.mark.parametrize(
    ("method", "fields", "number"),
    [
        ("map_gpa", MAP | {"page_count": 0}, errno.EINVAL),
        ("map_gpa", MAP | {"start_uaddr": 1}, errno.EINVAL),
        ("map_gpa", MAP | {"access": 2}, errno.EOPNOTSUPP),
        ("map_gpa", {"start_gfn": 1}, errno.EINVAL),
        ("unmap_gpa", {"start_gfn": 1 << 52, "page_count": 1}, errno.EINVAL),
        ("remap_gpa", MAP, errno.ENOSYS),
    ],
)
def test_a_request_that_cannot_be_carried_out_is_refused_and_the_next_goes_on(
    method: str, fields: dict[str, int], number: int
) -> None:
    link = Link().welcomed()

    refused, answered = link.answers(ask(1, method, fields) + ask(2, "map_gpa", MAP))

    match refused:
        case [1, 1, [int(said), str(), str(), dict()], None]:
            assert said == number
        case _:
            pytest.fail(f"no refusal: {refused!r}")
    assert answered == [1, 2, None, None]


def test_exhausted_memslots_refuse_the_map_and_change_nothing() -> None:
    link = Link(FakeSlots(slot_limit=1)).welcomed()
    link.answers(ask(1, "map_gpa", MAP))

    (refused,) = link.answers(ask(2, "map_gpa", MAP | {"start_gfn": OTHER_GFN}))

    match refused:
        case [1, 2, [errno.ENOSPC, "ENOSPC", str(), dict()], None]:
            pass
        case _:
            pytest.fail(f"no refusal: {refused!r}")
    assert sorted(link.slots.reached()) == [0x10, 0x11, 0x12, 0x13]


# ------------------------------------------------ lists


def pieces(*start_gfns: int, access: int = 3) -> list[dict[str, int]]:
    """Maps of a page each."""
    return [
        {
            "start_gfn": gfn,
            "page_count": 1,
            "start_uaddr": (0x7000 + gfn % 0x10) * PAGE_SIZE,
            "access": access,
        }
        for gfn in start_gfns
    ]


def test_a_list_is_carried_out_in_order_and_answered_once() -> None:
    link = Link().welcomed()

    answered = link.answers(
        ask(1, "map_gpas", {"pieces": pieces(0x10, 0x12, 0x13)})
        + ask(2, "unmap_gpas", {"pieces": [{"start_gfn": gfn, "page_count": 1} for gfn in (0x12, 0x11)]})
    )

    assert answered == [[1, 1, None, None], [1, 2, None, None]]
    assert sorted(link.slots.reached()) == [0x10, 0x13]


@pytest.mark.parametrize(("call", "done"), [(1, 0), (2, 1), (3, 2)])
def test_a_refused_piece_of_a_list_ends_it_and_says_how_many_were_done(call: int, done: int) -> None:
    link = Link().welcomed()
    link.slots.refuse_at = {call}

    (answer,) = link.answers(ask(1, "map_gpas", {"pieces": pieces(0x10, 0x12, 0x13)}))

    match answer:
        case [1, 1, [errno.ENOMEM, "ENOMEM", str(), details], None]:
            assert details == {"done": done}
        case _:
            pytest.fail(f"no refusal: {answer!r}")
    assert sorted(link.slots.reached()) == [0x10, 0x12, 0x13][:done]


@pytest.mark.parametrize(
    "wrong",
    [
        [],
        [{}],
        pieces(0x10) * 65,
        [*pieces(0x10), {"start_gfn": 1}],
        [*pieces(0x10), MAP | {"page_count": 0}],
    ],
    ids=["none", "an empty one", "65", "no map", "no range"],
)
def test_a_malformed_list_is_refused_before_anything_is_done(wrong: list[object]) -> None:
    link = Link().welcomed()

    (answer,) = link.answers(ask(1, "map_gpas", {"pieces": wrong}))

    match answer:
        case [1, 1, [errno.EINVAL, "EINVAL", str(), {"done": 0}], None]:
            assert link.slots.calls == 0
        case _:
            pytest.fail(f"no refusal: {answer!r}")


# ------------------------------------------------ what ends it


def test_a_refused_hello_raises_the_daemons_reason() -> None:
    with pytest.raises(WireError, match="EEXIST"):
        Link().session.receive_data(rpc.encode_error(1, WireError(errno.EEXIST, "there is one already")))


def test_the_daemons_last_word_ends_the_session() -> None:
    with pytest.raises(ConnectionEnded, match="EPROTO"):
        Link().welcomed().take(rpc.encode_error(0, WireError(errno.EPROTO, "no such msgid")))


@pytest.mark.parametrize(
    "data",
    [b"GET / HTTP/1.1", ask(1, "map_gpa", MAP), rpc.encode_result(9, None), rpc.encode_notification("x", [])],
    ids=["garbage", "a request before the welcome", "another answer", "a notification"],
)
def test_what_does_not_belong_is_a_violation(data: bytes) -> None:
    with pytest.raises(ProtocolViolation):
        Link().take(data)


def test_an_answer_to_what_was_never_asked_is_a_violation() -> None:
    with pytest.raises(ProtocolViolation):
        Link().welcomed().take(rpc.encode_result(2, None))


LAST_WORDS = rpc.encode_error(0, WireError(errno.EAGAIN, "too many connections"))


@pytest.fixture
def closed_by_the_daemon() -> Iterator[socket.socket]:
    """A connection that the daemon has closed, with its last words in it: nothing can be sent."""
    ours, theirs = socket.socketpair()
    with ours:
        theirs.sendall(LAST_WORDS)
        theirs.close()
        yield ours


def test_what_the_daemon_said_before_it_closed_is_read_by_threads(
    closed_by_the_daemon: socket.socket,
) -> None:
    assert _blocking_hypervisor._exchange(closed_by_the_daemon, b"hello") == LAST_WORDS


async def test_what_the_daemon_said_before_it_closed_is_read_in_trio(
    closed_by_the_daemon: socket.socket,
) -> None:
    sock = trio.socket.from_stdlib_socket(closed_by_the_daemon)
    assert await _trio_hypervisor._exchange(sock, b"hello") == LAST_WORDS


# ------------------------------------------------ with its thread


class Heard(threading.Event):
    why = ""

    def hear(self, why: str) -> None:
        self.why = why
        self.set()


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest.fixture
def daemons_end(heard: Heard) -> Iterator[socket.socket]:
    """The other end of a connection that serves."""
    link = Link().welcomed()
    ours, theirs = socket.socketpair()
    theirs.settimeout(PATIENCE)
    thread = HypervisorThread(BlockingHypervisor(ours, link.session, link.memory), heard.hear)
    with theirs:
        yield theirs
    thread.close()


def test_the_thread_answers_what_it_is_asked(daemons_end: socket.socket) -> None:
    daemons_end.sendall(ask(5, "map_gpa", MAP))

    assert msgpack.unpackb(daemons_end.recv(4096)) == [1, 5, None, None]


@pytest.mark.parametrize("last", [b"", b"nonsense"], ids=["hung up", "nonsense"])
def test_the_end_is_told_once_with_its_reason(daemons_end: socket.socket, heard: Heard, last: bytes) -> None:
    daemons_end.sendall(last)
    daemons_end.shutdown(socket.SHUT_WR)

    assert heard.wait(PATIENCE)
    assert heard.why
    assert daemons_end.recv(4096) == b""


def test_a_fault_of_our_own_closes_the_connection_instead_of_answering(
    heard: Heard, recwarn: pytest.WarningsRecorder
) -> None:
    """An undo that failed: what the guest reaches is not known, and the daemon must not think that it is."""
    slots = FakeSlots()
    slots.refuse_at = {4, 5}
    link = Link(slots).welcomed()
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.settimeout(PATIENCE)
        HypervisorThread(BlockingHypervisor(ours, link.session, link.memory), heard.hear)
        inside = {"start_gfn": 0x11, "page_count": 2, "start_uaddr": 0x7001 * PAGE_SIZE, "access": 1}
        theirs.sendall(ask(1, "map_gpa", MAP) + ask(2, "map_gpa", inside))

        assert b"".join(iter(lambda: theirs.recv(4096), b"")) == b""
    assert heard.wait(PATIENCE)
    assert not recwarn


def test_map_and_unmap_mean_what_the_wire_says() -> None:
    link = Link().welcomed()

    link.take(ask(1, "map_gpa", MAP))
    link.take(ask(2, "map_gpa", MAP | {"page_count": 1, "access": 0}))
    link.take(ask(3, "unmap_gpa", UNMAP))

    (slot,) = link.memory.slots
    assert (slot.gfns, slot.uaddrs) == (GfnRange(start=0x12, end=0x14), UaddrRange(start=0x7002, end=0x7004))
    assert slot.access == Access.READ | Access.WRITE


# ------------------------------------------------ any hypervisor, with a daemon

GFNS = GfnRange.of(0x100, 4)
UADDRS = UaddrRange.of_pages(0x7000_0000, 4)
READ = build_memory_intercept(gpa=0x101 << 12, access=Access.READ)
MAPPED = ("map", GFNS, UADDRS, Access.READ | Access.WRITE, 0xE0000)


@dataclass
class Recording:
    """A hypervisor that maps nothing and remembers what it was asked; `refusal` refuses its maps, but for the
    `allowed` first ones."""

    calls: list[tuple[object, ...]] = field(default_factory=list)
    refusal: WireError | None = None
    allowed: int = 0

    def map(self, gfns: GfnRange, uaddrs: UaddrRange, access: Access, start_pfn: int | None) -> None:
        self.calls.append(("map", gfns, uaddrs, access, start_pfn))
        if self.refusal is not None and len(self.calls) > self.allowed:
            raise self.refusal

    def unmap(self, gfns: GfnRange) -> None:
        self.calls.append(("unmap", gfns))


@dataclass
class AsyncRecording:
    """The same for trio."""

    recording: Recording = field(default_factory=Recording)

    async def map(self, gfns: GfnRange, uaddrs: UaddrRange, access: Access, start_pfn: int | None) -> None:
        await trio.lowlevel.checkpoint()
        self.recording.map(gfns, uaddrs, access, start_pfn)

    async def unmap(self, gfns: GfnRange) -> None:
        await trio.lowlevel.checkpoint()
        self.recording.unmap(gfns)


def test_a_mapper_of_single_pieces_is_called_for_each() -> None:
    recording = Recording()
    requests = [MapRequest(GFNS, UADDRS, Access.READ, None), MapRequest(GFNS, UADDRS, Access.NONE, None)]

    assert _carry_out(recording, requests) is None
    assert _carry_out(recording, [UnmapRequest(GFNS), UnmapRequest(GFNS)]) is None

    maps = [("map", GFNS, UADDRS, access, None) for access in (Access.READ, Access.NONE)]
    assert recording.calls == [*maps, ("unmap", GFNS), ("unmap", GFNS)]


@pytest.mark.parametrize("done", range(3))
async def test_a_mapper_that_refuses_a_piece_is_called_for_no_other(done: int) -> None:
    recordings = [
        Recording(refusal=WireError(errno.ENOSPC, "no slot", limit="slots"), allowed=done) for _ in range(2)
    ]
    maps = [MapRequest(GFNS, UADDRS, Access.READ, None)] * 3

    refusals = [
        _carry_out(recordings[0], maps),
        await carry_out_for_trio(AsyncRecording(recordings[1]), maps),
    ]

    for refusal, recording in zip(refusals, recordings, strict=True):
        assert refusal is not None
        assert refusal.to_wire() == [errno.ENOSPC, "ENOSPC", "no slot", {"limit": "slots", "done": done}]
        assert len(recording.calls) == done + 1


async def test_a_mapper_of_trio_is_called_for_each_piece() -> None:
    mapper = AsyncRecording()

    assert await carry_out_for_trio(mapper, [UnmapRequest(GFNS), UnmapRequest(GFNS)]) is None

    assert mapper.recording.calls == [("unmap", GFNS)] * 2


class Together(Recording):
    """A mapper that does lists at once."""

    def map_list(self, pieces: Sequence[MapRequest]) -> None:
        self.calls.append(("map_list", len(pieces)))
        if self.refusal is not None:
            raise refused_after(1, self.refusal)

    def unmap_list(self, ranges: Sequence[GfnRange]) -> None:
        self.calls.append(("unmap_list", len(ranges)))


def test_a_mapper_of_lists_is_called_once_for_a_list_and_not_for_a_single_piece() -> None:
    mapper = Together()
    piece = MapRequest(GFNS, UADDRS, Access.READ, None)

    assert [_carry_out(mapper, request) for request in ([piece], [piece] * 3, [UnmapRequest(GFNS)] * 2)] == [
        None, None, None,
    ]  # fmt: skip
    mapper.refusal = WireError(errno.ENOSPC, "no slot")
    refusal = _carry_out(mapper, [piece, piece])

    assert [call[0] for call in mapper.calls] == ["map", "map_list", "unmap_list", "map_list"]
    assert refusal is not None
    assert refusal.details == {"done": 1}


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    with DaemonProcess(tmp_path_factory.mktemp("daemon")) as process:
        process.wait_serving()
        yield process


def test_a_hypervisor_of_threads_is_asked_to_map_what_the_guest_touches_and_to_unmap_it(
    daemon: DaemonProcess,
) -> None:
    recording, threads = Recording(), ThreadPoolExecutor(1)
    with BlockingVmm.open(daemon.socket) as vmm:
        partition = vmm.create_partition(AddressSpaceKind.DECLARED, HypervisorKind.VMM)
        hypervisor = BlockingHypervisor.open(daemon.socket, partition, recording, regions=vmm.regions)
        served = threads.submit(hypervisor.serve)
        vmm.map_vma(UADDRS, 0xE0000, Access.READ | Access.WRITE, io=True)
        vmm.add_region(GFNS, UADDRS, writable=True, executable=False)
        with BlockingVp.open(daemon.socket, partition, vp_index=0) as vp:
            assert vp.intercept(READ) is Answer.MAPPED
        vmm.unmap_vma(UADDRS)
        assert recording.calls == [MAPPED, ("unmap", GFNS)]
    assert served.result(PATIENCE) == "the daemon closed the hypervisor connection"


async def test_a_hypervisor_of_trio_is_asked_to_map_what_the_guest_touches_and_to_unmap_it(
    daemon: DaemonProcess,
) -> None:
    mapper, ended = AsyncRecording(), list[str]()
    async with trio.open_nursery() as nursery, TrioVmm.open(daemon.socket) as vmm:
        partition = await vmm.create_partition(AddressSpaceKind.DECLARED, HypervisorKind.VMM)
        async with TrioHypervisor.open(daemon.socket, partition, mapper, regions=vmm.regions) as hypervisor:

            async def serve() -> None:
                ended.append(await hypervisor.serve())

            nursery.start_soon(serve)
            await vmm.map_vma(UADDRS, 0xE0000, Access.READ | Access.WRITE, io=True)
            await vmm.add_region(GFNS, UADDRS, writable=True, executable=False)
            async with TrioVp.open(daemon.socket, partition, vp_index=0) as vp:
                assert await vp.intercept(READ) is Answer.MAPPED
            await vmm.unmap_vma(UADDRS)
            assert mapper.recording.calls == [MAPPED, ("unmap", GFNS)]
    assert ended == ["closed by this client"]


async def test_a_hypervisor_of_trio_that_is_closed_while_it_maps_says_so(daemon: DaemonProcess) -> None:
    class Closing(AsyncRecording):
        async def map(
            self, gfns: GfnRange, uaddrs: UaddrRange, access: Access, start_pfn: int | None
        ) -> None:
            await super().map(gfns, uaddrs, access, start_pfn)
            hypervisor.close()

    async with trio.open_nursery() as nursery, TrioVmm.open(daemon.socket) as vmm:
        partition = await vmm.create_partition(AddressSpaceKind.DECLARED, HypervisorKind.VMM)
        async with TrioHypervisor.open(
            daemon.socket, partition, Closing(), regions=vmm.regions
        ) as hypervisor:
            served = Running(nursery, hypervisor.serve)
            await vmm.map_vma(UADDRS, 0xE0000, Access.READ, io=True)
            await vmm.add_region(GFNS, UADDRS, writable=False, executable=False)
            async with TrioVp.open(daemon.socket, partition, vp_index=0) as vp:
                with suppress(ConnectionLost):
                    await vp.intercept(READ)
            assert await served.result() == "closed by this client"


def test_a_hypervisor_that_refuses_a_map_fails_the_intercept(daemon: DaemonProcess) -> None:
    recording, threads = Recording(refusal=WireError(errno.ENOSPC, "no slot")), ThreadPoolExecutor(1)
    with BlockingVmm.open(daemon.socket) as vmm:
        partition = vmm.create_partition(AddressSpaceKind.DECLARED, HypervisorKind.VMM)
        hypervisor = BlockingHypervisor.open(daemon.socket, partition, recording, regions=vmm.regions)
        served = threads.submit(hypervisor.serve)
        vmm.map_vma(UADDRS, 0xE0000, Access.READ, io=True)
        vmm.add_region(GFNS, UADDRS, writable=False, executable=False)
        with BlockingVp.open(daemon.socket, partition, vp_index=0) as vp:
            assert vp.intercept(READ) is Answer.HYPERVISOR_ERROR
        hypervisor.close()
        assert served.result(PATIENCE) == "closed by this client"


@pytest.mark.parametrize(
    ("movable", "calls"), [(0, [("unmap_list", 64)]), (32, [("map_list", 32), ("unmap_list", 32)])]
)
def test_an_invalidation_of_64_pieces_is_one_request_or_two_where_some_are_movable(
    daemon: DaemonProcess, movable: int, calls: list[tuple[str, int]]
) -> None:
    mapper, threads = Together(), ThreadPoolExecutor(1)
    pages = [(GfnRange.of(0x100 + page, 1), UADDRS.start + page) for page in range(0, 128, 2)]
    with BlockingVmm.open(daemon.socket) as vmm:
        partition = vmm.create_partition(AddressSpaceKind.DECLARED, HypervisorKind.VMM)
        hypervisor = BlockingHypervisor.open(daemon.socket, partition, mapper, regions=vmm.regions)
        served = threads.submit(hypervisor.serve)
        memory = UaddrRange.at_page(UADDRS.start, 128)
        vmm.map_vma(memory, 0xE0000, Access.READ, io=True)
        with BlockingVp.open(daemon.socket, partition, vp_index=0) as vp:
            for number, (gfns, page) in enumerate(pages):
                kind = RequestedKind.MOVABLE if number < movable else RequestedKind.MMIO
                vmm.add_region(gfns, UaddrRange.at_page(page, 1), kind, writable=False, executable=False)
                touch = build_memory_intercept(gpa=gfns.start << 12, access=Access.READ)
                assert vp.intercept(touch) is Answer.MAPPED
        mapper.calls.clear()
        vmm.unmap_vma(memory)
        assert mapper.calls == calls
    assert served.result(PATIENCE) == "the daemon closed the hypervisor connection"


def test_a_partition_has_one_hypervisor_connection(daemon: DaemonProcess) -> None:
    with BlockingVmm.open(daemon.socket) as vmm:
        partition = vmm.create_partition(AddressSpaceKind.DECLARED, HypervisorKind.VMM)
        with (
            BlockingHypervisor.open(daemon.socket, partition, Recording(), regions=vmm.regions),
            pytest.raises(WireError, match="EEXIST"),
        ):
            BlockingHypervisor.open(daemon.socket, partition, Recording(), regions=vmm.regions)
