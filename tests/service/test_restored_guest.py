"""A restored guest over a fake kernel: what each refusal of the kernel and of the image leads to."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Iterator

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from fakes.fake_kernel import ZERO, FakeImage, FakeKernel, FakeWorkers, Held
from fakes.others import Others
from fakes.restored_guest import LIMITS, RestoredGuest
from fakes.used_up_time import time_used_up_every
from intercept_protocol.addresses import GfnRange, UaddrRange
from intercept_protocol.outcomes import Answer
from interceptd.address_space import image
from interceptd.address_space.image import ImagePart
from interceptd.address_space.refusals import Cause
from interceptd.config.schema import Limits
from interceptd.partition import fault_reader

START = 0x2000
PAGES = 32


def uaddrs(start: int, count: int = 1) -> UaddrRange:
    return UaddrRange(start=START + start, end=START + start + count)


class Restored:
    """A guest of one region whose workers are released at once."""

    def __init__(self, kernel: FakeKernel, *, around: int = 8, limits: Limits = LIMITS) -> None:
        self.kernel = kernel
        self.image = FakeImage(PAGES)
        self.workers = FakeWorkers()
        self.workers.held.release_all()
        kernel.held.release_all()
        self.failures: list[OSError] = []
        self.guest = RestoredGuest(
            kernel,
            self.image,
            [ImagePart(START, START + PAGES, 0)],
            around=around,
            workers=self.workers,
            on_failure=self.failures.append,
            limits=limits,
        )

    async def read(self, page: int) -> int | None:
        """What a thread finds, once nothing goes on any more; None if it still waits."""
        if self.kernel.touch(START + page) is None:
            await wait_all_tasks_blocked()
        return self.kernel.present.get(START + page)

    async def remove(self, start: int, count: int = 1) -> None:
        removal = self.kernel.begin_removal(uaddrs(start, count))
        await wait_all_tasks_blocked()
        self.kernel.run_on(removal)
        self.kernel.take_away(removal)


@pytest.fixture
def kernel() -> Iterator[FakeKernel]:
    kernel = FakeKernel()
    yield kernel
    kernel.close()


@pytest.fixture
async def restored(kernel: FakeKernel, autojump_clock: MockClock) -> AsyncIterator[Restored]:  # noqa: ARG001
    restored = Restored(kernel)
    restored.image.cached.update(range(PAGES))
    async with restored.guest.running():
        yield restored


async def test_a_fault_brings_in_its_block_and_no_more(restored: Restored) -> None:
    assert await restored.read(9) == 10
    assert sorted(restored.kernel.present) == list(range(START + 8, START + 16))
    assert restored.guest.reader.latency.count == 1
    assert restored.guest.hypervisor.demanded_pages == 8


async def test_a_block_without_some_of_its_pages_is_brought_in_as_far_as_it_is_there(
    restored: Restored,
) -> None:
    restored.image.cached -= {2}
    restored.image.fails = True
    assert await restored.read(1) == 2
    assert await restored.read(3) == 4
    assert START + 2 not in restored.kernel.present


async def test_mixed_runs_of_image_and_zero(restored: Restored) -> None:
    await restored.remove(3, 2)
    assert [await restored.read(page) for page in range(8)] == [1, 2, 3, ZERO, ZERO, 6, 7, 8]
    assert restored.guest.answers == {Answer.MAPPED: 3}
    assert restored.guest.hypervisor.zeroed_pages == 2


async def test_an_image_that_fails_holds_the_guest_and_is_tried_again(restored: Restored) -> None:
    restored.image.cached.clear()
    restored.image.fails = True
    assert restored.kernel.touch(START) is None
    await trio.sleep(60)
    assert restored.kernel.waiting == {START: 1}
    assert 10 < len(restored.failures) < 20
    assert restored.guest.memory.unresolved[Cause.IMAGE_ERROR] == len(restored.failures)
    restored.image.fails = False
    await trio.sleep(5)
    assert restored.kernel.present[START] == 1
    assert not restored.kernel.waiting


async def test_a_change_that_lasts_is_asked_about_ever_more_rarely(restored: Restored) -> None:
    removal = restored.kernel.begin_removal(uaddrs(0))
    assert await restored.read(8) is None
    await trio.sleep(1)
    assert 10 < restored.guest.reader.retries < 30
    restored.kernel.run_on(removal)
    await trio.sleep(0.1)
    assert restored.kernel.present[START + 8] == 9


async def test_unmapped_memory_is_left(restored: Restored, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for several pages, the kernel does not say which is gone."""
    bring_in = restored.kernel._bring_in
    gone, calls = {START + 3, START + 4}, list[int]()

    def refuse(page: int, values: list[int]) -> int:
        calls.append(len(values))
        return -errno.ENOENT if gone & set(range(page, page + len(values))) else bring_in(page, values)

    monkeypatch.setattr(restored.kernel, "_bring_in", refuse)
    assert await restored.read(6) == 7
    assert sorted(restored.kernel.present) == [START + page for page in (0, 1, 2, 5, 6, 7)]
    assert len(calls) <= 12


