"""`statistics`, `set_policy` and `restart` of an operator."""

from __future__ import annotations

from typing import Any

import pytest

from conformance.guests import GFN, PAGES, UADDR, RawVmm
from conformance.statements import statement
from conformance.wire import RawConnection

TOLD = {
    "uptime_ms", "partitions", "vps", "connections", "connections_without_hello", "tasks",
    "partitions_created", "partitions_lost", "connections_refused", "invalidations",
}  # fmt: skip


@statement("O-3")
def test_the_daemons_statistics_count_what_a_partition_does(operator: RawConnection, vmm: RawVmm) -> None:
    before = operator.ask("statistics")
    assert ({type(before[name]) for name in TOLD}, type(before["intercepts"])) == ({int}, dict)
    vmm.vp().intercept(0)
    after = operator.ask("statistics")
    assert after["vps"] == before["vps"] + 1
    counted = [seen["intercepts"].get("forward", {}).get("no_region", 0) for seen in (before, after)]
    assert counted[1] == counted[0] + 1


@statement("O-4")
def test_an_operator_changes_the_policy_of_any_partition(operator: RawConnection, vmm: RawVmm) -> None:
    fields = {"partition_id": vmm.partition_id, "mmio_granularity": "page"}
    assert operator.ask("set_policy", fields) is None
    vmm.map_vma(UADDR, PAGES)
    vmm.add_region(GFN, PAGES, UADDR, "mmio")
    vmm.vp().intercept(GFN)
    assert vmm.ask("statistics")["mapped_gfns"] == 1


@statement("O-4")
def test_the_policy_of_no_such_partition_is_enoent(operator: RawConnection) -> None:
    assert operator.refusal("set_policy", {"partition_id": 2**63}).name == "ENOENT"


@statement("O-16", "E-3")
def test_a_server_that_does_not_survive_a_restart_refuses_it(
    operator: RawConnection, hello: dict[str, Any]
) -> None:
    if hello["features"]["kept"]:
        pytest.skip("it would restart the server")
    assert operator.refusal("restart").name == "EOPNOTSUPP"
    assert operator.ask("statistics")["uptime_ms"] >= 0


@statement("P-3")
def test_a_method_that_operators_have_not_is_enosys_that_lists_theirs(operator: RawConnection) -> None:
    refusal = operator.refusal("create_partition")
    assert (refusal.name, "list_partitions" in refusal.details["methods"]) == ("ENOSYS", True)
