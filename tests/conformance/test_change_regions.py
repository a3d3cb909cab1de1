"""`change_regions`: one step from old regions to new ones, and nothing between them."""

from __future__ import annotations

from typing import Any

import pytest

from conformance.guests import GFN, PAGE, PAGES, PFN, UADDR, RawVmm, region
from conformance.hosts import REFUSAL
from conformance.statements import statement
from conformance.wire import READ, RawConnection, intercept_message, pack, request

ROM_UADDR, ROM_PFN = UADDR + 0x100 * PAGE, PFN + 0x100
"""What else may stand behind the gfns."""
ELSEWHERE = GFN + 0x100
THE_REGION = {"start_gfn": GFN, "page_count": PAGES, "start_uaddr": UADDR}
SERVED = (["resume", "mapped"], ["resume", "already_mapped"])
KINDS = pytest.mark.parametrize("kind", ["mmio", "movable", "pinned"])


@pytest.fixture
def mapped(vmm: RawVmm) -> RawVmm:
    """A movable region, all of it mapped, and a ROM."""
    vmm.add_memory()
    assert vmm.vp().intercept(GFN) == ["resume", "mapped"]
    vmm.map_vma(ROM_UADDR, PAGES, ROM_PFN)
    return vmm


def pfns(vmm: RawVmm, *gfns: int) -> list[int | None]:
    held = [vmm.ask("translate", gfn=gfn) for gfn in gfns]
    return [None if one is None else one["pfn"] for one in held]


# ------------------------------------------------ P-33: all or nothing


@statement("P-33")
@KINDS
def test_a_bar_that_moves_is_reached_at_its_new_place_only(mapped: RawVmm, kind: str) -> None:
    moved = region(ELSEWHERE, PAGES, UADDR, kind=kind)
    assert mapped.ask("change_regions", remove=[THE_REGION], add=[moved]) == {"kinds": [kind]}
    vp = mapped.vp(1)
    assert (vp.intercept(GFN), vp.intercept(ELSEWHERE) in SERVED) == (["forward", "no_region"], True)
    assert pfns(mapped, GFN, ELSEWHERE, ELSEWHERE + PAGES - 1) == [None, PFN, PFN + PAGES - 1]


@statement("P-33", "T-5")
@pytest.mark.parametrize("fields", [{}, {"remove": [], "add": []}, {"remove": None, "add": None}])
def test_a_change_of_nothing_changes_nothing(mapped: RawVmm, fields: dict[str, object]) -> None:
    assert mapped.ask("change_regions", **fields) == {"kinds": []}
    assert pfns(mapped, GFN) == [PFN]


@statement("P-33")
def test_the_kinds_come_in_the_order_of_the_added_regions(mapped: RawVmm) -> None:
    kinds = ["pinned", "auto", "mmio"]
    add = [region(ELSEWHERE - place, 1, ROM_UADDR, kind=kind) for place, kind in enumerate(kinds)]
    assert mapped.ask("change_regions", add=add) == {"kinds": ["pinned", "movable", "mmio"]}


