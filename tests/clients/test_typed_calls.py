"""The typed calls: what each sends and returns, and that blocking and trio clients have the same."""

from __future__ import annotations

import errno
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec
import pytest

import intercept_client
from fakes.scripted_daemon import ScriptedDaemon, hello, replies
from intercept_client import (
    Access,
    AddressSpaceKind,
    BlockingNotifier,
    BlockingOperator,
    BlockingVmm,
    ClientMisuse,
    DeclaredVma,
    EventName,
    GfnRange,
    HypervisorKind,
    MmioGranularity,
    NewRegion,
    PartitionCredentials,
    ProtocolViolation,
    Reason,
    RegionKind,
    RequestedKind,
    TrioOperator,
    TrioVmm,
    UaddrRange,
    VpSelection,
)

GFNS: Final = GfnRange.of(0x100, 4)
UADDRS: Final = UaddrRange.of_pages(0x7000_0000, 4)
REGION: Final = {"start_gfn": 0x100, "page_count": 4, "start_uaddr": 0x7000_0000}
VMA: Final = {"start_uaddr": 0x7000_0000, "page_count": 4}
NO_MORE: Final = {"writable": False, "executable": False}
CREDENTIALS: Final = PartitionCredentials(partition_id=7, token=bytes(16))
SUMMARY: Final = {
    "name": "", "uid": 0, "pid": 1, "address_space": "declared", "hypervisor": "software", "vps": 0,
    "regions": 0, "mapped_gfns": 0, "intercepts": 0, "invalidations": 0, "age_ms": 0,
}  # fmt: skip

ROLES: Final = ("Vmm", "Vp", "Notifier", "Operator", "Hypervisor")


def page(*partition_ids: int, more: bool) -> dict[str, object]:
    """A reply to `list_partitions`."""
    return {"partitions": [{"partition_id": n, **SUMMARY} for n in partition_ids], "more": more}


def public(client: type) -> dict[str, list[str]]:
    """The methods of a client, and the names of their parameters."""
    return {
        name: list(inspect.signature(method).parameters)
        for name, method in inspect.getmembers(client, callable)
        if not name.startswith("_")
    }


@pytest.mark.parametrize("role", ROLES)
def test_the_clients_of_a_role_agree_in_methods_and_parameters(role: str) -> None:
    """But for time: threads have timeouts, trio has cancellation."""
    blocking, trio = (public(getattr(intercept_client, f"{kind}{role}")) for kind in ("Blocking", "Trio"))
    assert {name: [one for one in names if one != "timeout"] for name, names in blocking.items()} == trio


@pytest.mark.parametrize(
    ("ask", "method", "fields"),
    [
        (lambda vmm: vmm.remove_region(GFNS, UADDRS), "remove_region", REGION),
        (
            lambda vmm: vmm.map_vma(UADDRS, 0xE0000, Access.READ | Access.WRITE, io=True),
            "map_vma",
            VMA | {"start_pfn": 0xE0000, "readable": True, "writable": True, "executable": False, "io": True},
        ),
        (
            lambda vmm: vmm.map_vmas(
                [DeclaredVma(UADDRS, 0xE0000, Access.READ), DeclaredVma(UADDRS, 0, Access.NONE, io=True)]
            ),
            "map_vmas",
            {
                "vmas": [
                    VMA | {"start_pfn": 0xE0000, "readable": True, "io": False} | NO_MORE,
                    VMA | {"start_pfn": 0, "readable": False, "io": True} | NO_MORE,
                ]
            },
        ),
        (lambda vmm: vmm.unmap_vma(UADDRS), "unmap_vma", VMA),
        (
            lambda vmm: vmm.protect_vma(UADDRS, Access.READ | Access.EXECUTE),
            "protect_vma",
            VMA | {"readable": True, "writable": False, "executable": True},
        ),
        (lambda vmm: vmm.kick(3), "kick", {"vp_index": 3}),
        (lambda vmm: vmm.kick(VpSelection.ALL), "kick", {"vp_index": "all"}),
        (lambda vmm: vmm.set_policy(), "set_policy", {}),
        (
            lambda vmm: vmm.set_policy(mmio_granularity=MmioGranularity.PAGE),
            "set_policy",
            {"mmio_granularity": "page"},
        ),
    ],
)  # fmt: skip
def test_a_typed_call_of_a_vmm_sends_its_method_and_fields(
    socket_path: Path, ask: Callable[[BlockingVmm], None], method: str, fields: dict[str, object]
) -> None:
    with (
        ScriptedDaemon(socket_path, ([*hello(), *replies(None)],)) as daemon,
        BlockingVmm.open(socket_path) as vmm,
    ):
        ask(vmm)
    assert daemon.heard[1:] == [(method, [fields])]


