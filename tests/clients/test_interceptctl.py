"""The operator's tool as a whole: sockets, refusals, exit codes and helps."""

from __future__ import annotations

import errno
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import msgpack
import pytest
from click.testing import CliRunner

import interceptd
from fakes.scripted_daemon import HangUp, Hear, Refuse, Say, ScriptedDaemon, Step, hello, replies
from fakes.tool import (
    DAEMON,
    HUGE,
    INSPECTION,
    run,
    run_against,
)
from intercept_protocol.errors import WireError
from interceptctl.cli import main

CLIENTS = Path(__file__).parents[2] / "clients" / "README.md"


def test_a_refusal_that_would_steer_the_terminal_is_shown_escaped(socket_path: Path) -> None:
    hostile = msgpack.packb([1, 2, [2, "ENOENT", "no \x1b[2J\u202e", {}], None])
    result, _ = run_against(socket_path, [Hear(), Say(hostile)], "stats")
    assert "no \\x1b[2J\\u202e" in result.stderr
    assert result.stderr.replace("\n", "").isprintable()


def test_a_path_that_is_not_utf8_is_shown_escaped(tmp_path: Path) -> None:
    result = run(tmp_path / "\udcff\x1b", "ls")
    assert (result.exit_code, "\\udcff\\x1b: no such file" in result.stderr) == (3, True)


def test_a_refusal_is_exit_code_1_and_the_daemons_words(socket_path: Path) -> None:
    refused: list[Step] = [Hear(), Refuse(WireError(errno.ENOENT, "no partition 9"))]

    result, _ = run_against(socket_path, refused, "show", "9")

    assert (result.exit_code, result.stdout) == (1, "")
    assert "ENOENT: no partition 9" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["policy", "set", "7"],
        ["policy", "set", "7", "--mmio-granularity", "region"],
        ["show", "guest"],
        ["show", "-1"],
        ["show", str(HUGE + 1)],
        ["drain"],
        ["drain", "--timeout", "-1"],
        ["drain", "--timeout", "5000000"],
    ],
    ids=" ".join,
)
def test_a_wrong_command_line_is_exit_code_2_before_anything_is_asked(
    socket_path: Path, arguments: list[str]
) -> None:
    assert run(socket_path, *arguments).exit_code == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ["--socket", "", "ls"],
        ["exercise", "--vmm-socket", ""],
        ["guest", "--vmm-socket", ""],
        ["doctor", "--vmm-socket", ""],
    ],
    ids=" ".join,
)
def test_an_empty_path_is_exit_code_2_and_said_to_be_empty(arguments: list[str]) -> None:
    result = CliRunner().invoke(main, arguments)

    assert (result.exit_code, result.stdout) == (2, "")
    assert "an empty path names no socket" in result.stderr


