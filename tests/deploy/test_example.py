"""The shipped configuration: its documented defaults are the real ones."""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner, Result

from fakes.eventually import PATIENCE
from interceptd.cli import main
from interceptd.config.schema import Config, Limits
from interceptd.config.sources import load_config
from interceptd.ledger.ledger_format import LEDGER_FORMAT, READABLE_FORMATS
from interceptd.process import SIGNALS

EXAMPLE = Path(__file__).parents[2] / "deploy" / "interceptd.toml"
SHOWN = re.compile(r"^#(?=\w+ = )", re.MULTILINE)
"""What makes a comment of a default: a # with no blank after it."""
UNSET = {
    "operator_socket": Config().operator_path,
    "allowed_uids": [0],
    "socket_group": "kvm",
    "limits.memory_mib": 1024,
    "metrics.listen": "unix:/run/interceptd/metrics.sock",
}
"""Defaults that depend on the other keys or on who runs, or are none: what the example shows for them."""


def flat(table: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Every key by its dotted name."""
    keys: dict[str, object] = {}
    for name, value in table.items():
        keys |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return keys


def test_the_example_as_shipped_changes_no_default() -> None:
    assert load_config(EXAMPLE) == Config()


def test_the_example_shows_every_key_and_its_default() -> None:
    shown = flat(tomllib.loads(SHOWN.sub("", EXAMPLE.read_text())))
    assert shown == flat(msgspec.to_builtins(Config())) | UNSET


def test_every_key_of_the_example_has_a_comment_above_it() -> None:
    lines = EXAMPLE.read_text().splitlines()
    bare = [line for above, line in itertools.pairwise(lines) if SHOWN.match(line) and above[:2] != "# "]
    assert bare == []


def test_every_duration_of_the_example_names_its_unit() -> None:
    text = EXAMPLE.read_text()
    assert re.findall(r"^# .*\bms\b.*\n#(\w+_ms) = ", text, re.MULTILINE) == re.findall(
        r"^#(\w+_ms) =", text, re.MULTILINE
    )


def check_config(file: Path) -> Result:
    return CliRunner().invoke(main, ["check-config", str(file)])


def test_check_config_of_the_example_shows_the_defaults() -> None:
    checked = check_config(EXAMPLE)
    assert (checked.exit_code, checked.stderr) == (0, "")
    assert checked.stdout.startswith(f"# {EXAMPLE}: would serve VMMs of uid")
    assert (
        "at /run/interceptd/vmm.sock (mode 0660) and operators at /run/interceptd/operator.sock"
        in checked.stdout
    )


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("limits.operators = 0", "limits.operators: expected `int` >= 1"),
        ("log.colour = true", "log.colour: unknown key"),
        ("[limits", "is not valid TOML: "),
    ],
)
def test_check_config_of_a_wrong_file_names_file_key_and_expectation(
    tmp_path: Path, text: str, complaint: str
) -> None:
    file = tmp_path / "wrong.toml"
    file.write_text(text)
    checked = check_config(file)
    assert (checked.exit_code, checked.stdout) == (1, "")
    assert checked.stderr.startswith(f"Error: {file}: {complaint}")


def test_check_config_quietly_prints_errors_alone(tmp_path: Path) -> None:
    """What a reload runs each time."""
    (tmp_path / "right.toml").write_text("limits.operators = 3")
    (tmp_path / "wrong.toml").write_text("limits.operators = 0")
    told = [
        CliRunner().invoke(main, ["check-config", "--quiet", str(tmp_path / name)])
        for name in ("right.toml", "wrong.toml")
    ]
    assert [(each.exit_code, each.stdout) for each in told] == [(0, ""), (1, "")]
    assert (told[0].stderr, "limits.operators: expected `int` >= 1" in told[1].stderr) == ("", True)


def test_an_error_in_the_journal_has_the_priority_of_one(tmp_path: Path) -> None:
    read, write = os.pipe()
    status = os.fstat(write)
    environment = os.environ | {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}
    command = [sys.executable, "-m", "interceptd", "check-config", str(tmp_path / "none.toml")]
    with os.fdopen(read) as said, os.fdopen(write, "w") as stderr:
        subprocess.run(command, stderr=stderr, env=environment, timeout=PATIENCE, check=False)
        stderr.close()
        assert said.read().startswith(f"<3>Error: {tmp_path / 'none.toml'}: ")


@pytest.mark.parametrize("outside", ["/run/\udcff\x1b[2J", "/run/\u202e\x7f"], ids=["no UTF-8", "bidi"])
@pytest.mark.parametrize(
    "arguments", [["--socket"], ["--metrics-listen"], []], ids=["used", "refused", "file"]
)
def test_check_config_quotes_any_text_in_one_harmless_line(arguments: list[str], outside: str) -> None:
    """A path, a value that is an error, and a file that is not there."""
    checked = CliRunner().invoke(main, ["check-config", *arguments, outside])
    assert [line for line in checked.output.splitlines() if not line.isprintable()] == []
    assert re.search(r"/run/\\u(dcff|202e)", checked.output)


def test_check_config_prints_every_value_and_its_source_as_an_equivalent_file(
    tmp_path: Path,
) -> None:
    file = tmp_path / "interceptd.toml"
    file.write_text("limits.operators = 3\nlimits.vmms_per_uid = 3\nsocket_mode = 0o600")
    command = [sys.executable, "-m", "interceptd", "check-config", str(file), "--set", "limits.vps_per_uid=5"]
    environment = os.environ | {"INTERCEPTD_LIMITS__OPERATORS": "4"}
    shown = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    origins = {line.split(" = ")[0]: line.rpartition("# ")[2] for line in shown.splitlines() if " = " in line}
    assert [
        origins[f"limits.{key}"] for key in ("operators", "vmms_per_uid", "vps_per_uid", "vps_per_partition")
    ] == [
        "environment: INTERCEPTD_LIMITS__OPERATORS",
        str(file),
        "--set limits.vps_per_uid",
        "default",
    ]
    file.write_text(shown)
    config = load_config(file)
    assert (config.limits, config.socket_mode) == (Limits(operators=4, vmms_per_uid=3, vps_per_uid=5), 0o600)


@pytest.fixture(autouse=True)
def signals_as_before() -> Iterator[None]:
    """`serve` blocks and ignores some in this process."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@pytest.mark.parametrize("command", ["serve", "check-config"])
def test_a_file_that_is_named_twice_is_wrong_usage(command: str) -> None:
    """Each form alone is one and the same, in both commands."""
    ended = CliRunner().invoke(main, [command, "a.toml", "--config", "b.toml"])
    assert (ended.exit_code, "two configuration files: a.toml and --config b.toml" in ended.stderr) == (
        2,
        True,
    )


@pytest.mark.parametrize("command", ["serve", "check-config"])
@pytest.mark.parametrize("form", [(), ("--config",)], ids=["alone", "--config"])
def test_both_commands_take_the_file_in_both_forms(
    tmp_path: Path, command: str, form: tuple[str, ...]
) -> None:
    (tmp_path / "wrong.toml").write_text("limits.operators = 0")
    ended = CliRunner().invoke(main, [command, *form, str(tmp_path / "wrong.toml")])
    assert (ended.exit_code, "limits.operators: expected `int` >= 1" in ended.stderr) == (1, True)


def test_check_config_binds_nothing(tmp_path: Path) -> None:
    file = tmp_path / "interceptd.toml"
    file.write_text(f'socket = "{tmp_path}/vmm.sock"')
    assert check_config(file).exit_code == 0
    assert list(tmp_path.iterdir()) == [file]


def test_check_config_says_which_ledgers_it_can_go_on_from() -> None:
    readable, unknown = (
        CliRunner().invoke(main, ["check-config", "--ledger-format", str(number)])
        for number in (LEDGER_FORMAT, max(READABLE_FORMATS) + 1)
    )
    assert (readable.exit_code, unknown.exit_code) == (0, 1)
    assert f"ledger format {max(READABLE_FORMATS) + 1} cannot be read" in unknown.stderr
