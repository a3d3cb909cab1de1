"""The software SLAT against a dict of pages."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fakes.drawn import SPACE, ranges
from intercept_protocol.addresses import GfnRange, PageRange
from intercept_protocol.outcomes import Access
from interceptd.hypervisor.slat import SoftwareSlat
from interceptd.pages.mapping import HOST_BACKING, Frame, Mapping

Entry = tuple[int | None, Access]
edits = st.lists(st.tuples(ranges(), st.sampled_from(["map", "no access", "clear"])))


def mapping(pages: PageRange, pfn: int) -> Mapping:
    return Mapping(pages.start, pages.end, Frame(HOST_BACKING, pfn), 0, Access.READ)


def edited(drawn: list[tuple[PageRange, str]]) -> tuple[SoftwareSlat, dict[int, Entry]]:
    slat = SoftwareSlat()
    oracle: dict[int, Entry] = {}
    for number, (pages, edit) in enumerate(drawn):
        each = range(pages.start, pages.end)
        match edit:
            case "map":
                slat.replace(mapping(pages, 1000 * number + pages.start))
                oracle |= {gfn: (1000 * number + gfn, Access.READ) for gfn in each}
            case "no access":
                slat.replace(Mapping(pages.start, pages.end, None, 0, Access.NONE))
                oracle |= dict.fromkeys(each, (None, Access.NONE))
            case _:
                slat.clear(GfnRange(start=pages.start, end=pages.end))
                oracle = {gfn: entry for gfn, entry in oracle.items() if gfn not in each}
    return slat, oracle


def read(slat: SoftwareSlat) -> dict[int, Entry]:
    entries = {gfn: slat.entry(gfn) for gfn in range(SPACE)}
    return {
        gfn: (None if (frame := entry.frame_at(gfn)) is None else frame.page, entry.access)
        for gfn, entry in entries.items()
        if entry is not None
    }


@given(edits)
def test_slat_after_any_edits_reads_like_a_dict_of_pages(drawn: list[tuple[PageRange, str]]) -> None:
    slat, oracle = edited(drawn)
    assert read(slat) == oracle


@given(edits)
def test_slat_counts_its_gfns_and_those_without_access(drawn: list[tuple[PageRange, str]]) -> None:
    slat, oracle = edited(drawn)
    assert slat.gfn_count == len(oracle)
    assert slat.no_access_gfns == sum(access is Access.NONE for _, access in oracle.values())


@given(edits, ranges())
def test_slat_new_gfns_are_those_without_an_entry(
    drawn: list[tuple[PageRange, str]], asked: PageRange
) -> None:
    slat, oracle = edited(drawn)
    new = {
        gfn
        for start, end in slat.new_gfns(GfnRange(start=asked.start, end=asked.end))
        for gfn in range(start, end)
    }
    assert new == set(range(asked.start, asked.end)) - oracle.keys()


def test_slat_holds_64_gib_as_one_extent() -> None:
    slat = SoftwareSlat()
    slat.replace(mapping(PageRange(start=0, end=1 << 24), 0))
    assert (len(slat), slat.gfn_count) == (1, 1 << 24)