async def test_another_refusal_is_tried_again_and_undoes_nothing(
    restored: Restored, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = [-errno.ENOMEM]
    bring_in = restored.kernel._bring_in
    monkeypatch.setattr(
        restored.kernel, "_bring_in", lambda *wanted: refused.pop() if refused else bring_in(*wanted)
    )
    assert await restored.read(0) is None
    assert restored.guest.answers == {Answer.HYPERVISOR_ERROR: 1}
    assert restored.guest.manager.mapping_count == 0
    await trio.sleep(0.2)
    assert restored.kernel.present[START] == 1


async def test_the_vmm_is_gone(restored: Restored, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restored.kernel, "_bring_in", lambda *_: -errno.ESRCH)
    await restored.read(0)
    await restored.guest.memory.run()
    assert restored.guest.hypervisor.vmm_gone


async def test_prefetch_passes_over_what_was_given_back_and_waits_for_faults(restored: Restored) -> None:
    await restored.remove(0, 12)
    restored.image.cached -= {20}
    restored.image.fails = True
    assert await restored.read(20) is None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(restored.guest.prefetch, [GfnRange(start=0, end=PAGES)])
        await trio.sleep(1)
        assert restored.guest.hypervisor.prefetched_pages == 0
        restored.image.fails = False
    assert restored.guest.hypervisor.prefetched_pages == 12
    assert sorted(restored.kernel.present) == list(range(START + 12, START + PAGES))


async def test_what_is_all_in_is_left_to_the_kernel(restored: Restored) -> None:
    await restored.remove(4, 4)
    await restored.guest.prefetch([GfnRange(start=0, end=PAGES)])
    await trio.sleep(2)
    assert restored.guest.completion.reached
    assert restored.kernel.touch(START + 5) == ZERO


async def test_pages_of_the_image_that_are_missing(restored: Restored) -> None:
    await restored.remove(4, 4)
    await restored.read(8)
    assert await restored.guest.completion.missing_pages() == PAGES - 4 - 8


async def test_runs_that_touch_are_recorded_as_one(restored: Restored) -> None:
    for start in (4, 8, 6, 20, 5):
        await restored.remove(start, 2)
    assert restored.guest.memory.image_runs(uaddrs(0, PAGES)) == [
        uaddrs(0, 4),
        uaddrs(10, 10),
        uaddrs(22, 10),
    ]
    assert restored.guest.memory.removed_pages == 8


async def test_long_walks_over_what_was_given_back_take_turns(
    restored: Restored, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image, "REMOVED_PER_PART", 1)
    for start in range(0, PAGES, 2):
        restored.guest.memory.removed(uaddrs(start))
    others = Others(nursery)
    with time_used_up_every(1):
        assert await restored.guest.completion.missing_pages() == PAGES // 2
        await restored.guest.memory.discard()
    assert others.turns >= PAGES // 2


async def test_messages_are_read_in_turns(kernel: FakeKernel, nursery: trio.Nursery) -> None:
    others = Others(nursery)
    with time_used_up_every(1):
        restored = Restored(kernel, around=1)
        restored.image.cached.update(range(PAGES))
        async with restored.guest.running():
            for page in range(PAGES):
                kernel.touch(START + page)
            while len(kernel.present) < PAGES:
                await trio.lowlevel.checkpoint()
    assert others.turns >= PAGES


async def test_nothing_is_read_before_the_last_ioctl_of_a_call_although_patience_ends(
    kernel: FakeKernel,
) -> None:
    """Old content came back: the thread that gives pages back ran on before an ioctl of the same call."""
    restored = Restored(kernel)
    restored.image.cached.update(range(PAGES))
    async with restored.guest.running():
        assert await restored.read(3) == 4
        # Of the block around page 11 some is in: two gaps, one call, two ioctls.
        restored.guest.regions[0].block = 1
        assert await restored.read(11) == 12
        restored.guest.regions[0].block = 8
        kernel.held = Held()
        restored.guest.hypervisor.be_patient(for_ns=0)
        assert kernel.touch(START + 9) is None
        await wait_all_tasks_blocked()
        kernel.held.release(0)
        await wait_all_tasks_blocked()
        kernel.held.release(0)  # the first ioctl is over, the second is about to be made
        await wait_all_tasks_blocked()
        removal = kernel.begin_removal(uaddrs(12, 2))
        await wait_all_tasks_blocked()
        under_way, was_read = len(kernel.held), removal.is_read
        kernel.held.release_all()
        assert (under_way, was_read) == (1, False)
        await wait_all_tasks_blocked()
        assert removal.is_read
        kernel.run_on(removal)
        kernel.take_away(removal)
        assert await restored.read(12) == ZERO
    assert not restored.guest.hypervisor.may_block


async def test_a_large_removal_takes_turns_and_its_faults_wait_until_all_is_known(
    restored: Restored, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image, "REMOVED_PER_PART", 1)
    for start in range(0, PAGES, 2):
        restored.guest.memory.removed(uaddrs(start))
    known: list[int] = []
    reader = restored.guest.reader

    async def turn() -> None:
        if restored.kernel.removals:
            removal = restored.kernel.removals[0]
            if not removal.runs_on:
                restored.kernel.run_on(removal)
                restored.kernel.take_away(removal)
            restored.kernel.touch(START + PAGES - 1)
        known.append(restored.guest.memory.removed_pages)
        await trio.lowlevel.checkpoint()

    monkeypatch.setattr(fault_reader, "give_way", turn)
    restored.kernel.begin_removal(uaddrs(0, PAGES))
    await wait_all_tasks_blocked()
    assert len(set(known)) > PAGES // 4
    assert restored.kernel.present[START + PAGES - 1] == ZERO
    assert reader.state == "running"
    assert restored.guest.notifier.quiet


async def test_what_is_given_back_in_too_many_pieces_waits_for_room(
    kernel: FakeKernel,
    autojump_clock: MockClock,  # noqa: ARG001
) -> None:
    limits = Limits(vmas_per_uid=2)
    restored = Restored(kernel, limits=limits)
    async with restored.guest.running():
        await restored.remove(0)
        assert restored.guest.tenant.vmas.count == 1
        assert not restored.guest.reader.held_up
        await restored.remove(2)
        assert "VMAs" in restored.guest.reader.held_up
        third = kernel.begin_removal(uaddrs(4))
        await trio.sleep(10)
        assert not third.is_read
        restored.guest.tenant.vmas.release()  # another guest of the uid ends
        await trio.sleep(10)
        assert third.is_read
        restored.guest.tenant.vmas.add(1)
    await restored.guest.memory.discard()
    assert not restored.guest.tenant.vmas.count


async def test_other_memory_that_is_given_back_is_not_remembered(restored: Restored) -> None:
    await restored.remove(PAGES + 10, 5)
    await restored.remove(-3, 5)
    assert restored.guest.memory.removed_pages == 2
