"""Hazards of rights and answers: g, h, l, o and t of the review."""

from __future__ import annotations

import pytest
import trio

from explorer.pauses import Point
from explorer.ports import Mapped
from fakes.model_partition import RW, ModelPartition
from fakes.model_vp import attached_vp
from fakes.one_region import GFN, PAGE, PAGES, PFN
from fakes.running import Running
from intercept_protocol.addresses import PAGE_SHIFT
from intercept_protocol.hv_message import MessageType, build_memory_intercept
from intercept_protocol.messages import INTERCEPT_METHOD, Architecture, RegionKind, Remap
from intercept_protocol.outcomes import Access, Answer
from interceptd.hypervisor.hv_status import HvStatus

RX = Access.READ | Access.EXECUTE


# ------------------------------------------------ g: gva_gpa_valid is not a condition


@pytest.mark.parametrize("architecture", Architecture)
@pytest.mark.parametrize("message_type", [MessageType.UNMAPPED_GPA, MessageType.GPA_INTERCEPT])
@pytest.mark.parametrize("gva", [None, 0xFFFF_8000_0000_0000])
async def test_g_an_intercept_is_served_whether_or_not_its_gva_is_valid(
    model: ModelPartition,
    architecture: Architecture,
    message_type: MessageType,
    gva: int | None,
) -> None:
    """g: the gpa of a page-table walk has no gva, and is as good as any."""
    await model.map_vma(PAGE, PAGES, PFN)
    await model.add_region(GFN, PAGES, PAGE)
    message = build_memory_intercept(
        gpa=GFN << PAGE_SHIFT,
        access=Access.READ,
        architecture=architecture,
        message_type=message_type,
        gva=gva,
    )
    async with attached_vp(model, architecture) as vp:
        await vp.peer.request(INTERCEPT_METHOD, message)
        assert await vp.peer.answer() is Answer.MAPPED


# ------------------------------------------------ h: rights


@pytest.mark.parametrize("kind", RegionKind)
async def test_h_a_write_to_a_read_only_region_is_forwarded_and_nothing_gets_writable(
    model: ModelPartition, kind: RegionKind
) -> None:
    """h: the patch mapped everything read-write."""
    await model.map_vma(PAGE, PAGES, PFN, RW)
    await model.add_region(GFN, PAGES, PAGE, kind, access=Access.READ)
    assert await model.fault(GFN, Access.WRITE) is Answer.PERMISSION
    await model.fault(GFN, Access.READ)
    translated = model.hypervisor.translate(GFN)
    assert translated is not None
    assert translated.access == Access.READ


@pytest.mark.parametrize("kind", RegionKind)
async def test_h_a_write_to_a_read_only_vma_is_forwarded_and_nothing_gets_writable(
    model: ModelPartition, kind: RegionKind
) -> None:
    await model.map_vma(PAGE, PAGES, PFN, Access.READ)
    await model.add_region(GFN, PAGES, PAGE, kind)
    assert await model.fault(GFN, Access.WRITE) is Answer.PERMISSION
    assert await model.fault(GFN, Access.READ) in {Answer.MAPPED, Answer.ALREADY_MAPPED}
    assert await model.fault(GFN, Access.WRITE) is Answer.PERMISSION


async def test_h_a_read_of_a_read_only_vma_is_served(model: ModelPartition) -> None:
    """h: the patch always faulted for write, so a read-only VMA never worked."""
    await model.map_vma(PAGE, PAGES, PFN, Access.READ)
    await model.add_region(GFN, PAGES, PAGE)
    assert await model.fault(GFN, Access.READ) is Answer.MAPPED
    assert model.hypervisor.events == [Mapped(GFN, GFN + PAGES, PFN, Access.READ)]


async def test_h_execute_is_the_regions_to_give_whatever_the_vma_says(model: ModelPartition) -> None:
    await model.map_vma(PAGE, PAGES, PFN, Access.READ)
    await model.add_region(GFN, PAGES, PAGE, RegionKind.MMIO, access=RX)
    assert await model.fault(GFN, Access.EXECUTE) is Answer.MAPPED
    assert model.hypervisor.events == [Mapped(GFN, GFN + PAGES, PFN, RX)]


