"""How the event loop's time is divided: when a uid's time is used up, and whose turn is next."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
import trio
from trio.testing import assert_no_checkpoints, wait_all_tasks_blocked

from interceptd.scheduling.step_monitor import ANY, STEP_LIMIT_NS, StepMonitor, Usage
from interceptd.scheduling.time_share import (
    LONELY_ROUND_NS,
    SHARE,
    SHARED_ROUND_NS,
    SLICE_NS,
    TimeShare,
    Turns,
    give_way,
    give_way_shielded,
)


class Clock:
    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def monitor(clock: Clock) -> AsyncIterator[StepMonitor]:
    monitor = StepMonitor(now=clock, usage=lambda: Usage(0, 0, 0))
    with monitor.installed():
        yield monitor


@pytest.fixture
def turns(monitor: StepMonitor) -> Turns:
    return Turns(monitor)


@pytest.fixture
async def given(turns: Turns, nursery: trio.Nursery) -> Turns:
    """Turns that are given."""
    nursery.start_soon(turns.run)
    await wait_all_tasks_blocked()
    return turns


# ------------------------------------------------ when it is used up


async def test_a_slice_is_used_up_by_the_clock(turns: Turns, clock: Clock) -> None:
    share = turns.share()
    share.begin()
    clock.now += SLICE_NS
    assert not share.used_up
    clock.now += 1
    assert share.used_up


@pytest.mark.parametrize(("uids", "ns"), [(1, LONELY_ROUND_NS), (2, SHARED_ROUND_NS)])
async def test_in_a_long_round_there_is_no_time_for_long_work(
    turns: Turns, clock: Clock, uids: int, ns: int
) -> None:
    """However short it has been running itself. A round is long sooner while there are other uids."""
    turns.set_uids(uids)
    share = turns.share()
    await trio.lowlevel.checkpoint()
    clock.now += ns
    share.begin()
    assert not share.used_up
    clock.now += 1
    assert share.used_up
    await trio.lowlevel.checkpoint()
    assert not share.used_up


async def test_a_task_whose_turn_it_is_has_its_slice_however_long_the_round_is(
    turns: Turns, clock: Clock
) -> None:
    share = turns.share()
    await share.turn()
    clock.now += 2 * LONELY_ROUND_NS
    assert share.used_up
    share.begin()
    assert not share.used_up
    clock.now += SLICE_NS + 1
    assert share.used_up


@pytest.mark.parametrize("give", [give_way, give_way_shielded])
async def test_giving_way_is_no_checkpoint_while_there_is_time(
    turns: Turns, clock: Clock, give: Callable[[], Awaitable[None]]
) -> None:
    with assert_no_checkpoints():
        await give()
    share = turns.share()
    SHARE.set(share)
    share.begin()
    clock.now += SLICE_NS
    with assert_no_checkpoints():
        await give()
    clock.now += 1
    before = turns.monitor.round
    await give()
    assert turns.monitor.round > before
    assert not share.used_up


async def test_giving_way_is_a_chance_to_be_cancelled_unless_it_is_shielded(
    given: Turns, clock: Clock
) -> None:
    share = given.share()
    SHARE.set(share)
    reached = []
    for give in (give_way_shielded, give_way):
        with trio.CancelScope() as scope:
            scope.cancel()
            share.begin()
            clock.now += SLICE_NS + 1
            await give()
            reached.append(give)
    assert reached == [give_way_shielded]


# ------------------------------------------------ long steps


async def test_a_task_that_has_waited_elsewhere_was_not_busy(
    turns: Turns, clock: Clock, monitor: StepMonitor
) -> None:
    share = turns.share()
    share.begin()
    await trio.lowlevel.checkpoint()
    clock.now += 2 * STEP_LIMIT_NS
    share.rest()
    assert monitor.long_steps == {}


async def test_a_long_step_of_a_connection_is_recorded_with_its_name(
    turns: Turns, clock: Clock, monitor: StepMonitor
) -> None:
    share = turns.share()
    share.begin()
    clock.now += 2 * STEP_LIMIT_NS
    share.rest()
    assert list(monitor.long_steps.values()) == [1]
    assert ANY not in monitor.long_steps


# ------------------------------------------------ whose turn is next


class Walk:
    """A task that takes a whole slice in each of its turns, and writes its name."""

    def __init__(self, share: TimeShare, name: str, diary: list[str], clock: Clock, cost: int) -> None:
        self._share, self._name, self._diary, self._clock, self._cost = share, name, diary, clock, cost

    async def run(self, turns: int) -> None:
        for _ in range(turns):
            await self._share.turn()
            self._diary.append(self._name)
            self._clock.now += self._cost
            self._share.rest()


def walks(
    turns: Turns, clock: Clock, diary: list[str], *names: str, cost: int = LONELY_ROUND_NS
) -> list[Walk]:
    """Their uids are the first letters."""
    shares = {name[0]: turns.share() for name in names}
    return [Walk(shares[name[0]], name, diary, clock, cost) for name in names]


async def test_the_uids_take_turns_whatever_number_of_tasks_they_have(given: Turns, clock: Clock) -> None:
    diary: list[str] = []
    async with trio.open_nursery() as nursery:
        for walk in walks(given, clock, diary, "a1", "a2", "a3", "b1"):
            nursery.start_soon(walk.run, 3)
    while_b_waits = "".join(name[0] for name in diary).rpartition("b")[0]
    assert "aaa" not in while_b_waits
    assert sorted(diary) == sorted(["a1", "a2", "a3", "b1"] * 3)


async def test_the_tasks_of_a_uid_go_on_in_the_order_of_their_waiting(given: Turns, clock: Clock) -> None:
    diary: list[str] = []
    async with trio.open_nursery() as nursery:
        for walk in walks(given, clock, diary, "a1", "a2", "a3"):
            nursery.start_soon(walk.run, 4)
    assert diary[3:6] == diary[6:9]


async def test_of_tasks_that_take_little_ever_more_go_on_at_once(given: Turns, clock: Clock) -> None:
    diary: list[str] = []
    names = [f"a{number}" for number in range(64)]
    before = given_rounds(given)
    async with trio.open_nursery() as nursery:
        for walk in walks(given, clock, diary, *names, cost=LONELY_ROUND_NS // 1000):
            nursery.start_soon(walk.run, 1)
    assert sorted(diary) == sorted(names)
    assert given_rounds(given) - before < 20


def given_rounds(turns: Turns) -> int:
    return turns.monitor.round


async def test_a_task_that_is_cancelled_waits_for_its_turn_and_holds_up_nobody(
    given: Turns, clock: Clock
) -> None:
    diary: list[str] = []
    one, another = walks(given, clock, diary, "a1", "a2")
    async with trio.open_nursery() as nursery:
        scope = trio.CancelScope()

        async def cancelled() -> None:
            with scope:
                await one.run(1)

        nursery.start_soon(cancelled)
        await trio.lowlevel.checkpoint()
        scope.cancel()
        nursery.start_soon(another.run, 1)
    assert sorted(diary) == ["a1", "a2"]


async def test_once_turns_are_given_no_more_everybody_goes_on(turns: Turns, clock: Clock) -> None:
    diary: list[str] = []
    many = walks(turns, clock, diary, "a1", "a2", "b1")
    async with trio.open_nursery() as waiting:
        with trio.CancelScope() as giving:
            async with trio.open_nursery() as giver:
                giver.start_soon(turns.run)
                await trio.lowlevel.checkpoint()
                for walk in many:
                    waiting.start_soon(walk.run, 5)
                await trio.lowlevel.checkpoint()
                await trio.lowlevel.checkpoint()
                giving.cancel()
    assert len(diary) == 15


# ------------------------------------------------ one per round


async def test_one_task_passes_the_gate_in_each_round(turns: Turns) -> None:
    gate, passed = turns.one_per_round(), list[int]()

    async def enter() -> None:
        await gate.enter()
        passed.append(turns.monitor.round)

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(enter)
    assert len(set(passed)) == 5


async def test_the_first_one_of_a_round_does_not_wait(turns: Turns) -> None:
    gate, began = turns.one_per_round(), turns.monitor.round
    await gate.enter()
    assert turns.monitor.round == began
    await gate.enter()
    assert turns.monitor.round > began
