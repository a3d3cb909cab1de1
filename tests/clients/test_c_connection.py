"""The C client's connection: answers that are damaged, strays, signals, and a daemon that restarts."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import msgpack
import pytest

from fakes.answering_peer import AnsweringPeer
from fakes.c_driver import MAPPING, REGION, STATISTICS, TOKEN, VMA, asked
from fakes.c_programs import CPrograms, conversation, run
from fakes.scripted_daemon import Answer, Await, Hear, ScriptedDaemon, Step, hello, replies

CALLS = (
    ({"partition_id": 7, "token": TOKEN},),
    ({"kind": "movable"},),
    ({"kinds": ["pinned"]},),
    ({"page_count": 3, "mapped_gfns": 2},),
    ({"frame": ["host", 5], "access": 3, "pfn": 1}, None),
    (STATISTICS,),
    ({"regions": [REGION, REGION], "more": True},),
    ({"vmas": [VMA], "more": False},),
    ({"mappings": [MAPPING] * 3, "more": True},),
    (["resume", "mapped"], ["retry", "later"]),
    (None,),
)
"""Results, by the calls of `c_restarts fuzz`; behind them hello, and a hypervisor's requests."""
HELLO = {
    "protocol": 1,
    "version": "1",
    "limits": {"operators": 5},
    "features": {"kept": True, "hypervisors": ["vmm"]},
}
PIECE = {"start_gfn": 0x101, "page_count": 2, "start_uaddr": 0x70001000, "access": 3}
ASKED = [
    [0, 5, "map_gpa", [PIECE]],
    [0, 6, "map_gpas", [{"pieces": [PIECE, PIECE | {"start_pfn": 7}]}]],
    [0, 7, "unmap_gpas", [{"pieces": [{"start_gfn": 0, "page_count": 2**52}]}]],
]
REFUSED = [1, 1, [22, "EINVAL", "a field", {"field": "x", "limit": "y", "list": "add", "index": 3}], None]


def damaged(chance: random.Random, data: bytes) -> bytes:
    """Some bytes are others, and perhaps it ends early, or goes on."""
    answer = bytearray(data)
    for _ in range(chance.randint(0, 4)):
        answer[chance.randrange(len(answer))] = chance.choice((chance.randrange(256), 0xC0, 0x80, 0xDF, 0xFF))
    if chance.random() < 0.1:
        del answer[chance.randrange(len(answer)) :]
    return bytes(answer + chance.randbytes(chance.choice((0, 0, 3))))


def test_damaged_answers_and_requests_end_as_a_result_and_nothing_is_read_that_did_not_come(
    programs: CPrograms,
) -> None:
    """A map outside of the region, and a read of what was not received, end the program."""
    chance = random.Random(7)
    whole: list[tuple[int, object]] = [
        (call, [1, 1, None, result]) for call, results in enumerate(CALLS) for result in results
    ]
    whole += [(11, HELLO), *((12, request) for request in ASKED)]
    whole += [(call, REFUSED) for call in range(11)]
    packed = [(call, msgpack.packb(message)) for call, message in whole]
    given = b""
    for _ in range(300):
        for call, message in packed:
            data = damaged(chance, message)
            given += bytes((call, *len(data).to_bytes(2, "little"))) + data
    [printed] = run(programs / "c_restarts", "fuzz", given=given)
    ended = [int(word.rstrip(",")) for word in printed.split()[1::2]]
    assert sum(ended) == 300 * len(packed)
    assert min(ended) > 300


def test_a_refused_call_keeps_the_connection_and_says_why(programs: CPrograms, socket_path: Path) -> None:
    error = [17, "EEXIST", "region overlaps " + "y" * 300, {"start_gfn": 1}]
    printed, _ = asked(programs, socket_path, "add_region", 1, 1, answer=[1, 1, error, None])
    assert printed == "refused 17 EEXIST " + ("region overlaps " + "y" * 300)[:255]


def test_a_refused_hello_is_the_end_of_the_connection(programs: CPrograms, socket_path: Path) -> None:
    printed, _ = asked(programs, socket_path, "open_vp", answer=[1, 1, [13, "EACCES", "no", {}], None])
    assert printed == "lost 13 EACCES no"


def test_an_error_under_msgid_0_is_the_end_of_the_connection(programs: CPrograms, socket_path: Path) -> None:
    printed, _ = asked(programs, socket_path, "kick", answer=[1, 0, [5, "EIO", "lost", {}], None])
    assert printed == "lost 5 EIO lost"


def test_a_text_that_no_request_can_hold_is_refused_before_it_is_sent(
    programs: CPrograms, socket_path: Path
) -> None:
    with AnsweringPeer(socket_path, [b""]):
        [printed] = run(programs / "c_driver", socket_path, "open_vmm_named_too_long")
    assert printed == "lost 90 request a text or list in it: Message too long"


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (b"", "lost 104 receive the daemon closed: "),
        (b"\x94\x01\x01\xc0\x92\xa6resu", "lost 104 receive the daemon closed: "),
        (b"HTTP/1.1 400 Bad Request\r\n", "lost 74 answer Bad message"),
        (b"\xc1", "lost 74 answer Bad message"),
        (b"\x91" * 18, "lost 74 answer Bad message"),
        (b"\xdb\xff\xff\xff\xff" + bytes(70_000), "lost 90 answer Message too long"),
        (msgpack.packb([1, 2, None, ["resume", "mapped"]]), "lost 74 answer Bad message"),
        (msgpack.packb([1, 0, None, ["resume", "mapped"]]), "lost 74 answer to no request: "),
        (msgpack.packb([0, 1, None, ["resume", "mapped"]]), "lost 74 answer Bad message"),
        (msgpack.packb([1, 1, None, ["resume"]]), "lost 74 answer to intercept: "),
        (msgpack.packb([1, 1, None, ["return", "mapped"]]), "lost 74 answer to intercept: "),
        (msgpack.packb([1, 1, None, 7]), "lost 74 answer to intercept: "),
        (msgpack.packb([1, 1, "wrong", None]), "lost 74 answer its error: "),
    ],
)
def test_an_invalid_answer_loses_the_connection(
    programs: CPrograms, socket_path: Path, answer: bytes, why: str
) -> None:
    with AnsweringPeer(socket_path, [answer]):
        [printed] = run(programs / "c_driver", socket_path, "intercept")
    assert printed.startswith(why)


