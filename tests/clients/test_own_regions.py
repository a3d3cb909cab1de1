"""A hypervisor connection carries out no map that none of the VMM's regions covers, whatever the daemon says
(Y-12)."""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import msgpack
import msgspec
import pytest
import trio

from fakes.eventually import PATIENCE
from fakes.lying_maps import LIES, RAM, ROM, RW, TRUTHS, at, uaddrs_of
from fakes.scripted_daemon import Answer, Ask, Await, Hear, ScriptedDaemon, Signal, Step, hello, replies
from intercept_client import (
    Access,
    AddressSpaceKind,
    BlockingHypervisor,
    BlockingVmm,
    GfnRange,
    HypervisorKind,
    OwnRegions,
    PartitionCredentials,
    TrioHypervisor,
    TrioVmm,
    UaddrRange,
)
from intercept_client._exchange import Exchange, call_exchange
from intercept_client._hypervisor_session import LOGGED_REFUSALS, HypervisorSession, MapRequest
from intercept_client._session import ClientSession
from intercept_client._vmm_requests import (
    DeclaredVma,
    NewRegion,
    add_region,
    change_regions,
    map_vma,
    map_vmas,
    remove_region,
    unmap_vma,
)
from intercept_protocol import rpc
from intercept_protocol.errors import WireError
from intercept_protocol.messages import AddRegion, AddRegionReply, MapVmas, RegionKind, RequestedKind

MEMORY: Final = UaddrRange.of_pages(0x7000_0000, 16)
UADDRS: Final = uaddrs_of(RAM, MEMORY)
PARTITION: Final = PartitionCredentials(partition_id=7, token=bytes(16))
ADDED: Final = AddRegionReply(kind=RegionKind.MOVABLE)
HEAP: Final = at(MEMORY, LIES["the heap, in no region"][0])
WHOLE_RAM: Final = at(MEMORY, TRUTHS["a whole region"])
PLAIN_ADD: Final = AddRegion(
    start_gfn=RAM.start,
    page_count=RAM.page_count,
    start_uaddr=UADDRS.start_uaddr,
    kind=RequestedKind.MOVABLE,
    writable=True,
    executable=False,
)


def regions_of_a_guest() -> OwnRegions:
    regions = OwnRegions()
    regions.add(RAM, UADDRS, writable=True, executable=False)
    regions.add(ROM, uaddrs_of(ROM, MEMORY), writable=False, executable=True)
    return regions


class Served:
    """A welcomed hypervisor connection without a socket; `mapped` is what reached the mapper."""

    def __init__(self, regions: OwnRegions) -> None:
        self._session = HypervisorSession(PARTITION, regions)
        self._session.receive_data(rpc.encode_result(1, {}))
        self.mapped: list[MapRequest] = []

    def ask(self, method: str, fields: Mapping[str, object]) -> object:
        """The error of the answer; None if it was carried out."""
        self._session.receive_data(rpc.encode_request(9, method, [fields]))
        while (request := self._session.next_request()) is not None:
            self.mapped += [piece for piece in request if isinstance(piece, MapRequest)]
            self._session.answer(None)
        _, _, error, _ = msgpack.unpackb(self._session.data_to_send())
        return error


def allowed(
    regions: OwnRegions,
    gfns: GfnRange = RAM,
    uaddrs: UaddrRange = UADDRS,
    access: Access = Access.READ,
) -> bool:
    """Whether a daemon may map this."""
    try:
        regions.require(gfns, uaddrs, access, None)
    except WireError:
        return False
    return True


# ------------------------------------------------ what a daemon asks


@pytest.mark.parametrize(("fields", "says"), LIES.values(), ids=LIES.keys())
def test_a_map_that_no_region_covers_is_refused_logged_and_never_carried_out(
    fields: dict[str, int], says: str, caplog: pytest.LogCaptureFixture
) -> None:
    served = Served(regions_of_a_guest())

    refused = served.ask("map_gpa", at(MEMORY, fields))

    match refused:
        case [errno.EPERM, "EPERM", str(message), dict()]:
            assert says in message
            asked = GfnRange.of(fields["start_gfn"], fields["page_count"])
            assert f"map_gpa of gfns {asked} to uaddrs" in message
            assert [(record.name, record.levelno) for record in caplog.records] == [
                ("intercept_client", logging.ERROR)
            ]
            assert message in caplog.text
        case _:
            pytest.fail(f"no refusal: {refused!r}")
    assert served.mapped == []
    assert served.ask("map_gpa", WHOLE_RAM) is None
    assert len(served.mapped) == 1


