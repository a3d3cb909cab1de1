"""`list_partitions` of an operator."""

from __future__ import annotations

import os

import pytest

from conformance.conftest import Server
from conformance.guests import GFN, WHOLE_MEMORY, RawVmm, waits
from conformance.statements import needs, statement
from conformance.wire import RawConnection

SUMMARY = {
    "partition_id", "name", "uid", "pid", "address_space", "hypervisor", "vps", "regions", "mapped_gfns",
    "intercepts", "invalidations", "age_ms",
}  # fmt: skip


@statement("O-1")
def test_a_partition_is_listed_with_its_owner_and_its_counts(operator: RawConnection, vmm: RawVmm) -> None:
    vmm.add_memory()
    vmm.vp().intercept(GFN)
    listed = operator.ask("list_partitions", {"after": vmm.partition_id - 1})
    ours = listed["partitions"][0]
    assert (listed["more"], ours.keys() >= SUMMARY) == (False, True)
    told = {
        key: ours[key] for key in ("partition_id", "uid", "address_space", "hypervisor", "vps", "regions")
    }
    assert told == {
        "partition_id": vmm.partition_id,
        "uid": os.getuid(),
        "address_space": "declared",
        "hypervisor": "software",
        "vps": 1,
        "regions": 1,
    }
    assert ours["intercepts"] == 1


@statement("O-1")
def test_they_come_by_ascending_id_above_after(operator: RawConnection, server: Server, vmm: RawVmm) -> None:
    with RawVmm(server.socket) as later:
        listed = operator.ask("list_partitions")["partitions"]
        ids = [partition["partition_id"] for partition in listed]
        assert ids == sorted(ids)
        assert {vmm.partition_id, later.partition_id} <= set(ids)
        above = operator.ask("list_partitions", {"after": vmm.partition_id})["partitions"]
        assert later.partition_id in [partition["partition_id"] for partition in above]
        assert vmm.partition_id not in [partition["partition_id"] for partition in above]


@statement("O-21")
@needs("notifier")
def test_an_invalidation_that_is_open_and_a_vp_that_waits_for_it_are_told(
    operator: RawConnection, vmm: RawVmm
) -> None:
    def told() -> tuple[int, int, int]:
        (ours, *_) = operator.ask("list_partitions", {"after": vmm.partition_id - 1})["partitions"]
        return ours["open_invalidations"], ours["waiting_vps"], ours["oldest_invalidation_ms"]

    vmm.add_memory()
    vp, notifier = vmm.vp(), vmm.notifier()
    assert told() == (0, 0, 0)
    notifier.ask("invalidate_begin", WHOLE_MEMORY)
    notifier.ask("invalidate_begin", WHOLE_MEMORY)
    assert waits(vmm, vp, GFN)
    first, second = told(), told()
    assert (first[:2], second[:2]) == ((2, 1), (2, 1))
    assert 0 <= first[2] <= second[2]
    notifier.ask("invalidate_end", WHOLE_MEMORY)
    assert told()[:2] == (1, 1)
    notifier.ask("invalidate_end", WHOLE_MEMORY)
    assert vp.answer()[0] == "resume"
    assert told() == (0, 0, 0)


@statement("O-21")
def test_what_a_partition_takes_of_the_servers_memory_grows_with_it(
    operator: RawConnection, vmm: RawVmm
) -> None:
    def taken() -> int:
        (ours, *_) = operator.ask("list_partitions", {"after": vmm.partition_id - 1})["partitions"]
        taken = ours["memory_bytes"]
        assert type(taken) is int
        return taken

    before = taken()
    vmm.add_memory()
    assert 0 <= before < taken()


@statement("O-1", "L-2")
def test_after_the_last_id_the_list_is_empty(operator: RawConnection) -> None:
    assert operator.ask("list_partitions", {"after": 2**64 - 1}) == {"partitions": [], "more": False}


@statement("P-3", "E-2")
@pytest.mark.parametrize("after", [-1, "0", True])
def test_another_after_is_einval(operator: RawConnection, after: object) -> None:
    refusal = operator.refusal("list_partitions", {"after": after})
    assert (refusal.name, refusal.details.get("field")) == ("EINVAL", "after")
