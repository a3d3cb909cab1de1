"""What a replay prints: the first difference with what led to it, the others, and a verdict.

Owns the layout. Must not know where the figures come from.
"""

from __future__ import annotations

from collections.abc import Iterator

from intercept_protocol.recording import Header
from intercept_protocol.text import visible
from interceptctl import units

from .explain import seconds
from .program import Report
from .verdict import Difference, Verdict


def lines(report: Report, header: Header) -> Iterator[str]:
    verdict = report.verdict
    for number, difference in enumerate(verdict.differences):
        yield f"{_place(difference, header)}: {visible(difference.what)}"
        yield f"  recorded: {visible(difference.recorded)}"
        yield f"  replayed: {visible(difference.replayed)}"
        if difference.why:
            yield f"  {difference.why}"
        if not number:
            yield from _before(report)
    if verdict.difference_count > len(verdict.differences):
        yield f"{units.of(verdict.difference_count - len(verdict.differences), 'more difference')}"
    yield from _not_compared(verdict)
    yield judgement(report)


def _place(difference: Difference, header: Header) -> str:
    parts = [f"record {difference.record:,}", seconds(difference.time_ns, header)]
    if difference.vp_index is not None:
        parts.append(f"VP {difference.vp_index}")
    if difference.gfn is not None:
        parts.append(f"gpa {units.address(difference.gfn)}")
    if difference.page is not None:
        parts.append(f"uaddr {units.address(difference.page)}")
    return ", ".join(parts)


def _before(report: Report) -> Iterator[str]:
    if report.striking:
        yield f"  {report.striking}"
    yield (
        "  the recording says of this page until then:"
        if report.before
        else "  nothing is recorded of this page"
    )
    for line in report.before:
        yield f"    {line}"


def _not_compared(verdict: Verdict) -> Iterator[str]:
    if verdict.not_repeatable:
        reasons = sorted(verdict.not_repeatable.items(), key=lambda item: (-item[1], item[0]))
        named = ", ".join(f"{visible(reason)} {count:,}" for reason, count in reasons)
        yield f"not repeatable: {named}"
    if verdict.unplaced:
        yield f"without a state: {units.of(verdict.unplaced, 'intercept')}"
    if verdict.reordered:
        yield f"answered in another order: {units.of(verdict.reordered, 'intercept')} that wanted one page"
    if verdict.told_late:
        yield f"seen before the daemon was told: {units.of(verdict.told_late, 'change')} of live memory"


def judgement(report: Report) -> str:
    verdict = report.verdict
    compared = f"{verdict.equal:,} of {units.of(verdict.compared, 'answer')} equal"
    skipped = verdict.not_repeatable.total() + verdict.unplaced
    rest = f", {skipped:,} not compared" if skipped else ""
    if report.passed:
        return f"PASS: {compared}{rest}"
    return f"FAIL: {units.of(verdict.difference_count, 'difference')}, {compared}{rest}"
