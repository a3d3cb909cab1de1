"""The judge finds each kind of fault, and nothing in a correct daemon."""

from __future__ import annotations

import pytest

from exercise.worlds import GFN, READ, READ_WRITE, WRITE, Scene, backing, region
from intercept_protocol.outcomes import Access, Answer, AnyAnswer, LaterAnswer, Outcome
from interceptctl.exercise.judge import Judge
from interceptctl.exercise.tally import FINDINGS_KEPT, Tally, Wrong
from interceptctl.exercise.world import Frame, Sight


class Court(Scene):
    """One region over one VMA that may only be read."""

    def __init__(self) -> None:
        super().__init__()
        self.tally = Tally(vps=[])
        self.judge = Judge(self.truth, self.tally)
        self.add(region())
        self.map(backing(0x50, READ))

    def answer(self, answer: AnyAnswer, access: Access = READ) -> dict[Wrong, int]:
        self.judge.answer("VP 0", GFN, access, answer, self.now())
        return dict(self.tally.wrongs)

    def sight(self, seen: Sight | None, *, resumed: bool = False) -> dict[Wrong, int]:
        during = self.now()
        self.judge.sight("VP 0", GFN, seen, during, during.first if resumed else None)
        return dict(self.tally.wrongs)


@pytest.mark.parametrize("answer", [answer for answer in Answer if answer.outcome is Outcome.RETRY])
def test_retry_is_never_wrong(answer: Answer) -> None:
    assert Court().answer(answer) == {}


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