@pytest.mark.parametrize("fields", TRUTHS.values(), ids=TRUTHS.keys())
def test_what_a_region_covers_is_mapped(fields: dict[str, int], caplog: pytest.LogCaptureFixture) -> None:
    served = Served(regions_of_a_guest())

    assert served.ask("map_gpa", at(MEMORY, fields)) is None

    assert [request.gfns.start for request in served.mapped] == [fields["start_gfn"]]
    assert caplog.records == []


@pytest.mark.parametrize("at_place", [0, 1, 2])
def test_one_lie_in_a_list_refuses_all_of_it_before_anything_is_carried_out(
    at_place: int, caplog: pytest.LogCaptureFixture
) -> None:
    served = Served(regions_of_a_guest())
    pieces = [WHOLE_RAM | {"page_count": 1}, WHOLE_RAM | {"page_count": 1, "access": 0}]
    pieces.insert(at_place, HEAP)

    refused = served.ask("map_gpas", {"pieces": pieces})

    match refused:
        case [errno.EPERM, "EPERM", str(), {"done": 0}]:
            assert len(caplog.records) == 1
        case _:
            pytest.fail(f"no refusal: {refused!r}")
    assert served.mapped == []
    pieces.remove(HEAP)
    assert served.ask("map_gpas", {"pieces": pieces}) is None
    assert len(served.mapped) == 2


def test_an_unmap_is_carried_out_wherever_it_is() -> None:
    """It takes nothing from the VMM, and a refused one would end the partition."""
    everything = {"start_gfn": 0, "page_count": 1 << 40}
    assert Served(OwnRegions()).ask("unmap_gpa", everything) is None
    assert Served(OwnRegions()).ask("unmap_gpas", {"pieces": [everything]}) is None


def test_a_daemon_that_goes_on_asking_does_not_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    served = Served(OwnRegions())

    assert all(served.ask("map_gpa", WHOLE_RAM) for _ in range(LOGGED_REFUSALS + 5))

    assert len(caplog.records) == LOGGED_REFUSALS
    assert [record.message.endswith("no more of these are logged") for record in caplog.records] == [
        *[False] * (LOGGED_REFUSALS - 1),
        True,
    ]


# ------------------------------------------------ which regions count, and when


class Conversation:
    """A `vmm` connection without a socket, whose requests `regions` follow."""

    def __init__(self) -> None:
        self.regions = OwnRegions()
        self._session = ClientSession()
        self._msgid = 0

    def send(self, exchange: Exchange[object]) -> None:
        self._session.start(self.regions.follow(exchange))
        self._session.sent(len(self._session.data_to_send()))
        self._msgid += 1

    def come(self, answer: object) -> None:
        """The daemon's answer; an error is a refusal."""
        self._session.receive_data(
            rpc.encode_error(self._msgid, answer)
            if isinstance(answer, WireError)
            else rpc.encode_result(self._msgid, answer)
        )

    def give_up_unsent(self, exchange: Exchange[object]) -> None:
        self._session.start(self.regions.follow(exchange))
        self._session.withdraw_unsent()

    def break_off(self) -> None:
        self._session.lose("the connection broke")

    def added(self) -> Conversation:
        """With the region in place."""
        self.send(adding())
        self.come({"kind": "movable"})
        assert allowed(self.regions)
        return self


def adding(uaddrs: UaddrRange = UADDRS) -> Exchange[object]:
    return add_region(RAM, uaddrs, writable=True, executable=False)  # type: ignore[return-value]


def removing() -> Exchange[object]:
    return remove_region(RAM, UADDRS)  # type: ignore[return-value]


@pytest.mark.parametrize("build", [adding, lambda: call_exchange(PLAIN_ADD)], ids=["add_region", "call"])
def test_a_region_counts_from_before_its_request_is_sent(build: Callable[[], Exchange[object]]) -> None:
    """A daemon maps a pinned region, and NO_ACCESS over a movable one, before it answers."""
    vmm = Conversation()
    assert not allowed(vmm.regions)

    vmm.send(build())

    assert allowed(vmm.regions)
    assert Served(vmm.regions).ask("map_gpa", WHOLE_RAM) is None


