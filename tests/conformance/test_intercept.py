"""`intercept`: what is answered to a VP, and to which messages."""

from __future__ import annotations

import struct

import pytest

from conformance.conftest import Server
from conformance.guests import GFN, PAGES, UADDR, WHOLE_MEMORY, RawVmm
from conformance.statements import needs, statement
from conformance.wire import (
    GPA_INTERCEPT,
    READ,
    UNACCEPTED_GPA,
    UNMAPPED_GPA,
    WRITE,
    intercept_message,
    request,
)

OUTCOMES = {"resume", "forward", "retry", "fail"}


@statement("V-1", "F-5", "E-2")
@pytest.mark.parametrize(
    "params", [None, bytes(255), bytes(257), "x" * 256, {}, {"message": bytes(256)}], ids=repr
)
def test_other_params_are_einval_and_the_connection_continues(vmm: RawVmm, params: object) -> None:
    vp = vmm.vp()
    refusal = vp.refusal("intercept", params)
    assert (refusal.name, refusal.details.get("field")) == ("EINVAL", "params")
    assert vp.intercept(0) == ["forward", "no_region"]


@statement("V-1")
@pytest.mark.parametrize("method", ["statistics", "invalidate", "hello", "kick"])
def test_another_method_is_enosys_and_the_connection_continues(vmm: RawVmm, method: str) -> None:
    vp = vmm.vp()
    assert vp.refusal(method).name == "ENOSYS"
    assert vp.intercept(0) == ["forward", "no_region"]


@statement("V-2", "V-3")
def test_every_answer_is_two_strings_of_the_table(vmm: RawVmm) -> None:
    vmm.add_memory()
    vp = vmm.vp()
    answers = [vp.intercept(gfn, access) for gfn in (GFN, GFN, 0) for access in range(3)]
    assert all(len(answer) == 2 and {type(word) for word in answer} == {str} for answer in answers)
    assert {outcome for outcome, _ in answers} <= OUTCOMES


@statement("V-3")
def test_mapped_and_already_mapped_are_distinguished(vmm: RawVmm) -> None:
    vmm.add_memory()
    first, second = vmm.vp(0), vmm.vp(1)
    answers = [first.intercept(GFN), second.intercept(GFN), second.intercept(GFN + PAGES - 1)]
    assert answers == [["resume", "mapped"], ["resume", "already_mapped"], ["resume", "already_mapped"]]


@statement("V-3")
def test_no_region_and_unbacked_are_distinguished(vmm: RawVmm) -> None:
    vmm.map_vma(UADDR, PAGES - 1)
    vmm.add_region(GFN, PAGES, UADDR)
    vp = vmm.vp()
    assert vp.intercept(GFN + PAGES) == ["forward", "no_region"]
    assert vp.intercept(GFN + PAGES - 1) == ["forward", "unbacked"]


@statement("V-2", "N-2")
@needs("notifier")
def test_a_wait_ends_in_bounded_time_with_retry(server: Server) -> None:
    with RawVmm(server.socket, invalidate_timeout_ms=100) as vmm:
        vmm.add_memory()
        vmm.notifier().ask("invalidate_begin", WHOLE_MEMORY)
        assert vmm.vp().intercept(GFN) == ["retry", "invalidating"]


@statement("V-4")
@needs("notifier")
def test_nothing_is_forwarded_because_its_memory_is_busy(server: Server) -> None:
    """A write that is emulated because the server was busy is lost."""
    with RawVmm(server.socket, invalidate_timeout_ms=50) as vmm:
        vmm.add_memory()
        vmm.notifier().ask("invalidate_begin", WHOLE_MEMORY)
        assert vmm.vp().intercept(GFN, WRITE)[0] == "retry"


@statement("V-5")
def test_the_17th_consecutive_already_mapped_is_no_progress_and_restarts_the_count(vmm: RawVmm) -> None:
    vmm.add_memory()
    vp = vmm.vp()
    vp.intercept(GFN)
    for _ in range(2):
        assert [vp.intercept(GFN) for _ in range(16)] == [["resume", "already_mapped"]] * 16
        assert vp.intercept(GFN) == ["fail", "no_progress"]


@statement("V-5")
def test_any_other_answer_starts_the_count_again(vmm: RawVmm) -> None:
    vmm.add_memory()
    vp = vmm.vp()
    vp.intercept(GFN)
    for _ in range(3):
        assert [vp.intercept(GFN) for _ in range(16)] == [["resume", "already_mapped"]] * 16
        assert vp.intercept(0) == ["forward", "no_region"]


@statement("V-6")
def test_the_vp_index_of_the_message_is_not_looked_at(vmm: RawVmm) -> None:
    vmm.add_memory()
    message = bytearray(intercept_message(GFN, READ))
    struct.pack_into("<I", message, 16, 77)
    assert vmm.vp(1).ask("intercept", bytes(message)) == ["resume", "mapped"]


