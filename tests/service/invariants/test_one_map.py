"""I9: VPs that fault on one extent cost one map, and a failure undoes only what its own call mapped."""

from __future__ import annotations

from collections import Counter

import trio
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs
from trio.testing import MockClock

from explorer.inspection import misrecorded
from fakes.drawn import pauses
from fakes.model_partition import ModelPartition
from fakes.pauses import DrawnPauses
from intercept_protocol.messages import RegionKind
from intercept_protocol.outcomes import Answer

PAGES = 16
LOOKED_AT = range(PAGES + 1)
kinds = st.sampled_from([RegionKind.MMIO, RegionKind.MOVABLE])


def faulted(
    model: ModelPartition, kind: RegionKind, gfns: list[int], refused: frozenset[int]
) -> Counter[Answer]:
    """All of them at once; the answers."""
    answers: Counter[Answer] = Counter()

    async def vp(gfn: int) -> None:
        answers[await model.fault(gfn)] += 1

    async def main() -> None:
        async with model.running():
            await model.map_vma(0, PAGES, 7000)
            await model.add_region(0, PAGES, 0, kind)
            model.hypervisor.events.clear()
            model.hypervisor.refused_maps = refused
            async with trio.open_nursery() as vps:
                for gfn in gfns:
                    vps.start_soon(vp, gfn)
            assert misrecorded(model, LOOKED_AT) is None

    with capture_logs():
        trio.run(main, clock=MockClock(autojump_threshold=0))
    return answers


@given(pauses(), kinds, st.lists(st.integers(0, PAGES - 1), min_size=1, max_size=8))
def test_i9_vps_that_fault_on_one_extent_cost_one_map(
    checkpoints: list[int], kind: RegionKind, gfns: list[int]
) -> None:
    model = ModelPartition(pauses=DrawnPauses(checkpoints))
    answers = faulted(model, kind, gfns, frozenset())
    assert len(model.hypervisor.events) == 1
    assert answers == Counter({Answer.MAPPED: 1}) + Counter({Answer.ALREADY_MAPPED: len(gfns) - 1})


@given(
    pauses(),
    kinds,
    st.lists(st.integers(0, PAGES - 1), min_size=1, max_size=8),
    st.frozensets(st.integers(1, 8)),
)
def test_i9_a_refused_map_is_the_failure_of_the_one_that_asked(
    checkpoints: list[int], kind: RegionKind, gfns: list[int], refused: frozenset[int]
) -> None:
    model = ModelPartition(pauses=DrawnPauses(checkpoints))
    answers = faulted(model, kind, gfns, refused)
    attempts = next(place for place in range(1, 10) if place not in refused)
    failures = min(attempts - 1, len(gfns))
    assert answers[Answer.HYPERVISOR_ERROR] == failures
    assert answers[Answer.MAPPED] == min(1, len(gfns) - failures)
    assert answers.total() == len(gfns)