def test_a_region_whose_adding_was_refused_does_not_count() -> None:
    vmm = Conversation()
    vmm.send(adding())

    vmm.come(WireError(errno.ENOSPC, "too many"))

    assert not allowed(vmm.regions)


def test_a_region_whose_adding_was_never_sent_does_not_count() -> None:
    vmm = Conversation()

    vmm.give_up_unsent(adding())

    assert not allowed(vmm.regions)


def test_a_region_whose_answer_is_lost_counts() -> None:
    """The daemon may have it, and may still have to make it inaccessible."""
    vmm = Conversation()
    vmm.send(adding())

    vmm.break_off()

    assert allowed(vmm.regions)


def test_a_region_counts_until_the_daemon_has_removed_it() -> None:
    vmm = Conversation().added()

    vmm.send(removing())
    assert allowed(vmm.regions)
    vmm.come(None)

    assert not allowed(vmm.regions)
    assert Served(vmm.regions).ask("map_gpa", WHOLE_RAM)


def test_a_region_that_could_not_be_removed_counts() -> None:
    vmm = Conversation().added()
    vmm.send(removing())

    vmm.come(WireError(errno.EINVAL, "start_uaddr differs"))

    assert allowed(vmm.regions)


def test_a_second_region_at_the_same_gfns_never_counts_and_the_first_stays() -> None:
    """The daemon has to refuse it (P-7)."""
    vmm = Conversation().added()
    elsewhere = UaddrRange.of_pages(0x6000_0000, 4)

    vmm.send(adding(elsewhere))
    assert not allowed(vmm.regions, uaddrs=elsewhere)
    vmm.come(WireError(errno.EEXIST, "overlaps"))

    assert not allowed(vmm.regions, uaddrs=elsewhere)
    assert allowed(vmm.regions)


@pytest.mark.parametrize("wrong", [{"page_count": 0}, {"start_uaddr": 1}, {"start_gfn": 1 << 52}])
def test_a_region_that_is_none_does_not_count_and_is_the_daemons_to_refuse(wrong: dict[str, int]) -> None:
    vmm = Conversation()
    fields = {"start_gfn": RAM.start, "page_count": 4, "start_uaddr": UADDRS.start_uaddr} | wrong
    add = AddRegion(**fields, kind=RequestedKind.MMIO, writable=True, executable=False)

    vmm.send(call_exchange(add))

    assert not allowed(vmm.regions)


def test_a_region_can_be_added_again_elsewhere_once_it_was_removed() -> None:
    vmm = Conversation().added()
    vmm.send(removing())
    vmm.come(None)
    elsewhere = UaddrRange.of_pages(0x6000_0000, 4)

    vmm.send(adding(elsewhere))

    assert allowed(vmm.regions, uaddrs=elsewhere)
    assert not allowed(vmm.regions)


# ------------------------------------------------ which regions count while they are changed

NEW_UADDRS: Final = UaddrRange.of_pages(0x6000_0000, 4)
ADDED_MOVABLE: Final = {"kinds": ["movable"]}


def changing(uaddrs: UaddrRange = NEW_UADDRS, *, writable: bool = True) -> Exchange[object]:
    """To other memory behind the same gfns."""
    add = [NewRegion(gfns=RAM, uaddrs=uaddrs, writable=writable, executable=False)]
    return change_regions(remove=[(RAM, UADDRS)], add=add)  # type: ignore[return-value]


def old_and_new(regions: OwnRegions) -> tuple[bool, bool]:
    """Which of the two a daemon may map."""
    return allowed(regions), allowed(regions, uaddrs=NEW_UADDRS)


def test_both_the_old_and_the_new_regions_count_while_they_are_changed() -> None:
    """The daemon maps the new ones before it answers, and puts the old ones back if that is refused."""
    vmm = Conversation().added()

    vmm.send(changing())

    assert old_and_new(vmm.regions) == (True, True)