@statement("V-7")
@needs("notifier")
def test_a_vp_that_closes_while_it_waits_is_gone_and_its_memory_stays_consistent(vmm: RawVmm) -> None:
    vmm.add_memory()
    notifier, vp = vmm.notifier(), vmm.vp(1)
    notifier.ask("invalidate_begin", WHOLE_MEMORY)
    vp.send(request("intercept", intercept_message(GFN, READ)))
    vp.half_close()
    assert vp.receive_all() == []
    notifier.ask("invalidate_end", WHOLE_MEMORY)
    assert vmm.vp(1).intercept(GFN)[0] == "resume"


@statement("P-2")
@needs("notifier")
def test_an_intercept_in_flight_is_answered_when_its_vmm_leaves(vmm: RawVmm) -> None:
    vmm.add_memory()
    vmm.notifier().ask("invalidate_begin", WHOLE_MEMORY)
    vp = vmm.vp()
    vp.send(request("intercept", intercept_message(GFN, READ)))
    vmm.ask("statistics")
    vmm.connection.close()
    assert vp.answer()[0] == "retry"
    assert vp.receive_all() == []


@statement("M-1", "M-4")
def test_a_message_that_is_zero_but_for_three_fields_is_served(vmm: RawVmm) -> None:
    vmm.add_memory()
    message = bytearray(256)
    struct.pack_into("<I", message, 0, UNMAPPED_GPA)
    struct.pack_into("<Q", message, 72, GFN << 12)
    assert vmm.vp().ask("intercept", bytes(message)) == ["resume", "mapped"]


@statement("M-1")
def test_other_fields_of_the_message_are_ignored(vmm: RawVmm) -> None:
    vmm.add_memory()
    message = bytearray(b"\xff" * 256)
    struct.pack_into("<I", message, 0, UNMAPPED_GPA)
    message[21] = READ
    struct.pack_into("<Q", message, 72, GFN << 12)
    assert vmm.vp().ask("intercept", bytes(message)) == ["resume", "mapped"]


@statement("M-2")
@pytest.mark.parametrize("message_type", [UNMAPPED_GPA, GPA_INTERCEPT])
@pytest.mark.parametrize("kind", ["mmio", "movable"])
def test_both_types_are_served_alike(vmm: RawVmm, message_type: int, kind: str) -> None:
    vmm.map_vma(UADDR, PAGES)
    vmm.add_region(GFN, PAGES, UADDR, kind)
    message = intercept_message(GFN, READ, message_type)
    assert vmm.vp().ask("intercept", message) == ["resume", "mapped"]


@statement("M-3")
@pytest.mark.parametrize("message_type", [0, UNACCEPTED_GPA, 0x80010000, 0xFFFFFFFF])
def test_another_type_is_not_memory(vmm: RawVmm, message_type: int) -> None:
    vmm.add_memory()
    message = intercept_message(GFN, READ, message_type)
    assert vmm.vp().ask("intercept", message) == ["forward", "not_memory"]


@statement("M-3")
@pytest.mark.parametrize("access", [3, 4, 255])
def test_another_access_type_is_not_memory(vmm: RawVmm, access: int) -> None:
    vmm.add_memory()
    assert vmm.vp().intercept(GFN, access) == ["forward", "not_memory"]


@statement("M-5")
@pytest.mark.parametrize(
    ("gpa", "answer"), [((GFN << 12) + 4095, "mapped"), (2**64 - 1, "no_region"), (0, "no_region")]
)
def test_every_gpa_is_valid_and_rounded_down_to_its_page(vmm: RawVmm, gpa: int, answer: str) -> None:
    vmm.map_vma(UADDR, 1)
    vmm.add_region(GFN, 1, UADDR)
    message = bytearray(intercept_message(0, READ))
    struct.pack_into("<Q", message, 72, gpa)
    assert vmm.vp().ask("intercept", bytes(message))[1] == answer


@statement("L-1")
def test_one_mapping_too_many_fails_its_intercept_and_no_other(vmm: RawVmm, limits: dict[str, int]) -> None:
    limit = limits["mappings_per_partition"]
    if limit > 2000:
        pytest.skip(f"limits.mappings_per_partition is {limit}: set it lower")
    vmm.map_vma(UADDR, 2 * limit + 1)
    vmm.add_region(0, 2 * limit + 1, UADDR, "mmio")
    vmm.ask("set_policy", mmio_granularity="page")
    vp = vmm.vp()
    for gfn in range(0, 2 * limit, 2):
        assert vp.intercept(gfn) == ["resume", "mapped"]
    assert vp.intercept(2 * limit) == ["fail", "hypervisor_error"]
    assert vp.intercept(0) == ["resume", "already_mapped"]