@pytest.mark.parametrize("kind", [RequestedKind.MMIO, RegionKind.MMIO])
async def test_adding_a_region_returns_its_kind_with_threads_and_with_trio(
    socket_path: Path, kind: RequestedKind | RegionKind
) -> None:
    script = [*hello(), *replies({"kind": "mmio"})]
    with ScriptedDaemon(socket_path, (script, script)) as daemon:
        with BlockingVmm.open(socket_path) as blocking:
            added = blocking.add_region(GFNS, UADDRS, kind, writable=True, executable=False)
        async with TrioVmm.open(socket_path) as vmm:
            assert await vmm.add_region(GFNS, UADDRS, kind, writable=True, executable=False) is added
    assert added is RegionKind.MMIO
    asked = ("add_region", [REGION | {"kind": "mmio", "writable": True, "executable": False}])
    assert [request for request in daemon.heard if request[0] != "hello"] == [asked, asked]


SHADOW: Final = NewRegion(gfns=GFNS, uaddrs=UADDRS, kind=RegionKind.PINNED, writable=False, executable=True)
ADDED: Final = {"kind": "pinned", "writable": False, "executable": True}


async def test_a_change_of_regions_returns_the_kinds_with_threads_and_with_trio(socket_path: Path) -> None:
    script = [*hello(), *replies({"kinds": ["pinned"]}, {"kinds": ["pinned"]})]
    with ScriptedDaemon(socket_path, (script, script)) as daemon:
        with BlockingVmm.open(socket_path) as blocking:
            kinds = [
                blocking.change_regions(remove=[(GFNS, UADDRS)], add=[SHADOW]),
                blocking.add_regions([SHADOW]),
            ]
        async with TrioVmm.open(socket_path) as vmm:
            kinds.append(await vmm.change_regions(remove=[(GFNS, UADDRS)], add=[SHADOW]))
            kinds.append(await vmm.add_regions([SHADOW]))
    assert kinds == [[RegionKind.PINNED]] * 4
    asked = [
        ("change_regions", [{"remove": [REGION], "add": [REGION | ADDED]}]),
        ("change_regions", [{"remove": [], "add": [REGION | ADDED]}]),
    ]
    assert [request for request in daemon.heard if request[0] != "hello"] == asked * 2


@pytest.mark.parametrize(
    ("ask", "why"),
    [
        (
            lambda vmm: vmm.change_regions(remove=[(GFNS, UADDRS)] * 129),
            "change_regions: 129 regions; a request takes 128",
        ),
        (
            lambda vmm: vmm.change_regions(remove=[(GFNS, UADDRS)] * 102, add=[SHADOW] * 102),
            "change_regions: a message on this connection may hold 2048 values",
        ),
        (lambda vmm: vmm.add_regions([SHADOW] * 129), "add_regions: 129 regions; a request takes 128"),
        (
            lambda vmm: vmm.add_regions([msgspec.structs.replace(SHADOW, gfns=GfnRange.of(0x100, 5))]),
            "add_regions: 5 gfns from 0x100, but 4 pages at",
        ),
    ],
)
def test_a_change_that_no_request_can_hold_is_refused_before_anything_is_sent(
    socket_path: Path, ask: Callable[[BlockingVmm], object], why: str
) -> None:
    """The daemon would end the connection, and the partition with it (F-6)."""
    with (
        ScriptedDaemon(socket_path, (hello(),)) as daemon,
        BlockingVmm.open(socket_path) as vmm,
        pytest.raises(ClientMisuse, match=why),
    ):
        ask(vmm)
    assert daemon.methods == ["hello"]


