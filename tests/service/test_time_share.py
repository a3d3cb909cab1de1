"""How the event loop's time is divided: when a uid's time is used up, and whose turn is next."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
import trio
from trio.testing import assert_no_checkpoints, wait_all_tasks_blocked

from interceptd.scheduling.step_monitor import StepMonitor, Usage
from interceptd.scheduling.time_share import (
    LONELY_ROUND_NS,
    SHARE,
    SHARED_ROUND_NS,
    SLICE_NS,
    YOUNG_ROUND_NS,
    TimeShare,
    TimeShares,
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
def turns(monitor: StepMonitor) -> TimeShares:
    return TimeShares(monitor)


@pytest.fixture
async def given(turns: TimeShares, nursery: trio.Nursery) -> TimeShares:
    """TimeShares that are given."""
    nursery.start_soon(turns.run)
    await wait_all_tasks_blocked()
    return turns


# ------------------------------------------------ when it is used up


async def test_a_slice_is_used_up_by_the_clock(turns: TimeShares, clock: Clock) -> None:
    share = turns.share()
    clock.now += SLICE_NS
    assert not share.used_up
    clock.now += 1
    assert share.used_up
    await trio.lowlevel.checkpoint()
    assert not share.used_up


@pytest.mark.parametrize(("uids", "ns"), [(1, LONELY_ROUND_NS), (2, SHARED_ROUND_NS)])
@pytest.mark.parametrize("more", [0, 1])
async def test_of_several_in_a_long_round_only_the_first_has_time(
    turns: TimeShares, clock: Clock, uids: int, ns: int, more: int
) -> None:
    """A round is long sooner while there are other uids."""
    turns.set_uids(uids)
    share = turns.share()
    used: list[bool] = []

    async def work() -> None:
        await share.turn()
        used.append(share.used_up)
        clock.now += ns + more

    async with trio.open_nursery() as nursery:
        nursery.start_soon(work)
        nursery.start_soon(work)
    assert used == [False, bool(more)]


async def test_the_first_of_a_burst_has_its_slice_however_long_the_round_is(
    turns: TimeShares, clock: Clock
) -> None:
    share = turns.share()
    await share.turn()
    turns.monitor.began -= 2 * LONELY_ROUND_NS  # others were before it
    assert not share.used_up
    clock.now += SLICE_NS + 1
    assert share.used_up


@pytest.mark.parametrize("give", [give_way, give_way_shielded])
async def test_giving_way_is_no_checkpoint_while_there_is_time(
    turns: TimeShares, clock: Clock, give: Callable[[], Awaitable[None]]
) -> None:
    with assert_no_checkpoints():
        await give()
    share = turns.share()
    SHARE.set(share)
    await trio.lowlevel.checkpoint()
    clock.now += SLICE_NS
    with assert_no_checkpoints():
        await give()
    clock.now += 1
    before = turns.monitor.round
    await give()
    assert turns.monitor.round > before
    assert not share.used_up


async def test_giving_way_is_a_chance_to_be_cancelled_unless_it_is_shielded(
    given: TimeShares, clock: Clock
) -> None:
    share = given.share()
    SHARE.set(share)
    reached = []
    for give in (give_way_shielded, give_way):
        with trio.CancelScope() as scope:
            scope.cancel()
            clock.now += SLICE_NS + 1
            await give()
            reached.append(give)
    assert reached == [give_way_shielded]


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


def walks(
    turns: TimeShares, clock: Clock, diary: list[str], *names: str, cost: int = LONELY_ROUND_NS
) -> list[Walk]:
    """Their uids are the first letters."""
    shares = {name[0]: turns.share() for name in names}
    return [Walk(shares[name[0]], name, diary, clock, cost) for name in names]


async def test_the_uids_take_turns_whatever_number_of_tasks_they_have(
    given: TimeShares, clock: Clock
) -> None:
    diary: list[str] = []
    async with trio.open_nursery() as nursery:
        for walk in walks(given, clock, diary, "a1", "a2", "a3", "b1"):
            nursery.start_soon(walk.run, 3)
    while_b_waits = "".join(name[0] for name in diary).rpartition("b")[0]
    assert "aaa" not in while_b_waits
    assert sorted(diary) == sorted(["a1", "a2", "a3", "b1"] * 3)


async def test_the_tasks_of_a_uid_go_on_in_the_order_of_their_waiting(
    given: TimeShares, clock: Clock
) -> None:
    diary: list[str] = []
    async with trio.open_nursery() as nursery:
        for walk in walks(given, clock, diary, "a1", "a2", "a3"):
            nursery.start_soon(walk.run, 4)
    assert diary[3:6] == diary[6:9]


async def test_of_tasks_that_take_little_ever_more_go_on_at_once(given: TimeShares, clock: Clock) -> None:
    diary: list[str] = []
    names = [f"a{number}" for number in range(64)]
    before = given_rounds(given)
    async with trio.open_nursery() as nursery:
        for walk in walks(given, clock, diary, *names, cost=LONELY_ROUND_NS // 1000):
            nursery.start_soon(walk.run, 1)
    assert sorted(diary) == sorted(names)
    assert given_rounds(given) - before < 20


def given_rounds(turns: TimeShares) -> int:
    return turns.monitor.round


async def test_a_task_that_is_cancelled_waits_for_its_turn_and_holds_up_nobody(
    given: TimeShares, clock: Clock
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


async def test_once_turns_are_given_no_more_everybody_goes_on(turns: TimeShares, clock: Clock) -> None:
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


async def test_if_nobody_counts_the_rounds_any_more_everybody_goes_on(
    given: TimeShares, clock: Clock, monitor: StepMonitor
) -> None:
    """trio disables an instrument that fails."""
    trio.lowlevel.remove_instrument(monitor)
    diary: list[str] = []
    async with trio.open_nursery() as nursery:
        for walk in walks(given, clock, diary, "a1", "a2", "b1"):
            nursery.start_soon(walk.run, 3)
    assert len(diary) == 9


# ------------------------------------------------ one per round


async def passings(turns: TimeShares, clock: Clock, takes_ns: int) -> list[int]:
    """The rounds in which each of five tasks passed, whose requests take so long."""
    gate, passed = turns.one_per_round(), list[int]()

    async def enter() -> None:
        await gate.enter()
        passed.append(turns.monitor.round)
        clock.now += takes_ns

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(enter)
    return passed


async def test_one_task_passes_the_gate_in_each_round_that_is_not_young(
    turns: TimeShares, clock: Clock
) -> None:
    assert len(set(await passings(turns, clock, YOUNG_ROUND_NS + 1))) == 5


async def test_several_pass_while_the_round_is_young(turns: TimeShares, clock: Clock) -> None:
    passed = await passings(turns, clock, YOUNG_ROUND_NS // 2)
    assert passed[:3] == [passed[0]] * 3
    assert len(set(passed)) == 3


async def test_nobody_overtakes_one_who_waits_because_a_new_round_is_young(turns: TimeShares) -> None:
    gate = turns.one_per_round()
    async with gate._lock:  # as one who waits
        assert not gate.enter_nowait()
    assert gate.enter_nowait()


async def test_the_first_one_of_a_round_does_not_wait(turns: TimeShares, clock: Clock) -> None:
    gate, began = turns.one_per_round(), turns.monitor.round
    await gate.enter()
    assert turns.monitor.round == began
    clock.now += YOUNG_ROUND_NS + 1
    await gate.enter()
    assert turns.monitor.round > began
