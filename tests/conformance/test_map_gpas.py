"""`map_gpas`: the server asks a VMM's hypervisor that takes lists to let the guest reach memory."""

from __future__ import annotations

import pytest

from conformance.guests import GFN, PAGE, PFN, UADDR, RawVmm
from conformance.hosts import REFUSAL, SPREAD, ListHost, refusal_after
from conformance.statements import needs, statement

SHORT_MS = 5_000
"""The longest `hypervisor_timeout_ms` to wait for."""


@pytest.fixture
def host(hosted: RawVmm) -> ListHost:
    return ListHost(hosted, lists=True)


@statement("Y-13")
@needs("notifier")
def test_its_pieces_have_the_fields_of_a_map_gpa_and_one_answer_is_enough(host: ListHost) -> None:
    host.add_pinned()
    assert host.asked_for_all("map_gpa") == [
        {
            "start_gfn": GFN + page,
            "page_count": 1,
            "start_uaddr": UADDR + page * PAGE,
            "start_pfn": PFN + 2 * page,
            "access": 3,
        }
        for page in range(SPREAD)
    ]
    assert host.vmm.connection.answer() == {"kind": "pinned"}


@statement("H-17")
@needs("notifier")
@pytest.mark.parametrize("hello", [{}, {"lists": False}, {"lists": None}], ids=str)
def test_a_vmm_that_does_not_take_lists_is_asked_for_each_piece(
    hosted: RawVmm, hello: dict[str, object]
) -> None:
    host = ListHost(hosted, **hello)
    host.add_pinned()
    for page in range(SPREAD):
        asked = host.asked()
        assert (asked.method, asked.starts) == ("map_gpa", [GFN + page])
        host.answer(asked)
    assert host.vmm.connection.answer() == {"kind": "pinned"}


@statement("Y-14", "Y-4")
@needs("notifier")
@pytest.mark.parametrize("done", range(SPREAD))
def test_what_was_done_of_a_refused_list_is_taken_back_and_nothing_else(host: ListHost, done: int) -> None:
    host.add_pinned()
    maps = host.asked_for_a_list("map_gpa")
    host.answer(maps, refusal_after(done))
    taken: list[int] = []
    while len(taken) < done:
        asked = host.asked()
        assert asked.method == "unmap_gpa"
        for piece in asked.pieces:
            taken += range(piece["start_gfn"], piece["start_gfn"] + piece["page_count"])
        host.answer(asked)
    _, _, error, _ = host.vmm.connection.receive()
    assert (taken, error[1]) == (maps.starts[:done], "EFAULT")
    assert host.vmm.ask("statistics")["regions"] == 0


@statement("Y-14", "Y-10")
@needs("notifier")
@pytest.mark.parametrize(
    "error", [REFUSAL, "no slot", *(refusal_after(done) for done in (-1, SPREAD, "1", True, 1.0))], ids=str
)
def test_a_refusal_that_does_not_say_what_was_done_has_all_unmapped(host: ListHost, error: object) -> None:
    host.add_pinned()
    maps = host.asked_for_a_list("map_gpa")
    host.answer(maps, error)
    assert [piece["start_gfn"] for piece in host.asked_for_all("unmap_gpa")] == maps.starts
    assert host.vmm.connection.receive()[2] is not None
    assert host.vmm.ask("statistics")["regions"] == 0


@statement("Y-5", "Y-13")
@needs("notifier")
def test_a_list_that_is_late_is_undone_for_its_whole_range(host: ListHost, limits: dict[str, int]) -> None:
    if limits["hypervisor_timeout_ms"] > SHORT_MS:
        pytest.skip(f"limits.hypervisor_timeout_ms is {limits['hypervisor_timeout_ms']}: set it lower")
    host.add_pinned()
    late = host.asked_for_a_list("map_gpa")
    undoing = host.asked()
    host.answer(late)
    host.answer(undoing)
    assert (undoing.method, undoing.starts) == ("unmap_gpa", late.starts)
    assert host.vmm.connection.receive()[2][1] == "EFAULT"
