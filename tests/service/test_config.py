"""Configuration: every error names the file, the key and what was expected."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from interceptd.config.schema import Config, Limits
from interceptd.config.sources import ConfigError, load_config


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "interceptd.toml"


def test_no_file_is_the_defaults() -> None:
    assert load_config(None) == Config()


def test_an_empty_file_is_the_defaults(file: Path) -> None:
    file.write_text("")
    assert load_config(file) == Config()


def test_keys_of_the_file_replace_the_defaults_and_only_those(file: Path) -> None:
    file.write_text('socket = "/tmp/a.sock"\n[limits]\noperators = 3\n')
    config = load_config(file)
    assert (config.socket, config.limits) == ("/tmp/a.sock", Limits(operators=3))


@pytest.mark.parametrize(
    ("text", "key", "expectation"),
    [
        ("[limits]\nvps_per_partition = 257", "limits.vps_per_partition", "<= 256"),
        ("[limits]\noperators = 0", "limits.operators", ">= 1"),
        ('[timeouts]\nhello_ms = "5s"', "timeouts.hello_ms", "expected `int`"),
        ("[timeouts]\nhelo_ms = 5", "timeouts.helo_ms", "unknown key"),
        ("sokket = 1", "sokket", "unknown key"),
        ('[log]\nlevel = "loud"', "log.level", "loud"),
        ("allowed_uids = [0, -1]", "allowed_uids", ">= 0"),
        ("socket_mode = 0o1777", "socket_mode", "<= 511"),
        ("limits = 3", "limits", "expected `object`"),
        ('[log]\nlevel = "as - at `$ says"', "log.level", "got 'as - at `$ says'"),
        ('socket = ""', "socket", "expected the path of a socket, got ''"),
        ('socket = "/"', "socket", "expected the path of a socket, got '/'"),
        ('operator_socket = "a\\u0000b"', "operator_socket", "expected the path of a socket"),
    ],
)
def test_a_wrong_key_is_named_with_its_file_and_what_was_expected(
    file: Path, text: str, key: str, expectation: str
) -> None:
    file.write_text(text)
    with pytest.raises(ConfigError) as refused:
        load_config(file)
    assert str(refused.value).startswith(f"{file}: {key}")
    assert expectation in str(refused.value)


def test_a_file_that_is_not_toml_is_named_with_the_place(file: Path) -> None:
    file.write_text("socket = \n")
    with pytest.raises(ConfigError, match=r"is not valid TOML: .*line 1"):
        load_config(file)


def test_a_file_that_is_not_text_is_named(file: Path) -> None:
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=f"{file}: is not valid TOML"):
        load_config(file)


def test_a_file_that_is_nested_beyond_what_can_be_read_is_named(file: Path) -> None:
    file.write_text("x = " + "[" * 5000)
    with pytest.raises(ConfigError, match=f"{file}: is nested too deeply"):
        load_config(file)


def test_a_missing_file_is_named_with_the_cause(file: Path) -> None:
    with pytest.raises(ConfigError, match=f"{file}: cannot be read: No such file"):
        load_config(file)


def test_operator_socket_stands_beside_the_vmm_socket_unless_said() -> None:
    assert Config(socket="/run/x/vmm.sock").operator_path == "/run/x/operator.sock"
    assert Config(operator_socket="/run/y/o.sock").operator_path == "/run/y/o.sock"


def test_allowed_uids_are_root_and_our_own_unless_said() -> None:
    assert Config().uids == {0, os.geteuid()}
    assert Config(allowed_uids=[7]).uids == {7}


def test_limits_as_stated_name_each_configurable_one_and_the_fixed_ones() -> None:
    stated = Limits().stated()
    assert stated.keys() == {
        *Limits.__struct_fields__,
        "message_bytes",
        "request_bytes",
        "request_values",
        "request_values_vmm",
        "requests_in_flight_per_connection",
    }
    assert stated["message_bytes"] == 64 * 1024
