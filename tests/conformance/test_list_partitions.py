"""`list_partitions` of an operator."""

from __future__ import annotations

import os

import pytest

from conformance.conftest import Server
from conformance.guests import GFN, RawVmm
from conformance.statements import statement
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


@statement("O-1", "L-2")
def test_after_the_last_id_the_list_is_empty(operator: RawConnection) -> None:
    assert operator.ask("list_partitions", {"after": 2**64 - 1}) == {"partitions": [], "more": False}


@statement("P-3", "E-2")
@pytest.mark.parametrize("after", [-1, "0", True])
def test_another_after_is_einval(operator: RawConnection, after: object) -> None:
    refusal = operator.refusal("list_partitions", {"after": after})
    assert (refusal.name, refusal.details.get("field")) == ("EINVAL", "after")