async def test_h_execute_of_a_region_without_it_is_forwarded(model: ModelPartition) -> None:
    await model.map_vma(PAGE, PAGES, PFN, RX)
    await model.add_region(GFN, PAGES, PAGE, RegionKind.MMIO, access=Access.READ)
    assert await model.fault(GFN, Access.EXECUTE) is Answer.PERMISSION


@pytest.mark.parametrize("remap", Remap)
async def test_h_a_vma_that_got_more_rights_is_mapped_again_with_them(remap: Remap) -> None:
    async with ModelPartition(remap=remap).running() as model:
        await model.map_vma(PAGE, PAGES, PFN, Access.READ)
        await model.add_region(GFN, PAGES, PAGE)
        await model.fault(GFN)
        await model.declared.protect_vma(model.regions.first_regions(1)[0].uaddrs, RW)
        assert await model.fault(GFN, Access.WRITE) is Answer.MAPPED
        assert await model.fault(GFN + 5, Access.WRITE) is Answer.ALREADY_MAPPED


# ------------------------------------------------ l: endless re-entry


async def test_l_a_vp_is_stopped_at_the_17th_fault_on_a_mapped_page(
    model: ModelPartition,
) -> None:
    """l: success while the access still faults re-enters the guest forever."""
    await model.map_vma(PAGE, PAGES, PFN)
    await model.add_region(GFN, PAGES, PAGE)
    async with attached_vp(model) as vp:
        answers = [await vp.peer.intercept(GFN) for _ in range(18)]
    assert answers == [Answer.MAPPED, *[Answer.ALREADY_MAPPED] * 16, Answer.NO_PROGRESS]


# ------------------------------------------------ o: errors are not one


async def test_o_a_fault_refused_by_the_hypervisor_is_not_forwarded() -> None:
    """o: in the patch every error became "let the VMM emulate it"."""
    model = ModelPartition(failing_calls={1: HvStatus.OPERATION_FAILED})
    async with model.running():
        await model.map_vma(PAGE, PAGES, PFN)
        await model.add_region(GFN, PAGES, PAGE)
        assert await model.fault(GFN) is Answer.HYPERVISOR_ERROR
        assert await model.fault(GFN) is Answer.MAPPED


async def test_o_a_fault_not_decided_in_time_is_retry(model: ModelPartition, nursery: trio.Nursery) -> None:
    """o: a VMM that emulates an access to RAM because we were busy loses a write."""
    await model.map_vma(PAGE, PAGES, PFN)
    await model.add_region(GFN, PAGES, PAGE)
    model.gates.hold(Point.RESOLVE)
    assert await Running(nursery, model.fault, GFN).result() is Answer.CONTENDED


async def test_o_each_cause_has_its_own_answer(model: ModelPartition) -> None:
    await model.map_vma(PAGE, 4, PFN, Access.READ)
    await model.add_region(GFN, PAGES, PAGE)
    answers = [
        await model.fault(GFN, Access.EXECUTE),
        await model.fault(GFN, Access.WRITE),
        await model.fault(GFN + 8),
        await model.fault(GFN + PAGES),
        await model.fault(GFN),
        await model.fault(GFN + 1),
    ]
    assert answers == [
        Answer.PERMISSION,
        Answer.PERMISSION,
        Answer.UNBACKED,
        Answer.NO_REGION,
        Answer.MAPPED,
        Answer.ALREADY_MAPPED,
    ]


# ------------------------------------------------ t: unmapped gpas outside all regions


async def test_t_an_unmapped_gpa_without_a_region_is_the_vmms_to_emulate(model: ModelPartition) -> None:
    """t: not every unmapped gpa is MMIO space of ours; emulated devices have no region."""
    await model.map_vma(PAGE, PAGES, PFN)
    await model.add_region(GFN, PAGES, PAGE)
    answers = [await model.fault(gfn) for gfn in (0, GFN - 1, GFN + PAGES, (1 << 52) - 1)]
    assert answers == [Answer.NO_REGION] * 4
    assert model.address_space.resolved == []


async def test_t_an_unmapped_gpa_of_movable_memory_is_served_like_mmio(model: ModelPartition) -> None:
    await model.map_vma(PAGE, PAGES, PFN)
    await model.add_region(GFN, PAGES, PAGE, RegionKind.MOVABLE)
    assert await model.fault(GFN) is Answer.MAPPED