def test_a_region_of_unequal_ranges_is_refused_before_anything_is_sent(socket_path: Path) -> None:
    with (
        ScriptedDaemon(socket_path, (hello(),)) as daemon,
        BlockingVmm.open(socket_path) as vmm,
        pytest.raises(ClientMisuse, match="add_region: 4 gfns from 0x100, but 3 pages at"),
    ):
        vmm.add_region(GFNS, UaddrRange.of_pages(0x7000_0000, 3), writable=True, executable=False)
    assert daemon.methods == ["hello"]


def test_more_vmas_than_a_request_takes_are_refused_before_anything_is_sent(socket_path: Path) -> None:
    """The daemon would end the connection, and the partition with it (F-6)."""
    vma = DeclaredVma(UADDRS, 0, Access.READ)
    with (
        ScriptedDaemon(socket_path, (hello(),)) as daemon,
        BlockingVmm.open(socket_path) as vmm,
        pytest.raises(ClientMisuse, match="map_vmas: 129 VMAs; a request takes 128"),
    ):
        vmm.map_vmas([vma] * 129)
    assert daemon.methods == ["hello"]


def test_a_created_partition_is_what_opens_its_other_connections(socket_path: Path) -> None:
    created = {"partition_id": 7, "token": bytes(16)}
    with (
        ScriptedDaemon(socket_path, ([*hello(), *replies(created)],)) as daemon,
        BlockingVmm.open(socket_path) as vmm,
    ):
        assert vmm.create_partition(AddressSpaceKind.PROCESS, HypervisorKind.VMM) == CREDENTIALS
    [(_, [fields])] = daemon.heard[1:]
    assert fields == {
        "address_space": "process", "hypervisor": "vmm", "architecture": "x86_64",
        "mmio_granularity": "vma", "remap": "replace",
    }  # fmt: skip


def test_an_invalidate_sends_bytes(socket_path: Path) -> None:
    with (
        ScriptedDaemon(socket_path, ([*hello(), *replies(None)],)) as daemon,
        BlockingNotifier.open(socket_path, CREDENTIALS) as notifier,
    ):
        notifier.invalidate(UADDRS)
    assert daemon.heard[1:] == [("invalidate", [{"start_uaddr": 0x7000_0000, "length": 0x4000}])]


async def test_partitions_are_listed_page_after_page_with_threads_and_with_trio(socket_path: Path) -> None:
    script = [*hello(), *replies(page(3, 5, more=True), page(9, more=False))]
    with ScriptedDaemon(socket_path, (script, script)) as daemon:
        with BlockingOperator.open(socket_path) as blocking:
            listed = blocking.list_partitions()
        async with TrioOperator.open(socket_path) as operator:
            assert await operator.list_partitions() == listed
    assert [summary.partition_id for summary in listed] == [3, 5, 9]
    assert [params for method, params in daemon.heard if method != "hello"] == 2 * [
        [{"after": 0}],
        [{"after": 5}],
    ]


@pytest.mark.parametrize("stuck", [page(more=True), page(0, more=True)], ids=["empty", "no further"])
def test_a_page_that_leads_nowhere_is_a_violation(socket_path: Path, stuck: dict[str, object]) -> None:
    with (
        ScriptedDaemon(socket_path, ([*hello(), *replies(stuck)],)),
        BlockingOperator.open(socket_path) as operator,
        pytest.raises(ProtocolViolation) as caught,
    ):
        operator.list_partitions()
    assert caught.value.number == errno.EPROTO


LISTED: Final[dict[str, tuple[str, str, dict[str, object]]]] = {
    "list_regions": (
        "regions",
        "start_gfn",
        {
            "page_count": 4, "start_uaddr": 4096, "kind": "mmio", "state": "live", "writable": True,
            "executable": False, "mapped_gfns": 0,
        },
    ),
    "list_vmas": (
        "vmas",
        "start_uaddr",
        {"page_count": 4, "start_pfn": 9, "readable": True, "writable": True, "executable": True, "io": True},
    ),
    "list_mappings": (
        "mappings",
        "start_gfn",
        {"page_count": 4, "start_uaddr": 4096, "frame": ["host", 9], "access": 3},
    ),
}  # fmt: skip
"""By method: its list, the key that the list is ordered by, and the other fields of an element."""


