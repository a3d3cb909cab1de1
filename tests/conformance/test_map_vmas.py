"""`map_vmas`: many VMAs at once, all of them or none."""

from __future__ import annotations

import pytest

from conformance.conftest import Server
from conformance.guests import GFN, PAGE, PAGES, PFN, UADDR, RawVmm, vma
from conformance.statements import needs, statement
from conformance.wire import Refusal

MOST = 128
FREE = UADDR + 2 * PAGES * PAGE
"""Behind all that a case maps before."""


def free(count: int) -> list[dict[str, object]]:
    """So many VMAs of a page, apart from each other."""
    return [vma(FREE + 2 * n * PAGE, 1, PFN + 2 * n) for n in range(count)]


def place(refusal: Refusal) -> tuple[str, object, object]:
    return refusal.name, refusal.details.get("list"), refusal.details.get("index")


@statement("P-36", "F-6")
def test_128_vmas_are_declared_at_once(vmm: RawVmm) -> None:
    vmm.add_region(GFN, 2 * MOST, FREE)
    vp = vmm.vp()
    assert vmm.connection.ask("map_vmas", {"vmas": free(MOST)}) is None
    assert vmm.ask("statistics")["vmas"] == MOST
    for gfn in (GFN, GFN + 2 * MOST - 2):
        assert vp.intercept(gfn) == ["resume", "mapped"]
        assert vmm.ask("translate", gfn=gfn)["pfn"] == PFN + gfn - GFN
    assert vp.intercept(GFN + 1) == ["forward", "unbacked"]


@statement("P-36")
def test_more_than_128_vmas_are_einval(vmm: RawVmm) -> None:
    refusal = vmm.connection.refusal("map_vmas", {"vmas": free(MOST + 1)})
    assert (refusal.name, refusal.details.get("field")) == ("EINVAL", "vmas")
    assert vmm.ask("statistics")["vmas"] == 0


@statement("P-36")
def test_no_vmas_are_declared_too(vmm: RawVmm) -> None:
    assert vmm.connection.ask("map_vmas", {"vmas": []}) is None


@statement("P-36", "P-13", "E-2")
@pytest.mark.parametrize(
    ("elements", "overlapped"),
    [([vma(UADDR + PAGE, 1)], vma(UADDR, PAGES)), ([vma(UADDR - PAGE, 1)] * 2, vma(UADDR - PAGE, 1))],
    ids=["one that is there", "an earlier one"],
)
def test_an_element_that_overlaps_is_eexist_that_says_which_and_none_is_declared(
    vmm: RawVmm, elements: list[dict[str, object]], overlapped: dict[str, object]
) -> None:
    vmm.map_vma(UADDR, PAGES)
    vmas = [*free(3), *elements]
    refusal = vmm.connection.refusal("map_vmas", {"vmas": [*vmas, *free(5)[3:]]})
    assert place(refusal) == ("EEXIST", "vmas", len(vmas) - 1)
    assert {key: refusal.details.get(key) for key in ("start_uaddr", "page_count")} == {
        key: overlapped[key] for key in ("start_uaddr", "page_count")
    }
    assert vmm.ask("statistics")["vmas"] == 1
    vmm.ask("map_vmas", vmas=free(3))


@statement("P-36", "P-4", "P-24", "E-2")
@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        (vma(UADDR, 0), "page_count"),
        (vma(UADDR + 1, 1), "start_uaddr"),
        (vma(UADDR, 1) | {"io": 1}, "io"),
        (vma(UADDR, 1) | {"later": 1}, "later"),
        ({"start_uaddr": UADDR}, None),
        (UADDR, "params"),
    ],
    ids=["empty", "misaligned", "wrong type", "unknown field", "missing fields", "no map"],
)
def test_an_element_that_is_wrong_is_einval_that_says_where_and_none_is_declared(
    vmm: RawVmm, wrong: object, field: str | None
) -> None:
    refusal = vmm.connection.refusal("map_vmas", {"vmas": [*free(2), wrong]})
    assert place(refusal) == ("EINVAL", "vmas", 2)
    assert refusal.details.get("field") in ({field} if field else set(vma(UADDR, 1)))
    assert vmm.ask("statistics")["vmas"] == 0


@statement("P-36", "P-15", "L-1")
def test_vmas_of_which_one_is_too_many_are_enospc_and_none_is_declared(
    vmm: RawVmm, limits: dict[str, int]
) -> None:
    limit = limits["vmas_per_partition"]
    if limit > 5000:
        pytest.skip(f"limits.vmas_per_partition is {limit}: set it lower")
    declared = limit - limit % MOST
    for n in range(0, declared, MOST):
        vmm.ask("map_vmas", vmas=free(declared)[n : n + MOST])
    refusal = vmm.connection.refusal("map_vmas", {"vmas": free(limit + 1)[declared:]})
    assert (refusal.name, refusal.details.get("limit")) == ("ENOSPC", "vmas_per_partition")
    assert vmm.ask("statistics")["vmas"] == declared


@statement("P-36", "P-24")
@needs("process")
def test_many_vmas_are_not_declared_in_process_mode(server: Server) -> None:
    with RawVmm(server.socket, address_space="process") as vmm:
        assert vmm.connection.refusal("map_vmas", {"vmas": free(2)}).name == "EINVAL"
