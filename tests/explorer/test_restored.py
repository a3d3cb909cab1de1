"""A restored guest under drawn schedules: nothing is found, and of safeguards that are left out all are."""

from __future__ import annotations

from dataclasses import replace

import pytest

from explorer.restored import Broken, Parts, explore
from intercept_protocol.addresses import UaddrRange
from interceptd.address_space.image import ImageAddressSpace
from interceptd.hypervisor.userfaultfd import UserfaultfdHypervisor
from interceptd.mmu_notifier import MmuNotifier
from interceptd.pages.mapping import IMAGE_BACKING, Mapping
from interceptd.partition.fault_reader import FaultReader

STEPS = 200
"""Of a schedule."""
OWN = Parts()


def test_no_schedule_of_twenty_thousand_steps_breaks_anything() -> None:
    verdicts = explore(range(100), STEPS)
    assert [verdict.found for verdict in verdicts] == [{}] * 100
    assert any(verdict.completed for verdict in verdicts)


@pytest.mark.verify
@pytest.mark.parametrize("part", range(4))
def test_no_schedule_of_a_million_steps_breaks_anything(part: int) -> None:
    seeds = range(1000 + part * 1250, 1000 + (part + 1) * 1250)
    assert [verdict.found for verdict in explore(seeds, STEPS)] == [{}] * 1250


class _NothingGoesStale(MmuNotifier):
    def mark_stale(self, uaddrs: UaddrRange) -> None:
        """No attempt has to start again."""


class _RemembersNoRemoval(ImageAddressSpace):
    def removed(self, uaddrs: UaddrRange) -> None:
        """The image's content stays."""


class _ReadsMeanwhile(UserfaultfdHypervisor):
    async def settled(self) -> None:
        """Messages are read while a worker makes an ioctl."""


class _LeavesWhoFoundThePageIn(UserfaultfdHypervisor):
    def wake(self, uaddrs: UaddrRange) -> None:
        """A page that is in already needs no wake."""

    async def bring_again(self, mapping: Mapping, gfn: int) -> None:
        """Nor does one that has an entry."""


class _BringsZeroesOnce(UserfaultfdHypervisor):
    async def bring_again(self, mapping: Mapping, gfn: int) -> None:
        """A page of zeroes that has an entry is in."""
        if mapping.frame is not None and mapping.frame.backing == IMAGE_BACKING:
            await super().bring_again(mapping, gfn)


class _InvalidatesNothing(FaultReader):
    async def _remove(self, uaddrs: UaddrRange) -> None:
        """The memory forgets the page, and the notifier hears nothing."""
        self._memory.removed(uaddrs)


@pytest.mark.parametrize(
    ("left_out", "broken"),
    [
        (replace(OWN, notifier=_NothingGoesStale), Broken.OLD_CONTENT),
        (replace(OWN, memory=_RemembersNoRemoval), Broken.OLD_CONTENT),
        (replace(OWN, hypervisor=_ReadsMeanwhile), Broken.OLD_CONTENT),
        (replace(OWN, hypervisor=_LeavesWhoFoundThePageIn), Broken.STUCK),
        (replace(OWN, hypervisor=_BringsZeroesOnce), Broken.STUCK),
        (replace(OWN, reader=_InvalidatesNothing), Broken.RECORDED),
    ],
    ids=lambda value: value.name if isinstance(value, Broken) else None,
)
def test_what_is_left_out_is_found(left_out: Parts, broken: Broken) -> None:
    assert broken in explore(range(600), STEPS, left_out)[-1].found
