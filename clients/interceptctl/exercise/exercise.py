"""The exercise itself: a fake VMM, its guests and its notifiers against the daemon behind a socket.

Owns what runs when, and concurrently with what; must not know where the daemon comes from or how anything is
shown.
"""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Final

import trio

from intercept_client import TrioNotifier, TrioVmm, TrioVp
from intercept_protocol.messages import PartitionStatistics
from intercept_protocol.outcomes import Access, Answer

from . import live_memory
from .clock import Clock, During
from .declared_memory import DeclaredMemory
from .guest import Guest, Touch
from .judge import Judge
from .kills import Kills, Schedule, share_over
from .link import Link
from .live_memory import LiveMemory
from .memory import Memory, Mode
from .notifier import FakeNotifier, disturb
from .report import Report
from .scenario import Scenario
from .tally import Finding, Tally, VpTally, Wrong
from .truth import Truth
from .vmm import FakeVmm
from .workload import Workload


@dataclass(frozen=True, slots=True)
class Progress:
    """What a live view may read while the exercise runs."""

    scenario: Scenario
    tally: Tally
    vmm: FakeVmm
    kills: Kills


FINAL_TOUCH_EVERY: Final = 8
"""The final comparison looks at every page, and touches every eighth."""

Watch = Callable[[Progress], Awaitable[None]]


async def exercise(
    path: str, scenario: Scenario, watch: Watch, kill: Callable[[], None] | None = None
) -> Report:
    """Exercise the daemon whose VMMs' socket is at `path`; `watch` runs concurrently until cancelled. `kill`
    is called as often as the scenario says, and the daemon is then started again; None if it is not ours.

    Raises what the clients raise if the daemon refuses a request or goes away. The report has its faults.
    """
    started = time.perf_counter()
    clock = Clock()
    truth = Truth(clock)
    tally = Tally([VpTally() for _ in range(scenario.vps)])
    kills = Kills(clock, tally, kill)
    judge = Judge(truth, tally, kills)
    async with AsyncExitStack() as connections:
        client = await connections.enter_async_context(TrioVmm.open(path, name="exercise"))
        partition = await client.call(scenario.mode.partition)
        link = Link(client, clock, tally)
        memory: Memory
        match scenario.mode:
            case Mode.DECLARED:
                memory = DeclaredMemory(link, truth)
            case Mode.LIVE:
                await live_memory.attach(client)
                announcer = await connections.enter_async_context(TrioNotifier.open(path, partition))
                memory = LiveMemory(link, announcer, truth, connections.enter_context(live_memory.arena()))
        vmm = FakeVmm(link, memory, truth, judge)

        async def notifier() -> FakeNotifier:
            client = await connections.enter_async_context(TrioNotifier.open(path, partition))
            return FakeNotifier(client, clock, truth, tally, vmm)

        async def guest(index: int) -> Guest:
            vp = await connections.enter_async_context(TrioVp.open(path, partition, vp_index=index))
            rng = scenario.rng(f"guest {index}")
            return Guest(index, vp, vmm, clock=clock, judge=judge, tally=tally, kills=kills, rng=rng)

        guests = [await guest(index) for index in range(scenario.vps)]
        workload = Workload(vmm, await notifier(), truth, tally, scenario.rng("workload"))
        disturber = await notifier()
        await workload.set_up()
        async with trio.open_nursery() as watching:
            progress = Progress(scenario, tally, vmm, kills)
            watching.start_soon(watch, progress)
            await _run(progress, workload, guests, disturber)
            await workload.wait_idle()
            await _compare_all(vmm, truth, guests[0])
            watching.cancel_scope.cancel()
        statistics = await vmm.statistics()
    _compare_counts(tally, kills, statistics)
    seconds = time.perf_counter() - started
    return Report.of(scenario, tally, kills, statistics, seconds)


async def _run(progress: Progress, workload: Workload, guests: list[Guest], disturber: FakeNotifier) -> None:
    """Run the VMM, its guests and its notifiers concurrently, at the same pace, and kill the daemon.

    The VMM waits for guests that fall behind, but never while a range is shut: they may be waiting for it."""
    scenario, tally, kills = progress.scenario, progress.tally, progress.kills
    turns, guests_turns = trio.open_memory_channel[None](len(guests))
    nudges, disturbers_turns = trio.open_memory_channel[None](0)
    orders, due = trio.open_memory_channel[None](math.inf)
    async with trio.open_nursery() as nursery, turns, nudges, orders:
        for guest in guests:
            nursery.start_soon(guest.run, guests_turns)
        nursery.start_soon(disturb, disturber, disturbers_turns, scenario.rng("disturber"))
        nursery.start_soon(kills.run, due, progress.vmm.statistics, scenario.rng("kills"))
        schedule = Schedule(scenario.kills, scenario.rng("schedule of kills"))
        rng, owed, burst = scenario.rng("bursts"), 0, 1
        began, over = trio.current_time(), 0.0
        while over < 1 or kills.count < scenario.kills:
            await workload.go_on()
            over = share_over(
                (tally.steps, scenario.step_limit), (trio.current_time() - began, scenario.time_limit)
            )
            for _ in range(schedule.due(over)):
                orders.send_nowait(None)
            owed += scenario.touches_per_action
            if owed >= burst:
                for _ in range(owed):
                    await turns.send(None)
                owed, burst = 0, rng.randint(1, len(guests))
                if disturbers_turns.statistics().tasks_waiting_receive:
                    nudges.send_nowait(None)


async def _compare_all(vmm: FakeVmm, truth: Truth, guest: Guest) -> None:
    """With no change in progress, check every page of every region, then touch some of them again."""
    for region in truth.regions:
        for gfn in range(region.gfns.start, region.gfns.end):
            await vmm.look("final comparison", gfn)
    for region in truth.regions:
        for gfn in (*range(region.gfns.start, region.gfns.end, FINAL_TOUCH_EVERY), region.gfns.end):
            await guest.touch(Touch(gfn, Access.READ))


def _compare_counts(tally: Tally, kills: Kills, counted: PartitionStatistics) -> None:
    """Every intercept was answered once, and the daemon's counters agree with the answers received since it
    was started. It was started as often as it was killed, and every begin was ended once."""

    def found(wrong: Wrong, told: str, right: str) -> None:
        tally.found(Finding(wrong, "statistics", None, told, (right,), During(0, 0)))

    if counted.open_invalidations:
        found(Wrong.LEFT_OPEN, f"{counted.open_invalidations} invalidations are open", "none")
    if counted.restarts != kills.count:
        if kills.are_ours:
            found(Wrong.RESTARTED, f"{counted.restarts} restarts", f"{kills.count} kills")
        return
    for answer in Answer:
        said, least = counted.intercepts[answer.outcome][answer.reason], kills.surely[answer]
        if not least <= said <= least + kills.perhaps[answer]:
            heard = f"{least} to {least + kills.perhaps[answer]}" if kills.perhaps[answer] else f"{least}"
            found(Wrong.MISCOUNTED, f"{answer}: {said} counted by the daemon", f"{heard} received by guests")
