"""The conformance suite detects lying servers: the matching cases fail, and only those."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from conformance.exchange import PROFILES
from conformance.reference import COMMAND, reference_server
from fakes.conformance_suite import SUITE, run_suite
from fakes.eventually import eventually
from fakes.listening_at import is_listening
from fakes.puppet import ENVIRONMENT

PATIENCE: Final = 3.0
"""Seconds that an answer may take which a liar will never give."""
FOUND_OUT: Final[Mapping[str, Mapping[str, frozenset[str]]]] = {
    "nothing-but-the-truth": {},
    "hasty-acknowledgement": {
        "intercept": frozenset(
            {
                "a_vp_that_closes_while_it_waits_is_gone_and_its_memory_stays_consistent",
                "a_wait_ends_in_bounded_time_with_retry",
                "nothing_is_forwarded_because_its_memory_is_busy",
            }
        ),
        "invalidate": frozenset(
            {
                "a_pinned_region_that_is_hit_is_not_mapped_again",
                "it_is_answered_when_the_guest_reaches_nothing_and_leaves_nothing_open",
            }
        ),
        "invalidate_begin": frozenset(
            {
                "a_region_that_is_added_in_the_range_waits_as_well",
                "faults_beside_the_range_do_not_wait_and_map_nothing_of_it",
                "faults_in_the_range_wait_for_the_end",
                "faults_wait_for_the_end_of_every_range_that_has_their_page",
                "it_is_answered_when_the_guest_reaches_nothing_of_the_range",
                "it_reaches_every_region_that_has_the_uaddrs",
                "open_begins_end_with_their_connection",
            }
        ),
        "kick": frozenset(
            {
                "a_kick_while_idle_is_kept_once",
                "a_notifier_kicks_too",
                "the_intercept_that_waits_or_is_about_to_is_kicked",
                "a_kick_does_not_change_answers_given_without_waiting",
            }
        ),
        "prefault": frozenset(
            {
                "pages_that_are_being_invalidated_are_passed_over_without_waiting",
                "what_was_invalidated_since_is_mapped_again",
            }
        ),
        "unmap_gpa": frozenset(
            {
                "an_error_that_is_not_of_the_form_loses_the_partition_too",
                "a_begin_is_answered_only_when_the_vmm_has_unmapped",
                "a_refusal_loses_the_partition",
                "a_vp_that_waits_has_its_answer_when_the_partition_is_lost",
                "no_answer_in_time_loses_the_partition",
            }
        ),
        "unmap_gpas": frozenset(
            {
                "a_refusal_loses_the_partition_however_much_was_done",
                "a_single_piece_may_come_as_either_request",
                "a_vmm_that_does_not_take_lists_is_asked_for_each_piece",
                "an_invalidate_is_answered_when_all_pieces_are_unmapped",
            }
        ),
    },
    "forward-for-retry": {
        "intercept": frozenset(
            {
                "a_wait_ends_in_bounded_time_with_retry",
                "an_intercept_in_flight_is_answered_when_its_vmm_leaves",
                "nothing_is_forwarded_because_its_memory_is_busy",
            }
        ),
        "kick": frozenset(
            {
                "a_kick_while_idle_is_kept_once",
                "a_kick_of_a_notifier_does_not_wait_for_the_vmms_request",
                "a_notifier_kicks_too",
                "the_intercept_that_waits_or_is_about_to_is_kicked",
                "a_kick_does_not_change_answers_given_without_waiting",
            }
        ),
    },
    "open-door": {
        "hello": frozenset(
            {
                "an_unknown_partition_and_a_wrong_token_are_one_error",
                "the_token_of_another_partition_is_eacces",
            }
        ),
    },
    "nameless-field": {
        "add_region": frozenset(
            {
                "a_range_that_is_empty_misaligned_or_ends_beyond_its_space_is_einval_that_names_a_field",
                "a_wrong_field_is_einval_that_names_it",
                "auto_over_nothing_is_einval",
            }
        ),
        "change_regions": frozenset({"what_is_refused_names_the_element_and_changes_nothing"}),
        "create_partition": frozenset(
            {
                "a_wrong_field_is_einval_that_names_it",
                "the_fields_of_a_method_before_the_partition_are_checked_first",
            }
        ),
        "hello": frozenset(
            {
                "a_field_that_the_role_has_not_or_has_otherwise_is_einval_that_names_it",
                "a_hypervisor_of_a_partition_that_has_the_servers_is_einval",
                "a_protocol_that_is_not_an_integer_is_einval",
                "a_refused_hello_is_answered_under_its_own_msgid_and_closed",
                "an_index_at_the_limit_is_einval",
                "an_unknown_role_is_einval",
            }
        ),
        "intercept": frozenset(
            {
                "other_params_are_einval_and_the_connection_stays_open",
            }
        ),
        "invalidate_begin": frozenset(
            {
                "a_range_that_is_not_whole_pages_empty_or_wraps_is_einval",
            }
        ),
        "kick": frozenset(
            {
                "any_other_target_is_einval",
            }
        ),
        "libraries": frozenset(
            {
                "a_map_that_was_sent_empty_is_einval_that_names_the_first_required_field",
                "an_address_that_became_a_float_is_einval_and_a_signed_integer_is_as_good_as_an_unsigned_one",
                "an_intercept_message_that_was_sent_as_text_is_einval_or_ebadmsg",
                "bytes_that_were_sent_as_something_else_are_einval",
                "names_that_were_sent_as_bytes_are_einval_as_keys_and_ebadmsg_as_the_method",
            }
        ),
        "lists": frozenset({"another_after_is_einval"}),
        "map_vma": frozenset(
            {
                "a_field_that_is_missing_is_einval_that_names_it",
                "a_range_that_is_empty_misaligned_or_ends_beyond_its_space_is_einval",
            }
        ),
        "map_vmas": frozenset(
            {
                "an_element_that_is_wrong_is_einval_that_says_where_and_none_is_declared",
                "more_than_128_vmas_are_einval",
            }
        ),
        "prefault": frozenset({"a_range_that_is_none_is_einval"}),
        "remove_region": frozenset(
            {
                "a_region_of_another_extent_is_einval_that_names_the_field",
            }
        ),
        "set_policy": frozenset(
            {
                "another_granularity_is_einval",
            }
        ),
        "translate": frozenset(
            {
                "a_gfn_that_is_not_a_number_is_einval",
            }
        ),
        "transport": frozenset(
            {
                "16_levels_are_read_and_17_are_ebadmsg",
                "256_values_are_read_and_257_are_emsgsize",
                "a_message_of_exactly_64_kib_is_read",
                "a_required_field_that_is_absent_or_nil_is_einval_that_names_it",
                "a_vmm_that_has_said_hello_may_send_2048_values",
                "an_unknown_field_is_einval_that_names_it",
                "params_of_another_form_are_einval_and_the_connection_stays_open",
                "text_for_bytes_and_bytes_for_text_are_einval",
            }
        ),
        "unmap_vma": frozenset(
            {
                "a_range_that_is_empty_or_misaligned_is_einval",
            }
        ),
        "values": frozenset(
            {
                "a_wrong_last_value_of_a_key_that_comes_twice_is_einval",
                "a_non_boolean_is_einval_that_names_the_field",
                "a_non_integer_is_einval_that_names_the_field",
            }
        ),
    },
    "overlapping-regions": {
        "add_region": frozenset(
            {
                "an_overlap_is_eexist_that_says_with_what",
            }
        ),
    },
}
"""Lie to the cases that find it out, by their files."""
RACES: Final[Mapping[str, Mapping[str, frozenset[str]]]] = {
    "hasty-acknowledgement": {
        "intercept": frozenset({"an_intercept_in_flight_is_answered_when_its_vmm_leaves"}),
        "transport": frozenset({"a_second_request_before_the_answer_is_eproto_and_closes"}),
    },
}
"""Those that find a lie out only if the answer, which should not come yet, overtakes what they send next."""


@contextmanager
def lying(lie: str, directory: Path) -> Iterator[Path]:
    """A server that is right but for this lie; yields its socket."""
    with reference_server(directory) as (upstream, _):
        path = directory / "lying.sock"
        command: list[str | Path] = [sys.executable, "-m", "fakes.lying_proxy", lie, upstream, path]
        with subprocess.Popen(command, env=os.environ | ENVIRONMENT) as proxy:
            try:
                eventually(lambda: is_listening(path), True)
                yield path
            finally:
                proxy.kill()


def failing_cases(socket: Path, methods: Iterable[str] | None = None) -> dict[str, set[str]]:
    """The cases that fail when the suite, or some of its files, is run by hand: those that a server can pass
    to which no descriptor comes."""
    files = [SUITE] if methods is None else [SUITE / f"test_{method}.py" for method in methods]
    profiles = [f"--profile={profile}" for profile in PROFILES if profile != "restore"]
    run = run_suite("--socket", socket, *profiles, "-rfE", "--tb=no", files=files, patience=PATIENCE)
    assert run.returncode in {0, 1}, run.stdout + run.stderr
    failing: dict[str, set[str]] = {}
    for method, case in re.findall(r"^FAILED \S*?test_(\w+)\.py::test_(\w+)", run.stdout, flags=re.MULTILINE):
        failing.setdefault(method, set()).add(case)
    return failing


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    if not COMMAND.exists():
        pytest.skip(f"{COMMAND} is not installed")
    return tmp_path


@pytest.mark.parametrize("absent", ["--socket", "--operator-socket"])
def test_a_socket_without_a_server_is_named_once_and_ends_the_run(absent: str, directory: Path) -> None:
    with reference_server(directory) as (vmms, operators):
        sockets = {"--socket": vmms, "--operator-socket": operators} | {absent: directory / "absent.sock"}
        run = run_suite(*(word for option, path in sockets.items() for word in (option, path)))
    assert run.returncode == pytest.ExitCode.USAGE_ERROR
    assert f"{absent} {directory / 'absent.sock'}: No such file or directory" in run.stdout
    assert "FAILED" not in run.stdout


@pytest.mark.parametrize("table", [FOUND_OUT, RACES], ids=["found out", "races"])
def test_the_tables_name_cases_of_the_suite(table: Mapping[str, Mapping[str, frozenset[str]]]) -> None:
    for by_method in table.values():
        for method, cases in by_method.items():
            suite = (SUITE / f"test_{method}.py").read_text()
            assert cases <= set(re.findall(r"^def test_(\w+)", suite, flags=re.MULTILINE)), method


@pytest.mark.parametrize("lie", ["open-door", "overlapping-regions"])
def test_a_lie_fails_exactly_the_matching_cases_of_their_files(lie: str, directory: Path) -> None:
    with lying(lie, directory) as socket:
        assert failing_cases(socket, FOUND_OUT[lie]) == FOUND_OUT[lie]


@pytest.mark.verify
@pytest.mark.parametrize("lie", FOUND_OUT)
def test_a_lie_fails_exactly_the_matching_cases(lie: str, directory: Path) -> None:
    with lying(lie, directory) as socket:
        failing = failing_cases(socket)
    for method, cases in RACES.get(lie, {}).items():
        failing[method] = failing.get(method, set()) - cases
    assert {method: cases for method, cases in failing.items() if cases} == FOUND_OUT[lie]