@pytest.mark.parametrize("method", LISTED)
@pytest.mark.parametrize("role", ["vmm", "operator"])
async def test_a_list_is_asked_for_page_by_page_with_threads_and_with_trio(
    socket_path: Path, method: str, role: str
) -> None:
    what, key, fields = LISTED[method]
    sent = [
        {what: [{key: n, **fields} for n in starts], "more": more}
        for starts, more in (((0, 2), True), ((7,), False))
    ]
    script = [*hello(), *replies(*sent)]
    of, asked = ((), {}) if role == "vmm" else ((7,), {"partition_id": 7})
    blocking_client, trio_client = (
        (BlockingVmm, TrioVmm) if role == "vmm" else (BlockingOperator, TrioOperator)
    )
    with ScriptedDaemon(socket_path, (script, script)) as daemon:
        with blocking_client.open(socket_path) as blocking:
            listed = getattr(blocking, method)(*of)
        async with trio_client.open(socket_path) as client:
            assert await getattr(client, method)(*of) == listed
    assert [getattr(each, key) for each in listed] == [0, 2, 7]
    assert [request for request in daemon.heard if request[0] != "hello"] == 2 * [
        (method, [asked]),
        (method, [asked | {"after": 2}]),
    ]


@pytest.mark.parametrize("starts", [[], [5], [4]])
def test_a_later_page_of_a_list_that_leads_nowhere_is_a_violation(
    socket_path: Path, starts: list[int]
) -> None:
    what, key, fields = LISTED["list_regions"]
    sent = [{what: [{key: n, **fields} for n in page], "more": True} for page in ([1, 5], starts)]
    with (
        ScriptedDaemon(socket_path, ([*hello(), *replies(*sent)],)),
        BlockingVmm.open(socket_path) as vmm,
        pytest.raises(ProtocolViolation, match="does not advance past 0x5"),
    ):
        vmm.list_regions()


async def test_prefault_goes_on_where_an_answer_stopped_and_tells_how_far_it_came(socket_path: Path) -> None:
    sent = [{"page_count": 3, "mapped_gfns": 3}, {"page_count": 1, "mapped_gfns": 0}]
    script = [*hello(), *replies(*sent)]
    told: list[tuple[int, int]] = []
    with ScriptedDaemon(socket_path, (script, script)) as daemon:
        with BlockingVmm.open(socket_path) as blocking:
            assert blocking.prefault(GFNS, progress=lambda *far: told.append(far)) == 3
        async with TrioVmm.open(socket_path) as vmm:
            assert await vmm.prefault(GFNS) == 3
    assert told == [(3, 3), (4, 3)]
    assert [request for request in daemon.heard if request[0] != "hello"] == 2 * [
        ("prefault", [{"start_gfn": 0x100, "page_count": 4}]),
        ("prefault", [{"start_gfn": 0x103, "page_count": 1}]),
    ]


@pytest.mark.parametrize("page_count", [0, 5])
def test_prefault_of_none_or_of_more_than_was_asked_is_a_violation(
    socket_path: Path, page_count: int
) -> None:
    with (
        ScriptedDaemon(socket_path, ([*hello(), *replies({"page_count": page_count, "mapped_gfns": 0})],)),
        BlockingVmm.open(socket_path) as vmm,
        pytest.raises(ProtocolViolation, match="prefault"),
    ):
        vmm.prefault(GFNS)


def test_an_operators_calls_send_their_methods_and_fields(socket_path: Path) -> None:
    with (
        ScriptedDaemon(socket_path, ([*hello(), *replies(None, None, None, None)],)) as daemon,
        BlockingOperator.open(socket_path) as operator,
    ):
        operator.set_policy(4, mmio_granularity=MmioGranularity.VMA)
        operator.subscribe([EventName.PARTITION_LOST], partition_id=4, reasons=[Reason.KICKED])
        operator.drain(250)
        operator.restart()
    assert daemon.heard[1:] == [
        ("set_policy", [{"partition_id": 4, "mmio_granularity": "vma"}]),
        ("subscribe", [{"events": ["partition_lost"], "partition_id": 4, "reasons": ["kicked"]}]),
        ("drain", [{"timeout_ms": 250}]),
        ("restart", [{}]),
    ]
