"""The report of the conformance suite on an incomplete server, and on a complete one."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from conformance.reference import COMMAND, reference_server
from conformance.selection import require_cases
from fakes.conformance_suite import run_suite
from fakes.first_day_server import first_day_server

CHOSEN = ("P-1", "P-7", "P-21", "N-1", "O-1", "P-20", "Y-2")
"""One that the first-day server breaks, one whose method it lacks, one that holds, one whose role it lacks,
and three of parts that its hello and our options say are not there."""


def statements(*numbers: str) -> list[str]:
    return [word for number in numbers for word in ("--statement", number)]


def lines_of(run: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """The report's line of each statement."""
    lines = re.findall(r"^([A-Z]-\d+) +(.*)$", run.stdout, flags=re.MULTILINE)
    assert len(lines) == len(dict(lines)), run.stdout
    return dict(lines)


@pytest.fixture(scope="module")
def first_day(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with first_day_server(tmp_path_factory.mktemp("first-day")) as socket:
        yield socket


@pytest.fixture(scope="module")
def report(first_day: Path) -> subprocess.CompletedProcess[str]:
    return run_suite("--socket", first_day, *statements(*CHOSEN))


@pytest.mark.parametrize(
    ("number", "line"),
    [
        ("P-1", r"0 of \d+ cases +BROKEN +A method other than `create_partition` is `ENOENT` while there is"),
        (
            "P-7",
            r"0 of \d+ cases +not implemented +The gfns MUST NOT overlap another region's: `EEXIST`, with",
        ),
        (
            "P-21",
            r"1 of 1 case +holds +`create_partition` replies `\{partition_id: integer, token: 16 bytes\}`\.$",
        ),
        (
            "N-1",
            r"0 of \d+ cases +not implemented +`start_uaddr` and `length` are whole pages, `length` is not",
        ),
        ("O-1", r"0 of \d+ cases +skipped +`list_partitions \{after\?\}` replies "),
        ("P-20", r"0 of \d+ cases +skipped +`promise_begin_end` true says that every change of the VMM's"),
        (
            "Y-2",
            r"0 of \d+ cases +skipped +`map_gpa \{start_gfn, page_count, start_uaddr, start_pfn\?, ",
        ),
    ],
)
def test_each_statement_has_one_line_with_its_cases_its_verdict_and_its_first_sentence(
    report: subprocess.CompletedProcess[str], number: str, line: str
) -> None:
    assert re.match(line, lines_of(report)[number]), report.stdout


def test_the_report_lists_and_counts_the_selected_statements_in_order(
    report: subprocess.CompletedProcess[str],
) -> None:
    assert list(lines_of(report)) == ["P-1", "P-21", "P-7", "P-20", "N-1", "Y-2", "O-1"]
    assert "1 holds, 1 BROKEN, 2 not implemented, 3 skipped, 0 no case\n" in report.stdout


@pytest.mark.parametrize(
    "reason",
    [
        "not implemented: add_region",
        "not implemented: role notifier",
        "no --operator-socket PATH was given",
        "features.address_spaces has no process",
        "features.hypervisors has no vmm",
    ],
)
def test_a_case_not_run_says_why(report: subprocess.CompletedProcess[str], reason: str) -> None:
    assert re.search(rf"^not run: \d+ cases?: {reason}$", report.stdout, flags=re.MULTILINE), report.stdout


def test_a_failed_case_shows_sent_received_expected_and_location(
    report: subprocess.CompletedProcess[str],
) -> None:
    _, _, failure = report.stdout.partition("test_a_method_before_the_partition_is_enoent[kick] ")
    sent, came, wants, case = failure.splitlines()[1:5]
    assert sent == 'sent  vmm: [0, 1, "kick", [{"vp_index": "all"}]]'
    assert came == "came  [1, 1, nil, nil]"
    assert (
        wants == "wants P-1 A method other than `create_partition` is `ENOENT` while there is no partition."
    )
    assert re.match(r"case  test_create_partition\.py:\d+: AssertionError: kick was not refused", case)
    assert "Traceback" not in report.stdout
    assert "FAILED" not in report.stdout


@pytest.mark.parametrize(
    ("numbers", "status"), [(["P-21", "O-1", "Y-2"], 0), (["P-7"], 1)], ids=["without it", "with it"]
)
@pytest.mark.verify
def test_a_server_does_not_pass_with_a_statement_that_it_does_not_implement_yet(
    first_day: Path, numbers: list[str], status: int
) -> None:
    """It may lack what its hello says it works without, and an operators' socket."""
    assert run_suite("--socket", first_day, *statements(*numbers)).returncode == status


@pytest.mark.verify
def test_a_profile_omits_cases_that_need_more(first_day: Path) -> None:
    run = run_suite("--socket", first_day, "--profile", "core", *statements("H-15", "N-1"))
    assert list(lines_of(run)) == ["H-15"]
    assert "left out: N-1: needs --profile notifier, too\n" in run.stdout


@pytest.mark.verify
def test_a_statement_of_which_the_profile_leaves_no_case_is_named_with_what_it_needs(first_day: Path) -> None:
    run = run_suite("--socket", first_day, "--profile", "notifier", *statements("N-1", "Y-2", "P-21"))
    assert re.findall("^left out: .*$", run.stdout, flags=re.MULTILINE) == [
        "left out: P-21: needs --profile core, too",
        "left out: Y-2: needs --profile hypervisor, too",
    ]


def test_a_report_with_something_broken_says_that_the_suite_wants_the_server_for_itself(
    report: subprocess.CompletedProcess[str],
) -> None:
    """Other clients change what some cases count."""
    assert "other clients of the server may break cases that count: run it alone\n" in report.stdout


@pytest.mark.parametrize(
    ("number", "why"), [("V-333", "no such statement"), ("H-9", "a peer of another uid is needed")]
)
def test_a_statement_that_no_case_checks_is_refused_with_the_reason(number: str, why: str) -> None:
    with pytest.raises(pytest.UsageError, match=f"--statement {number}: {why}"):
        require_cases([number])


def test_a_complete_server_passes_even_without_an_operator_socket(
    tmp_path: Path,
) -> None:
    if not COMMAND.exists():
        pytest.skip(f"{COMMAND} is not installed")
    with reference_server(tmp_path) as (socket, _):
        run = run_suite("--socket", socket, *statements("V-5", "O-1", "P-20", "Y-2"))
    verdicts = {number: line.split()[4] for number, line in lines_of(run).items()}
    assert verdicts == {"V-5": "holds", "P-20": "holds", "Y-2": "holds", "O-1": "skipped"}
    assert (run.returncode, "run it alone" in run.stdout) == (0, False)