@statement("P-33", "E-2")
@pytest.mark.parametrize(
    ("change", "error", "details"),
    [
        (
            {"remove": [THE_REGION, {**THE_REGION, "start_gfn": GFN + 1}]},
            "ENOENT",
            {"list": "remove", "index": 1},
        ),
        ({"remove": [THE_REGION, THE_REGION]}, "ENOENT", {"list": "remove", "index": 1}),
        (
            {"remove": [{**THE_REGION, "page_count": 1}]},
            "EINVAL",
            {"list": "remove", "index": 0, "field": "page_count"},
        ),
        (
            {"add": [region(ELSEWHERE, 1, UADDR), region(GFN + PAGES - 1, 2, UADDR)]},
            "EEXIST",
            {"list": "add", "index": 1, "start_gfn": GFN, "page_count": PAGES},
        ),
        (
            {"remove": [THE_REGION], "add": [region(GFN, 2, UADDR), region(GFN + 1, 2, UADDR)]},
            "EEXIST",
            {"list": "add", "index": 1, "start_gfn": GFN, "page_count": 2},
        ),
        (
            {"remove": [THE_REGION], "add": [region(GFN, 2, UADDR), region(ELSEWHERE, 0, UADDR)]},
            "EINVAL",
            {"list": "add", "index": 1, "field": "page_count"},
        ),
        (
            {"remove": [THE_REGION], "add": [{**region(GFN, 2, UADDR), "writable": 1}]},
            "EINVAL",
            {"list": "add", "index": 0, "field": "writable"},
        ),
        (
            {"remove": [THE_REGION], "add": [region(GFN, PAGES + 1, UADDR, kind="pinned")]},
            "EFAULT",
            {"list": "add", "index": 0},
        ),
        ({"remove": [THE_REGION] * 129}, "EINVAL", {"field": "remove"}),
        ({"add": {}}, "EINVAL", {"field": "add"}),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_refused_names_the_element_and_changes_nothing(
    mapped: RawVmm, change: dict[str, object], error: str, details: dict[str, object]
) -> None:
    refusal = mapped.connection.refusal("change_regions", change)
    assert (refusal.name, {key: refusal.details.get(key) for key in details}) == (error, details)
    assert (pfns(mapped, GFN), mapped.ask("statistics")["regions"]) == ([PFN], 1)


@statement("P-33", "L-1")
def test_the_limit_of_regions_counts_what_is_left_afterwards(vmm: RawVmm, limits: dict[str, int]) -> None:
    limit = limits["regions_per_partition"]
    if limit > 5000:
        pytest.skip(f"limits.regions_per_partition is {limit}: set it lower")
    for gfn in range(limit):
        vmm.add_region(gfn, 1, UADDR)
    first = {"start_gfn": 0, "page_count": 1, "start_uaddr": UADDR}
    two = [region(limit + 1, 1, UADDR), region(limit + 2, 1, UADDR)]
    refusal = vmm.connection.refusal("change_regions", {"remove": [first], "add": two})
    assert (refusal.name, refusal.details.get("limit")) == ("ENOSPC", "regions_per_partition")
    assert vmm.ask("change_regions", remove=[first], add=two[:1]) == {"kinds": ["movable"]}


# ------------------------------------------------ P-34: nothing between


@statement("P-34")
def test_what_old_and_new_regions_have_alike_stays_mapped(mapped: RawVmm) -> None:
    around = [region(GFN, 4, UADDR), region(GFN + 6, PAGES - 6, UADDR + 6 * PAGE)]
    before = mapped.ask("statistics")
    mapped.ask("change_regions", remove=[THE_REGION], add=around)
    after = mapped.ask("statistics")
    assert pfns(mapped, *range(GFN + 3, GFN + 7)) == [PFN + 3, None, None, PFN + 6]
    assert (after["map_calls"], after["mapped_gfns"]) == (before["map_calls"], PAGES - 2)
    assert mapped.vp(1).intercept(GFN + 4) == ["forward", "no_region"]


@statement("P-34")
@pytest.mark.parametrize(
    "new",
    [
        region(GFN, PAGES, ROM_UADDR),
        region(GFN, PAGES, UADDR, writable=False),
        region(GFN, PAGES, UADDR, kind="mmio"),
        region(GFN, PAGES, UADDR, kind="auto"),
    ],
    ids=["uaddr", "rights", "kind", "auto"],
)
def test_what_differs_is_mapped_anew(mapped: RawVmm, new: dict[str, object]) -> None:
    mapped.ask("change_regions", remove=[THE_REGION], add=[new])
    assert pfns(mapped, GFN) == [None]
    assert mapped.vp(1).intercept(GFN) == ["resume", "mapped"]
    assert pfns(mapped, GFN) == [ROM_PFN if new["start_uaddr"] == ROM_UADDR else PFN]


class ChangingHost:
    """A VMM with its own hypervisor that is asked for what a change of regions takes."""

    def __init__(self, vmm: RawVmm, kind: str) -> None:
        self.vmm, self.link = vmm, vmm.link()
        self.vp, self.other = vmm.vp(), vmm.vp(1)
        vmm.map_vma(UADDR, PAGES)
        vmm.map_vma(ROM_UADDR, PAGES, ROM_PFN)
        vmm.connection.send(request("add_region", region(GFN, PAGES, UADDR, kind=kind)))
        if kind != "mmio":
            self.carry_out()
        assert vmm.connection.answer() == {"kind": kind}

    def change(self, *add: dict[str, object]) -> None:
        fields = {"remove": [THE_REGION], "add": list(add)}
        self.vmm.connection.send(request("change_regions", fields))

    def asked(self) -> tuple[int, str, dict[str, Any]]:
        kind, msgid, method, (fields,) = self.link.receive()
        assert kind == 0
        return msgid, method, fields

    def answer(self, msgid: int, error: object = None) -> None:
        self.link.send(pack([1, msgid, error, None]))

    def carry_out(self) -> tuple[str, int, int | None]:
        """The next request: method, start_gfn, and uaddr unless it is an unmap."""
        msgid, method, fields = self.asked()
        self.answer(msgid)
        return method, fields["start_gfn"], fields.get("start_uaddr")

    def touch(self, vp: RawConnection, gfn: int) -> None:
        vp.send(request("intercept", intercept_message(gfn, READ)))

    def answers_others(self) -> bool:
        """Whether an intercept elsewhere is answered."""
        answer: object = self.other.intercept(ELSEWHERE)
        return answer == ["forward", "no_region"]


@statement("P-34")
def test_an_intercept_meanwhile_waits_and_is_answered_for_the_new_region(hosted: RawVmm) -> None:
    """Also while the new region is made known: it is no_region at no moment."""
    host = ChangingHost(hosted, "movable")
    host.change(region(GFN, PAGES, ROM_UADDR))
    for expected in ("unmap_gpa", "map_gpa"):
        msgid, method, _ = host.asked()
        if expected == "unmap_gpa":
            host.touch(host.vp, GFN)
        assert (method, host.answers_others(), host.vp.is_readable()) == (expected, True, False)
        host.answer(msgid)
    assert host.vmm.connection.answer() == {"kinds": ["movable"]}
    assert host.carry_out() == ("map_gpa", GFN, ROM_UADDR)
    assert host.vp.answer() == ["resume", "mapped"]


@statement("P-34")
def test_all_that_goes_is_gone_before_anything_comes(hosted: RawVmm) -> None:
    host = ChangingHost(hosted, "pinned")
    host.change(region(GFN, 4, ROM_UADDR, kind="pinned"), region(ELSEWHERE, 4, ROM_UADDR))
    methods = [host.carry_out()[0] for _ in range(3)]
    assert methods == ["unmap_gpa", "map_gpa", "map_gpa"]
    assert host.vmm.connection.answer() == {"kinds": ["pinned", "movable"]}


# ------------------------------------------------ P-35: the hypervisor refuses


@statement("P-35")
def test_a_map_that_is_refused_brings_the_old_regions_back(hosted: RawVmm) -> None:
    host = ChangingHost(hosted, "pinned")
    host.change(region(GFN, PAGES, ROM_UADDR))
    assert host.carry_out()[:2] == ("unmap_gpa", GFN)
    msgid, method, _ = host.asked()
    host.answer(msgid, REFUSAL)
    assert (method, host.carry_out()) == ("map_gpa", ("map_gpa", GFN, UADDR))
    _, _, error, _ = host.vmm.connection.receive()
    assert (error[1], error[3]["list"], error[3]["index"]) == ("ENOMEM", "add", 0)
    assert host.vp.intercept(GFN) == ["resume", "already_mapped"]
    assert host.vmm.ask("statistics")["regions"] == 1


@statement("P-35", "Y-7")
@pytest.mark.parametrize("nth", [1, 3], ids=["the unmap", "the undoing"])
def test_a_refusal_that_cannot_be_undone_loses_the_partition(hosted: RawVmm, nth: int) -> None:
    host = ChangingHost(hosted, "pinned")
    host.change(region(GFN, PAGES, ROM_UADDR))
    for call in range(1, nth + 1):
        msgid, _, _ = host.asked()
        host.answer(msgid, REFUSAL if call >= min(nth, 2) else None)
    assert host.vmm.connection.farewell().name == "EIO"


@statement("P-35")
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_pinned_region_that_is_invalidated_is_refused_before_the_change_and_dangles_after_it(
    mapped: RawVmm, when: str
) -> None:
    pinned = {"remove": [THE_REGION], "add": [region(GFN, PAGES, ROM_UADDR, kind="pinned")]}
    if when == "before":
        mapped.ask("unmap_vma", start_uaddr=ROM_UADDR, page_count=1)
        assert mapped.connection.refusal("change_regions", pinned).name == "EFAULT"
        assert pfns(mapped, GFN) == [PFN]
    else:
        mapped.ask("change_regions", **pinned)
        mapped.ask("unmap_vma", start_uaddr=ROM_UADDR, page_count=1)
        assert mapped.vp(1).intercept(GFN) == ["forward", "unbacked"]
        assert pfns(mapped, GFN, GFN + 1) == [None, ROM_PFN + 1]
