"""One schedule: the actors of a script, a system under test, and the choices of which actor runs next.

Owns carrying the verbs out and telling the truth about them. Must not know what is searched for.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import dataclass

import trio
from trio.testing import MockClock

from intercept_protocol.errors import WireError
from intercept_protocol.outcomes import Answer, Outcome
from intercept_protocol.text import sentence
from interceptd.pages.mapping import Mapping

from . import script
from .judge import Judge
from .model_partition import TIMEOUT
from .pauses import Asked, Point
from .rules import Finding, Rule
from .scheduler import TIME, VMM, Chooser, Scheduler, youngest_first
from .script import Bar, Script, Touch, Verb
from .system_under_test import Build
from .timeline import Side, Story, port_call
from .verbs import Verbs

EXPECTED_REFUSALS = {errno.EEXIST, errno.ENOENT, errno.EINVAL, errno.EFAULT, errno.ENOMEM}
"""Errors that a VMM may get when its calls conflict, or when the hypervisor was ordered to refuse."""
MOST_RETRIES = 3
"""Answers RETRY after which a VP does something else."""
TAKES_AWAY = (
    script.UnmapVma,
    script.ProtectVma,
    script.RemoveRegion,
    script.ChangeRegions,
    script.Begin,
    script.Invalidate,
)
"""Verbs after whose answer the VMM relies on something: that moment is always told."""


@dataclass(frozen=True, slots=True)
class Outcomes:
    """What one schedule came to: its choices, and the first finding of each rule."""

    trace: Sequence[str]
    findings: dict[Rule, Finding]


class Run:
    """One schedule under way; the subject's stage, too."""

    def __init__(
        self,
        play: Script,
        build: Build,
        chooser: Chooser,
        clock: MockClock,
        story: Story,
        *,
        judges_recovery: bool,
    ) -> None:
        self._play = play
        self._story = story
        self._judge = Judge(_looked_at(play), lambda: self._scheduler.step, judges_recovery=judges_recovery)
        self._truth = self._judge.truth
        self._notifiers = [f"thread {n}" for n in range(len(play.notifiers))]
        self._vps = [f"VP {n}" for n in range(len(play.vps))]
        names = [VMM, *self._notifiers, *self._vps]
        self._scheduler = Scheduler(names, chooser, clock, self._look_at_rest)
        self._subject = build(play, self)
        self._actors: trio.Nursery | None = None
        self._all_through = trio.Event()
        self._intercepts = 0
        self._verbs = Verbs(self._subject, self._judge, len(play.vps))

    async def run(self) -> Outcomes:
        try:
            async with trio.open_nursery() as self._actors:
                self._actors.start_soon(self._live)
                await self._scheduler.run()
                if self._scheduler.stuck:
                    self._judge.find(Rule.STUCK, f"still waiting: {', '.join(self._scheduler.stuck)}")
                self._actors.cancel_scope.cancel()
        except* Exception as group:  # any exception is a fault of the system under test
            error = _first(group)
            self._judge.find(Rule.BROKE, f"{type(error).__name__}: {sentence(error)}")
        return Outcomes(self._scheduler.trace, self._judge.findings)

    # ------------------------------------------------ the subject's stage

    async def at(self, point: Point, asked: Asked) -> None:
        self.at_once(point, asked)
        await self._scheduler.stop()

    def at_once(self, point: Point, asked: Asked) -> None:
        who = self._scheduler.current()
        if point is Point.RESOLVE or point is Point.RESOLVED:
            self._must_not_hold_a_lock(who)
        else:
            mapping = asked if isinstance(asked, Mapping) else None
            self._judge.port(point, who, mapping, self._subject.slat)
        if self._story.wanted:
            self._story.tell(self._scheduler.step, Side.DAEMON, who, port_call(point, asked))

    async def step(self, what: str) -> None:
        self.tell(what)
        await self._scheduler.stop()

    async def sleep(self, what: str) -> None:
        who = self._scheduler.current()
        self.tell(what)
        self._must_not_hold_a_lock(who)
        await self._scheduler.stop()

    def name(self, actor: str) -> None:
        self._scheduler.name(actor)

    def tell(self, what: str, *of: object) -> None:
        if self._story.wanted:
            self._story.tell(self._scheduler.step, Side.DAEMON, self._scheduler.current(), what, *of)

    def find(self, rule: Rule, how: str) -> None:
        self._judge.find(rule, how)

    def _must_not_hold_a_lock(self, who: str) -> None:
        lock = self._subject.sleeps_with_a_lock()
        if lock is not None:
            self._judge.find(Rule.SLEPT, f"{who} may sleep here, and holds {lock}")

    def _look_at_rest(self) -> None:
        self._look()
        self._judge.everybody_stands()

    def _look(self) -> None:
        self._judge.look(self._subject)

    # ------------------------------------------------ lives

    async def _live(self) -> None:
        await self._subject.live(self._vmm)
        left = self._subject.remains()
        if left is not None:
            self._judge.find(Rule.REMAINS, left)
        self._scheduler.end()

    async def _vmm(self) -> None:
        assert self._actors is not None
        self._scheduler.name(VMM)
        for verb in self._play.given:
            await self._perform(verb)
        self._story.begins()
        for n in range(len(self._vps)):
            self._subject.attach(n, self._judge.answer)
        self._scheduler.acting.update([VMM, *self._notifiers, *self._vps])
        for n, name in enumerate(self._notifiers):
            self._actors.start_soon(self._notifier, name, self._play.notifiers[n])
        for n, name in enumerate(self._vps):
            self._actors.start_soon(self._vp, n, name, self._play.vps[n])
        if await self._act(VMM, self._play.vmm):
            await self._all_through.wait()
        self._truth.ends()

    async def _notifier(self, name: str, verbs: Sequence[Verb]) -> None:
        self._scheduler.name(name)
        await self._act(name, verbs)

    async def _act(self, name: str, verbs: Sequence[Verb]) -> bool:
        """Carry out the verbs one by one; whether the actor lives on."""
        lives = True
        for verb in verbs:
            await self._scheduler.stop()
            if isinstance(verb, script.Die):
                self._speak(name, "dies")
                lives = False
                break
            await self._perform(verb)
        self._through(name)
        return lives

    def _through(self, name: str) -> None:
        self._scheduler.acting.discard(name)
        if not self._scheduler.acting:
            self._all_through.set()

    # ------------------------------------------------ verbs

    async def _perform(self, verb: Verb) -> None:
        who = self._scheduler.current()
        self._speak(who, "{}", verb)
        step = self._scheduler.step
        try:
            await self._verbs.carry_out(verb)
        except WireError as error:
            if error.number not in EXPECTED_REFUSALS:
                raise
            self._speak(who, "gets {}", error.name)
        else:
            if self._scheduler.step != step or isinstance(verb, TAKES_AWAY):
                self._speak(who, "is answered")
        self._look()

    # ------------------------------------------------ a guest

    async def _vp(self, n: int, name: str, touches: Sequence[Touch]) -> None:
        self._scheduler.name(name)
        for touch in touches:
            if not await self._touch(n, name, touch):
                break
        self._verbs.out[n].set()
        self._through(name)

    async def _touch(self, n: int, name: str, touch: Touch) -> bool:
        """Until the access succeeds or is abandoned; returns whether the VP continues."""
        resumes = retries = 0
        while True:
            await self._scheduler.stop()
            if self._judge.reaches(touch) and not touch.trapped:
                self._speak(name, "{}: pfn {}", touch, self._judge.pfn(touch.gfn))
                return True
            self._speak(name, "{}: intercept", touch)
            answer = await self._ask(n, touch)
            self._speak(name, "gets {}", answer if self._subject.says_why else answer.outcome)
            match answer.outcome:
                case Outcome.RESUME:
                    resumes += 1
                    self._judge.resumed(touch, resumes)
                    if resumes > MOST_RESUMES_FOLLOWED:
                        return True
                case Outcome.RETRY:
                    retries += 1
                    if answer is Answer.KICKED:
                        return True
                    if answer is Answer.DRAINING or retries == MOST_RETRIES:
                        return answer is not Answer.DRAINING
                case _:
                    return True

    async def _ask(self, n: int, touch: Touch) -> Answer:
        with self._judge.intercept(self._vps[n], touch) as watch:
            asked_at = trio.current_time()
            self._intercepts += 1
            if TIME not in self._scheduler.trace:
                self._scheduler.timeout = TIMEOUT
            try:
                answer = await self._subject.intercept(n, touch)
            finally:
                self._intercepts -= 1
                if not self._intercepts:
                    self._scheduler.timeout = None
            if answer is None:
                self._judge.find(Rule.LATE_ANSWER, f"{touch}: never answered")
                return Answer.DRAINING
            self._judge.forwarded(touch, answer, watch, says_why=self._subject.says_why)
        self._in_time(n, touch, answer, asked_at)
        return answer

    def _in_time(self, n: int, touch: Touch, answer: Answer, asked_at: float) -> None:
        now = trio.current_time()
        if now - asked_at > TIMEOUT + 0.001:
            self._judge.find(Rule.LATE_ANSWER, f"{touch}: told {answer} after {now - asked_at:.0f} s")
        elif now - asked_at >= TIMEOUT and TIME not in self._scheduler.trace:
            self._judge.find(Rule.LATE_ANSWER, f"{touch}: waited for a timeout, and nobody was at work")
        kicked_at = self._verbs.kicked_at.pop(n, None)
        if kicked_at is not None and now > max(kicked_at, asked_at) and TIME not in self._scheduler.trace:
            self._judge.find(Rule.LATE_ANSWER, f"{touch}: VP {n} was kicked, and had to wait for a timeout")

    def _speak(self, who: str, what: str, *of: object) -> None:
        if self._story.wanted:
            self._story.tell(self._scheduler.step, Side.VMM, who, what, *of)


MOST_RESUMES_FOLLOWED = 20
"""Where a VP that is sent back to the same access gives up: enough is seen by then."""


async def play(
    script_: Script,
    build: Build,
    chooser: Chooser,
    clock: MockClock,
    story: Story,
    *,
    backwards: bool,
    judges_recovery: bool,
) -> Outcomes:
    """Run a script once, on the clock of this `trio.run`."""
    youngest_first(backwards=backwards)
    return await Run(script_, build, chooser, clock, story, judges_recovery=judges_recovery).run()


def _looked_at(play: Script) -> list[int]:
    """The gfns that VPs touch, and the first, the last and those around of every region."""
    gfns = {touch.gfn for touches in play.vps for touch in touches}
    for verbs in (play.given, play.vmm):
        for verb in verbs:
            for bar in _added(verb):
                gfns |= {bar.gfn, bar.gfn + bar.count // 2, bar.gfn + bar.count - 1, bar.gfn + bar.count}
    return sorted(gfns)


def _added(verb: Verb) -> Sequence[Bar]:
    match verb:
        case script.AddRegion(bar):
            return [bar]
        case script.ChangeRegions(_, bars):
            return bars
        case _:
            return []


def _first(group: BaseExceptionGroup[Exception]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