def answer(msgid: int, outcome: str, reason: str) -> str:
    """In hex, as a script has it."""
    packed: bytes = msgpack.packb([1, msgid, None, [outcome, reason]])
    return packed.hex()


def error(msgid: int, number: int) -> str:
    packed: bytes = msgpack.packb([1, msgid, [number, "E", "no", {}], None])
    return packed.hex()


FIRST, SECOND, THIRD = answer(1, "resume", "mapped"), answer(2, "retry", "kicked"), error(3, 5)


def test_answers_that_come_again_are_passed_over_wherever_they_are_cut(programs: CPrograms) -> None:
    """Right behind the first time, and late, around later ones. A request is one system call (T-13)."""
    scripts = FIRST + FIRST, FIRST + SECOND + SECOND + FIRST, SECOND + FIRST + THIRD + SECOND
    printed = run(programs / "c_restarts", "ask", *scripts)
    assert len(printed) == len("".join(scripts)) // 2 + 1
    assert set(printed) == {"resume mapped, retry kicked, refused 5 E"}


def test_msgids_begin_again_and_their_answers_too(programs: CPrograms) -> None:
    numbers = [number % 127 + 1 for number in range(130)]
    answers = [2 * answer(number, "resume", f"{number}") for number in numbers]
    assert run(programs / "c_restarts", "ask_uncut", *answers) == [
        ", ".join(f"resume {number}" for number in numbers)
    ]


@pytest.mark.parametrize("stray", [answer(3, "resume", "mapped"), answer(255, "resume", "mapped"), "c1"])
def test_behind_an_answer_what_was_never_asked_loses_the_connection(programs: CPrograms, stray: str) -> None:
    printed = run(programs / "c_restarts", "ask", FIRST + stray, SECOND)
    assert set(printed) == {"resume mapped, lost 74 answer"}


def test_signals_neither_end_a_call_nor_keep_it_from_timing_out(
    programs: CPrograms, socket_path: Path
) -> None:
    go_on = threading.Event()
    script: list[Step] = [*hello(), Hear(), Await(go_on), Answer(None), *replies(None)]
    with (
        ScriptedDaemon(socket_path, (script,)),
        conversation(programs / "c_driver", socket_path, "session", "vmm") as said,
    ):
        assert [said.end(), said.do("timeout", 50)] == ["ok", "ok"]
        assert said.do("be_interrupted") == "ok"
        assert said.do("kick", 1) == "timed out"
        go_on.set()
        assert [said.do("timeout", 0), said.do("kick", 2)] == ["ok", "ok"]


WELCOME = msgpack.packb([1, 1, None, {"protocol": 1}]).hex()


@pytest.mark.parametrize(
    ("fates", "end"),
    [
        (["", "", "", WELCOME], "ok, attempts 4, paused 150"),
        ([WELCOME[:-2], WELCOME], "ok, attempts 2, paused 50"),
        (["", "ENOENT", "ECONNREFUSED", "", WELCOME], "ok, attempts 5, paused 200"),
        (["ENOENT"], "lost 2 connect, attempts 1, paused 0"),
        (["ECONNREFUSED"], "lost 111 connect, attempts 1, paused 0"),
        (["", "EACCES"], "lost 13 connect, attempts 2, paused 50"),
        (["", error(1, 13)], "lost 13 E, attempts 2, paused 50"),
        ([error(0, 11)], "lost 11 E, attempts 1, paused 0"),
        (["c1"], "lost 74 answer, attempts 1, paused 0"),
        ([""], "lost 104 receive, attempts 200, paused 9950"),
        (["", "ENOENT"], "lost 2 connect, attempts 200, paused 9950"),
    ],
)
def test_a_hello_without_an_answer_is_begun_again_for_ten_seconds(
    programs: CPrograms, fates: list[str], end: str
) -> None:
    assert run(programs / "c_restarts", "open", *fates) == [end]


@pytest.mark.parametrize("verb", [("open_vmm",), ("open_vp", 7, 1), ("open_notifier", 7)])
def test_every_role_is_opened_despite_a_restart(
    programs: CPrograms, socket_path: Path, verb: tuple[object, ...]
) -> None:
    with AnsweringPeer(socket_path, [b"", b"", bytes.fromhex(WELCOME)]) as peer:
        assert run(programs / "c_driver", socket_path, *verb) == ["ok"]
    first, *others = peer.requests
    assert (first[2], others) == ("hello", [first, first])


def test_a_socket_that_is_not_there_is_named(programs: CPrograms, socket_path: Path) -> None:
    [printed] = run(programs / "c_driver", socket_path, "intercept")
    assert printed == f"lost 2 connect {socket_path}: No such file or directory"


def test_a_path_that_no_address_can_hold_is_refused(programs: CPrograms, tmp_path: Path) -> None:
    [printed] = run(programs / "c_driver", tmp_path / ("x" * 108), "intercept")
    assert printed.startswith("lost 36 connect ")
