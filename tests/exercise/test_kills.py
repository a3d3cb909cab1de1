"""When the daemon is killed, what is noticed of it, and what of its counters outlives it."""

from __future__ import annotations

import math
import random

import trio
import trio.testing

from exercise.worlds import statistics
from intercept_protocol.messages import PartitionStatistics
from intercept_protocol.outcomes import Answer
from interceptctl.exercise.clock import Clock, During
from interceptctl.exercise.kills import Kills, Schedule, share_over
from interceptctl.exercise.lives import added
from interceptctl.exercise.tally import Tally, VpTally


class Play:
    """A daemon that only counts how often it was killed."""

    def __init__(self) -> None:
        self.deaths = 0
        self.clock = Clock()
        self.kills = Kills(self.clock, Tally([VpTally()]), self._die)

    def ask(self) -> int:
        return self.clock.tick()

    def answer(self, asked: int, answer: Answer = Answer.MAPPED, seconds: float = 0.0) -> None:
        self.kills.answered(answer, During(asked, self.clock.tick()), seconds)

    def strike(self) -> None:
        self.kills.strike(statistics())

    def _die(self) -> None:
        self.deaths += 1


async def no_statistics() -> PartitionStatistics:
    return statistics()


async def test_no_daemon_is_killed_before_it_has_answered_what_was_asked_after_the_last_kill(
    autojump_clock: trio.testing.MockClock,  # noqa: ARG001 - the delays pass at once
) -> None:
    play = Play()
    orders, due = trio.open_memory_channel[None](math.inf)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(play.kills.run, due, no_statistics, random.Random(1))
        async with orders:
            for _ in range(3):
                orders.send_nowait(None)
        deaths = []
        for _ in range(3):
            late = play.ask()
            await trio.sleep(1)
            deaths.append(play.deaths)
            play.answer(play.ask())
            await trio.sleep(1)
            play.answer(late)
            await trio.sleep(1)
    assert deaths == [0, 1, 2]
    assert play.deaths == play.kills.count == len(play.kills.lives) == 3


def test_what_waited_for_the_next_daemon_is_counted_with_the_longest_wait() -> None:
    play = Play()
    play.answer(play.ask(), seconds=9)
    during_the_kill = play.ask()
    play.strike()
    while_there_is_none = play.ask()
    play.answer(while_there_is_none, seconds=2)
    play.answer(during_the_kill, seconds=3)
    play.answer(play.ask(), seconds=9)
    assert (play.kills.waited, play.kills.longest_wait) == (2, 3)


def test_only_what_was_asked_after_the_kill_is_surely_counted_by_the_daemon_that_runs() -> None:
    play = Play()
    play.answer(play.ask(), Answer.UNBACKED)
    during_the_kill = play.ask()
    play.strike()
    play.answer(during_the_kill, Answer.RESTARTED)
    play.answer(play.ask(), Answer.MAPPED)
    assert play.kills.surely == {Answer.MAPPED: 1}
    assert play.kills.perhaps == {Answer.RESTARTED: 1}


def test_all_kills_are_due_in_the_middle_and_each_once() -> None:
    schedule = Schedule(10, random.Random(1))
    assert schedule.due(0.25) == 0
    early = schedule.due(0.5)
    assert 0 < early < 10
    assert early + schedule.due(0.75) == 10
    assert schedule.due(1) == 0


def test_what_is_over_is_the_larger_share_and_no_limit_is_never_reached() -> None:
    assert share_over((3, 10), (1, 2)) == 0.5
    assert share_over((3, math.inf), (1, math.inf)) == 0


def test_counters_of_all_lives_are_added_and_the_state_is_the_last_ones() -> None:
    first = statistics(map_calls=3, invalidations=5, stale_attempts=1, mapped_gfns=9, latency=(1, 2))
    last = statistics(map_calls=4, invalidations=6, mapped_gfns=7, latency=(1,), latency_waited=(0, 1))
    total = added([first, last])
    assert (total.map_calls, total.invalidations, total.stale_attempts, total.mapped_gfns) == (7, 11, 1, 7)
    assert [list(total.latency), list(total.latency_waited)] == [[2, 2], [0, 1]]
