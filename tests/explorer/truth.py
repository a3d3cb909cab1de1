"""The explorer's reference: the VMM's memory and regions, and what follows for the guest.

Owns the reference that every variant is judged by: plain ranges in lists, no locks, none of the code's flags.
While a call about a page is in progress, nothing is asserted of it. Must not know how any variant works.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from intercept_protocol.messages import RegionKind
from intercept_protocol.outcomes import Access, Answer

from .facts import Change, Gone, Memory, Reached, Watch
from .rules import Rule
from .script import RW, Bar, Pages, rights


class Truth:
    """`now` counts moments, for telling what was left from what came too late."""

    def __init__(self, now: Callable[[], int]) -> None:
        self.dirty = True
        self._now = now
        self._memory: list[Memory] = []
        self._past: list[Memory] = []
        self._regions: list[Bar] = []
        self._in_doubt: list[Bar] = []
        self._change: Change | None = None
        """The one under way: there is one VMM."""
        self._dangling: dict[Bar, int] = {}
        """Pinned regions that lost memory, and when the VMM was told that it is out of reach."""
        self._removed: list[tuple[Bar, int]] = []
        self._moving: list[Pages] = []
        self._closed: list[Gone] = []
        self._gone: list[Gone] = []
        self._watches: list[Watch] = []

    # ------------------------------------------------ what the VMM does

    def mapped(self, pages: Pages, pfn: int, access: Access) -> None:
        self._memory.append(Memory(pages, pfn, access))
        self._changed()

    def unmapped(self, pages: Pages) -> None:
        self._cut(pages)
        self._changed()

    def protected(self, pages: Pages, access: Access) -> None:
        taken = self._cut(pages)
        self._memory += [Memory(each.pages, each.pfn, access) for each in taken]
        self._changed()

    @contextmanager
    def motion(self, pages: Pages) -> Iterator[None]:
        """From a call that takes these pages away to its answer; by then the VMM has them back."""
        announced = self._now()
        self._moving.append(pages)
        shaken = [bar for bar in (*self._regions, *self._in_doubt) if _is_pinned(bar, pages)]
        self._dangling |= {bar: 0 for bar in shaken if bar not in self._dangling}
        self._changed()
        try:
            yield
            self._gone.append(Gone(pages, self._now(), announced))
            self._dangling |= {bar: self._now() for bar in shaken if bar in self._dangling}
        finally:
            self._moving.remove(pages)
            self._changed()

    def closed(self, pages: Pages) -> None:
        """An acknowledged begin: nothing reaches these pages until it is `opened`."""
        self._closed.append(Gone(pages, self._now(), self._now()))
        self._changed()

    def opened(self, pages: Pages) -> None:
        self._closed.remove(next(each for each in self._closed if each.pages == pages))
        self._changed()

    @contextmanager
    def doubt(self, bar: Bar) -> Iterator[None]:
        """While a call about this region is out."""
        self._in_doubt.append(bar)
        self._changed()
        try:
            yield
        finally:
            self._in_doubt.remove(bar)
            if bar not in self._regions:
                self._dangling.pop(bar, None)  # its add failed, and one that is added again is another
            self._changed()

    def added(self, bar: Bar) -> None:
        self._regions.append(bar)

    def removed(self, bar: Bar) -> None:
        self._regions.remove(bar)
        self._removed.append((bar, self._now()))
        self._dangling.pop(bar, None)  # one that is added again is another

    @contextmanager
    def change(self, remove: Sequence[Bar], add: Sequence[Bar]) -> Iterator[None]:
        """While a call is out that replaces regions: those before are true, or those after if it succeeds."""
        change = Change(tuple(bar for bar in remove if bar in self._regions), tuple(add), self._now())
        self._change = change
        self._in_doubt += [*change.old, *change.new]
        self._changed()
        succeeded = False
        try:
            yield
            succeeded = True
        finally:
            self._change = None
            for bar in (*change.old, *change.new):
                self._in_doubt.remove(bar)
            if succeeded:
                self._succeed(change)
            else:
                self._come_to_nothing(change)
            self._changed()

    # ------------------------------------------------ what may be said of it

    @contextmanager
    def watching(self, gfn: int, access: Access) -> Iterator[Watch]:
        watch = Watch(gfn, access, self._now())
        self._watches.append(watch)
        self._say_what_is_right(watch)
        try:
            yield watch
        finally:
            self._watches.remove(watch)

    def ends(self) -> None:
        """The VMM is gone, and its regions with it, at an unknown time."""
        self._in_doubt += self._regions
        self._changed()

    def movable(self) -> Iterator[Bar]:
        """The movable regions of which nothing is in doubt."""
        return (bar for bar in self._regions if bar.kind is RegionKind.MOVABLE and bar not in self._in_doubt)

    def pinned(self) -> Iterator[Bar]:
        """The pinned regions that are whole."""
        return (
            bar
            for bar in self._regions
            if bar.kind is RegionKind.PINNED and bar not in self._in_doubt and bar not in self._dangling
        )

    def stays(self, gfn: int) -> bool:
        """Whether a change is under way that leaves `gfn` as it is mapped."""
        before = self._change and self._change.alike(gfn)
        return before is not None and before not in self._dangling

    def mixed(self, reached: Iterable[Reached]) -> str | None:
        """What is reached of the regions before the change under way besides what is of those after it."""
        if self._change is None:
            return None
        before = after = None
        for each in reached:
            if not self._is_of(self._change.new, each):
                before = each if self._is_of(self._change.old, each) else before
            elif not self._is_of(self._regions, each):
                after = each
        return f"{after}, while {before} as before" if before and after else None

    def wrong(self, reached: Reached) -> tuple[Rule, str] | None:
        """Why the guest must not reach this, if it must not."""
        bars = [bar for bar in (*self._regions, *self._in_doubt) if bar.covers(reached.gfn)]
        if not bars:
            return self._outside(reached)
        verdicts = [self._wrong_in(bar, reached) for bar in bars]
        return verdicts[0] if all(verdicts) else None

    # ------------------------------------------------ helpers

    def _succeed(self, change: Change) -> None:
        for bar in change.old:
            self.removed(bar)
        for bar in change.new:
            self.added(bar)
            gone = [*self._moving, *(each.pages for each in self._gone if each.since > change.began)]
            if any(_is_pinned(bar, pages) for pages in gone):
                self._dangling[bar] = 0  # unless it was before the region was looked at

    def _come_to_nothing(self, change: Change) -> None:
        """What was mapped of a dangling region may have been mapped again."""
        self._dangling |= {bar: self._now() for bar in change.old if self._dangling.get(bar)}
        for bar in change.new:
            if bar not in self._regions:
                self._dangling.pop(bar, None)

    def _is_of(self, bars: Sequence[Bar], reached: Reached) -> bool:
        """Whether one of these regions gives the guest this, or did when its memory was there."""
        memories = [*self._memory, *self._past]
        for bar in bars:
            if bar.covers(reached.gfn) and not reached.access & ~bar.access:
                page = bar.page_of(reached.gfn)
                if any(page in memory.pages and memory.pfn_of(page) == reached.pfn for memory in memories):
                    return True
        return False

    def _changed(self) -> None:
        self.dirty = True
        for watch in self._watches:
            self._say_what_is_right(watch)

    def _at(self, page: int) -> Memory | None:
        for memory in self._memory:
            if page in memory.pages:
                return memory
        return None

    def _cut(self, pages: Pages) -> list[Memory]:
        """Take these pages out of the VMAs; returns what was taken."""
        kept: list[Memory] = []
        taken: list[Memory] = []
        for memory in self._memory:
            held = memory.pages
            start, end = max(held.start, pages.start), min(held.end, pages.end)
            if start >= end:
                kept.append(memory)
                continue
            taken.append(Memory(Pages(start, end), memory.pfn_of(start), memory.access))
            if held.start < start:
                kept.append(Memory(Pages(held.start, start), memory.pfn, memory.access))
            if end < held.end:
                kept.append(Memory(Pages(end, held.end), memory.pfn_of(end), memory.access))
        self._memory = kept
        self._past += taken
        return taken

    def _is_moving(self, page: int) -> bool:
        return any(page in pages for pages in self._moving)

    def _closed_since(self, page: int) -> int | None:
        return max((each.since for each in self._closed if page in each.pages), default=None)

    def _wrong_in(self, bar: Bar, reached: Reached) -> tuple[Rule, str] | None:
        page = bar.page_of(reached.gfn)
        if self._is_moving(page):
            return None
        since = self._closed_since(page)
        if since is not None:
            rule = (
                Rule.EXTRAPOLATED if self._is_a_guess(bar, reached, since) else _left_or_late(reached, since)
            )
            return rule, f"{reached}, page {page}, which is being invalidated"
        memory = self._at(page)
        if memory is None or memory.pfn_of(page) != reached.pfn:
            return self._wrong_frame(bar, page, memory, reached)
        if reached.access & ~_rights(bar, memory.access):
            return self._excess(bar, page, memory, reached)
        told = self._dangling.get(bar)
        changes = self._change is not None and bar in (*self._change.old, *self._change.new)
        if told and not changes and reached.mapped_at > told:
            return Rule.DANGLING, f"{reached}, in {bar.name}, whose memory had gone"
        if any(page in each.pages and reached.mapped_at < each.announced for each in self._gone):
            return Rule.LEFT, f"{reached}, page {page}, as it did before the invalidation"
        return None

    def _wrong_frame(self, bar: Bar, page: int, memory: Memory | None, reached: Reached) -> tuple[Rule, str]:
        if self._had_it(page, reached) and not self._is_a_guess(bar, reached, self._gone_at(page)):
            return self._outlived(page, reached), f"{reached}, which page {page} had before and has no more"
        if memory is None:
            return Rule.EXTRAPOLATED, f"{reached}, and no VMA is at page {page}"
        return Rule.WRONG_FRAME, f"{reached}, and page {page} is pfn {memory.pfn_of(page)}"

    def _excess(self, bar: Bar, page: int, memory: Memory, reached: Reached) -> tuple[Rule, str]:
        given = f"{bar.name} gives {rights(bar.access)} and the VMA {rights(memory.access)}"
        had = any(not reached.access & ~_rights(bar, past.access) for past in self._had_it(page, reached))
        if had and not self._is_a_guess(bar, reached, self._gone_at(page)):
            return self._outlived(page, reached), f"{reached}, and now {given}"
        return Rule.EXCESS, f"{reached}, and {given}"

    def _had_it(self, page: int, reached: Reached) -> list[Memory]:
        """The VMAs of the past in which the page had the frame that is reached."""
        return [past for past in self._past if page in past.pages and past.pfn_of(page) == reached.pfn]

    def _gone_at(self, page: int) -> int:
        return max(each.since for each in self._gone if page in each.pages)

    def _outlived(self, page: int, reached: Reached) -> Rule:
        return _left_or_late(reached, self._gone_at(page))

    def _is_a_guess(self, bar: Bar, reached: Reached, gone_at: int) -> bool:
        """Whether it was mapped for an intercept of a page that is there, and that began when this one had
        gone: what was looked up was not out of date, but is no word about this page."""
        asked = reached.mapped_for
        if asked is None or asked.began < gone_at:
            return False
        page = bar.page_of(asked.gfn)
        return self._at(page) is not None and self._closed_since(page) is None

    def _outside(self, reached: Reached) -> tuple[Rule, str]:
        removed = [(at, bar) for bar, at in self._removed if bar.covers(reached.gfn)]
        if not removed:
            return Rule.LATE_REGION, f"{reached}, in no region"
        at, bar = removed[-1]
        rule = Rule.LEFT_REGION if reached.mapped_at <= at else Rule.LATE_REGION
        return rule, f"{reached}, in no region: {bar.name} was removed"

    def _say_what_is_right(self, watch: Watch) -> None:
        """Every FORWARD that would be right at this instant."""
        covering = [bar for bar in (*self._regions, *self._in_doubt) if bar.covers(watch.gfn)]
        throughout = self._change is not None and self._change.covers_throughout(watch.gfn)
        if not throughout and all(bar in self._in_doubt for bar in covering):
            watch.rightly.add(Answer.NO_REGION)
        for bar in covering:
            page = bar.page_of(watch.gfn)
            memory = self._at(page)
            if watch.access not in bar.access:
                watch.rightly.add(Answer.PERMISSION)
                continue
            if bar in self._dangling:
                watch.rightly.add(Answer.UNBACKED)
            if self._dangling.get(bar):
                continue
            if self._is_moving(page) or self._closed_since(page) is not None:
                watch.was_going = True
            elif memory is None:
                watch.rightly.add(Answer.UNBACKED)
            elif watch.access not in _rights(bar, memory.access):
                watch.rightly.add(Answer.PERMISSION)


def _left_or_late(reached: Reached, gone_at: int) -> Rule:
    return Rule.LEFT if reached.mapped_at <= gone_at else Rule.LATE


def _is_pinned(bar: Bar, pages: Pages) -> bool:
    return bar.kind is RegionKind.PINNED and bar.pages.overlaps(pages)


def _rights(bar: Bar, vma: Access) -> Access:
    shared = bar.access & vma & RW
    return shared | (bar.access & Access.EXECUTE) if Access.READ in shared else shared
