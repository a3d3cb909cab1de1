"""The scenarios: which guest programs run on which memory, what the host does meanwhile, and the expected
result.

Owns the expectations; must not know how they are shown. Each starts with a fresh guest.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from intercept_client.kvm import StopReason
from intercept_protocol.addresses import PAGE_SHIFT, PAGE_SIZE
from intercept_protocol.messages import MmioGranularity
from intercept_protocol.outcomes import Answer

from .programs import COUNT, JUMP, PATTERN, STORE, SWEEP, TRIPLE_FAULT, WATCH
from .restarts import HandedOver, Wrong
from .vmm import SCRATCH_GPA, Memory, Running, Vmm

STOP_SECONDS: Final = 60.0
"""Seconds within which a program must halt."""
BAR_PAGES: Final = 256
FLOATING: Final = 0xFFFF_FFFF
OURS: Final = 0x42
ELSEWHERE: Final = 0x800
"""A gfn at which no scenario places its BAR initially."""
INCREMENTS: Final = 2000
READS: Final = 50
KILLS: Final = 2
SEED: Final = 1


Kill = Callable[[], None]
"""Kills the daemon."""


class Unexpected(Exception):
    """The scenario observed something else; the message says what."""


@dataclass(frozen=True, slots=True)
class Scenario:
    name: str
    expects: str
    play: Callable[[Vmm, Kill], str]
    """Run it; returns what was observed, or raises `Unexpected`."""
    granularity: MmioGranularity = MmioGranularity.VMA
    kills: bool = False
    """Whether it kills the daemon, which then has to be started again."""


def _sweep(vmm: Vmm, intercepts: int) -> str:
    bar = vmm.add_bar(BAR_PAGES)
    guest = vmm.add_vcpu(SWEEP, esi=bar.gpa, ecx=BAR_PAGES, ebx=2)
    _ended(vmm.start())
    _require(bar.word(PAGE_SIZE) == 2, f"a page was incremented {bar.word(PAGE_SIZE)} times in 2 rounds")
    taken = guest.tally.intercepts.total() - 1  # one for the program's own page
    _require(taken == intercepts, f"{taken} intercepts")
    return f"{taken} intercept{'s' if taken > 1 else ''} for {2 * BAR_PAGES} accesses"


def _count(vmm: Vmm, _: Kill) -> str:
    bar = vmm.add_bar(1)
    for _vcpu in range(2):
        vmm.add_vcpu(COUNT, esi=bar.gpa, ecx=INCREMENTS)
    _ended(vmm.start())
    _require(bar.word(0) == 2 * INCREMENTS, f"the counter is {bar.word(0)}")
    return f"the counter is {bar.word(0)}"


def _pattern(vmm: Vmm, _: Kill) -> str:
    bar = vmm.add_bar(4)
    vmm.add_vcpu(PATTERN, esi=bar.gpa, edx=bar.gpa + 4 * PAGE_SIZE)
    _ended(vmm.start())
    found = bar.read(0, 8) + bar.read(4094, 4) + bar.read(8188, 8)
    wanted = bytes.fromhex("0011222204002000") + b"ABCD" + bytes.fromhex("080020000c002000")
    _require(found == wanted, found.hex())
    _require(bar.word(4 * PAGE_SIZE - 4) == bar.gpa + 4 * PAGE_SIZE - 4, "the last word is wrong")
    return "every byte arrived"


def _device(vmm: Vmm, _: Kill) -> str:
    guest = vmm.add_vcpu(STORE, esi=SCRATCH_GPA, ebx=7)
    _ended(vmm.start())
    _require(vmm.reports.kept == [7], f"the guest read {vmm.reports.kept}")
    _require(guest.tally.intercepts.total() == 1, f"{guest.tally.intercepts.total()} intercepts")
    return f"{vmm.scratch_accesses} accesses answered by the VMM alone"


def _read_only(vmm: Vmm, _: Kill) -> str:
    rom = vmm.add_bar(1, writable=False)
    rom.write(0, bytes([OURS]))
    guest = vmm.add_vcpu(STORE, esi=rom.gpa, ebx=7)
    _ended(vmm.start())
    _require(rom.word(0) == OURS and vmm.reports.kept == [OURS], "the memory was changed")
    _require(guest.tally.intercepts[Answer.PERMISSION] == 1, "the write was not forwarded")
    return "the write was forwarded, the memory is unchanged"


def _void(vmm: Vmm, _: Kill) -> str:
    vmm.add_vcpu(JUMP, esi=ELSEWHERE << PAGE_SHIFT)
    vmm.add_vcpu(TRIPLE_FAULT)
    reasons = [running.result(STOP_SECONDS).reason for running in vmm.start()]
    _require(reasons == [StopReason.NOT_EXECUTABLE, StopReason.TRIPLE_FAULT], f"stopped: {reasons}")
    return "each vCPU stopped with its reason"


def _move(vmm: Vmm, _: Kill) -> str:
    bar = _watched_bar(vmm)
    bar.move(ELSEWHERE)
    seen = set(vmm.reports.wait(READS)[1:])
    _require(seen == {FLOATING}, f"the old address reads {sorted(seen)}")
    vmm.add_vcpu(STORE, esi=ELSEWHERE << PAGE_SHIFT, ebx=7)
    _ended(vmm.start()[1:])
    _require(bar.word(0) == 7, "the new address does not reach it")
    return "unmapped at the old address, mapped at the new"


def _unmap(vmm: Vmm, _: Kill) -> str:
    bar = _watched_bar(vmm)
    bar.unmap()
    seen = set(vmm.reports.wait(READS)[1:])
    bar.reuse()
    seen |= set(vmm.reports.wait(READS))
    _require(seen == {FLOATING}, f"the guest reads {sorted(seen)}")
    return "the guest reads all ones, never the memory that reused the address"


def _restart(vmm: Vmm, kill: Kill) -> str:
    try:
        return str(HandedOver(vmm, kill, random.Random(SEED)).run(KILLS))
    except Wrong as wrong:
        raise Unexpected(str(wrong)) from wrong


SCENARIOS: Final = (
    Scenario("sweep", "1 intercept per VMA", lambda vmm, _: _sweep(vmm, 1)),
    Scenario(
        "sweep by page",
        f"{BAR_PAGES} intercepts",
        lambda vmm, _: _sweep(vmm, BAR_PAGES),
        granularity=MmioGranularity.PAGE,
    ),
    Scenario("count", f"two vCPUs count to {2 * INCREMENTS} together", _count),
    Scenario("pattern", "writes of 1 to 8 bytes arrive, across pages too", _pattern),
    Scenario("device", "accesses to the VMM's own device cause no intercept", _device),
    Scenario("read-only", "a write is forwarded and changes nothing", _read_only),
    Scenario("void", "a jump to unmapped memory and a triple fault stop their vCPUs", _void),
    Scenario("move", "a moved BAR is reachable at the new address only", _move),
    Scenario("unmap", "the guest never reads what was unmapped", _unmap),
    Scenario("restart", "a daemon that is killed costs a wait, and nothing stale", _restart, kills=True),
)


def _watched_bar(vmm: Vmm) -> Memory:
    """A page that the guest has read and keeps reading."""
    bar = vmm.add_bar(1)
    bar.write(0, bytes([OURS]))
    vmm.add_vcpu(WATCH, esi=bar.gpa)
    vmm.start()
    vmm.reports.wait_for(OURS)
    return bar


def _ended(running: Sequence[Running]) -> None:
    for vcpu in running:
        stop = vcpu.result(STOP_SECONDS)
        _require(stop.reason is StopReason.HALTED, f"a vCPU stopped: {stop}")


def _require(holds: bool, found: str) -> None:
    if not holds:
        raise Unexpected(found)
