"""What every client does with what a daemon says, whatever language it is in: the same scripts for all."""

from __future__ import annotations

import errno
import threading
from pathlib import Path
from typing import Final

import pytest

from fakes.c_programs import CPrograms
from fakes.eventually import PATIENCE
from fakes.every_client import KINDS, Open, opener
from fakes.scripted_daemon import (
    Answer,
    Await,
    HangUp,
    Hear,
    Refuse,
    Say,
    ScriptedDaemon,
    Signal,
    Step,
    hello,
    replies,
)
from intercept_protocol import rpc
from intercept_protocol.errors import WireError

SHORT: Final = 50
"""Milliseconds that a test waits for an answer that is not given."""


@pytest.fixture(params=KINDS)
def client(request: pytest.FixtureRequest, programs: CPrograms) -> Open:
    return opener(request.param, programs)


def test_an_intercept_is_answered_by_what_is_known_and_by_what_is_not(
    client: Open, socket_path: Path
) -> None:
    said = ["resume", "mapped"], ["retry", "kicked"], ["forward", "of_a_later_version"]
    with ScriptedDaemon(socket_path, ([*hello(), *replies(*said)],)), client(socket_path, "vp") as vp:
        answers = [vp.do("intercept") for _ in said]
    assert answers == ["resume mapped ok", "retry kicked ok", "forward of_a_later_version ok"]


def test_a_refused_call_says_why_and_the_next_continues(client: Open, socket_path: Path) -> None:
    refusals = [
        WireError(errno.ENOENT, "no VP 9"),
        WireError(errno.EINVAL, "vp_index: too large", field="vp_index"),
        WireError(errno.ENOSPC, "too many", limit="open_invalidations_per_partition", later=[{"x": 1}]),
        WireError(4000, "of a later version"),
    ]
    script = [*hello(), *(step for refusal in refusals for step in (Hear(), Refuse(refusal))), *replies(None)]
    with (
        ScriptedDaemon(socket_path, (script,)) as daemon,
        client(socket_path, "vmm") as vmm,
    ):
        said = [vmm.do("kick", 9) for _ in refusals]
        assert vmm.do("kick_all") == "ok"
    assert said == [
        "refused ENOENT: no VP 9",
        "refused EINVAL: vp_index: too large field=vp_index",
        "refused ENOSPC: too many limit=open_invalidations_per_partition",
        "refused E4000: of a later version",
    ]
    assert daemon.heard[1:] == [("kick", [{"vp_index": 9}])] * 4 + [("kick", [{"vp_index": "all"}])]


@pytest.mark.parametrize("role", ["vmm", "vp", "notifier"])
def test_a_refused_hello_is_the_end_and_says_why(client: Open, socket_path: Path, role: str) -> None:
    script: list[Step] = [Hear(), Refuse(WireError(errno.EACCES, "no such partition")), HangUp()]
    with ScriptedDaemon(socket_path, (script,)) as daemon, client(socket_path, role) as refused:
        assert refused.opened == "lost EACCES: no such partition"
    assert daemon.methods == ["hello"]


def test_a_socket_that_is_not_there_is_an_error_at_once(client: Open, socket_path: Path) -> None:
    with client(socket_path, "vmm") as vmm:
        assert vmm.opened == "lost"


@pytest.mark.parametrize(
    "end",
    [[HangUp()], [Say(b"HTTP/1.1 400"), HangUp()], [Say(b"\x94\x01\x02\xc0"), HangUp()], [Say(b"\xc1")]],
    ids=["closed", "no MessagePack", "in the middle of an answer", "wrong"],
)
def test_a_daemon_that_hangs_up_or_talks_nonsense_loses_the_connection_for_good(
    client: Open, socket_path: Path, end: list[Step]
) -> None:
    with ScriptedDaemon(socket_path, ([*hello(), Hear(), *end],)), client(socket_path, "vmm") as vmm:
        assert [vmm.do("translate", 5), vmm.do("translate", 5)] == ["lost", "lost"]


def test_a_daemon_that_hung_up_between_calls_is_still_heard(client: Open, socket_path: Path) -> None:
    welcomed, gone = threading.Event(), threading.Event()
    last_word = rpc.encode_error(0, WireError(errno.ESHUTDOWN, "going down"))
    script = [*hello(), Await(welcomed), Say(last_word), HangUp(), Signal(gone)]
    with ScriptedDaemon(socket_path, (script,)), client(socket_path, "vmm") as vmm:
        welcomed.set()
        assert gone.wait(PATIENCE)
        assert [vmm.do("kick", 1), vmm.do("kick", 1)] == ["lost ESHUTDOWN: going down"] * 2


