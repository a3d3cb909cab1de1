"""The C client, built with all warnings as errors and with the sanitizers, and run."""

from __future__ import annotations

import random
import shutil
import subprocess
from pathlib import Path

import msgpack
import pytest

from fakes.answering_peer import AnsweringPeer
from fakes.daemon_process import DaemonProcess
from fakes.eventually import PATIENCE

HERE = Path(__file__).parent
HEADER = HERE.parents[1] / "clients" / "c"
STRICT = [
    "-std=c11",
    "-pedantic",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-g",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
]
TOKEN = b"fifteen letters\0"
RESUMED = [1, 1, None, ["resume", "mapped"]]


@pytest.fixture(scope="session")
def binaries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example, the driver, and the one without sockets."""
    gcc = shutil.which("gcc")
    if gcc is None:
        pytest.skip("gcc is missing: the C client cannot be built")
    directory = tmp_path_factory.mktemp("c")
    for source in (HEADER / "example.c", HERE / "c_driver.c", HERE / "c_restarts.c"):
        command: list[str | Path] = [gcc, *STRICT, f"-I{HEADER}", "-o", directory / source.stem, source]
        subprocess.run(command, check=True, timeout=PATIENCE)
    return directory


def run(binary: Path, *arguments: object) -> list[str]:
    """What it prints, a line an element; it must succeed and break no rule that a sanitizer knows."""
    command: list[str | Path] = [binary, *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, errors="replace", timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def asked(binaries: Path, socket_path: Path, *verb: object, answer: object = RESUMED) -> tuple[str, object]:
    """What the driver printed of one call, and the request that it made."""
    with AnsweringPeer(socket_path, [msgpack.packb(answer)]) as peer:
        [printed] = run(binaries / "c_driver", socket_path, *verb)
    return printed, peer.requests[0]


def test_the_example_lives_a_vmms_whole_life_with_a_real_daemon(binaries: Path, tmp_path: Path) -> None:
    with DaemonProcess(tmp_path) as daemon:
        daemon.wait_serving()
        printed = run(binaries / "example", daemon.socket)
    assert printed == [
        "gfn 0xf0000: resume mapped",
        "gfn 0xf0001: resume already_mapped",
        "gfn 0xf0002: forward permission",
        "gfn 0xf0040: forward no_region",
        "gfn 0xf0000: forward unbacked",
        "refused: EEXIST: region [0xf0000, 0xf0040) overlaps [0xf0000, 0xf0040)",
    ]


@pytest.mark.parametrize(
    ("verb", "method", "fields"),
    [
        (
            ("open_vmm",),
            "hello",
            {
                "protocol": 1,
                "role": "vmm",
                "name": "a VMM whose name is longer than thirty-one characters",
            },
        ),
        (
            ("open_vp", 7, 300),
            "hello",
            {"protocol": 1, "role": "vp", "partition_id": 7, "token": TOKEN, "vp_index": 300},
        ),
        (
            ("open_notifier", 2**32),
            "hello",
            {"protocol": 1, "role": "notifier", "partition_id": 2**32, "token": TOKEN},
        ),
        (
            ("remove_region", 127, 128, 255),
            "remove_region",
            {"start_gfn": 127, "page_count": 128, "start_uaddr": 255},
        ),
        (
            ("remove_region", 2**16 - 1, 2**16, 2**64 - 1),
            "remove_region",
            {"start_gfn": 2**16 - 1, "page_count": 2**16, "start_uaddr": 2**64 - 1},
        ),
        (
            ("map_vma", 0, 256, 2**32 - 1),
            "map_vma",
            {
                "start_uaddr": 0,
                "page_count": 256,
                "start_pfn": 2**32 - 1,
                "readable": True,
                "writable": False,
                "executable": True,
                "io": False,
            },
        ),
        (("unmap_vma", 4096, 1), "unmap_vma", {"start_uaddr": 4096, "page_count": 1}),
        (
            ("protect_vma", 4096, 1),
            "protect_vma",
            {"start_uaddr": 4096, "page_count": 1, "readable": False, "writable": True, "executable": False},
        ),
        (("kick", 3), "kick", {"vp_index": 3}),
        (("invalidate_begin", 0, 4096), "invalidate_begin", {"start_uaddr": 0, "length": 4096}),
        (("invalidate_end", 0, 4096), "invalidate_end", {"start_uaddr": 0, "length": 4096}),
        (("invalidate", 0, 4096), "invalidate", {"start_uaddr": 0, "length": 4096}),
    ],
)
def test_a_call_goes_out_with_the_names_and_values_it_was_given(
    binaries: Path, socket_path: Path, verb: tuple[object, ...], method: str, fields: dict[str, object]
) -> None:
    printed, request = asked(binaries, socket_path, *verb, answer=[1, 1, None, None])
    assert (printed, request) == ("ok", [0, 1, method, [fields]])


@pytest.mark.parametrize("count", [0, 1, 128])
def test_a_list_goes_out_whole_however_long_its_numbers_are(
    binaries: Path, socket_path: Path, count: int
) -> None:
    printed, request = asked(binaries, socket_path, "map_vmas", count, answer=[1, 1, None, None])
    longest = 2**64 - 1
    rights = {"readable": True, "writable": False, "executable": True, "io": False}
    vmas = [
        {"start_uaddr": longest - n, "page_count": longest, "start_pfn": longest, **rights}
        for n in range(count)
    ]
    assert (printed, request) == ("ok", [0, 1, "map_vmas", [{"vmas": vmas}]])


@pytest.mark.parametrize(("removed", "added"), [(0, 0), (1, 2), (101, 101), (53, 128)])
def test_a_change_of_regions_goes_out_whole_and_the_kinds_come_back(
    binaries: Path, socket_path: Path, removed: int, added: int
) -> None:
    kinds = [("mmio", "movable", "pinned")[n % 3] for n in range(added)]
    reply = {"later": [kinds], "kinds": kinds}
    printed, request = asked(
        binaries, socket_path, "change_regions", removed, added, answer=[1, 1, None, reply]
    )
    assert printed == "".join(f"kind {1 + n % 3} " for n in range(added)) + "ok"
    longest = 2**64 - 1
    places = [
        {"start_gfn": longest - n, "page_count": longest, "start_uaddr": longest}
        for n in range(max(removed, added))
    ]
    add = [place | {"kind": "movable", "writable": True, "executable": False} for place in places[:added]]
    assert request == [0, 1, "change_regions", [{"remove": places[:removed], "add": add}]]


def test_regions_that_are_only_added_are_a_change_that_removes_none(
    binaries: Path, socket_path: Path
) -> None:
    printed, request = asked(
        binaries, socket_path, "add_regions", 0, 1, answer=[1, 1, None, {"kinds": ["pinned"]}]
    )
    assert printed == "kind 3 ok"
    longest = 2**64 - 1
    place = {"start_gfn": longest, "page_count": longest, "start_uaddr": longest}
    add = [place | {"kind": "movable", "writable": True, "executable": False}]
    assert request == [0, 1, "change_regions", [{"remove": [], "add": add}]]


@pytest.mark.parametrize(
    "reply",
    [{}, {"kinds": ["mmio"]}, {"kinds": ["mmio", "ram"]}, {"kinds": ["mmio"] * 3}, {"kinds": 2}, ["mmio"]],
)
def test_an_answer_without_the_kind_of_each_added_region_closes_the_connection(
    binaries: Path, socket_path: Path, reply: object
) -> None:
    printed, _ = asked(binaries, socket_path, "change_regions", 0, 2, answer=[1, 1, None, reply])
    assert printed == "lost 74 answer to change_regions: Bad message"


def test_a_caller_who_wants_no_kinds_gets_none(binaries: Path, socket_path: Path) -> None:
    printed, _ = asked(binaries, socket_path, "change_regions", 0, 2, 1, answer=[1, 1, None, {}])
    assert printed == "ok"


@pytest.mark.parametrize("counts", [(129, 0), (0, 129), (102, 102), (54, 128)])
def test_a_change_of_more_regions_than_the_daemon_takes_is_refused_before_it_is_sent(
    binaries: Path, socket_path: Path, counts: tuple[int, int]
) -> None:
    with AnsweringPeer(socket_path, [b""]) as peer:
        [printed] = run(binaries / "c_driver", socket_path, "change_regions", *counts)
    assert printed == "refused 90 request a text or list in it: Message too long"
    assert peer.requests == []


def test_a_list_that_the_daemon_would_not_take_is_refused_before_it_is_sent(
    binaries: Path, socket_path: Path
) -> None:
    """It would end the connection, and the partition with it (F-6)."""
    with AnsweringPeer(socket_path, [b""]) as peer:
        [printed] = run(binaries / "c_driver", socket_path, "map_vmas", 129)
    assert printed == "refused 90 request a text or list in it: Message too long"
    assert peer.requests == []


def test_a_partition_is_read_wherever_its_fields_stand(binaries: Path, socket_path: Path) -> None:
    reply = {"later": [{"a": 1.5, "b": -3}, b"x"], "token": TOKEN, "partition_id": 2**64 - 1}
    printed, request = asked(binaries, socket_path, "create_partition", answer=[1, 1, None, reply])
    assert printed == f"partition {2**64 - 1} fifteen letters ok"
    assert request == [
        0,
        1,
        "create_partition",
        [{"address_space": "process", "hypervisor": "software"}],
    ]


def test_a_partition_reply_without_a_token_is_invalid(binaries: Path, socket_path: Path) -> None:
    printed, _ = asked(binaries, socket_path, "create_partition", answer=[1, 1, None, {"partition_id": 1}])
    assert printed.startswith("lost 74 answer to create_partition: ")


def test_the_kind_inferred_for_auto_is_returned(binaries: Path, socket_path: Path) -> None:
    printed, request = asked(
        binaries, socket_path, "add_region", 1, 2, 4096, answer=[1, 1, None, {"kind": "movable"}]
    )
    assert printed == "kind 2 ok"
    fields = {"start_gfn": 1, "page_count": 2, "start_uaddr": 4096, "kind": "auto"}
    assert request == [0, 1, "add_region", [fields | {"writable": True, "executable": False}]]


def test_prefault_says_how_far_it_came(binaries: Path, socket_path: Path) -> None:
    reply = {"later": 1, "mapped_gfns": 0, "page_count": 300}
    printed, request = asked(binaries, socket_path, "prefault", 2**40, 4096, answer=[1, 1, None, reply])
    assert printed == "300 0 ok"
    assert request == [0, 1, "prefault", [{"start_gfn": 2**40, "page_count": 4096}]]


@pytest.mark.parametrize("reply", [{}, {"page_count": 0}, {"page_count": 5}, {"page_count": "4"}, [4]])
def test_a_prefault_reply_that_nobody_could_go_on_from_is_invalid(
    binaries: Path, socket_path: Path, reply: object
) -> None:
    printed, _ = asked(binaries, socket_path, "prefault", 0, 4, answer=[1, 1, None, reply])
    assert printed.startswith("lost 74 answer to prefault: ")


def test_an_intercept_carries_the_message_that_the_daemon_reads(binaries: Path, socket_path: Path) -> None:
    from intercept_protocol.hv_message import memory_access  # noqa: PLC0415 - of this test alone
    from intercept_protocol.messages import Architecture  # noqa: PLC0415
    from intercept_protocol.outcomes import Access  # noqa: PLC0415

    printed, request = asked(binaries, socket_path, "intercept", 0x123456789ABCD000, 1)
    assert printed == "resume mapped ok"
    assert isinstance(request, list)
    [message] = request[3]
    assert memory_access(message, Architecture.X86_64) == (0x123456789ABCD, Access.WRITE)


def test_a_reason_that_is_not_known_and_too_long_is_cut(binaries: Path, socket_path: Path) -> None:
    printed, _ = asked(binaries, socket_path, "intercept", answer=[1, 1, None, ["retry", "x" * 40]])
    assert printed == f"retry {'x' * 23} ok"


def test_a_restart_of_the_daemon_is_a_retry(binaries: Path, socket_path: Path) -> None:
    printed, _ = asked(binaries, socket_path, "intercept", answer=[1, 1, None, ["retry", "restarted"]])
    assert printed == "retry restarted ok"


@pytest.mark.parametrize(
    ("hello", "printed"),
    [
        ({"protocol": 1, "features": {"x": [1], "kept": True, "y": {}}, "later": {"kept": False}}, "kept ok"),
        ({"features": {"kept": False}, "later": {"kept": True}}, "ok"),
        ({"kept": True, "features": {"chaos": 5}}, "ok"),
        ({"features": {"kept": 1}}, "ok"),
        ({"features": [["kept", True]]}, "ok"),
        ({"protocol": 1}, "ok"),
        (None, "ok"),
    ],
)
def test_hello_says_whether_a_restart_is_survived(
    binaries: Path, socket_path: Path, hello: object, printed: str
) -> None:
    assert asked(binaries, socket_path, "open_vmm", answer=[1, 1, None, hello])[0] == printed


def test_a_refused_call_keeps_the_connection_and_says_why(binaries: Path, socket_path: Path) -> None:
    error = [17, "EEXIST", "region overlaps " + "y" * 300, {"start_gfn": 1}]
    printed, _ = asked(binaries, socket_path, "add_region", 1, 1, answer=[1, 1, error, None])
    assert printed == "refused 17 EEXIST " + ("region overlaps " + "y" * 300)[:255]


def test_a_refused_hello_is_the_end_of_the_connection(binaries: Path, socket_path: Path) -> None:
    printed, _ = asked(binaries, socket_path, "open_vp", answer=[1, 1, [13, "EACCES", "no", {}], None])
    assert printed == "lost 13 EACCES no"


def test_an_error_under_msgid_0_is_the_end_of_the_connection(binaries: Path, socket_path: Path) -> None:
    printed, _ = asked(binaries, socket_path, "kick", answer=[1, 0, [5, "EIO", "lost", {}], None])
    assert printed == "lost 5 EIO lost"


def test_a_text_that_no_request_can_hold_is_refused_before_it_is_sent(
    binaries: Path, socket_path: Path
) -> None:
    with AnsweringPeer(socket_path, [b""]):
        [printed] = run(binaries / "c_driver", socket_path, "open_vmm_named_too_long")
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
    binaries: Path, socket_path: Path, answer: bytes, why: str
) -> None:
    with AnsweringPeer(socket_path, [answer]):
        [printed] = run(binaries / "c_driver", socket_path, "intercept")
    assert printed.startswith(why)


def answer(msgid: int, outcome: str, reason: str) -> str:
    """In hex, as a script has it."""
    packed: bytes = msgpack.packb([1, msgid, None, [outcome, reason]])
    return packed.hex()


def error(msgid: int, number: int) -> str:
    packed: bytes = msgpack.packb([1, msgid, [number, "E", "no", {}], None])
    return packed.hex()


FIRST, SECOND, THIRD = answer(1, "resume", "mapped"), answer(2, "retry", "kicked"), error(3, 5)


def test_answers_that_come_again_are_passed_over_wherever_they_are_cut(binaries: Path) -> None:
    """Right behind the first time, and late, around later ones. A request is one system call (T-13)."""
    scripts = FIRST + FIRST, FIRST + SECOND + SECOND + FIRST, SECOND + FIRST + THIRD + SECOND
    printed = run(binaries / "c_restarts", "ask", *scripts)
    assert len(printed) == len("".join(scripts)) // 2 + 1
    assert set(printed) == {"resume mapped, retry kicked, refused 5 E"}


def test_msgids_begin_again_and_their_answers_too(binaries: Path) -> None:
    numbers = [number % 127 + 1 for number in range(130)]
    answers = [2 * answer(number, "resume", f"{number}") for number in numbers]
    assert run(binaries / "c_restarts", "ask_uncut", *answers) == [
        ", ".join(f"resume {number}" for number in numbers)
    ]


@pytest.mark.parametrize("stray", [answer(3, "resume", "mapped"), answer(255, "resume", "mapped"), "c1"])
def test_behind_an_answer_what_was_never_asked_loses_the_connection(binaries: Path, stray: str) -> None:
    printed = run(binaries / "c_restarts", "ask", FIRST + stray, SECOND)
    assert set(printed) == {"resume mapped, lost 74 answer"}


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
    binaries: Path, fates: list[str], end: str
) -> None:
    assert run(binaries / "c_restarts", "open", *fates) == [end]


@pytest.mark.parametrize("verb", [("open_vmm",), ("open_vp", 7, 1), ("open_notifier", 7)])
def test_every_role_is_opened_despite_a_restart(
    binaries: Path, socket_path: Path, verb: tuple[object, ...]
) -> None:
    with AnsweringPeer(socket_path, [b"", b"", bytes.fromhex(WELCOME)]) as peer:
        assert run(binaries / "c_driver", socket_path, *verb) == ["ok"]
    first, *others = peer.requests
    assert (first[2], others) == ("hello", [first, first])


def test_damaged_answers_end_as_a_result_and_never_beyond_a_buffer(binaries: Path, socket_path: Path) -> None:
    chance = random.Random(7)
    whole = [msgpack.packb(RESUMED), msgpack.packb([1, 1, [22, "EINVAL", "a field", {"field": "x"}], None])]
    damaged = []
    for _ in range(400):
        answer = bytearray(chance.choice(whole))
        for _ in range(chance.randint(1, 4)):
            answer[chance.randrange(len(answer))] = chance.randrange(256)
        damaged.append(bytes(answer))
    with AnsweringPeer(socket_path, damaged):
        printed = run(binaries / "c_driver", socket_path, "intercepts")
    assert printed[-1].startswith("lost 2 connect ")


def test_a_socket_that_is_not_there_is_named(binaries: Path, socket_path: Path) -> None:
    [printed] = run(binaries / "c_driver", socket_path, "intercept")
    assert printed == f"lost 2 connect {socket_path}: No such file or directory"


def test_a_path_that_no_address_can_hold_is_refused(binaries: Path, tmp_path: Path) -> None:
    [printed] = run(binaries / "c_driver", tmp_path / ("x" * 108), "intercept")
    assert printed.startswith("lost 36 connect ")


def test_the_header_may_be_included_in_several_files_of_a_program(binaries: Path, tmp_path: Path) -> None:  # noqa: ARG001
    for name, text in (("a.c", "int main(void) { return 0; }"), ("b.c", "int other(void) { return 1; }")):
        (tmp_path / name).write_text(f'#include "intercept_client.h"\n{text}\n')
    sources = [tmp_path / "a.c", tmp_path / "b.c"]
    command: list[str | Path] = ["gcc", *STRICT, f"-I{HEADER}", "-o", tmp_path / "both", *sources]
    subprocess.run(command, check=True, timeout=PATIENCE)
    assert run(tmp_path / "both") == []