@pytest.mark.parametrize(
    ("answer", "count"),
    [(ADDED_MOVABLE, (False, True)), (WireError(errno.EEXIST, "add[0]: overlaps"), (True, False))],
    ids=["made", "refused"],
)
def test_after_a_change_exactly_the_regions_count_that_the_daemon_has(
    answer: object, count: tuple[bool, bool]
) -> None:
    vmm = Conversation().added()
    vmm.send(changing())

    vmm.come(answer)

    assert old_and_new(vmm.regions) == count


def test_after_a_change_whose_answer_is_lost_both_count() -> None:
    vmm = Conversation().added()
    vmm.send(changing())

    vmm.break_off()

    assert old_and_new(vmm.regions) == (True, True)


def test_after_a_change_that_was_never_sent_the_old_regions_count() -> None:
    vmm = Conversation().added()

    vmm.give_up_unsent(changing())

    assert old_and_new(vmm.regions) == (True, False)


def test_no_mixture_of_an_old_and_a_new_region_may_be_mapped_meanwhile() -> None:
    vmm = Conversation().added()
    vmm.send(changing(writable=False))

    assert allowed(vmm.regions, access=RW)
    assert allowed(vmm.regions, uaddrs=NEW_UADDRS, access=Access.READ)
    assert not allowed(vmm.regions, uaddrs=NEW_UADDRS, access=RW)


def test_regions_that_are_changed_one_way_and_back_are_those_from_before() -> None:
    vmm = Conversation().added()
    back = change_regions(
        remove=[(RAM, NEW_UADDRS)],
        add=[NewRegion(gfns=RAM, uaddrs=UADDRS, writable=True, executable=False)],
    )
    vmm.send(changing())
    vmm.come(ADDED_MOVABLE)
    vmm.send(back)  # type: ignore[arg-type]
    vmm.come(ADDED_MOVABLE)

    assert old_and_new(vmm.regions) == (True, False)


@pytest.mark.parametrize(("made", "count"), [(True, (False, True)), (False, (True, False))])
def test_a_list_kept_by_hand_follows_a_change(*, made: bool, count: tuple[bool, bool]) -> None:
    regions = OwnRegions()
    regions.add(RAM, UADDRS, writable=True, executable=False)

    answered = regions.change(
        [RAM], [NewRegion(gfns=RAM, uaddrs=NEW_UADDRS, writable=True, executable=False)]
    )
    assert old_and_new(regions) == (True, True)
    answered(made)

    assert old_and_new(regions) == count


# ------------------------------------------------ which host pages count, and when

PFN: Final = 0xE0000
FIRST, SECOND = UADDRS.slice(UADDRS.start, UADDRS.start + 2), UADDRS.slice(UADDRS.start + 2, UADDRS.end)


def pfn_allowed(regions: OwnRegions, uaddrs: UaddrRange = UADDRS, pfn: int = PFN) -> bool:
    gfns = GfnRange.of(RAM.start + uaddrs.start - UADDRS.start, uaddrs.page_count)
    try:
        regions.require(gfns, uaddrs, Access.READ, pfn)
    except WireError:
        return False
    return True


def declaring(uaddrs: UaddrRange, pfn: int) -> Exchange[object]:
    return map_vma(uaddrs, pfn, RW)  # type: ignore[return-value]


def test_host_pages_count_from_before_they_are_declared_and_no_others_do() -> None:
    vmm = Conversation().added()
    assert not pfn_allowed(vmm.regions)

    vmm.send(declaring(UADDRS, PFN))

    assert pfn_allowed(vmm.regions)
    assert not pfn_allowed(vmm.regions, pfn=PFN + 1)
    assert pfn_allowed(vmm.regions, SECOND, PFN + 2)
    assert not pfn_allowed(vmm.regions, SECOND, PFN)


def test_host_pages_whose_declaration_was_refused_do_not_count() -> None:
    vmm = Conversation().added()
    vmm.send(declaring(UADDRS, PFN))

    vmm.come(WireError(errno.ENOSPC, "too many"))

    assert not pfn_allowed(vmm.regions)


def declaring_all(*vmas: tuple[UaddrRange, int]) -> Exchange[object]:
    return map_vmas([DeclaredVma(uaddrs, pfn, RW) for uaddrs, pfn in vmas])  # type: ignore[return-value]


