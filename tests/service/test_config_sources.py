"""Defaults, file, environment and flags: their precedence, and how errors name the source."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from interceptd.config.schema import Config, Limits
from interceptd.config.sources import CHAOS_VARIABLE, ConfigError, Setting, Sources, set_flag


def load(
    file: Path | None = None, environment: Mapping[str, str] | None = None, *flags: str
) -> tuple[Config, Mapping[str, str]]:
    loaded = Sources(file, environment or {}, tuple(map(set_flag, flags))).load()
    return loaded.config, loaded.origins


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "interceptd.toml"
    file.write_text("[limits]\noperators = 1\nvmms_per_uid = 1\nvps_per_uid = 1")
    return file


def test_a_flag_goes_before_the_environment_and_that_before_the_file_and_the_rest_stays(file: Path) -> None:
    environment = {"INTERCEPTD_LIMITS__OPERATORS": "2", "INTERCEPTD_LIMITS__VMMS_PER_UID": "2"}
    config, origins = load(file, environment, "limits.operators=3")
    assert config == Config(limits=Limits(operators=3, vmms_per_uid=2, vps_per_uid=1))
    assert origins == {
        "limits.operators": "--set limits.operators",
        "limits.vmms_per_uid": "environment: INTERCEPTD_LIMITS__VMMS_PER_UID",
        "limits.vps_per_uid": str(file),
    }


@pytest.mark.parametrize(
    ("variable", "text", "key", "value"),
    [
        ("SOCKET", "/run/a b.sock", "socket", "/run/a b.sock"),
        ("OPERATOR_SOCKET", "7", "operator_socket", "7"),
        ("SOCKET_MODE", "0o600", "socket_mode", 0o600),
        ("SOCKET_GROUP", "64055", "socket_group", "64055"),
        ("ALLOWED_UIDS", "[0, 64055]", "allowed_uids", [0, 64055]),
        ("ALLOWED_GIDS", "[]", "allowed_gids", []),
    ],
)
def test_a_variable_is_written_as_in_the_file_but_text_needs_no_quotes(
    variable: str, text: str, key: str, value: object
) -> None:
    config, _ = load(None, {f"INTERCEPTD_{variable}": text})
    assert getattr(config, key) == value


def test_a_word_of_a_few_is_text_too() -> None:
    config, _ = load(None, {"INTERCEPTD_LOG__LEVEL": "debug"})
    assert config.log.level == "debug"


@pytest.mark.parametrize(
    ("variable", "text", "complaint"),
    [
        ("LIMITS__OPERATORS", "0", "limits.operators: expected `int` >= 1"),
        ("LIMITS__OPERATORS", "many", "limits.operators: expected `int`, got `str`"),
        ("LIMITS__OPERATORS", "1\nsocket = 2", "limits.operators: expected `int`, got `str`"),
        ("LIMITS__OPERATORS", "", "limits.operators: expected `int`, got `str`"),
        ("LOG__LEVEL", "loud", "log.level: expected one of debug, info, warning, error, got 'loud'"),
        ("ALLOWED_UIDS", "[0, -1]", "allowed_uids[1]: expected `int` >= 0"),
        ("SOKKET", "/tmp/x", "sokket: unknown key"),
        ("LIMITS__OPRATORS", "1", "limits.oprators: unknown key"),
        ("LIMITS__", "1", "limits.: unknown key"),
        ("SOCKET__PATH", "/tmp/x", "socket: expected `str`, got `object`"),
        ("LIMITS", "3", "limits: expected `object`, got `int`"),
        ("METRICS__LISTEN", "9477", "metrics.listen: expected unix:/PATH, or an IP address and a port"),
    ],
)
def test_a_wrong_variable_is_named_with_its_key_and_what_was_expected(
    variable: str, text: str, complaint: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"environment: INTERCEPTD_{variable}: {complaint}")):
        load(None, {f"INTERCEPTD_{variable}": text})


def test_a_wrong_flag_is_named_with_its_key_and_what_was_expected() -> None:
    with pytest.raises(ConfigError, match=r"^--set limits.operators: limits.operators: expected `int` >= 1"):
        load(None, {}, "limits.operators=0")


@pytest.mark.parametrize("text", ["limits.operators", "=3", ""])
def test_a_flag_that_sets_nothing_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected KEY=VALUE"):
        set_flag(text)


def test_a_flags_value_may_hold_the_separator() -> None:
    assert set_flag("socket=/a=b") == Setting("--set socket", "socket", "/a=b")


def test_a_wrong_file_is_an_error_though_a_flag_goes_before_the_key(file: Path) -> None:
    file.write_text("limits.operators = 0")
    with pytest.raises(ConfigError, match=f"^{file}: limits.operators"):
        load(file, {}, "limits.operators=3")


def test_a_dotted_name_in_quotes_is_not_a_key(file: Path) -> None:
    file.write_text('"limits.operators" = 3')
    with pytest.raises(ConfigError, match=f"^{file}: limits.operators: unknown key"):
        load(file)


def test_chaos_the_store_and_other_programs_variables_are_not_keys() -> None:
    config, origins = load(
        None, {CHAOS_VARIABLE: "3", "INTERCEPTD_KEEP": "yes", "INTERCEPT": "1", "PATH": "/bin"}
    )
    assert (config, origins) == (Config(), {})
