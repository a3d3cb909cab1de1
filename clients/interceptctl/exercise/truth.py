"""The exerciser's reference: what backs every page and what every gfn leads to, now and in the past.

Owns the regions and VMAs, page by page, and every judgement of whether something can have been true. Pure:
the caller records when each change was requested and acknowledged, and asks about intervals of ticks. Must
not know connections or how a daemon works. History that no open question can be about is dropped.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

from intercept_protocol.addresses import UaddrRange
from intercept_protocol.messages import RegionKind
from intercept_protocol.outcomes import Access, Answer

from .clock import Clock, During
from .history import FOREVER, History
from .world import RESUMED, Backing, Invalidation, Region, Sight, decide, sight


@dataclass(frozen=True, slots=True)
class State:
    """A region and a backing that were possible together, at every instant of `during`."""

    during: During
    region: Region | None
    backing: Backing | None
    shut: bool
    """Throughout, the page was in an invalidation that had begun and not ended."""


@dataclass(slots=True)
class Edit:
    """A requested change; it is acknowledged or refused once."""

    _truth: Truth
    _pages: list[History[Backing | None]]
    _gfns: list[History[Region | None]]
    _invalidation: Invalidation | None = None
    _added: Region | None = None

    def acknowledge(self, at: int) -> None:
        for page in self._pages:
            page.acknowledge(at, self._truth.horizon)
        for gfn in self._gfns:
            gfn.acknowledge(at, self._truth.horizon)
        if self._invalidation is not None:
            self._invalidation.gone = self._invalidation.shut_until = at

    def refuse(self, at: int) -> None:
        for page in self._pages:
            page.refuse(at, self._truth.horizon)
        for gfn in self._gfns:
            gfn.refuse(at, self._truth.horizon)
        if self._added is not None:
            self._truth.forget(self._added)


class Truth:
    """See the module. Ticks come from `clock`, which also says which history can be dropped."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._backings: dict[int, History[Backing | None]] = {}
        self._layout: dict[int, History[Region | None]] = {}
        self._regions: dict[Region, None] = {}
        self._invalidations: list[Invalidation] = []

    @property
    def horizon(self) -> int:
        return self._clock.horizon

    # ------------------------------------------------ the present, as far as acknowledged

    @property
    def regions(self) -> list[Region]:
        return list(self._regions)

    def backing(self, page: int) -> Backing | None:
        """What stands behind a uaddr page."""
        history = self._backings.get(page)
        return None if history is None else history.now

    def gaps(self, uaddrs: UaddrRange) -> list[UaddrRange]:
        """The unbacked runs of `uaddrs`."""
        runs: list[UaddrRange] = []
        for page in range(uaddrs.start, uaddrs.end):
            if self.backing(page) is None:
                start = runs.pop().start if runs and runs[-1].end == page else page
                runs.append(UaddrRange(start=start, end=page + 1))
        return runs

    # ------------------------------------------------ changes, each requested `at` a tick

    def ask_map(self, uaddrs: UaddrRange, first: Backing, at: int) -> Edit:
        """A VMA over `uaddrs`, where nothing is; `first` is behind its first page, the rest follow it."""
        pages = [self._page(page) for page in range(uaddrs.start, uaddrs.end)]
        for offset, history in enumerate(pages):
            history.ask(first.ahead(offset), at)
        return Edit(self, pages, [])

    def ask_unmap(self, uaddrs: UaddrRange, at: int) -> Edit:
        pages = self._backed(uaddrs)
        for history, _ in pages:
            history.ask(None, at)
        return Edit(self, [history for history, _ in pages], [], self.ask_invalidation(uaddrs, at))

    def ask_protect(self, uaddrs: UaddrRange, access: Access, at: int) -> Edit:
        pages = self._backed(uaddrs)
        for history, backing in pages:
            history.ask(Backing(backing.frame, access, backing.io), at)
        return Edit(self, [history for history, _ in pages], [], self.ask_invalidation(uaddrs, at))

    def ask_add(self, region: Region, at: int) -> Edit:
        self._regions[region] = None
        gfns = [self._gfn(gfn) for gfn in range(region.gfns.start, region.gfns.end)]
        for history in gfns:
            history.ask(region, at)
        return Edit(self, [], gfns, _added=region)

    def ask_remove(self, region: Region, at: int) -> Edit:
        self.forget(region)
        gfns = [self._gfn(gfn) for gfn in range(region.gfns.start, region.gfns.end)]
        for history in gfns:
            history.ask(None, at)
        return Edit(self, [], gfns)

    def forget(self, region: Region) -> None:
        """The region was removed, or its add was refused."""
        del self._regions[region]

    def question(self) -> AbstractContextManager[int]:
        """Within the block, no history since its tick is dropped."""
        return self._clock.question()

    def disturbed(self, uaddrs: UaddrRange, since: int) -> bool:
        """Whether an invalidation of some of these pages was in progress at any time since `since`."""
        return any(
            each.uaddrs.overlaps(uaddrs) and max(each.gone, each.shut_until) >= since
            for each in self._invalidations
        )

    def ask_invalidation(self, uaddrs: UaddrRange, at: int) -> Invalidation:
        """`uaddrs` is being revoked from the guest; the caller sets `gone` and `shut_until`."""
        horizon = self.horizon
        self._invalidations = [old for old in self._invalidations if max(old.gone, old.shut_until) >= horizon]
        invalidation = Invalidation(uaddrs, asked=at, gone=FOREVER)
        self._invalidations.append(invalidation)
        for region in self._regions:
            if region.kind is RegionKind.PINNED and region.uaddrs.overlaps(uaddrs):
                region.hits.append(invalidation)
        return invalidation

    # ------------------------------------------------ what was possible

    def possible_answers(self, gfn: int, access: Access, during: During) -> frozenset[Answer]:
        """Every answer that was right at some instant of `during`, besides "ask again"."""
        return frozenset(
            answer
            for state in self.states(gfn, during)
            for answer in _answers(state, gfn, access)
            if not (state.shut and answer in RESUMED)
        )

    def possible_sights(self, gfn: int, during: During) -> set[Sight]:
        """Everything that a guest may have reached at `gfn` at some instant of `during`."""
        seen = (
            None if state.shut or _taken_for_good(state, gfn) else sight(state.region, state.backing)
            for state in self.states(gfn, during)
        )
        return {something for something in seen if something is not None}

    def touched(self, gfn: int, during: During) -> bool:
        """Whether anything in `during` can have revoked a mapping of `gfn`."""
        layouts = self._layout_of(gfn).possible(during)
        return len(layouts) > 1 or any(
            region is not None and self._invalidated(region.uaddr_page(gfn), during) for region, _ in layouts
        )

    def states(self, gfn: int, during: During) -> Iterator[State]:
        """Every state of `gfn` that was possible at some instant of `during`.

        Region and backing change independently; they were possible together when their times overlap.
        """
        for region, covered in self._layout_of(gfn).possible(during):
            if region is None:
                yield State(covered, None, None, shut=False)
                continue
            page = region.uaddr_page(gfn)
            for backing, both in self._backings.get(page, _NEVER_BACKED).possible(covered):
                yield State(both, region, backing, self._shut(page, both))

    def _layout_of(self, gfn: int) -> History[Region | None]:
        return self._layout.get(gfn, _NO_REGION_EVER)

    def _invalidated(self, page: int, during: During) -> bool:
        return any(
            page in each.uaddrs and each.asked <= during.last and during.first <= each.gone
            for each in self._invalidations
        )

    def _shut(self, page: int, during: During) -> bool:
        """Whether invalidations that had begun and not ended cover `during` without a gap.

        Between sending an end and the acknowledgement of the next begin the page may be free for an instant,
        even if the two ticks are adjacent.
        """
        shut = sorted((each.gone, each.shut_until) for each in self._invalidations if page in each.uaddrs)
        reached = during.first
        for start, end in shut:
            if start <= reached <= end:
                reached = end
        return reached > during.first and reached >= during.last

    # ------------------------------------------------ helpers

    def _backed(self, uaddrs: UaddrRange) -> list[tuple[History[Backing | None], Backing]]:
        pages = (self._backings.get(page) for page in range(uaddrs.start, uaddrs.end))
        return [
            (history, history.now) for history in pages if history is not None and history.now is not None
        ]

    def _page(self, page: int) -> History[Backing | None]:
        if page not in self._backings:
            self._backings[page] = History(None)
        return self._backings[page]

    def _gfn(self, gfn: int) -> History[Region | None]:
        if gfn not in self._layout:
            self._layout[gfn] = History(None)
        return self._layout[gfn]


_NEVER_BACKED: History[Backing | None] = History(None)
_NO_REGION_EVER: History[Region | None] = History(None)


def _answers(state: State, gfn: int, access: Access) -> frozenset[Answer]:
    """The right answers in one state. A pinned region that was hit maps nothing again: pages inside the range
    are gone for good, the others stay as they are."""
    right = decide(state.region, state.backing, access)
    region = state.region
    if (
        region is None
        or access not in region.access
        or not any(h.asked <= state.during.last for h in region.hits)
    ):
        return right
    if _taken_for_good(state, gfn):
        return frozenset({Answer.UNBACKED})
    return right | {Answer.UNBACKED}


def _taken_for_good(state: State, gfn: int) -> bool:
    if state.region is None:
        return False
    page = state.region.uaddr_page(gfn)
    return any(page in hit.uaddrs and hit.gone <= state.during.first for hit in state.region.hits)