def test_the_host_pages_of_many_vmas_count_from_before_they_are_declared() -> None:
    vmm = Conversation().added()

    vmm.send(declaring_all((FIRST, PFN), (SECOND, PFN + 9)))

    assert (pfn_allowed(vmm.regions, FIRST), pfn_allowed(vmm.regions, SECOND, PFN + 9)) == (True, True)
    assert not pfn_allowed(vmm.regions, SECOND, PFN + 2)


def test_if_one_of_many_vmas_was_refused_the_host_pages_of_none_count() -> None:
    vmm = Conversation().added()
    vmm.send(declaring(FIRST, PFN))
    vmm.come(None)
    vmm.send(declaring_all((SECOND, PFN + 2), (FIRST, PFN + 9)))

    vmm.come(WireError(errno.EEXIST, "vmas[1]: overlaps", list="vmas", index=1))

    assert (pfn_allowed(vmm.regions, FIRST), pfn_allowed(vmm.regions, SECOND, PFN + 2)) == (True, False)


def test_host_pages_of_vmas_of_which_one_is_no_range_do_not_count() -> None:
    """The daemon has to refuse them all."""
    wrong = msgspec.structs.replace(declaring(SECOND, PFN).call, page_count=0)  # type: ignore[type-var]
    right = declaring(FIRST, PFN).call
    vmm = Conversation().added()

    vmm.send(call_exchange(MapVmas(vmas=[right, wrong])))  # type: ignore[list-item]

    assert not pfn_allowed(vmm.regions, FIRST)


@pytest.mark.parametrize(("second", "is_allowed"), [(PFN + 2, True), (PFN + 9, False)])
def test_host_pages_of_two_vmas_count_together_only_if_they_are_contiguous(
    second: int, is_allowed: bool
) -> None:
    vmm = Conversation().added()
    for uaddrs, pfn in ((FIRST, PFN), (SECOND, second)):
        vmm.send(declaring(uaddrs, pfn))
        vmm.come(None)

    assert pfn_allowed(vmm.regions) is is_allowed


def test_host_pages_count_until_the_daemon_has_answered_that_they_are_gone() -> None:
    vmm = Conversation().added()
    vmm.send(declaring(UADDRS, PFN))
    vmm.come(None)
    hole = UADDRS.slice(UADDRS.start + 1, UADDRS.start + 2)

    vmm.send(unmap_vma(hole))  # type: ignore[arg-type]
    assert pfn_allowed(vmm.regions)
    vmm.come(None)

    assert not pfn_allowed(vmm.regions)
    assert [
        pfn_allowed(vmm.regions, UADDRS.slice(page, page + 1), PFN + page - UADDRS.start)
        for page in range(UADDRS.start, UADDRS.end)
    ] == [True, False, True, True]


def test_unmapping_takes_several_vmas_and_new_host_pages_can_be_declared_there() -> None:
    vmm = Conversation().added()
    for uaddrs, pfn in ((FIRST, PFN), (SECOND, PFN + 2)):
        vmm.send(declaring(uaddrs, pfn))
        vmm.come(None)
    vmm.send(unmap_vma(UADDRS))  # type: ignore[arg-type]
    vmm.come(None)

    vmm.send(declaring(UADDRS, PFN + 0x100))

    assert pfn_allowed(vmm.regions, pfn=PFN + 0x100)
    assert not pfn_allowed(vmm.regions)


# ------------------------------------------------ over sockets


class Mapper:
    """Remembers what it was asked to map."""

    def __init__(self) -> None:
        self.mapped: list[GfnRange] = []

    def map(self, gfns: GfnRange, uaddrs: UaddrRange, access: Access, start_pfn: int | None) -> None:
        assert (uaddrs, access, start_pfn) == (UADDRS, RW, None)
        self.mapped.append(gfns)

    def unmap(self, gfns: GfnRange) -> None:
        raise AssertionError(f"nobody asked for {gfns}")


class AsyncMapper:
    """The same for trio."""

    def __init__(self) -> None:
        self.mapper = Mapper()

    async def map(self, gfns: GfnRange, uaddrs: UaddrRange, access: Access, start_pfn: int | None) -> None:
        await trio.lowlevel.checkpoint()
        self.mapper.map(gfns, uaddrs, access, start_pfn)

    async def unmap(self, gfns: GfnRange) -> None:
        await trio.lowlevel.checkpoint()
        self.mapper.unmap(gfns)


