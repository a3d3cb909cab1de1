"""Every answer, as encoded on the wire."""

from __future__ import annotations

import pytest

from intercept_protocol.outcomes import Access, Answer, LaterAnswer, Outcome, spelled


def test_answers_are_the_pairs_of_the_wire_specification() -> None:
    assert {(str(answer.outcome), answer.reason) for answer in Answer} == {
        ("resume", "mapped"),
        ("resume", "already_mapped"),
        ("forward", "not_memory"),
        ("forward", "no_region"),
        ("forward", "permission"),
        ("forward", "unbacked"),
        ("retry", "invalidating"),
        ("retry", "contended"),
        ("retry", "kicked"),
        ("retry", "draining"),
        ("retry", "restarted"),
        ("fail", "no_progress"),
        ("fail", "hypervisor_error"),
    }


@pytest.mark.parametrize("answer", Answer)
def test_answer_is_its_outcome_and_its_reason(answer: Answer) -> None:
    assert answer.value == (answer.outcome, answer.reason)


def test_answer_prints_outcome_and_reason() -> None:
    assert str(Answer.NO_REGION) == "forward no_region"


def test_outcome_is_its_word_on_the_wire() -> None:
    assert [str(outcome) for outcome in Outcome] == ["resume", "forward", "retry", "fail"]


def test_access_bits_are_those_of_the_wire_specification() -> None:
    assert (Access.READ, Access.WRITE, Access.EXECUTE) == (1, 2, 4)


@pytest.mark.parametrize(
    ("rights", "text"),
    [
        (Access.NONE, "---"),
        (Access.READ | Access.WRITE, "rw-"),
        (Access.READ | Access.EXECUTE, "r-x"),
        (Access.WRITE, "-w-"),
    ],
)
def test_rights_are_spelled_as_people_write_them(rights: Access, text: str) -> None:
    assert spelled(rights) == text


def test_a_later_answer_is_counted_by_its_words_and_prints_like_any_other() -> None:
    answer = LaterAnswer(Outcome.RETRY, "later")

    assert {answer: 1}[LaterAnswer(Outcome.RETRY, "later")] == 1
    assert str(answer) == "retry later"
