"""`prefault`: pages that are mapped before the guest touches them."""

from __future__ import annotations

import pytest

from conformance.guests import GFN, PAGE, PAGES, PFN, UADDR, WHOLE_MEMORY, RawVmm, pages
from conformance.hosts import REFUSAL
from conformance.statements import needs, statement
from conformance.wire import WRITE, Refused, pack, request

WHOLE = {"start_gfn": GFN, "page_count": PAGES}


def prefault(vmm: RawVmm, start_gfn: int = GFN, page_count: int = PAGES) -> int:
    """In as many requests as it takes: how many pages were mapped when they were gone through."""
    done, mapped = 0, 0
    while done < page_count:
        reply = vmm.ask("prefault", start_gfn=start_gfn + done, page_count=page_count - done)
        assert 0 < reply["page_count"] <= page_count - done
        assert 0 <= reply["mapped_gfns"] <= reply["page_count"]
        done, mapped = done + reply["page_count"], mapped + reply["mapped_gfns"]
    return mapped


def reached(vmm: RawVmm) -> list[int]:
    """Which of the pages of `add_memory` the guest reaches, counted from the first."""
    return [n for n in range(PAGES) if vmm.ask("translate", gfn=GFN + n) is not None]


@statement("P-37")
@pytest.mark.parametrize("kind", ["mmio", "movable"])
def test_the_guest_reaches_all_that_is_backed(vmm: RawVmm, kind: str) -> None:
    vmm.map_vma(UADDR, PAGES)
    vmm.add_region(GFN, PAGES, UADDR, kind)
    assert prefault(vmm) == PAGES
    assert vmm.ask("translate", gfn=GFN + PAGES - 1)["pfn"] == PFN + PAGES - 1
    assert vmm.vp().intercept(GFN, WRITE) == ["resume", "already_mapped"]


@statement("P-37", "P-25")
def test_it_is_no_intercept(vmm: RawVmm) -> None:
    vmm.add_memory()
    prefault(vmm)
    counted = vmm.ask("statistics")["intercepts"]
    assert sum(count for reasons in counted.values() for count in reasons.values()) == 0


@statement("P-37", "V-5")
def test_the_repeats_of_a_vp_neither_count_it_nor_begin_again_with_it(vmm: RawVmm) -> None:
    vmm.add_memory()
    vp = vmm.vp()
    answers = []
    for _ in range(18):
        answers.append(vp.intercept(GFN))
        prefault(vmm)
    repeated = [["resume", "already_mapped"]] * 16
    assert answers == [["resume", "mapped"], *repeated, ["fail", "no_progress"]]


@statement("P-37")
def test_pages_without_region_or_backing_are_passed_over(vmm: RawVmm) -> None:
    vmm.map_vma(UADDR + 4 * PAGE, 2)
    vmm.add_region(GFN, PAGES, UADDR)
    assert prefault(vmm, GFN - 3, PAGES + 9) == 2
    assert reached(vmm) == [4, 5]
    assert prefault(vmm, 2**52 - 1, 1) == 0


@statement("P-37")
@needs("notifier")
def test_pages_that_are_being_invalidated_are_passed_over_without_waiting(vmm: RawVmm) -> None:
    """The partition's waits are so long that a server that waits here is found out."""
    vmm.add_memory()
    notifier = vmm.notifier()
    notifier.ask("invalidate_begin", pages(UADDR + 4 * PAGE, 2))
    assert prefault(vmm) == PAGES - 2
    assert reached(vmm) == [n for n in range(PAGES) if n not in {4, 5}]


@statement("P-37", "L-2")
def test_an_answer_that_stops_before_the_end_says_how_far_it_came(vmm: RawVmm) -> None:
    """A page a fault, and more pages than an answer may have faults."""
    vmm.ask("set_policy", mmio_granularity="page")
    vmm.map_vma(UADDR, 5000)
    vmm.add_region(GFN, 5000, UADDR, "mmio")
    done, answers = 0, 0
    while done < 5000:
        reply = vmm.ask("prefault", start_gfn=GFN + done, page_count=5000 - done)
        assert 1 <= reply["mapped_gfns"] == reply["page_count"] <= 4096
        done, answers = done + reply["page_count"], answers + 1
    assert (done, vmm.ask("statistics")["mapped_gfns"]) == (5000, 5000)
    assert answers >= 2


@statement("P-37", "Y-2")
@needs("hypervisor")
def test_the_vmms_own_hypervisor_is_asked_to_map(hosted: RawVmm) -> None:
    link = hosted.link()
    hosted.map_vma(UADDR, PAGES)
    hosted.add_region(GFN, PAGES, UADDR, "mmio")
    hosted.connection.send(request("prefault", WHOLE))
    _, msgid, method, (fields,) = link.receive()
    assert (method, fields["start_gfn"], fields["page_count"]) == ("map_gpa", GFN, PAGES)
    link.send(pack([1, msgid, None, None]))
    assert hosted.connection.answer() == {"page_count": PAGES, "mapped_gfns": PAGES}


@statement("P-37", "Y-4")
@needs("hypervisor")
def test_a_map_that_is_refused_ends_it_before_that_page_and_as_the_first_it_is_eio(hosted: RawVmm) -> None:
    link = hosted.link()
    hosted.map_vma(UADDR, PAGES)
    hosted.add_region(GFN, 4, UADDR, "mmio")
    hosted.add_region(GFN + 4, 4, UADDR + 4 * PAGE, "mmio")
    hosted.connection.send(request("prefault", {"start_gfn": GFN, "page_count": 8}))
    for error in (None, REFUSAL):
        link.send(pack([1, link.receive()[1], error, None]))
    assert hosted.connection.answer() == {"page_count": 4, "mapped_gfns": 4}
    hosted.connection.send(request("prefault", {"start_gfn": GFN + 4, "page_count": 4}))
    link.send(pack([1, link.receive()[1], REFUSAL, None]))
    with pytest.raises(Refused) as refused:
        hosted.connection.answer()
    refusal = refused.value.refusal
    assert (refusal.name, refusal.details.get("start_gfn")) == ("EIO", GFN + 4)


@statement("P-37", "P-4", "P-3")
@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"start_gfn": GFN}, "page_count"),
        ({"page_count": 1}, "start_gfn"),
        ({"start_gfn": GFN, "page_count": 0}, "page_count"),
        ({"start_gfn": 2**52 - 1, "page_count": 2}, "page_count"),
        ({"start_gfn": 2**52, "page_count": 1}, "start_gfn"),
    ],
)
def test_a_range_that_is_none_is_einval(vmm: RawVmm, fields: dict[str, object], field: str) -> None:
    refusal = vmm.connection.refusal("prefault", fields)
    assert (refusal.name, refusal.details.get("field")) == ("EINVAL", field)


@statement("P-37")
@needs("notifier")
def test_what_was_invalidated_since_is_mapped_again(vmm: RawVmm) -> None:
    vmm.add_memory()
    prefault(vmm)
    vmm.notifier().ask("invalidate", WHOLE_MEMORY)
    assert reached(vmm) == []
    assert prefault(vmm) == PAGES