class LyingDaemon:
    """While it adds a region it maps the heap, and the region. When the VMM says that the region was removed,
    it maps the region again."""

    def __init__(self, path: Path) -> None:
        self.removed, self.has_lied = threading.Event(), threading.Event()
        asked, mapped = threading.Event(), threading.Event()
        vmm: list[Step] = [
            *hello(), *replies(PARTITION),
            Hear(), Signal(asked), Await(mapped), Answer(ADDED),
            *replies(None),
        ]  # fmt: skip
        hypervisor: list[Step] = [
            *hello(),
            Await(asked), Ask("map_gpa", HEAP), Ask("map_gpa", WHOLE_RAM), Signal(mapped),
            Await(self.removed), Ask("map_gpa", WHOLE_RAM), Signal(self.has_lied),
        ]  # fmt: skip
        self.script = ScriptedDaemon(path, (vmm, hypervisor))

    def answers(self) -> list[str | None]:
        """The name of the error of each answer to a map."""
        return [error[1] if isinstance(error, list) else None for error in self.script.answered]


EXPECTED: Final = ["EPERM", None, "EPERM"]
"""The heap; the region that is being added; the region that was removed."""


@pytest.mark.parametrize("is_plain", [False, True], ids=["add_region", "call"])
def test_a_hypervisor_of_threads_maps_its_vmms_regions_and_nothing_else(
    socket_path: Path, is_plain: bool
) -> None:
    daemon, mapper, threads = LyingDaemon(socket_path), Mapper(), ThreadPoolExecutor(1)
    with daemon.script, BlockingVmm.open(socket_path, timeout=PATIENCE) as vmm:
        partition = vmm.create_partition(AddressSpaceKind.PROCESS, HypervisorKind.VMM)
        with BlockingHypervisor.open(socket_path, partition, mapper, regions=vmm.regions) as hypervisor:
            served = threads.submit(hypervisor.serve)
            if is_plain:
                vmm.call(PLAIN_ADD)
            else:
                vmm.add_region(RAM, UADDRS, RequestedKind.MOVABLE, writable=True, executable=False)
            vmm.remove_region(RAM, UADDRS)
            daemon.removed.set()
            assert daemon.has_lied.wait(PATIENCE)
        assert served.result(PATIENCE) == "closed by this client"
    assert daemon.answers() == EXPECTED
    assert mapper.mapped == [RAM]


@pytest.mark.parametrize("is_plain", [False, True], ids=["add_region", "call"])
async def test_a_hypervisor_of_trio_maps_its_vmms_regions_and_nothing_else(
    socket_path: Path, is_plain: bool
) -> None:
    daemon, mapper = LyingDaemon(socket_path), AsyncMapper()
    with daemon.script:
        async with trio.open_nursery() as nursery, TrioVmm.open(socket_path) as vmm:
            partition = await vmm.create_partition(AddressSpaceKind.PROCESS, HypervisorKind.VMM)
            async with TrioHypervisor.open(socket_path, partition, mapper, regions=vmm.regions) as hypervisor:
                nursery.start_soon(hypervisor.serve)
                if is_plain:
                    await vmm.call(PLAIN_ADD)
                else:
                    await vmm.add_region(RAM, UADDRS, RequestedKind.MOVABLE, writable=True, executable=False)
                await vmm.remove_region(RAM, UADDRS)
                daemon.removed.set()
                assert await trio.to_thread.run_sync(daemon.has_lied.wait, PATIENCE)
    assert daemon.answers() == EXPECTED
    assert mapper.mapper.mapped == [RAM]


# ------------------------------------------------ in another process than the main connection


def test_a_list_kept_by_hand_allows_what_was_added_to_it_until_it_is_removed() -> None:
    regions = OwnRegions()
    regions.add(RAM, UADDRS, writable=True, executable=False)
    regions.map_vma(UADDRS, PFN)
    assert pfn_allowed(regions)

    regions.unmap_vma(UADDRS)
    assert not pfn_allowed(regions)
    assert allowed(regions)
    regions.remove(RAM)

    assert not allowed(regions)
