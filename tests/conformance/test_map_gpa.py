"""`map_gpa`: the server asks the VMM's hypervisor to let the guest reach memory."""

from __future__ import annotations

from typing import Any

import pytest

from conformance.guests import GFN, PAGES, PFN, UADDR, RawVmm, region
from conformance.hosts import REFUSAL, Host
from conformance.statements import needs, statement
from conformance.wire import READ, intercept_message, pack, request

MESSAGE_BYTES = 65536
SHORT_MS = 5_000
"""The longest `hypervisor_timeout_ms` to wait for."""


def refusal_of_a_region(hosted: RawVmm, answered: list[object]) -> list[Any]:
    """The refusal of `add_region` when the VMM has given this answer."""
    link = hosted.link()
    hosted.connection.send(request("add_region", region(GFN, PAGES, UADDR)))
    _, msgid, _, _ = link.receive()
    link.send(pack([1, msgid, *answered]))
    error: list[Any] = hosted.connection.receive()[2]
    return error


@pytest.fixture
def host(hosted: RawVmm) -> Host:
    return Host(hosted)


@statement("Y-2")
@needs("notifier")
def test_it_names_gfns_uaddrs_pfns_and_rights_and_the_fault_waits_for_its_answer(host: Host) -> None:
    host.fault()
    msgid, method, fields = host.asked()
    assert not host.vp.is_readable()
    host.answer(msgid)
    assert (method, host.vp.answer()) == ("map_gpa", ["resume", "mapped"])
    assert fields == {
        "start_gfn": GFN,
        "page_count": PAGES,
        "start_uaddr": UADDR,
        "start_pfn": PFN,
        "access": 3,
    }


@statement("Y-2")
def test_movable_memory_is_made_known_as_inaccessible(hosted: RawVmm) -> None:
    link = hosted.link()
    hosted.connection.send(request("add_region", region(GFN, PAGES, UADDR)))
    _, msgid, method, (fields,) = link.receive()
    link.send(pack([1, msgid, None, None]))
    assert (method, fields["access"], fields["page_count"]) == ("map_gpa", 0, PAGES)
    assert hosted.connection.answer() == {"kind": "movable"}


@statement("Y-4")
@needs("notifier")
def test_a_refusal_fails_the_intercept_and_leaves_the_partition(host: Host) -> None:
    host.fault()
    msgid, _, _ = host.asked()
    host.answer(msgid, REFUSAL)
    assert host.vp.answer() == ["fail", "hypervisor_error"]
    host.map()


@statement("P-10", "Y-4")
def test_a_refusal_during_an_add_is_the_vmms_error_and_adds_nothing(hosted: RawVmm) -> None:
    link = hosted.link()
    hosted.connection.send(request("add_region", region(GFN, PAGES, UADDR)))
    _, msgid, _, _ = link.receive()
    link.send(pack([1, msgid, REFUSAL, None]))
    _, _, error, _ = hosted.connection.receive()
    assert (error[1], hosted.ask("statistics")["regions"]) == ("ENOMEM", 0)


@statement("Y-10", "E-5")
@pytest.mark.parametrize(
    "error",
    ["no slot is free", False, 0, b"", [], {}, [12], [12, "ENOMEM", "m"], [12, "ENOMEM", "m", {}, 1],
     [-12, "ENOMEM", "m", {}], [0, "OK", "m", {}], [4096, "E4096", "m", {}], [12.0, "ENOMEM", "m", {}],
     [True, "EPERM", "m", {}], [12, None, "m", {}], [12, "ENOMEM", b"m", {}], [12, "ENOMEM", "m", []]],
    ids=repr,
)  # fmt: skip
def test_an_error_that_is_not_of_the_form_is_a_refusal_too_and_counts_as_eproto(
    hosted: RawVmm, error: object
) -> None:
    assert refusal_of_a_region(hosted, [error, None])[:2] == [71, "EPROTO"]
    assert hosted.ask("statistics")["regions"] == 0


@statement("Y-10", "E-5")
def test_an_error_is_passed_on_by_its_number_and_not_by_its_name_or_details(hosted: RawVmm) -> None:
    error = refusal_of_a_region(hosted, [[28, "ENOMEM", "no slot", {"limit": "slots", 5: [1.5, {}]}], None])
    assert error[:2] == [28, "ENOSPC"]
    assert "slots" not in error[3].values()


