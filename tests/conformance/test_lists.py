"""`list_regions`, `list_vmas` and `list_mappings`, of a VMM and of an operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from conformance.guests import GFN, MODEL, PAGE, PAGES, PFN, UADDR, RawVmm, region, vma
from conformance.statements import needs, statement
from conformance.wire import RawConnection

KEYS = {"regions": "start_gfn", "vmas": "start_uaddr", "mappings": "start_gfn"}
"""What is listed, and the field that `after` compares."""
PAGE_OF_LIST = 256
each_list = pytest.mark.parametrize("what", KEYS)


def many(vmm: RawVmm, what: str) -> list[int]:
    """A page of them and three more, each of one page, of which none continues another: their first pages."""
    starts = range(0, 2 * (PAGE_OF_LIST + 3), 2)
    if what == "vmas":
        for n in starts:
            vmm.map_vma(n * PAGE, 1)
        return list(starts)
    vmm.map_vma(0, starts[-1] + 1)
    vp = vmm.vp()
    for n in starts:
        vmm.add_region(n, 1, n * PAGE, "mmio")
        vp.intercept(n)
    return list(starts)


def take(vmm: RawVmm, what: str, start: int) -> None:
    if what == "vmas":
        vmm.ask("unmap_vma", start_uaddr=start * PAGE, page_count=1)
    else:
        vmm.ask("remove_region", start_gfn=start, page_count=1, start_uaddr=start * PAGE)


def key_of(what: str, page: int) -> int:
    return page * PAGE if what == "vmas" else page


@statement("P-38", "L-2")
@each_list
def test_all_are_listed_in_order_by_asking_again_behind_the_last(vmm: RawVmm, what: str) -> None:
    starts = many(vmm, what)
    first = vmm.ask(f"list_{what}")
    second = vmm.ask(f"list_{what}", after=first[what][-1][KEYS[what]])
    assert (len(first[what]), first["more"], second["more"]) == (PAGE_OF_LIST, True, False)
    seen = [each[KEYS[what]] for each in (*first[what], *second[what])]
    assert seen == [key_of(what, start) for start in starts]


@statement("P-38")
@each_list
def test_what_was_listed_may_go_between_two_pages(vmm: RawVmm, what: str) -> None:
    starts = many(vmm, what)
    last = vmm.ask(f"list_{what}")[what][-1][KEYS[what]]
    for start in starts[PAGE_OF_LIST - 2 : PAGE_OF_LIST]:
        take(vmm, what, start)
    rest = vmm.ask(f"list_{what}", after=last)
    assert [each[KEYS[what]] for each in rest[what]] == [key_of(what, n) for n in starts[PAGE_OF_LIST:]]


@statement("P-38", "T-5")
@each_list
@pytest.mark.parametrize("fields", [{}, {"after": None}, {"after": 2**64 - 1}])
def test_an_empty_list_is_the_last_page(vmm: RawVmm, what: str, fields: dict[str, object]) -> None:
    assert vmm.ask(f"list_{what}", **fields) == {what: [], "more": False}


@statement("P-38")
def test_elements_say_what_was_declared_added_and_mapped(vmm: RawVmm) -> None:
    vmm.ask("map_vma", **vma(UADDR, PAGES) | {"writable": False, "io": True})
    vmm.ask("add_region", **region(GFN, PAGES, UADDR - 4 * PAGE, kind="mmio", executable=True))
    vmm.vp().intercept(GFN + 7)
    assert vmm.ask("list_vmas")["vmas"] == [vma(UADDR, PAGES) | {"writable": False, "io": True}]
    assert vmm.ask("list_regions")["regions"] == [
        region(GFN, PAGES, UADDR - 4 * PAGE, kind="mmio", executable=True)
        | {"state": "live", "mapped_gfns": PAGES - 4}
    ]
    assert vmm.ask("list_mappings")["mappings"] == [
        {
            "start_gfn": GFN + 4,
            "page_count": PAGES - 4,
            "start_uaddr": UADDR,
            "frame": ["host", PFN],
            "access": 5,
        }
    ]


@statement("P-38")
def test_known_inaccessible_pages_are_no_mapping(vmm: RawVmm) -> None:
    vmm.add_memory()
    assert vmm.ask("list_mappings") == {"mappings": [], "more": False}


@statement("P-38", "P-24")
@needs("process")
def test_vmas_that_were_not_declared_are_einval(connect: Callable[[], RawConnection]) -> None:
    vmm = connect()
    vmm.say_hello("vmm")
    vmm.ask("create_partition", MODEL | {"address_space": "process"})
    assert vmm.refusal("list_vmas").name == "EINVAL"
    assert vmm.ask("list_mappings") == {"mappings": [], "more": False}


@statement("P-38", "E-2")
@each_list
@pytest.mark.parametrize("after", [-1, "0", True])
def test_another_after_is_einval(vmm: RawVmm, what: str, after: object) -> None:
    refusal = vmm.connection.refusal(f"list_{what}", {"after": after})
    assert (refusal.name, refusal.details.get("field")) == ("EINVAL", "after")


# ------------------------------------------------ an operator


@statement("O-15")
@each_list
def test_an_operator_is_told_what_the_vmm_is_told(operator: RawConnection, vmm: RawVmm, what: str) -> None:
    many(vmm, what)
    seen: list[dict[str, Any]] = []
    for after in (None, key_of(what, 300)):
        mine = vmm.ask(f"list_{what}", after=after)
        theirs = operator.ask(f"list_{what}", {"partition_id": vmm.partition_id, "after": after})
        assert theirs == mine
        seen.append(theirs)
    assert [page["more"] for page in seen] == [True, False]


@statement("O-15")
@each_list
def test_no_such_partition_is_enoent(operator: RawConnection, what: str) -> None:
    assert operator.refusal(f"list_{what}", {"partition_id": 2**63}).name == "ENOENT"


@statement("O-15", "P-24")
@needs("process")
def test_an_operator_asks_in_vain_for_vmas_that_were_not_declared(
    operator: RawConnection, connect: Callable[[], RawConnection]
) -> None:
    vmm = connect()
    vmm.say_hello("vmm")
    created = vmm.ask("create_partition", MODEL | {"address_space": "process"})
    assert operator.refusal("list_vmas", {"partition_id": created["partition_id"]}).name == "EINVAL"
