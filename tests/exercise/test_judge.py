"""The judge finds each kind of fault, and nothing in a correct daemon."""

from __future__ import annotations

import pytest

from exercise.worlds import GFN, READ, READ_WRITE, WRITE, Scene, backing, region, statistics
from intercept_protocol.outcomes import Access, Answer, AnyAnswer, LaterAnswer, Outcome
from interceptctl.exercise.clock import During
from interceptctl.exercise.judge import Judge
from interceptctl.exercise.kills import Kills
from interceptctl.exercise.tally import FINDINGS_KEPT, Tally, VpTally, Wrong
from interceptctl.exercise.world import Frame, Sight


class Court(Scene):
    """One region over one VMA that may only be read."""

    def __init__(self) -> None:
        super().__init__()
        self.tally = Tally(vps=[VpTally()])
        self.kills = Kills(self.clock, self.tally, lambda: None)
        self.judge = Judge(self.truth, self.tally, self.kills)
        self.add(region())
        self.map(backing(0x50, READ))

    def answer(self, answer: AnyAnswer, access: Access = READ) -> dict[Wrong, int]:
        self.judge.answer("VP 0", GFN, access, answer, self.now())
        return dict(self.tally.wrongs)

    def retry(self, answer: Answer, during: During) -> dict[Wrong, int]:
        self.tally.answered(0, answer)
        self.judge.retry(0, answer, during)
        return dict(self.tally.wrongs)

    def sight(self, seen: Sight | None, *, resumed: bool = False) -> dict[Wrong, int]:
        during = self.now()
        self.judge.sight("VP 0", GFN, seen, during, during.first if resumed else None)
        return dict(self.tally.wrongs)


@pytest.mark.parametrize("answer", [answer for answer in Answer if answer.outcome is Outcome.RETRY])
def test_retry_is_true_at_all_times(answer: Answer) -> None:
    assert Court().answer(answer) == {}


def test_restarted_is_right_around_a_kill_alone() -> None:
    court = Court()
    before, asked = court.now(), court.clock.tick()
    court.kills.strike(statistics())
    around, after = During(asked, court.clock.tick()), court.now()
    assert court.retry(Answer.RESTARTED, around) == {}
    assert court.retry(Answer.RESTARTED, before) == {Wrong.UNCAUSED: 1}
    assert court.retry(Answer.RESTARTED, after) == {Wrong.UNCAUSED: 2}


def test_kicked_is_right_once_for_each_kick_and_each_kill() -> None:
    court = Court()
    court.tally.kicked(0)
    court.tally.kicked(None)
    court.kills.strike(statistics())
    assert [court.retry(Answer.KICKED, court.now()) for _ in range(4)] == [{}, {}, {}, {Wrong.UNCAUSED: 1}]


def test_the_daemon_of_somebody_else_may_be_restarted_at_any_time() -> None:
    court = Court()
    court.judge = Judge(court.truth, court.tally, Kills(court.clock, court.tally, None))
    assert court.retry(Answer.RESTARTED, court.now()) == {}
    assert court.retry(Answer.KICKED, court.now()) == {}


@pytest.mark.parametrize("answer", [answer for answer in Answer if answer.outcome is Outcome.FAIL])
def test_fail_is_always_wrong(answer: Answer) -> None:
    assert Court().answer(answer) == {Wrong.FAILED: 1}


@pytest.mark.parametrize(
    ("access", "answer"),
    [
        (READ, Answer.MAPPED),
        (READ, Answer.ALREADY_MAPPED),
        (WRITE, Answer.PERMISSION),
        (READ, LaterAnswer(Outcome.RESUME, "later")),
        (WRITE, LaterAnswer(Outcome.FORWARD, "later")),
        (READ, LaterAnswer(Outcome.RETRY, "later")),
    ],
)
def test_a_true_answer_is_right(access: Access, answer: AnyAnswer) -> None:
    assert Court().answer(answer, access) == {}


@pytest.mark.parametrize(
    ("access", "answer"),
    [
        (READ, Answer.NO_REGION),
        (READ, Answer.UNBACKED),
        (READ, Answer.PERMISSION),
        (READ, Answer.NOT_MEMORY),
        (WRITE, Answer.MAPPED),
        (READ, LaterAnswer(Outcome.FORWARD, "later")),
    ],
)
def test_an_untrue_answer_is_a_stale_read(access: Access, answer: AnyAnswer) -> None:
    court = Court()
    assert court.answer(answer, access) == {Wrong.UNTRUE_ANSWER: 1}
    assert court.tally.stale_reads == 1


@pytest.mark.parametrize(
    "seen",
    [
        pytest.param(Sight(Frame("host", 0x51), READ), id="the neighbour's frame"),
        pytest.param(Sight(Frame("host", 0x50), READ_WRITE), id="too many rights"),
        pytest.param(Sight(Frame("file", 0x50), READ), id="another backing"),
    ],
)
def test_a_frame_or_right_that_is_not_there_is_a_stale_read(seen: Sight) -> None:
    court = Court()
    assert court.sight(seen) == {Wrong.UNTRUE_SIGHT: 1}
    assert court.tally.stale_reads == 1


def test_the_frame_that_is_there_is_right() -> None:
    assert Court().sight(Sight(Frame("host", 0x50), READ), resumed=True) == {}


def test_reaching_nothing_is_right_for_a_guest_that_was_not_resumed() -> None:
    assert Court().sight(None) == {}


def test_reaching_nothing_after_a_resume_is_a_lost_mapping_and_not_a_stale_read() -> None:
    court = Court()
    assert court.sight(None, resumed=True) == {Wrong.LOST: 1}
    assert court.tally.stale_reads == 0


def test_reaching_nothing_after_a_resume_is_right_once_the_page_was_revoked() -> None:
    court = Court()
    with court.clock.question() as asked:
        court.unmap()
        court.judge.sight("VP 0", GFN, None, court.now(), asked)
    assert not court.tally.wrongs


def test_a_memory_answer_to_another_message_is_wrong() -> None:
    court = Court()
    court.judge.not_memory("VP 0", Answer.MAPPED, court.now())
    assert dict(court.tally.wrongs) == {Wrong.UNTRUE_ANSWER: 1}


def test_a_finding_says_what_would_have_been_right() -> None:
    court = Court()
    court.answer(Answer.UNBACKED)
    (finding,) = court.tally.findings
    assert finding.told == "r--: forward unbacked"
    assert [state.partition(" ")[2] for state in finding.possible] == [
        f"{finding.during.first} to {finding.during.last} "
        "mmio region [0x100, 0x104) rw-, page 0x7000 is host page 0x50 r--"
    ]


def test_findings_beyond_the_first_are_counted_only() -> None:
    court = Court()
    for _ in range(FINDINGS_KEPT + 5):
        court.answer(Answer.UNBACKED)
    assert len(court.tally.findings) == FINDINGS_KEPT
    assert court.tally.stale_reads == FINDINGS_KEPT + 5
