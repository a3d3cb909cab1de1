"""Invalid configuration: an error that names the file, the key and what was expected."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fakes.daemon_process import StartDaemon, run_to_end
from fakes.raw_client import RawConnection


@pytest.mark.parametrize(
    ("text", "key", "expected"),
    [
        ("[limits]\npartitions = 1", "limits.partitions", "unknown key"),
        ('socket_mode = "0660"', "socket_mode", "expected `int`, got `str`"),
        ("allowed_uids = [0, -1]", "allowed_uids[1]", "expected `int` >= 0"),
        ("limits.vps_per_partition = 257", "limits.vps_per_partition", "expected `int` <= 256"),
        ('metrics.listen = "9477"', "metrics.listen", "expected unix:/PATH, or an IP address and a port"),
        ("metrics.listen = 9477", "metrics.listen", "expected `str`, got `int`"),
        ('log.level = "loud"', "log.level", "expected one of debug, info, warning, error, got 'loud'"),
    ],
)
def test_a_wrong_key_is_an_error_that_names_file_key_and_what_was_expected(
    tmp_path: Path, text: str, key: str, expected: str
) -> None:
    file = tmp_path / "interceptd.toml"
    file.write_text(text)
    ended = run_to_end("--config", str(file), "--socket", str(tmp_path / "vmm.sock"))
    assert (ended.returncode, os.listdir(tmp_path)) == (1, [file.name])
    assert ended.stderr.startswith(f"Error: {file}: {key}: ")
    assert expected in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


def test_a_file_that_is_not_toml_is_an_error_that_names_it_and_the_place(tmp_path: Path) -> None:
    file = tmp_path / "interceptd.toml"
    file.write_text("limits = 5 5")
    ended = run_to_end("--config", str(file))
    assert (ended.returncode, len(ended.stderr.splitlines())) == (1, 1)
    assert f"Error: {file}: is not valid TOML: " in ended.stderr
    assert "at line 1, column 12" in ended.stderr


def test_a_file_that_is_not_there_is_an_error_that_names_it(tmp_path: Path) -> None:
    file = tmp_path / "missing.toml"
    ended = run_to_end("--config", str(file))
    assert (ended.returncode, ended.stderr) == (
        1,
        f"Error: {file}: cannot be read: No such file or directory\n",
    )


@pytest.mark.parametrize("value", ["many", "1001"])
def test_chaos_that_is_not_a_number_is_an_error_that_names_the_variable(tmp_path: Path, value: str) -> None:
    socket = str(tmp_path / "vmm.sock")
    ended = run_to_end("--socket", socket, environment={"INTERCEPTD_CHAOS": value})
    assert (ended.returncode, len(ended.stderr.splitlines())) == (1, 1)
    assert "INTERCEPTD_CHAOS: expected a number from 0 to 1000" in ended.stderr


def test_wrong_usage_ends_with_status_2() -> None:
    assert run_to_end("--sockets", "x").returncode == 2


@pytest.mark.parametrize(("chaos", "shown"), [("0", None), ("7", 7)])
def test_chaos_is_shown_in_the_features_when_it_is_on(
    start_daemon: StartDaemon, chaos: str, shown: int | None
) -> None:
    daemon = start_daemon(environment={"INTERCEPTD_CHAOS": chaos})
    with RawConnection(daemon.socket) as connection:
        assert connection.say_hello("vmm")["features"].get("chaos") == shown


def test_flags_go_before_the_file(start_daemon: StartDaemon, tmp_path: Path) -> None:
    daemon = start_daemon(config=f'socket = "{tmp_path}/unused.sock"')
    assert (daemon.socket.exists(), (tmp_path / "unused.sock").exists()) == (True, False)
