"""Runs scenarios, each with a fresh guest.

Owns the lifetime of the VMM and the figures of a scenario; must not know what is expected.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from intercept_client.kvm import Coverage, PartitionSetting

from .outcome import GuestReport, ScenarioOutcome, vcpu_outcome
from .scenarios import Kill, Scenario, Unexpected
from .vmm import Vmm

OpenVmm = Callable[[str, PartitionSetting], Vmm]
"""Starts a VMM, given the path of the daemon's socket."""


def play_all(
    path: str,
    kill: Kill,
    open_vmm: OpenVmm,
    *,
    vmm: str,
    coverage: Coverage,
    scenarios: Sequence[Scenario],
    tell: Callable[[str], None],
) -> GuestReport:
    """Run them one after the other with the daemon at `path`, which `kill` kills.

    `tell` is called with a line for each as it ends. Raises `KvmUnavailable`, or what a connection raises.
    """
    outcomes = []
    for scenario in scenarios:
        outcome = _play(path, kill, open_vmm, coverage, scenario)
        tell(f"{outcome.name}: {outcome.found}")
        outcomes.append(outcome)
    return GuestReport(vmm=vmm, coverage=coverage.name.lower(), scenarios=outcomes)


def _play(
    path: str, kill: Kill, open_vmm: OpenVmm, coverage: Coverage, scenario: Scenario
) -> ScenarioOutcome:
    setting = PartitionSetting(
        name=f"guest {scenario.name}", mmio_granularity=scenario.granularity, coverage=coverage
    )
    with open_vmm(path, setting) as vmm:
        began = time.perf_counter()
        try:
            found, passed = scenario.play(vmm, kill), True
        except (Unexpected, TimeoutError) as error:
            found, passed = str(error), False
        seconds = time.perf_counter() - began
        memslots = vmm.memslots
        stops = vmm.stop()
        return ScenarioOutcome(
            name=scenario.name,
            expects=scenario.expects,
            passed=passed,
            found=found,
            seconds=seconds,
            memslots=memslots,
            vcpus=[
                vcpu_outcome(index, vcpu.tally, stop, vmm.mmio_exits(index))
                for index, (vcpu, stop) in enumerate(zip(vmm.vcpus, stops, strict=False))
            ],
        )
