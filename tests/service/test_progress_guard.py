"""I8: the 17th consecutive intercept for a mapped page is answered no_progress."""

from __future__ import annotations

from itertools import groupby

from hypothesis import given
from hypothesis import strategies as st

from intercept_protocol.outcomes import Access, Answer
from interceptd.pages.mapping import Mapping
from interceptd.partition.progress_guard import REPEATS, ProgressGuard

MAPPINGS = [Mapping(0, 8, None, 0, Access.READ | Access.WRITE) for _ in range(2)]
"""Equal, and yet two: a change in between makes a new object."""


def asked(guard: ProgressGuard, times: int, access: Access = Access.READ) -> list[Answer]:
    return [guard.answer(MAPPINGS[0], 3, access) for _ in range(times)]


def test_guard_after_sixteen_repeats_fails_the_seventeenth() -> None:
    assert asked(ProgressGuard(), 17) == [Answer.ALREADY_MAPPED] * 16 + [Answer.NO_PROGRESS]


def test_guard_after_no_progress_counts_from_the_start() -> None:
    guard = ProgressGuard()
    asked(guard, 17)
    assert asked(guard, 17) == [Answer.ALREADY_MAPPED] * 16 + [Answer.NO_PROGRESS]


def test_guard_after_another_answer_counts_from_the_start() -> None:
    guard = ProgressGuard()
    asked(guard, 16)
    guard.reset()
    assert asked(guard, 16) == [Answer.ALREADY_MAPPED] * 16


def test_guard_counts_another_access_apart() -> None:
    guard = ProgressGuard()
    asked(guard, 16)
    assert asked(guard, 16, Access.WRITE) == [Answer.ALREADY_MAPPED] * 16


questions = st.tuples(
    st.integers(0, 1),
    st.sampled_from([3, 4]),
    st.sampled_from([Access.READ, Access.WRITE]),
    st.integers(1, 40),
)


@given(st.lists(questions, max_size=8))
def test_i8_guard_fails_exactly_every_seventeenth_of_an_unbroken_run(
    drawn: list[tuple[int, int, Access, int]],
) -> None:
    guard = ProgressGuard()
    asked_for = [question[:3] for question in drawn for _ in range(question[3])]
    answers = [guard.answer(MAPPINGS[which], gfn, access) for which, gfn, access in asked_for]
    runs = [len(list(run)) for _, run in groupby(asked_for)]
    expected = [
        Answer.NO_PROGRESS if place % (REPEATS + 1) == REPEATS else Answer.ALREADY_MAPPED
        for run in runs
        for place in range(run)
    ]
    assert answers == expected
