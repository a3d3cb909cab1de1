"""Which of the restores that have ended are remembered."""

from __future__ import annotations

from intercept_protocol.messages import RestoreState
from interceptd.sessions.ended_restores import LIMIT, EndedRestores
from interceptd.sessions.restore_session import unserved

FIGURES = unserved(RestoreState.ENDED, 1, "")


def test_the_last_ones_of_a_uid_are_remembered() -> None:
    ended = EndedRestores()
    for partition_id in range(LIMIT + 1):
        ended.add(partition_id, 1000, FIGURES)
    assert ended.find(0) is None
    assert ended.find(1) == ended.find(LIMIT) == (1000, FIGURES)


def test_a_uid_with_many_has_none_of_another_forgotten() -> None:
    ended = EndedRestores()
    ended.add(1, 1000, FIGURES)
    for partition_id in range(2, 3 * LIMIT):
        ended.add(partition_id, 1001, FIGURES)
    assert ended.find(1) == (1000, FIGURES)
    assert ended.find(3 * LIMIT - 1) == (1001, FIGURES)
    assert ended.find(2 * LIMIT) is None
