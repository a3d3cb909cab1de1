"""The summary of an exercise: a table that fits 80 columns, the counterexamples and a one-line verdict.

Owns their layout; must not know where the figures come from.
"""

from __future__ import annotations

from typing import Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from interceptctl import units

from .report import Killed, Report, Took
from .tally import Finding

FINDINGS_SHOWN: Final = 5


def summary(report: Report) -> RenderableType:
    """Intercepts by outcome and reason, the other figures, and the verdict."""
    return Group(_intercepts(report), Text(""), _figures(report), Text(""), verdict(report))


def verdict(report: Report) -> RenderableType:
    """The counterexamples, if any, and one line."""
    if report.passed:
        return Text(
            f"PASS: no stale read in {report.intercept_count:,} intercepts{_page_checks(report)}",
            style="bold green",
        )
    wrongs = ", ".join(f"{count} x {wrong}" for wrong, count in report.wrongs.items())
    shown = report.findings[:FINDINGS_SHOWN]
    return Group(*(_finding(finding) for finding in shown), Text(f"FAIL: {wrongs}", style="bold red"))


def _intercepts(report: Report) -> RenderableType:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("OUTCOME")
    table.add_column("REASON")
    table.add_column("INTERCEPTS", justify="right")
    for outcome, reasons in report.intercepts.items():
        for reason, count in reasons.items():
            if count:
                table.add_row(outcome, reason, f"{count:,}")
    return table


def _figures(report: Report) -> RenderableType:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column()
    table.add_column(overflow="fold")
    stale = Text(f"{report.stale_reads:,}", style="bold red" if report.stale_reads else "bold green")
    rows: tuple[tuple[str, str | Text], ...] = (
        ("mode", report.mode),
        ("VPs, steps, seed", f"{report.vps}, {report.steps:,}, {report.seed}"),
        ("map calls", f"{report.map_calls:,}"),
        ("pages mapped", f"{report.pages_mapped:,} at the end"),
        ("invalidations", f"{report.invalidations:,}, which made {report.stale_attempts:,} attempts stale"),
        ("page checks", f"{report.looks:,}"),
        ("stale reads", stale),
        *_kills(report.kills),
        ("answered at once", _took(report.answered_at_once)),
        ("waited", _took(report.waited)),
        ("time", f"{report.seconds:.1f} s"),
    )
    for name, value in rows:
        table.add_row(name, value)
    return table


def waited_text(waited: int, longest_seconds: float) -> str:
    """What guests noticed of kills."""
    longest = f", the longest {units.latency(longest_seconds * 1e9)}" if waited else ""
    return f"{units.of(waited, 'intercept')} waited{longest}"


def _kills(killed: Killed) -> tuple[tuple[str, str], ...]:
    """All requests were answered, or there would be no report; what is carried out twice is refused."""
    if not killed.count:
        return ()
    noticed = waited_text(killed.waited, killed.longest_wait_ms / 1e3)
    return (
        ("kills", f"{killed.count:,}: {noticed}"),
        ("requests", "0 lost, 0 carried out twice"),
    )


def _page_checks(report: Report) -> str:
    kills = report.kills.count
    checks = f"{report.looks:,} page checks"
    return f", {checks} and {units.of(kills, 'kill')}" if kills else f" and {checks}"


def _took(took: Took) -> str:
    """The time in the daemon, if it reports times."""
    counted = units.of(took.intercepts, "intercept")
    if took.quantiles.p50_ns is None:
        return counted
    half, most = units.latency(took.quantiles.p50_ns), units.latency(took.quantiles.p99_ns)
    return f"{counted}, p50 <= {half}, p99 <= {most}"


def _finding(finding: Finding) -> RenderableType:
    """What the guest got, and everything that would have been right. Times are ticks of the logical clock."""
    where = "" if finding.gfn is None else f" at gfn {finding.gfn:#x}"
    when = f"between {finding.during.first} and {finding.during.last}"
    lines = [f"{finding.wrong}: {finding.who}{where} {when}", f"  got: {finding.told}"]
    lines += [f"  possible: {state}" for state in finding.possible]
    return Text("\n".join(lines))