@pytest.mark.parametrize("in_the_middle", [False, True])
def test_after_a_call_timed_out_the_next_gets_its_own_answer(
    client: Open, socket_path: Path, *, in_the_middle: bool
) -> None:
    """T-12: the late one is passed over. No request is sent before it has come (T-7)."""
    go_on = threading.Event()
    late = rpc.encode_result(2, {"frame": ["host", 1], "access": 1})
    cut = len(late) // 2 if in_the_middle else 0
    script = [*hello(), Hear(), Say(late[:cut]), Await(go_on), Say(late[cut:])]
    script += replies({"frame": ["host", 2], "access": 3})
    with ScriptedDaemon(socket_path, (script,)) as daemon, client(socket_path, "vmm") as vmm:
        assert vmm.do("timeout", SHORT) == "ok"
        assert [vmm.do("translate", 1), vmm.do("translate", 1)] == ["timed out", "timed out"]
        go_on.set()
        vmm.do("timeout", 0)
        assert vmm.do("translate", 2) == "host 2 3 ok"
    assert daemon.heard[1:] == [("translate", [{"gfn": 1}]), ("translate", [{"gfn": 2}])]


def test_a_call_ends_in_time_whatever_comes_meanwhile(client: Open, socket_path: Path) -> None:
    """Answers that come again are passed over (T-12), and are no reason to wait on and on."""
    timed_out = threading.Event()
    again_and_again = Say(4096 * rpc.encode_result(2, None), timed_out)
    script = [*hello(), *replies(None), Hear(), again_and_again, Answer(None), *replies(None)]
    with ScriptedDaemon(socket_path, (script,)), client(socket_path, "vmm") as vmm:
        assert vmm.do("kick", 1) == "ok"
        vmm.do("timeout", SHORT)
        assert vmm.do("kick", 2) == "timed out"
        timed_out.set()
        vmm.do("timeout", 0)
        assert vmm.do("kick", 3) == "ok"


def test_a_refusal_that_comes_late_is_passed_over_too(client: Open, socket_path: Path) -> None:
    go_on = threading.Event()
    script = [
        *hello(), Hear(), Await(go_on), Refuse(WireError(errno.ENOENT, "no VP 9")), *replies(None, None),
    ]  # fmt: skip
    with ScriptedDaemon(socket_path, (script,)), client(socket_path, "vmm") as vmm:
        vmm.do("timeout", SHORT)
        assert vmm.do("kick", 9) == "timed out"
        go_on.set()
        vmm.do("timeout", 0)
        assert [vmm.do("kick", 1), vmm.do("kick", 2)] == ["ok", "ok"]


LIVES: Final[dict[str, tuple[list[Step], list[tuple[str, ...]], list[str]]]] = {
    "vmm": (
        [
            *hello(),
            *replies(None, None),
            Hear(),
            Refuse(WireError(errno.ENOENT, "no VP 9")),
            *replies({"frame": ["host", 5], "access": 3}, None),
        ],
        [("kick_all",), ("kick_all",), ("kick", "9"), ("translate", "5"), ("translate", "6")],
        ["ok", "ok", "refused ENOENT: no VP 9", "host 5 3 ok", "nothing ok"],
    ),
    "vp": (
        [*hello(), *replies(["retry", "kicked"], ["resume", "mapped"], ["resume", "mapped"])],
        [("intercept",)] * 3,
        ["retry kicked ok", "resume mapped ok", "resume mapped ok"],
    ),
    "notifier": (
        [*hello(), *replies(None, None)],
        [("invalidate", "0x70000000", "0x3000")] * 2,
        ["ok", "ok"],
    ),
}


@pytest.mark.parametrize("role", LIVES)
def test_a_daemon_that_answers_everything_twice_is_understood(
    client: Open, socket_path: Path, role: str
) -> None:
    script, calls, ends = LIVES[role]
    with ScriptedDaemon(socket_path, (script,), answers_twice=True), client(socket_path, role) as player:
        assert player.opened == "ok"
        assert [player.do(verb, *(int(n, 0) for n in numbers)) for verb, *numbers in calls] == ends
