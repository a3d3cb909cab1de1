"""`inspect_partition` of an operator."""

from __future__ import annotations

from conformance.conftest import Server
from conformance.guests import GFN, PAGES, UADDR, WHOLE_MEMORY, RawVmm
from conformance.statements import needs, statement
from conformance.wire import RawConnection

REGIONS_TOLD = 256


@statement("O-2")
def test_a_partition_is_described_in_full(operator: RawConnection, vmm: RawVmm) -> None:
    vmm.add_memory()
    vmm.vp(6).intercept(GFN)
    seen = operator.ask("inspect_partition", {"partition_id": vmm.partition_id})
    assert (seen["architecture"], seen["mmio_granularity"]) == ("x86_64", "vma")
    assert (seen["summary"]["partition_id"], seen["statistics"]["regions"]) == (vmm.partition_id, 1)
    assert seen["regions"] == [
        {
            "start_gfn": GFN,
            "page_count": PAGES,
            "start_uaddr": UADDR,
            "kind": "movable",
            "state": "live",
            "writable": True,
            "executable": False,
            "mapped_gfns": PAGES,
        }
    ]
    vps = [(vp["vp_index"], vp["intercepts"], type(vp["state"])) for vp in seen["virtual_processors"]]
    assert vps == [(6, 1, str)]


@statement("O-2")
@needs("notifier")
def test_a_pinned_region_whose_memory_was_unmapped_is_dangling(operator: RawConnection, vmm: RawVmm) -> None:
    vmm.map_vma(UADDR, PAGES)
    vmm.add_region(GFN, PAGES, UADDR, "pinned")
    vmm.notifier().ask("invalidate", WHOLE_MEMORY)
    (region,) = operator.ask("inspect_partition", {"partition_id": vmm.partition_id})["regions"]
    assert (region["state"], region["mapped_gfns"]) == ("dangling", 0)


@statement("O-2", "L-2")
def test_the_first_256_regions_are_listed_and_the_statistics_count_all(
    operator: RawConnection, vmm: RawVmm
) -> None:
    for gfn in range(REGIONS_TOLD + 1):
        vmm.add_region(gfn, 1, UADDR, "mmio")
    seen = operator.ask("inspect_partition", {"partition_id": vmm.partition_id})
    assert (len(seen["regions"]), seen["statistics"]["regions"]) == (REGIONS_TOLD, REGIONS_TOLD + 1)


@statement("O-17")
@needs("notifier")
def test_how_a_vmm_that_declares_its_memory_announces_changes_is_described(
    operator: RawConnection, vmm: RawVmm
) -> None:
    def notifiers() -> object:
        return operator.ask("inspect_partition", {"partition_id": vmm.partition_id})["notifiers"]

    assert notifiers() == 0
    vmm.notifier()
    seen = operator.ask("inspect_partition", {"partition_id": vmm.partition_id})
    assert (seen["notifiers"], seen["summary"]["watch"]) == (1, "declared")
    assert "hypervisor_connected" not in seen
    assert (seen["statistics"]["unresolved"], vmm.ask("statistics")["unresolved"]) == ({}, {})


@statement("O-17")
@needs("hypervisor")
def test_whether_the_vmms_hypervisor_is_connected_is_told(operator: RawConnection, server: Server) -> None:
    with RawVmm(server.socket, hypervisor="vmm") as vmm:
        before = operator.ask("inspect_partition", {"partition_id": vmm.partition_id})
        vmm.link()
        after = operator.ask("inspect_partition", {"partition_id": vmm.partition_id})
    assert (before["hypervisor_connected"], after["hypervisor_connected"]) == (False, True)


@statement("O-2")
def test_no_such_partition_is_enoent(operator: RawConnection) -> None:
    assert operator.refusal("inspect_partition", {"partition_id": 2**63}).name == "ENOENT"