def test_an_empty_variable_is_one_that_is_not_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As every shell has it; the default is said, and how to name another."""
    default = str(tmp_path / "absent.sock")
    monkeypatch.setattr(socket_option(), "default", default)
    result = CliRunner().invoke(main, ["ls"], env={"INTERCEPTCTL_SOCKET": ""})

    assert result.exit_code == 3
    assert f"Error: {default}: no such file" in result.stderr
    assert "--socket or INTERCEPTCTL_SOCKET names another" in result.stderr


def socket_option() -> click.Parameter:
    return next(option for option in main.params if option.name == "path")


def test_an_absent_socket_is_exit_code_3_and_named(socket_path: Path) -> None:
    result = run(socket_path, "ls")

    assert result.exit_code == 3
    assert f"Error: {socket_path}: no such file" in result.stderr


def test_a_socket_without_a_listener_is_named(socket_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(socket_path))

    result = run(socket_path, "ls")

    assert result.exit_code == 3
    assert f"{socket_path}: connection refused" in result.stderr


@pytest.fixture
def locked_path(socket_path: Path) -> Iterator[Path]:
    """A socket in a directory that this process may not enter while the fixture lives."""
    user = os.geteuid()
    socket_path.parent.chmod(0o000)
    os.seteuid(user or 65534)  # root may enter every directory, so become nobody
    yield socket_path
    os.seteuid(user)
    socket_path.parent.chmod(0o700)


def test_a_socket_without_permission_is_named(locked_path: Path) -> None:
    result = run(locked_path, "ls")

    assert result.exit_code == 3
    assert f"{locked_path}: permission denied" in result.stderr


def test_the_vmm_socket_is_reported_as_no_operator_socket(socket_path: Path) -> None:
    refused: list[Step] = [
        Hear(),
        Refuse(WireError(errno.EACCES, "operators are served elsewhere")),
        HangUp(),
    ]

    with ScriptedDaemon(socket_path, (refused,)):
        result = run(socket_path, "ls")

    assert result.exit_code == 3
    assert f"{socket_path}: not an operator socket, or access denied: EACCES: operators" in result.stderr


def test_a_server_of_another_protocol_is_reported_as_no_operator_socket(socket_path: Path) -> None:
    with ScriptedDaemon(socket_path, ([Say(b"220 mail\r\n")],)):
        result = run(socket_path, "ls")

    assert result.exit_code == 3
    assert f"{socket_path}: not an operator socket" in result.stderr


def test_a_server_that_hangs_up_at_once_is_reported_as_no_operator_socket(
    socket_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("intercept_client._connecting.RESTART_SECONDS", 0)
    with ScriptedDaemon(socket_path, ([Hear(), HangUp()],)):
        result = run(socket_path, "ls")

    assert result.exit_code == 3
    assert f"{socket_path}: not an operator socket: the connection ended" in result.stderr


def test_a_path_too_long_for_a_socket_is_named(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 200)

    result = run(path, "ls")

    assert result.exit_code == 3
    assert f"{path}: the path has {len(str(path))} bytes, and that of a socket at most 107" in result.stderr


def test_another_protocol_version_is_reported_as_that(socket_path: Path) -> None:
    refusal = WireError(errno.EPROTONOSUPPORT, "hello: unsupported protocol 1 (supported: 2)")
    with ScriptedDaemon(socket_path, ([Hear(), Refuse(refusal)],)):
        result = run(socket_path, "ls")

    assert result.exit_code == 3
    assert f"{socket_path}: hello: unsupported protocol 1 (supported: 2)" in result.stderr


def test_a_connection_lost_in_between_is_exit_code_3(socket_path: Path) -> None:
    result, _ = run_against(socket_path, [Hear(), HangUp()], "stats")

    assert result.exit_code == 3
    assert f"{socket_path}: the connection ended" in result.stderr


def test_a_daemon_that_does_not_answer_is_exit_code_3(
    socket_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("interceptctl.operator_client.ANSWER_TIMEOUT", 0.05)

    result, _ = run_against(socket_path, [Hear()], "drain", "--timeout", "0")

    assert result.exit_code == 3
    assert "no answer within 0.05 s" in result.stderr


def test_the_socket_may_come_from_the_environment(socket_path: Path) -> None:
    with ScriptedDaemon(socket_path, ([*hello(), *replies(DAEMON)],)):
        result = CliRunner().invoke(main, ["stats"], env={"INTERCEPTCTL_SOCKET": str(socket_path)})

    assert result.exit_code == 0


def test_it_runs_as_a_module_and_documents_its_exit_codes() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "interceptctl", "--help"],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "NO_COLOR": "1"},
    )

    assert result.stdout.startswith("Usage: interceptctl ")
    assert "3  cannot reach the daemon" in result.stdout
    assert "/run/interceptd/operator.sock" in result.stdout


def leaves(group: click.Group, *above: str) -> Iterator[tuple[str, ...]]:
    """Every command by its words."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from leaves(command, *above, name)
        else:
            yield *above, name


COMMANDS = list(leaves(main))


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_has_json_and_its_help_fits_80_columns(words: tuple[str, ...]) -> None:
    result = CliRunner().invoke(main, [*words, "--help"], terminal_width=80)

    assert "--json" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_the_help_itself_fits_80_columns() -> None:
    result = CliRunner().invoke(main, ["--help"], terminal_width=80)

    assert max(map(len, result.stdout.splitlines())) <= 80


def test_the_version_is_the_daemons() -> None:
    result = CliRunner().invoke(main, ["--version"])

    assert result.stdout == f"interceptctl, version {interceptd.__version__}\n"


def test_exit_codes_of_the_help_are_those_of_the_documents() -> None:
    helped = re.findall(r"^    (\d)  ", CliRunner().invoke(main, ["--help"]).stdout, flags=re.MULTILINE)
    documented = re.findall(r"^\| (\d) \|", CLIENTS.read_text(encoding="utf-8"), flags=re.MULTILINE)

    assert helped == documented == ["0", "1", "2", "3", "4"]


@pytest.mark.parametrize(
    ("reply", "arguments"),
    [
        (DAEMON, ["stats"]),
        (INSPECTION, ["stats", "7"]),
        (DAEMON, ["health"]),
        (INSPECTION, ["policy", "show", "7"]),
        (None, ["policy", "set", "7", "--mmio-granularity", "vma"]),
        (None, ["drain", "--timeout", "1"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_a_command_prints_fits_80_columns(
    socket_path: Path, reply: object, arguments: list[str]
) -> None:
    result, _ = run_against(socket_path, [*replies(reply), HangUp()], *arguments)

    assert result.exit_code == 0
    assert max(map(len, result.stdout.splitlines())) <= 80


def fractions(command: click.Command, *names: str) -> Iterator[tuple[str, click.Option]]:
    """Every option that takes a number with a fraction."""
    for name, each in getattr(command, "commands", {}).items():
        yield from fractions(each, *names, name)
    for option in command.params:
        if isinstance(option, click.Option) and isinstance(option.type, click.types.FloatParamType):
            yield " ".join((*names, option.opts[0])), option


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_number_that_is_none_is_refused_by_every_option(value: str) -> None:
    found = dict(fractions(main))
    assert {"record --max-size", "replay --speed", "drain --timeout"} <= set(found)
    for option in found.values():
        with pytest.raises(click.BadParameter):
            option.type.convert(value, option, None)