@statement("Y-10", "L-2")
def test_a_refusal_of_64_kib_is_passed_on_in_a_message_that_may_be_read(hosted: RawVmm) -> None:
    spare = MESSAGE_BYTES - len(pack([1, 1, [12, "ENOMEM", "x" * 60_000, {}], None])) + 60_000
    error = refusal_of_a_region(hosted, [[12, "ENOMEM", "x" * spare, {}], None])
    assert error[1] == "ENOMEM"
    assert len(pack([1, 1, error, None])) <= MESSAGE_BYTES


@statement("Y-11")
@needs("notifier")
@pytest.mark.parametrize("result", [True, "ok", 0, [], {"mapped": 16}], ids=repr)
def test_a_nil_error_means_mapped_with_any_result(host: Host, result: object) -> None:
    host.fault()
    msgid, _, _ = host.asked()
    host.link.send(pack([1, msgid, None, result]))
    assert host.vp.answer() == ["resume", "mapped"]


@statement("Y-11")
def test_a_result_beside_an_error_is_a_refusal(hosted: RawVmm) -> None:
    assert refusal_of_a_region(hosted, [REFUSAL, True])[1] == "ENOMEM"


@statement("T-17")
@needs("notifier")
def test_requests_of_the_server_have_a_msgid_other_than_0(host: Host) -> None:
    host.fault()
    msgid, _, _ = host.asked()
    assert msgid > 0


@statement("Y-5")
@needs("notifier")
def test_the_server_has_one_request_in_flight(host: Host) -> None:
    second = host.vmm.vp(1)
    host.fault()
    msgid, _, _ = host.asked()
    second.send(request("intercept", intercept_message(GFN + 1, READ)))
    for _ in range(3):
        host.vmm.ask("statistics")
    assert not host.link.is_readable()
    host.answer(msgid)
    assert {host.vp.answer()[0], second.answer()[0]} == {"resume"}


@statement("Y-5")
@needs("notifier")
def test_a_map_that_is_late_is_undone_before_the_intercept_fails(host: Host, limits: dict[str, int]) -> None:
    if limits["hypervisor_timeout_ms"] > SHORT_MS:
        pytest.skip(f"limits.hypervisor_timeout_ms is {limits['hypervisor_timeout_ms']}: set it lower")
    host.fault()
    late, _, mapped = host.asked()
    undoing, method, unmapped = host.asked()
    assert (method, unmapped["start_gfn"], unmapped["page_count"]) == ("unmap_gpa", GFN, mapped["page_count"])
    assert not host.vp.is_readable()
    host.answer(late)
    host.answer(undoing)
    assert host.vp.answer() == ["fail", "hypervisor_error"]
    host.map()


@statement("Y-1", "F-4")
@needs("notifier")
def test_a_request_on_the_hypervisor_connection_is_ebadmsg_and_loses_the_partition(host: Host) -> None:
    host.link.send(request("statistics"))
    assert (host.link.farewell().name, host.is_lost()) == ("EBADMSG", True)


@statement("Y-6", "Y-7")
@needs("notifier")
@pytest.mark.parametrize(
    ("sent", "name"),
    [(pack([1, 77, None, None]), "EPROTO"), (pack([1, 77, None]), "EBADMSG"), (b"\xc1", "EBADMSG")],
    ids=["to no request", "of another form", "garbage"],
)
def test_an_answer_to_nothing_loses_the_partition_and_the_loss_is_reported(
    host: Host, sent: bytes, name: str
) -> None:
    host.link.send(sent)
    assert (host.link.farewell().name, host.is_lost()) == (name, True)


@statement("Y-6")
@needs("notifier")
def test_a_second_answer_to_one_request_loses_the_partition(host: Host) -> None:
    host.fault()
    msgid, _, _ = host.asked()
    host.answer(msgid)
    assert host.vp.answer() == ["resume", "mapped"]
    host.answer(msgid)
    assert (host.link.farewell().name, host.is_lost()) == ("EPROTO", True)
