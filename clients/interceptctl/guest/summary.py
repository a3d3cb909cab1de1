"""The summary of the guests: a table that fits 80 columns, what failed, and a one-line verdict.

Owns their layout; must not know where the figures come from.
"""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from interceptctl import units

from .outcome import GuestReport, ScenarioOutcome, VcpuOutcome


def summary(report: GuestReport) -> RenderableType:
    return Group(_vcpus(report), Text(""), verdict(report))


def verdict(report: GuestReport) -> RenderableType:
    """What failed, if anything, and one line."""
    failed = [scenario for scenario in report.scenarios if not scenario.passed]
    if not failed:
        return Text(f"PASS: {_guests(report)}, memory {report.coverage}", style="bold green")
    lines = [
        Text(f"{scenario.name}: expected: {scenario.expects}; found: {scenario.found}") for scenario in failed
    ]
    return Group(*lines, Text(f"FAIL: {len(failed)} of {_guests(report)}", style="bold red"))


def _guests(report: GuestReport) -> str:
    counted = units.of(len(report.scenarios), "guest")
    return counted if report.vmm == "python" else f"{counted} of the VMM in C"


def _vcpus(report: GuestReport) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("GUEST")
    for title in ("VCPU", "EXITS", "KVM MMIO", "INTERCEPTS", "FIRST TOUCH", "SLOTS"):
        table.add_column(title, justify="right")
    for scenario in report.scenarios:
        for number, vcpu in enumerate(scenario.vcpus):
            table.add_row(*_row(scenario, vcpu, is_first=not number))
    return table


def _row(scenario: ScenarioOutcome, vcpu: VcpuOutcome, *, is_first: bool) -> tuple[str, ...]:
    touch = vcpu.first_touch_median_us
    return (
        scenario.name if is_first else "",
        str(vcpu.vp_index),
        f"{sum(vcpu.exits.values()):,}",
        "-" if vcpu.kvm_mmio_exits is None else f"{vcpu.kvm_mmio_exits:,}",
        f"{sum(vcpu.intercepts.values()):,}",
        "-" if touch is None else f"{touch:,.0f} us",
        str(scenario.memslots) if is_first else "",
    )
