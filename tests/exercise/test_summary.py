"""The summary of an exercise fits a terminal and has the figures that matter."""

from __future__ import annotations

import io

import msgspec
import pytest
from rich.console import Console, RenderableType

from intercept_protocol.outcomes import Answer, Outcome
from interceptctl.exercise.clock import During
from interceptctl.exercise.report import Killed, Report, Took
from interceptctl.exercise.summary import FINDINGS_SHOWN, summary, verdict
from interceptctl.exercise.tally import Finding, Wrong
from interceptctl.quantiles import Quantiles

HUGE = 10**9
NO_KILLS = Killed(count=0, waited=0, longest_wait_ms=0)


def report(*findings: Finding) -> Report:
    """A report with every counter at 10^9."""
    return Report(
        mode="model (declared + software)",
        seed=HUGE,
        vps=256,
        steps=HUGE,
        seconds=float(HUGE),
        intercepts={
            outcome.value: {answer.reason: HUGE for answer in Answer if answer.outcome is outcome}
            for outcome in Outcome
        },
        map_calls=HUGE,
        pages_mapped=HUGE,
        invalidations=HUGE,
        stale_attempts=HUGE,
        looks=HUGE,
        stale_reads=len(findings),
        kills=Killed(count=HUGE, waited=HUGE, longest_wait_ms=HUGE),
        wrongs={Wrong.UNTRUE_SIGHT: len(findings)} if findings else {},
        answered_at_once=Took(intercepts=HUGE, quantiles=Quantiles(HUGE, HUGE)),
        waited=Took(intercepts=HUGE, quantiles=Quantiles(HUGE, HUGE)),
        findings=list(findings),
    )


def finding(gfn: int) -> Finding:
    possible = ("from 5 to 6 no region",)
    return Finding(Wrong.UNTRUE_SIGHT, "VP 3", gfn, "reaches host page 0x50 rw-", possible, During(5, 6))


def shown(renderable: RenderableType) -> str:
    stream = io.StringIO()
    Console(file=stream, width=80).print(renderable)
    return stream.getvalue()


def test_summary_fits_80_columns_with_the_largest_counts() -> None:
    lines = shown(summary(report())).splitlines()
    assert max(len(line.rstrip()) for line in lines) <= 80
    assert (
        len([line for line in lines if line.startswith(("stale reads", "answered", "waited", "time"))]) == 4
    )


def test_summary_shows_latency_apart_for_answered_at_once_and_waited() -> None:
    figures = msgspec.structs.replace(
        report(),
        answered_at_once=Took(intercepts=5_700, quantiles=Quantiles(16_000, 256_000)),
        waited=Took(intercepts=1, quantiles=Quantiles(2_048_000, 2_048_000)),
    )
    text = " ".join(shown(summary(figures)).split())
    assert "answered at once 5,700 intercepts, p50 <= 16us, p99 <= 256us" in text
    assert "waited 1 intercept, p50 <= 2.0ms, p99 <= 2.0ms" in text


def test_summary_of_a_daemon_without_histograms_shows_no_latency() -> None:
    nothing = Took(intercepts=0, quantiles=Quantiles())
    figures = msgspec.structs.replace(report(), answered_at_once=nothing, waited=nothing)
    assert "p50" not in shown(summary(figures))


def test_summary_and_verdict_say_what_guests_noticed_of_kills() -> None:
    killed = msgspec.structs.replace(report(), kills=Killed(count=2, waited=1, longest_wait_ms=412))
    text = " ".join(shown(summary(killed)).split())
    assert "kills 2: 1 intercept waited, the longest 412ms" in text
    assert "requests 0 lost, 0 carried out twice" in text
    assert text.endswith(" page checks and 2 kills")


def test_summary_without_kills_does_not_mention_them() -> None:
    assert "kill" not in shown(summary(msgspec.structs.replace(report(), kills=NO_KILLS)))


def test_summary_names_every_outcome_and_reason() -> None:
    text = shown(summary(report()))
    assert all(answer.reason in text for answer in Answer)


def test_verdict_of_a_good_daemon_is_one_line() -> None:
    figures = msgspec.structs.replace(report(), kills=NO_KILLS)
    (line,) = shown(verdict(figures)).splitlines()
    assert line.startswith("PASS")


def test_verdict_of_a_bad_daemon_shows_the_first_counterexamples_and_counts_all() -> None:
    text = shown(verdict(report(*(finding(gfn) for gfn in range(FINDINGS_SHOWN + 2)))))
    assert "stale frame: VP 3 at gfn 0x0 between 5 and 6" in text
    assert "got: reaches host page 0x50 rw-" in text
    assert "possible: from 5 to 6 no region" in text
    assert f"at gfn {FINDINGS_SHOWN - 1:#x}" in text
    assert f"at gfn {FINDINGS_SHOWN:#x}" not in text
    assert text.splitlines()[-1] == f"FAIL: {FINDINGS_SHOWN + 2} x stale frame"


@pytest.mark.parametrize("findings", [(), (finding(7),)])
def test_a_report_survives_json(findings: tuple[Finding, ...]) -> None:
    original = report(*findings)
    assert msgspec.json.decode(msgspec.json.encode(original), type=Report) == original
