"""First touches of memory in very many VMAs by 8 VPs at once, regions of kind auto: every one is mapped."""

from __future__ import annotations

import pytest

from fakes import live_first_touches as touches
from fakes.live_vmm import LiveVmm
from fakes.puppet import Puppet
from intercept_client.memory import Watch
from intercept_protocol.outcomes import Answer

FEW, MANY, REGIONS = 400, 30_000, 8


def sizes(few: int, many: int) -> list[object]:
    return [few, pytest.param(many, marks=pytest.mark.verify)]


@pytest.mark.parametrize("vma_count", sizes(FEW, MANY))
@pytest.mark.parametrize(
    ("watch", "promise"),
    [(Watch.REQUIRED, False), (Watch.NONE, True), (Watch.REQUIRED, True)],
    ids=["watched", "announced", "both"],
)
def test_first_touches_of_very_many_vmas_at_once_are_all_mapped_whatever_else_changes(
    unattached: Puppet, watch: Watch, promise: bool, vma_count: int
) -> None:
    unattached.do(LiveVmm.attach, watch, promise=promise)
    unattached.do(touches.add_regions_of_vmas, vma_count, REGIONS)
    for _ in range(2):
        answers = unattached.start(touches.touch_all_at_once, vma_count).result(patience=120)
        assert answers == {Answer.MAPPED: vma_count}
        unattached.do(touches.announce_all)
