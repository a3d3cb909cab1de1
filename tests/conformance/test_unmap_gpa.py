"""`unmap_gpa`: the server unmaps memory from the guest, and answers no one before it is gone."""

from __future__ import annotations

import pytest

from conformance.guests import GFN, PAGE, PAGES, UADDR, WHOLE_MEMORY, RawVmm, pages
from conformance.hosts import REFUSAL, Host
from conformance.statements import needs, statement
from conformance.wire import request

UNMAPPING = request("unmap_vma", {"start_uaddr": UADDR, "page_count": 1}, 1)


@pytest.fixture
def host(hosted: RawVmm) -> Host:
    """A host with its memory mapped."""
    host = Host(hosted)
    host.map()
    return host


@statement("Y-3", "N-2")
@needs("notifier")
def test_a_begin_is_answered_only_when_the_vmm_has_unmapped(host: Host) -> None:
    host.notifier.send(request("invalidate_begin", pages(UADDR + PAGE, 2)))
    msgid, method, fields = host.asked()
    for _ in range(3):
        host.vmm.ask("statistics")
    assert not host.notifier.is_readable()
    host.answer(msgid)
    assert host.notifier.answer() is None
    assert method == "unmap_gpa"
    assert fields["start_gfn"] <= GFN + 1
    assert fields["start_gfn"] + fields["page_count"] >= GFN + 3


@statement("P-12")
@needs("notifier")
def test_a_remove_is_answered_only_when_the_vmm_has_unmapped(host: Host) -> None:
    fields = {"start_gfn": GFN, "page_count": PAGES, "start_uaddr": UADDR}
    host.vmm.connection.send(request("remove_region", fields))
    msgid, method, _ = host.asked()
    assert (method, host.vmm.connection.is_readable()) == ("unmap_gpa", False)
    host.answer(msgid)
    assert host.vmm.connection.answer() is None


@statement("Y-4", "Y-7")
@needs("notifier")
def test_a_refusal_loses_the_partition(host: Host) -> None:
    host.notifier.send(request("invalidate", WHOLE_MEMORY))
    msgid, _, _ = host.asked()
    host.answer(msgid, REFUSAL)
    assert host.is_lost()


@statement("Y-4", "Y-10")
@needs("notifier")
@pytest.mark.parametrize("error", ["busy", False, [-5, "EIO", "m", {}]], ids=repr)
def test_an_error_that_is_not_of_the_form_loses_the_partition_too(host: Host, error: object) -> None:
    host.notifier.send(request("invalidate", WHOLE_MEMORY))
    msgid, _, _ = host.asked()
    host.answer(msgid, error)
    assert host.is_lost()


@statement("Y-4", "Y-5")
@needs("notifier")
def test_no_answer_in_time_loses_the_partition(host: Host, limits: dict[str, int]) -> None:
    if limits["hypervisor_timeout_ms"] > 5_000:
        pytest.skip(f"limits.hypervisor_timeout_ms is {limits['hypervisor_timeout_ms']}: set it lower")
    host.notifier.send(request("invalidate", WHOLE_MEMORY))
    host.asked()
    assert host.is_lost()


@statement("Y-4", "Y-7")
@needs("notifier")
def test_the_end_of_the_hypervisor_connection_loses_the_partition(host: Host) -> None:
    host.link.close()
    assert host.is_lost()


@statement("V-2", "Y-4")
@needs("notifier")
def test_a_vp_that_waits_has_its_answer_when_the_partition_is_lost(host: Host) -> None:
    host.notifier.send(request("invalidate", WHOLE_MEMORY))
    msgid, _, _ = host.asked()
    host.fault()
    host.vmm.ask("statistics")
    host.answer(msgid, REFUSAL)
    assert host.vp.answer() == ["fail", "hypervisor_error"]


@statement("T-19")
@needs("notifier")
def test_requests_behind_one_that_waits_are_carried_out_when_it_is_answered(host: Host) -> None:
    host.vmm.connection.send(UNMAPPING + request("kick", {"vp_index": 9}, 2) + request("statistics", {}, 3))
    msgid, method, _ = host.asked()
    assert (method, host.vmm.connection.is_readable()) == ("unmap_gpa", False)
    host.answer(msgid)
    answers = [host.vmm.connection.receive() for _ in range(3)]
    assert [(answered, error and error[1]) for _, answered, error, _ in answers] == [
        (1, None), (2, "ENOENT"), (3, None),
    ]  # fmt: skip


@statement("T-19", "T-10")
@needs("notifier")
def test_a_vmm_that_closes_while_a_request_waits_ends_its_partition_whatever_it_sent_before(
    host: Host,
) -> None:
    host.vmm.connection.send(UNMAPPING + request("statistics", {}, 2))
    msgid, _, _ = host.asked()
    host.vmm.connection.close()
    host.answer(msgid)
    assert [message for message in host.vp.receive_all() if message[0] == 1] == []
