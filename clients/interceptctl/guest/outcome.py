"""The result of one scenario, per vCPU and overall.

Owns the figures that are shown or printed as JSON; must not know where they come from.
"""

from __future__ import annotations

from statistics import median

import msgspec

from intercept_client.kvm import Stop

from .vmm import Tally


class VcpuOutcome(msgspec.Struct, frozen=True, kw_only=True):
    vp_index: int
    stopped: str
    exits: dict[str, int]
    """By kind."""
    kvm_mmio_exits: int | None
    """By KVM's own statistics; None where the kernel has none."""
    intercepts: dict[str, int]
    """By answer."""
    completed: int
    forwarded: int
    replayed: int
    first_touch_us: list[float]
    """For each exit that led to a map, the time until the guest could continue."""

    @property
    def first_touch_median_us(self) -> float | None:
        return median(self.first_touch_us) if self.first_touch_us else None


class ScenarioOutcome(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    expects: str
    passed: bool
    found: str
    """What was observed; shown next to `expects` if it failed."""
    seconds: float
    memslots: int
    vcpus: list[VcpuOutcome]


class GuestReport(msgspec.Struct, frozen=True, kw_only=True):
    vmm: str
    """The language that it is written in."""
    coverage: str
    scenarios: list[ScenarioOutcome]

    @property
    def passed(self) -> bool:
        return all(scenario.passed for scenario in self.scenarios)


def vcpu_outcome(vp_index: int, tally: Tally, stop: Stop, kvm_mmio_exits: int | None) -> VcpuOutcome:
    return VcpuOutcome(
        vp_index=vp_index,
        stopped=str(stop),
        exits=dict(tally.exits),
        kvm_mmio_exits=kvm_mmio_exits,
        intercepts={str(answer): count for answer, count in tally.intercepts.items() if count},
        completed=tally.completed,
        forwarded=tally.forwarded,
        replayed=tally.replayed,
        first_touch_us=[seconds * 1e6 for seconds in tally.first_touches],
    )
