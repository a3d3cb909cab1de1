"""Well-formed but wrong requests: a typed error names the cause, and the connection stays open."""

from __future__ import annotations

import pytest

from fakes.raw_client import READ, Connect, Refusal, intercept_message, pack
from fakes.raw_vmm import GFN, MODEL, PAGE, PAGES, UADDR, RawVmm, region, vma

INVALIDATION = {"start_uaddr": UADDR, "length": PAGE}


def says(refusal: Refusal, errno_name: str, field: object) -> bool:
    """Whether the error has this name, and names the field to programs and to people."""
    return (refusal.name, refusal.details.get("field")) == (errno_name, field) and str(
        field
    ) in refusal.message


@pytest.mark.parametrize(
    ("method", "fields", "field"),
    [
        ("map_vma", vma(UADDR, 1) | {"start_pfn": "4096"}, "start_pfn"),
        ("map_vma", vma(UADDR, 1) | {"page_count": 1.0}, "page_count"),
        ("map_vma", vma(UADDR, 1) | {"page_count": True}, "page_count"),
        ("map_vma", vma(UADDR, 1) | {"page_count": None}, "page_count"),
        ("map_vma", vma(UADDR, 1) | {"start_uaddr": -4096}, "start_uaddr"),
        ("map_vma", vma(UADDR, 1) | {"io": 0}, "io"),
        ("map_vma", vma(UADDR, 1) | {"cached": True}, "cached"),
        ("map_vma", {}, "start_uaddr"),
        ("add_region", region(0, 1, 0, kind="device"), "kind"),
        ("add_region", region(0, 1, 0, kind=b"mmio"), "kind"),
        ("add_region", region(0, 1, 0, writable="yes"), "writable"),
        ("add_region", region(0, 1, 0, executable=[]), "executable"),
        ("add_region", region(0, 1, 0) | {"": 0}, ""),
        ("translate", {"gfn": {}}, "gfn"),
        ("translate", {"gfn": 0, "gpa": 0}, "gpa"),
        ("translate", {1: 2}, "params"),
        ("translate", 7, "params"),
        ("translate", None, "gfn"),
        ("kick", {"vp_index": "some"}, "vp_index"),
        ("kick", {"vp_index": 1 << 32}, "vp_index"),
        ("set_policy", {"mmio_granularity": "huge"}, "mmio_granularity"),
        ("statistics", {"verbose": True}, "verbose"),
    ],
)
def test_a_wrong_field_is_einval_that_names_it(vmm: RawVmm, method: str, fields: object, field: str) -> None:
    assert says(vmm.connection.refusal(method, fields), "EINVAL", field)
    assert vmm.ask("statistics")["vmas"] == 0


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"hypervisor": "software"}, "address_space"),
        (MODEL | {"hypervisor": "kvm"}, "hypervisor"),
        (MODEL | {"architecture": "riscv"}, "architecture"),
        (MODEL | {"deposit_pages": 1 << 32}, "deposit_pages"),
        (MODEL | {"invalidate_timeout_ms": -1}, "invalidate_timeout_ms"),
        (MODEL | {"token": bytes(16)}, "token"),
    ],
)
def test_a_partition_of_wrong_fields_is_einval_and_not_created(
    connect: Connect, fields: dict[str, object], field: str
) -> None:
    connection = connect()
    connection.say_hello("vmm")
    assert says(connection.refusal("create_partition", fields), "EINVAL", field)
    assert connection.refusal("statistics").name == "ENOENT"


def test_params_of_two_elements_are_einval(vmm: RawVmm) -> None:
    vmm.connection.send(pack([0, 1, "statistics", [{}, {}]]))
    _, _, error, _ = vmm.connection.receive()
    assert says(Refusal(*error), "EINVAL", "params")


def test_a_method_before_the_partition_is_enoent(connect: Connect) -> None:
    connection = connect()
    connection.say_hello("vmm")
    assert connection.refusal("add_region", region(0, 1, 0)).name == "ENOENT"


def test_a_second_partition_is_eexist(vmm: RawVmm) -> None:
    assert vmm.connection.refusal("create_partition", MODEL).name == "EEXIST"


