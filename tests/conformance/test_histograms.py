"""`histograms` of an operator, and the `latency` of its other answers."""

from __future__ import annotations

from typing import Any

import pytest

from conformance.guests import GFN, WHOLE_MEMORY, RawVmm, waits
from conformance.statements import needs, statement
from conformance.wire import READ, RawConnection, intercept_message, request

BOUNDARIES_NS = [2**power * 1000 for power in range(1, 24)]
BUCKETS = 24


def histograms(operator: RawConnection, vmm: RawVmm, **fields: object) -> dict[str, Any]:
    told: dict[str, Any] = operator.ask("histograms", {"partition_id": vmm.partition_id, **fields})
    return told


@statement("O-7", "O-8")
def test_each_attached_vp_is_listed_by_ascending_index(operator: RawConnection, vmm: RawVmm) -> None:
    vps = {index: vmm.vp(index) for index in (6, 0, 3)}
    for gfn in range(5):
        vps[3].intercept(gfn)
    told = histograms(operator, vmm)
    assert (told["boundaries_ns"], told["more"]) == (BOUNDARIES_NS, False)
    assert [each["vp_index"] for each in told["virtual_processors"]] == [0, 3, 6]
    _, busy, idle = told["virtual_processors"]
    assert (busy["intercepts"], sum(busy["buckets"]), len(busy["buckets"])) == (5, 5, BUCKETS)
    assert (idle["intercepts"], idle["total_ns"], idle["buckets"]) == (0, 0, [0] * BUCKETS)
    assert busy["total_ns"] > 0


@statement("O-7")
@pytest.mark.parametrize(("after", "told"), [(None, [0, 3]), (0, [3]), (3, [])])
def test_those_above_after_are_listed(
    operator: RawConnection, vmm: RawVmm, after: int | None, told: list[int]
) -> None:
    vmm.vp(0)
    vmm.vp(3)
    seen = histograms(operator, vmm, after=after)["virtual_processors"]
    assert [each["vp_index"] for each in seen] == told


@statement("O-7")
def test_no_such_partition_is_enoent(operator: RawConnection) -> None:
    assert operator.refusal("histograms", {"partition_id": 2**63}).name == "ENOENT"


@statement("O-8", "O-9")
def test_the_latencies_of_a_partition_and_of_the_daemon_count_intercepts_of_vps_that_ended_too(
    operator: RawConnection, vmm: RawVmm
) -> None:
    before = sum(operator.ask("statistics")["latency"])
    vp = vmm.vp()
    for gfn in range(3):
        vp.intercept(gfn)
    vp.half_close()
    vp.receive_all()
    listed = operator.ask("list_partitions", {"after": vmm.partition_id - 1})["partitions"][0]
    assert (len(listed["latency"]), sum(listed["latency"]), listed["intercepts"]) == (BUCKETS, 3, 3)
    assert sum(operator.ask("statistics")["latency"]) == before + 3


@statement("O-14", "P-25")
@needs("notifier")
def test_an_intercept_that_waited_for_an_invalidation_is_counted_as_waited_too(
    operator: RawConnection, vmm: RawVmm
) -> None:
    vmm.add_memory()
    vp, notifier = vmm.vp(), vmm.notifier()
    vp.intercept(GFN)
    notifier.ask("invalidate_begin", WHOLE_MEMORY)
    assert waits(vmm, vp, GFN)
    notifier.ask("invalidate_end", WHOLE_MEMORY)
    assert vp.answer() == ["resume", "mapped"]
    [told] = histograms(operator, vmm)["virtual_processors"]
    assert (sum(told["buckets"]), sum(told["waited_buckets"])) == (2, 1)
    assert 0 < told["waited_ns"] < told["total_ns"]
    listed = operator.ask("list_partitions", {"after": vmm.partition_id - 1})["partitions"][0]
    counted = vmm.ask("statistics")
    for each in (listed, counted):
        assert (sum(each["latency"]), sum(each["latency_waited"])) == (2, 1)


@statement("O-9", "V-7")
@needs("notifier")
def test_an_abandoned_intercept_is_not_counted(operator: RawConnection, vmm: RawVmm) -> None:
    vmm.add_memory()
    vmm.notifier().ask("invalidate_begin", WHOLE_MEMORY)
    waiting = vmm.vp()
    waiting.send(request("intercept", intercept_message(GFN, READ)))
    waiting.half_close()
    waiting.receive_all()
    listed = operator.ask("list_partitions", {"after": vmm.partition_id - 1})["partitions"][0]
    assert (sum(listed["latency"]), listed["intercepts"]) == (0, 0)
