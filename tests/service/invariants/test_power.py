"""What the properties can see: each finds the mistake that it is there for.

A mend is taken out by patching it, and a schedule that breaks the invariant must be found. A property that
cannot fail is a defect.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import trio
from hypothesis import HealthCheck, Phase, find, settings

from fakes.schedule import Schedule, schedules, violations_of
from intercept_protocol.addresses import UaddrRange
from intercept_protocol.outcomes import Access, Answer
from interceptd.attempt import Attempt, Obstacle
from interceptd.intercept import InterceptPath
from interceptd.mmu_notifier import MmuNotifier
from interceptd.region import Region
from interceptd.region_manager import RegionManager

searching = settings(
    max_examples=2000,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def breaks(*invariants: str) -> Callable[[Schedule], bool]:
    return lambda schedule: any(found.invariant in invariants for found in violations_of(schedule))


def test_i1_finds_a_commit_without_the_staleness_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Attempt, "stale", property(lambda _: False))
    find(schedules(), breaks("I1"), settings=searching)


def test_i1_finds_faults_that_do_not_look_for_open_invalidations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MmuNotifier, "open_at", lambda *_: None)
    monkeypatch.setattr(MmuNotifier, "cut_back", lambda _, uaddrs, __: uaddrs)
    find(schedules(), breaks("I1"), settings=searching)


def test_i1_finds_windows_that_are_not_cut_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def whole(_: MmuNotifier, uaddrs: UaddrRange, __: int) -> UaddrRange:
        return uaddrs

    monkeypatch.setattr(MmuNotifier, "cut_back", whole)
    find(schedules(), breaks("I1"), settings=searching)


def test_i1_finds_invalidations_that_unmap_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async def nothing(*_: object, **__: object) -> None:
        """Acknowledged all the same."""

    monkeypatch.setattr(RegionManager, "_invalidate", nothing)
    find(schedules(), breaks("I1"), settings=searching)


def test_i1_finds_an_acknowledgement_that_comes_before_the_unmap(monkeypatch: pytest.MonkeyPatch) -> None:
    served = RegionManager.serve_pending

    async def hasty(regions: RegionManager) -> None:
        regions._notifier._pending.done.set()
        await served(regions)

    monkeypatch.setattr(RegionManager, "serve_pending", hasty)
    find(schedules(), breaks("I1"), settings=searching)


def test_i1_finds_rights_that_are_hard_coded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Region, "rights", lambda region, _: region.access)
    find(schedules(), breaks("I1"), settings=searching)


def test_i2_finds_a_remove_that_leaves_attempts_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    remove, mark_stale = RegionManager._remove, MmuNotifier.mark_stale
    removed: list[UaddrRange] = []

    async def noted(regions: RegionManager, region: Region) -> None:
        removed.append(region.uaddrs)
        await remove(regions, region)

    def sparing(notifier: MmuNotifier, uaddrs: UaddrRange) -> None:
        if not any(uaddrs is each for each in removed):
            mark_stale(notifier, uaddrs)

    monkeypatch.setattr(RegionManager, "_remove", noted)
    monkeypatch.setattr(MmuNotifier, "mark_stale", sparing)
    find(schedules(), breaks("I2"), settings=searching)


def test_i4_finds_a_forward_of_what_was_merely_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    begin = RegionManager.begin

    def impatient(regions: RegionManager, gfn: int, access: Access) -> object:
        step = begin(regions, gfn, access)
        return Answer.UNBACKED if isinstance(step, Obstacle) else step

    monkeypatch.setattr(RegionManager, "begin", impatient)
    find(schedules(), breaks("I4"), settings=searching)


def test_i5_finds_a_resolve_under_the_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = InterceptPath._try

    async def locked(path: InterceptPath, attempt: Attempt) -> Answer | None:
        async with path._regions._lock:
            await path._address_space.resolve(
                attempt.uaddr_page, attempt.window.uaddrs, attempt.region.uaddrs
            )
        return await tried(path, attempt)

    monkeypatch.setattr(InterceptPath, "_try", locked)
    find(schedules(), breaks("I5"), settings=searching)


def test_i6_finds_attempts_that_are_never_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RegionManager, "finish", lambda *_: None)
    find(schedules(), breaks("I6"), settings=searching)


def test_i10_finds_a_change_that_is_not_shielded(monkeypatch: pytest.MonkeyPatch) -> None:
    def unshielded(*, shield: bool) -> trio.CancelScope:
        assert shield
        return trio.CancelScope()

    unshielding = SimpleNamespace(**{**vars(trio), "CancelScope": unshielded})
    monkeypatch.setattr("interceptd.region_manager.trio", unshielding)
    find(schedules(), breaks("I10"), settings=searching)


def test_i10_finds_a_resume_while_the_call_is_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RegionManager, "_changing", lambda *_: nullcontext())
    find(schedules(), breaks("I10"), settings=searching)