@pytest.mark.parametrize(
    "method", ["hello", "intercept", "invalidate", "list_partitions", "map_gpa", "", "\0", "x" * 60_000]
)
def test_a_method_not_for_vmms_is_enosys_that_lists_those_for_vmms(vmm: RawVmm, method: str) -> None:
    refusal = vmm.connection.refusal(method)
    assert (refusal.name, "add_region" in refusal.details["methods"]) == ("ENOSYS", True)
    assert len(refusal.message) < 200


@pytest.mark.parametrize("method", ["hello", "statistics", "create_partition", "intercept", "unmap_vma"])
def test_a_method_that_is_not_a_notifiers_is_enosys(vmm: RawVmm, method: str) -> None:
    assert vmm.notifier().refusal(method).name == "ENOSYS"


@pytest.mark.parametrize("method", ["hello", "statistics", "invalidate", "kick"])
def test_a_method_that_is_not_a_vps_is_enosys(vmm: RawVmm, method: str) -> None:
    assert vmm.vp().refusal(method).name == "ENOSYS"


@pytest.mark.parametrize("message", [b"", bytes(255), bytes(257), "x" * 256, {}, None, 256], ids=repr)
def test_an_intercept_that_is_not_256_bytes_is_einval(vmm: RawVmm, message: object) -> None:
    vp = vmm.vp()
    assert says(vp.refusal("intercept", message), "EINVAL", "params")
    assert vp.intercept(GFN) == ["forward", "no_region"]


@pytest.mark.parametrize("message_type", [0, 0x80000003, 0x80010000, 0xFFFFFFFF])
def test_an_intercept_of_another_type_is_not_memory(vmm: RawVmm, message_type: int) -> None:
    message = intercept_message(GFN, READ, message_type)
    assert vmm.vp().ask("intercept", message) == ["forward", "not_memory"]


@pytest.mark.parametrize("access_type", [3, 255])
def test_an_access_type_above_two_is_not_memory(vmm: RawVmm, access_type: int) -> None:
    vmm.add_memory()
    assert vmm.vp().intercept(GFN, access_type) == ["forward", "not_memory"]


@pytest.mark.parametrize("filler", [b"\x00", b"\xff", b"\x80"])
def test_256_bytes_of_anything_are_answered_forward(vmm: RawVmm, filler: bytes) -> None:
    vmm.add_memory()
    outcome, _ = vmm.vp().ask("intercept", filler * 256)
    assert outcome == "forward"


def test_a_kick_of_a_vp_that_is_not_there_is_enoent(vmm: RawVmm) -> None:
    refusal = vmm.connection.refusal("kick", {"vp_index": 9})
    assert (refusal.name, refusal.details) == ("ENOENT", {"vp_index": 9})


def test_an_end_without_its_begin_is_enoent(vmm: RawVmm) -> None:
    other, notifier = vmm.notifier(), vmm.notifier()
    other.ask("invalidate_begin", INVALIDATION)
    assert notifier.refusal("invalidate_end", INVALIDATION).name == "ENOENT"


def test_a_region_that_is_not_the_one_there_is_einval_that_names_the_difference(vmm: RawVmm) -> None:
    vmm.add_memory()
    there = {"start_gfn": GFN, "page_count": PAGES, "start_uaddr": UADDR}
    refusal = vmm.connection.refusal("remove_region", there | {"page_count": PAGES - 1})
    assert says(refusal, "EINVAL", "page_count")
    assert vmm.connection.refusal("remove_region", there | {"start_gfn": GFN + 1}).name == "ENOENT"
    assert vmm.connection.ask("remove_region", there) is None


def test_an_overlap_is_eexist_that_says_with_what(vmm: RawVmm) -> None:
    vmm.add_memory()
    region_refusal = vmm.connection.refusal("add_region", region(GFN + PAGES - 1, 2, UADDR))
    vma_refusal = vmm.connection.refusal("map_vma", vma(UADDR - PAGE, 2))
    assert (region_refusal.name, region_refusal.details) == (
        "EEXIST",
        {"start_gfn": GFN, "page_count": PAGES},
    )
    assert (vma_refusal.name, vma_refusal.details) == ("EEXIST", {"start_uaddr": UADDR, "page_count": PAGES})
