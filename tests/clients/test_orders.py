"""`interceptctl policy`, `restart` and `drain`: what they ask for, and what they say about it."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fakes.scripted_daemon import HangUp, Hear, Look, Refuse, ScriptedDaemon, Step, hello, replies
from fakes.tool import (
    INSPECTION,
    run,
    run_against,
)
from intercept_protocol.errors import WireError
from interceptctl import operator_client


def test_policy_set_sets_the_granularity_and_confirms(socket_path: Path) -> None:
    result, daemon = run_against(
        socket_path, replies(None), "policy", "set", "7", "--mmio-granularity", "page"
    )

    assert daemon.heard[1:] == [("set_policy", [{"partition_id": 7, "mmio_granularity": "page"}])]
    assert result.stdout.startswith("partition 7: mmio_granularity is page: ")


@pytest.mark.parametrize("verb", [["show", "7"], ["set", "7", "--mmio-granularity", "vma"]], ids=" ".join)
def test_policy_json_has_the_fields_of_set_policy(socket_path: Path, verb: list[str]) -> None:
    answer = INSPECTION if verb[0] == "show" else None

    result, _ = run_against(socket_path, replies(answer), "policy", *verb, "--json")

    assert json.loads(result.stdout) == {"partition_id": 7, "mmio_granularity": "vma"}


def test_policy_show_explains_the_value(socket_path: Path) -> None:
    result, daemon = run_against(socket_path, replies(INSPECTION), "policy", "show", "7")

    assert daemon.methods == ["hello", "inspect_partition"]
    assert result.stdout == ("partition 7: mmio_granularity is vma: a first touch maps its whole VMA\n")


def test_drain_passes_its_timeout_in_milliseconds(socket_path: Path) -> None:
    result, daemon = run_against(
        socket_path, [*replies(None), HangUp()], "drain", "--timeout", "2.5", "--json"
    )

    assert daemon.heard[1:] == [("drain", [{"timeout_ms": 2500}])]
    assert json.loads(result.stdout) == {"timeout_ms": 2500}


RESTARTING: list[Step] = [*hello(), *replies(None)]


class Pauses:
    """In place of sleeping: counts, and runs something in one of them."""

    def __init__(self, number: int = 0, action: Callable[[], object] = int) -> None:
        self.count = 0
        self._number, self._action = number, action

    def sleep(self, _: float) -> None:
        self.count += 1
        if self.count == self._number:
            self._action()


def test_restart_waits_for_the_successor(socket_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    successor = ScriptedDaemon(socket_path, (hello(),))
    pauses = Pauses(3, successor.__enter__)
    monkeypatch.setattr(operator_client, "time", pauses)
    script = [*RESTARTING, Look(socket_path.unlink), HangUp()]
    try:
        with ScriptedDaemon(socket_path, (script,)) as daemon:
            result = run(socket_path, "restart")
    finally:
        successor.__exit__(None, None, None)

    assert (result.exit_code, result.stdout, result.stderr) == (0, "restarted\n", "")
    assert (daemon.heard[1:], successor.methods, pauses.count) == ([("restart", [{}])], ["hello"], 3)


def test_a_restart_without_a_successor_is_exit_code_3(
    socket_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses = Pauses()
    monkeypatch.setattr(operator_client, "time", pauses)
    with ScriptedDaemon(socket_path, ([*RESTARTING, Look(socket_path.unlink), HangUp()],)):
        result = run(socket_path, "restart")

    assert (result.exit_code, result.stdout, pauses.count) == (3, "", operator_client.SUCCESSOR_ATTEMPTS)
    assert "no such file" in result.stderr


def test_a_restart_that_is_refused_is_exit_code_1(socket_path: Path) -> None:
    refusal = WireError(errno.EINVAL, "a daemon started now could not go on: limits.vps: unknown key")
    result, _ = run_against(socket_path, [Hear(), Refuse(refusal)], "restart")

    assert (result.exit_code, result.stdout) == (1, "")
    assert "limits.vps: unknown key" in result.stderr


def test_a_drain_that_does_not_end_is_exit_code_3(socket_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("interceptctl.operator_client.ANSWER_TIMEOUT", 0.05)

    result, _ = run_against(socket_path, replies(None), "drain", "--timeout", "0")

    assert (result.exit_code, result.stdout) == (3, "")
