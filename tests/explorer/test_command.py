"""`python -m explorer` from its command line to its output and exit status."""

from __future__ import annotations

import json

from click.testing import CliRunner, Result

from explorer.command import explore_command
from explorer.scenarios import SCENARIOS
from explorer.variants import VARIANTS

V3 = ("--variant", "patch-v3", "--scenario", "bar-move", "--schedules", "5")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(explore_command, arguments)


def test_no_broken_rule_is_status_0_with_a_line_per_scenario_and_a_verdict() -> None:
    result = run("--scenario", "msix-hole", "--schedules", "3")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[1].split() == ["msix-hole", "-"]
    assert "core: 3 schedules of 1 scenario, and no rule was broken" in result.stdout


def test_a_broken_rule_is_status_1_with_its_story_in_two_columns() -> None:
    result = run(*V3)
    assert result.exit_code == 1
    assert "LEFT_REGION (I2; k): a region was removed but its mappings remain" in result.stdout
    assert "the VMM and its guest" in result.stdout


def test_the_command_that_finds_a_story_again_can_be_pasted_from_80_columns() -> None:
    _, command = run(*V3).stdout.split("again: ", 1)
    pasted = command.replace("\\\n", "").splitlines()[0].split()
    assert pasted[:7] == ["python", "-m", "explorer", "--variant", "patch-v3", "--scenario", "bar-move"]
    assert pasted[-2:] == ["--schedules", "1"]


def test_a_story_tells_the_step_in_which_the_rule_was_broken() -> None:
    result = run("--variant", "patch-v0", "--scenario", "no-translation", "--schedules", "1", "--json")
    [example] = json.loads(result.stdout)[0]["counterexamples"]
    assert [line["text"] for line in example["story"]] == [
        "VP 0: reads gfn 107: intercept",
        "VP 0: gets forward",
    ]


def test_quiet_prints_the_verdict_alone() -> None:
    result = run(*V3, "--quiet")
    assert result.stdout.startswith("patch-v3: 5 schedules of 1 scenario, and ")
    assert len(result.stdout.splitlines()) == 1


def test_json_prints_the_reports_alone() -> None:
    result = run(*V3, "--json")
    [report] = json.loads(result.stdout)
    assert report["schedules"] == 5
    assert report["counterexamples"][0]["story"][0]["side"] == "vmm"


def test_the_list_names_every_variant_and_every_scenario() -> None:
    words = run("--list").stdout.split()
    assert {*VARIANTS, *SCENARIOS} <= set(words)


def test_several_variants_are_explored_one_after_the_other() -> None:
    result = run("--variant", "core", *V3, "--quiet")
    assert [line.split(":")[0] for line in result.stdout.splitlines()] == ["core", "patch-v3"]


def test_an_unknown_variant_is_status_2_and_named() -> None:
    result = run("--variant", "patch-v9")
    assert result.exit_code == 2
    assert "no such name: 'patch-v9'" in result.stderr


def test_a_scenario_that_does_not_apply_is_a_usage_error() -> None:
    result = run("--variant", "patch-v0", "--scenario", "pinned-add")
    assert result.exit_code == 2
    assert "patch-v0 does not support the regions in pinned-add" in result.stderr
