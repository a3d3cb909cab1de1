"""Replacing the live configuration: what changes at once, what waits for a restart, and who is notified."""

from __future__ import annotations

import pytest

from interceptd.config.live import Settings
from interceptd.config.schema import Config, Limits, Log, Timeouts


def test_live_keys_are_taken_over_and_named_with_both_values() -> None:
    settings = Settings(Config())
    exchange = settings.exchange(Config(limits=Limits(operators=3), log=Log(level="debug"), allowed_uids=[7]))
    assert settings.now == Config(limits=Limits(operators=3), log=Log(level="debug"), allowed_uids=[7])
    assert sorted(exchange.changed) == [
        "allowed_uids: default -> [7]",
        "limits.operators: 32 -> 3",
        "log.level: info -> debug",
    ]
    assert exchange.needs_restart == []


def test_keys_that_need_a_restart_stay_and_are_named_every_time() -> None:
    settings = Settings(Config(socket="/a"))
    wanted = Config(socket="/b", socket_mode=0o600, timeouts=Timeouts(drain_ms=1))
    exchanges = [settings.exchange(wanted) for _ in range(2)]
    assert settings.now == Config(socket="/a", timeouts=Timeouts(drain_ms=1))
    assert [exchange.changed for exchange in exchanges] == [["timeouts.drain_ms: 5000 -> 1"], []]
    assert [exchange.needs_restart for exchange in exchanges] == [
        ["socket: /a -> /b", "socket_mode: 0o660 -> 0o600"]
    ] * 2


def test_the_same_configuration_changes_nothing() -> None:
    exchange = Settings(Config()).exchange(Config())
    assert (exchange.changed, exchange.needs_restart) == ([], [])


@pytest.mark.parametrize(
    "wanted", [Config(socket="new"), Config(operator_socket="new"), Config(socket_group="new")]
)
def test_sockets_are_for_a_restart(wanted: Config) -> None:
    exchange = Settings(Config()).exchange(wanted)
    assert (exchange.changed, len(exchange.needs_restart)) == ([], 1)
