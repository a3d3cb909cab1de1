"""Checks after every step what the guest reaches, and reports which rules are broken.

Owns the findings of one schedule and the moments of its maps. What is true is the truth's to say; who goes
next is the scheduler's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from intercept_protocol.addresses import PAGE_LIMIT, GfnRange
from intercept_protocol.outcomes import Access, Answer, Outcome
from intercept_protocol.text import sentence
from interceptd.hypervisor.software import SoftwareHypervisor
from interceptd.pages.mapping import Mapping

from .facts import Reached, Watch
from .pauses import Point
from .rules import Finding, Rule
from .scheduler import DAEMON, VMM
from .script import Touch, rights
from .successor import Successor
from .system_under_test import Subject
from .truth import Truth

EVERYWHERE = GfnRange(start=0, end=PAGE_LIMIT)
MOST_RESUMES = 17
"""Answers RESUME for one access that does not come through: the map, and the 16 that I8 allows."""


class Judge:
    """`gfns` are those that are checked: all that a script touches, and the edges around them. `step`
    is the schedule's step under way. `judges_recovery`: the rules of I11, too."""

    def __init__(self, gfns: Sequence[int], step: Callable[[], int], *, judges_recovery: bool) -> None:
        self.gfns = gfns
        self._judges_recovery = judges_recovery
        self.truth = Truth(lambda: self._moment)
        self.findings: dict[Rule, Finding] = {}
        """The first of each rule."""
        self._step = step
        self._moment = 0
        self._reached: dict[int, Mapping] = {}
        """As of the last port call."""
        self._mapped_at: dict[int, int] = {}
        self._mapped_by: dict[int, str] = {}
        self._mapped_for: dict[int, Watch | None] = {}
        self._intercepts: dict[str, Watch] = {}
        """By VP, the last that it raised."""
        self._announced: set[object] = set()
        self._in_this_pass: set[object] | None = None
        """What was announced when the pass under way made its first call."""
        self._to_be_served: set[object] = set()

    def find(self, rule: Rule, how: str) -> None:
        if rule not in self.findings:
            self.findings[rule] = Finding(rule, how, self._step())

    # ------------------------------------------------ after each step

    def look(self, subject: Subject) -> None:
        """At what is true and what is reached, if either has changed."""
        if not self.truth.dirty:
            return
        self.truth.dirty = False
        all_reached = [self._reached_at(gfn, mapping) for gfn, mapping in self._reached.items()]
        for reached in all_reached:
            verdict = self.truth.wrong(reached)
            if verdict is not None:
                self.find(*verdict)
        if (how := self.truth.mixed(all_reached)) is not None:
            self.find(Rule.MIXED, how)
        if (how := subject.misrecorded(self.gfns)) is not None:
            self.find(Rule.UNKNOWN, how)
        if (how := subject.disorder()) is not None:
            self.find(Rule.DISORDER, how)
        if self._judges_recovery:
            self._look_at_recovery(subject)
        self._look_for_stranded(subject.slat)
        self._look_for_unpinned()

    def _look_at_recovery(self, subject: Subject) -> None:
        if (how := subject.unlogged()) is not None:
            self.find(Rule.UNLOGGED, how)
        try:
            for successor in subject.successors():
                self._look_at(successor)
        except Exception as error:  # any is a fault of what brings it back
            self.find(Rule.UNRECOVERED, f"{type(error).__name__}: {sentence(error)}")

    def _look_at(self, successor: Successor) -> None:
        """What it has, and what its VPs would be answered."""
        if (how := successor.wrong(self.gfns)) is not None:
            self.find(Rule.UNRECOVERED, how)
        left = [gfn for gfn in self.gfns if successor.mapping(gfn) is not None]
        for gfn in self.gfns:
            mapped_at = self._mapped_at.get(gfn, 0) if gfn in left else self._moment + 1
            for access in (Access.READ, Access.WRITE):
                if (how := self._touched(successor, Touch(gfn, access), mapped_at)) is not None:
                    self.find(Rule.UNRECOVERED, how)

    def _touched(self, successor: Successor, touch: Touch, mapped_at: int) -> str | None:
        """What is wrong with what a guest is answered, or reaches then."""
        with self.truth.watching(touch.gfn, touch.access) as watch:
            answer = successor.touch(touch.gfn, touch.access)
        mapping = successor.mapping(touch.gfn)
        frame = None if mapping is None else mapping.frame_at(touch.gfn)
        if mapping is not None and frame is not None:
            verdict = self.truth.wrong(Reached(touch.gfn, frame.page, mapping.access, mapped_at, watch))
            if verdict is not None:
                return f"{verdict[0].name}: {verdict[1]}"
        match answer and answer.outcome:
            case Outcome.FORWARD if answer not in watch.rightly and not watch.was_going:
                return f"{touch}: told {answer}"
            case Outcome.RESUME if mapping is None or touch.access not in mapping.access:
                return f"{touch}: told {answer}, and does not reach it"
        return None

    def everybody_stands(self) -> None:
        """All notifications have been delivered by now."""
        if self._to_be_served & self._announced:
            self.find(Rule.WAITED, "announced before the pass made its first call, and not served by it")
        self._to_be_served = set()

    def _look_for_stranded(self, slat: SoftwareHypervisor) -> None:
        for bar in self.truth.movable():
            for gfn in self.gfns:
                if bar.covers(gfn) and slat.table.entry(gfn) is None:
                    self.find(Rule.STRANDED, f"gfn {gfn} of {bar.name}")

    def _look_for_unpinned(self) -> None:
        for bar in self.truth.pinned():
            for gfn in self.gfns:
                if bar.covers(gfn) and gfn not in self._reached:
                    self.find(Rule.UNPINNED, f"gfn {gfn} of {bar.name}")

    def _reached_at(self, gfn: int, mapping: Mapping) -> Reached:
        frame = mapping.frame_at(gfn)
        assert frame is not None, "what is reached has a frame"
        return Reached(gfn, frame.page, mapping.access, self._mapped_at[gfn], self._mapped_for[gfn])

    # ------------------------------------------------ port calls

    def port(self, point: Point, who: str, mapping: Mapping | None, slat: SoftwareHypervisor) -> None:
        """A call of the hypervisor is made by `who`, or has done its work; `mapping` is what it is to map."""
        match point:
            case Point.MAP:
                assert mapping is not None
                self._before_a_map(mapping)
            case Point.MAPPED | Point.REFUSED | Point.UNMAPPED:
                self._after_a_change(point, who, mapping, slat)
        if self._in_this_pass is None and who == DAEMON:
            self._in_this_pass = set(self._announced)

    def _before_a_map(self, mapping: Mapping) -> None:
        if mapping.frame is not None and mapping.frame.page + mapping.end - mapping.start > PAGE_LIMIT:
            self.find(Rule.WRAPPED, f"gfn {mapping.start} is to reach pfn {mapping.frame.page:#x}")
        if mapping.access:
            for gfn in self._reached:
                if mapping.start <= gfn < mapping.end:
                    over = f"gfns {mapping.start}-{mapping.end - 1} are mapped over it"
                    self.find(Rule.REMAPPED, f"gfn {gfn} reaches pfn {self.pfn(gfn)}, and {over}")

    def _after_a_change(
        self, point: Point, who: str, mapping: Mapping | None, slat: SoftwareHypervisor
    ) -> None:
        self._moment += 1
        self.truth.dirty = True
        reached: dict[int, Mapping] = {}
        for entry in slat.table.entries(EVERYWHERE):
            if entry.access:
                for gfn in self.gfns:
                    if entry.start <= gfn < entry.end:
                        reached[gfn] = entry
        for gfn in self._reached.keys() - reached.keys():
            owner = self._mapped_by[gfn]
            if who != owner and who.startswith("VP") and owner.startswith("VP"):
                self.find(Rule.UNDONE, f"gfn {gfn}, which {owner} had mapped, was unmapped by {who}")
            if who == VMM and self.truth.stays(gfn):
                self.find(Rule.DISTURBED, f"gfn {gfn} was unmapped by {who}")
        if point is Point.MAPPED and mapping is not None and mapping.access:
            for gfn in reached:
                if mapping.start <= gfn < mapping.end:
                    self._mapped_at[gfn] = self._moment
                    self._mapped_by[gfn] = who
                    self._mapped_for[gfn] = self._intercepts.get(who)
        self._reached = reached

    # ------------------------------------------------ announcements

    def announced(self, announcement: object) -> None:
        self._moment += 1
        self._announced.add(announcement)

    def acknowledged(self, announcement: object) -> None:
        self._moment += 1
        self._announced.discard(announcement)
        if self._in_this_pass is not None and announcement in self._in_this_pass:
            self._to_be_served, self._in_this_pass = self._in_this_pass, None

    # ------------------------------------------------ intercepts and their answers

    @contextmanager
    def intercept(self, who: str, touch: Touch) -> Iterator[Watch]:
        """From a VP's intercept to its answer."""
        with self.truth.watching(touch.gfn, touch.access) as watch:
            self._intercepts[who] = watch
            yield watch

    def reaches(self, touch: Touch) -> bool:
        mapping = self._reached.get(touch.gfn)
        return mapping is not None and touch.access in mapping.access

    def rights(self, gfn: int) -> Access:
        mapping = self._reached.get(gfn)
        return Access.NONE if mapping is None else mapping.access

    def pfn(self, gfn: int) -> int | None:
        frame = self._reached[gfn].frame_at(gfn) if gfn in self._reached else None
        return None if frame is None else frame.page

    def answer(self, touch: Touch, answer: Answer) -> None:
        """At the very instant of the answer, before anyone else runs."""
        if answer.outcome is Outcome.RESUME and not self.reaches(touch):
            self.find(
                Rule.LIED, f"{touch}: told {answer.outcome}, and reaches {rights(self.rights(touch.gfn))}"
            )

    def forwarded(self, touch: Touch, answer: Answer, watch: Watch, *, says_why: bool) -> None:
        right = answer in watch.rightly if says_why else watch.rightly or watch.was_going
        if answer.outcome is Outcome.FORWARD and not right:
            self.find(Rule.FORWARDED, f"{touch}: told {answer if says_why else 'to emulate it'}")

    def resumed(self, touch: Touch, times: int) -> None:
        if times > MOST_RESUMES:
            self.find(Rule.SPUN, f"{touch}: told to go on {times} times running")
