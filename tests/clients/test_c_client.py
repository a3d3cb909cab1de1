"""The C client, built with all warnings as errors and with the sanitizers, and run."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path

import msgpack
import pytest

from fakes.answering_peer import AnsweringPeer
from fakes.c_programs import CPrograms, build, conversation, run
from fakes.daemon_process import DaemonProcess
from fakes.scripted_daemon import Answer, Await, Hear, ScriptedDaemon, Step, hello, replies
from intercept_client import BlockingVmm

TOKEN = b"fifteen letters\0"
RESUMED = [1, 1, None, ["resume", "mapped"]]


def asked(
    programs: CPrograms, socket_path: Path, *verb: object, answer: object = RESUMED
) -> tuple[str, object]:
    """What the driver printed of one call, and the request that it made."""
    with AnsweringPeer(socket_path, [msgpack.packb(answer)]) as peer:
        [printed] = run(programs / "c_driver", socket_path, *verb)
    return printed, peer.requests[0]


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    with DaemonProcess(tmp_path_factory.mktemp("daemon")) as process:
        yield process.wait_serving()


def test_the_example_lives_a_vmms_whole_life_with_a_real_daemon(
    programs: CPrograms, daemon: DaemonProcess
) -> None:
    assert run(programs / "example", daemon.socket) == [
        "gfn 0xf0000: resume mapped",
        "gfn 0xf0001: resume already_mapped",
        "gfn 0xf0002: forward permission",
        "gfn 0xf0040: forward no_region",
        "gfn 0xf0000: forward unbacked",
        "refused: EEXIST: region [0xf0000, 0xf0040) overlaps [0xf0000, 0xf0040)",
    ]


def test_a_vmm_on_its_own_memory_and_hypervisor_lives_with_a_real_daemon(
    programs: CPrograms, daemon: DaemonProcess
) -> None:
    assert run(programs / "c_vmm", daemon.socket) == [
        "copies left: -1 -1 -1",
        "resume mapped, reaches 7",
        "mprotect 0",
        "forward permission, reaches -1",
        "resume already_mapped, reaches 7",
        "mprotect -1 ECANCELED start_uaddr",
        "munmap 0",
        "forward unbacked, reaches -1",
        "mremap 1",
        "resume mapped, reaches 7",
        "own regions: 0",
        "served until: receive: the daemon closed: Connection reset by peer",
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
        (("kick_all",), "kick", {"vp_index": "all"}),
        (("set_policy", 0), "set_policy", {"mmio_granularity": "vma"}),
        (("set_policy", 1), "set_policy", {"mmio_granularity": "page"}),
        (("invalidate_begin", 0, 4096), "invalidate_begin", {"start_uaddr": 0, "length": 4096}),
        (("invalidate_end", 0, 4096), "invalidate_end", {"start_uaddr": 0, "length": 4096}),
        (("invalidate", 0, 4096), "invalidate", {"start_uaddr": 0, "length": 4096}),
    ],
)
def test_a_call_goes_out_with_the_names_and_values_it_was_given(
    programs: CPrograms, socket_path: Path, verb: tuple[object, ...], method: str, fields: dict[str, object]
) -> None:
    printed, request = asked(programs, socket_path, *verb, answer=[1, 1, None, None])
    assert (printed, request) == ("ok", [0, 1, method, [fields]])


@pytest.mark.parametrize("count", [0, 1, 128])
def test_a_list_goes_out_whole_however_long_its_numbers_are(
    programs: CPrograms, socket_path: Path, count: int
) -> None:
    printed, request = asked(programs, socket_path, "map_vmas", count, answer=[1, 1, None, None])
    longest = 2**64 - 1
    rights = {"readable": True, "writable": False, "executable": True, "io": False}
    vmas = [
        {"start_uaddr": longest - n, "page_count": longest, "start_pfn": longest, **rights}
        for n in range(count)
    ]
    assert (printed, request) == ("ok", [0, 1, "map_vmas", [{"vmas": vmas}]])


@pytest.mark.parametrize(("removed", "added"), [(0, 0), (1, 2), (101, 101), (53, 128)])
def test_a_change_of_regions_goes_out_whole_and_the_kinds_come_back(
    programs: CPrograms, socket_path: Path, removed: int, added: int
) -> None:
    kinds = [("mmio", "movable", "pinned")[n % 3] for n in range(added)]
    reply = {"later": [kinds], "kinds": kinds}
    printed, request = asked(
        programs, socket_path, "change_regions", removed, added, answer=[1, 1, None, reply]
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
    programs: CPrograms, socket_path: Path
) -> None:
    printed, request = asked(
        programs, socket_path, "add_regions", 0, 1, answer=[1, 1, None, {"kinds": ["pinned"]}]
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
    programs: CPrograms, socket_path: Path, reply: object
) -> None:
    printed, _ = asked(programs, socket_path, "change_regions", 0, 2, answer=[1, 1, None, reply])
    assert printed == "lost 74 answer to change_regions: Bad message"


def test_a_caller_who_wants_no_kinds_gets_none(programs: CPrograms, socket_path: Path) -> None:
    printed, _ = asked(programs, socket_path, "change_regions", 0, 2, 1, answer=[1, 1, None, {}])
    assert printed == "ok"


@pytest.mark.parametrize("counts", [(129, 0), (0, 129), (102, 102), (54, 128)])
def test_a_change_of_more_regions_than_the_daemon_takes_is_refused_before_it_is_sent(
    programs: CPrograms, socket_path: Path, counts: tuple[int, int]
) -> None:
    with AnsweringPeer(socket_path, [b""]) as peer:
        [printed] = run(programs / "c_driver", socket_path, "change_regions", *counts)
    assert printed == "refused 90 request a text or list in it: Message too long"
    assert peer.requests == []


def test_a_list_that_the_daemon_would_not_take_is_refused_before_it_is_sent(
    programs: CPrograms, socket_path: Path
) -> None:
    """It would end the connection, and the partition with it (F-6)."""
    with AnsweringPeer(socket_path, [b""]) as peer:
        [printed] = run(programs / "c_driver", socket_path, "map_vmas", 129)
    assert printed == "refused 90 request a text or list in it: Message too long"
    assert peer.requests == []


def test_a_partition_is_read_wherever_its_fields_stand(programs: CPrograms, socket_path: Path) -> None:
    reply = {"later": [{"a": 1.5, "b": -3}, b"x"], "token": TOKEN, "partition_id": 2**64 - 1}
    printed, request = asked(programs, socket_path, "create_partition", answer=[1, 1, None, reply])
    assert printed == f"partition {2**64 - 1} fifteen letters ok"
    assert request == [
        0,
        1,
        "create_partition",
        [{"address_space": "process", "hypervisor": "software"}],
    ]


def test_a_partition_is_created_as_it_is_wanted(programs: CPrograms, socket_path: Path) -> None:
    reply = {"partition_id": 1, "token": TOKEN}
    _, request = asked(programs, socket_path, "create_partition", 1, answer=[1, 1, None, reply])
    wanted = {
        "address_space": "declared", "hypervisor": "vmm", "architecture": "arm64", "mmio_granularity": "page",
        "remap": "error", "deposit_pages": 300, "invalidate_timeout_ms": 70,
    }  # fmt: skip
    assert request == [0, 1, "create_partition", [wanted]]


def test_a_partition_reply_without_a_token_is_invalid(programs: CPrograms, socket_path: Path) -> None:
    printed, _ = asked(programs, socket_path, "create_partition", answer=[1, 1, None, {"partition_id": 1}])
    assert printed.startswith("lost 74 answer to create_partition: ")


def test_the_kind_inferred_for_auto_is_returned(programs: CPrograms, socket_path: Path) -> None:
    printed, request = asked(
        programs, socket_path, "add_region", 1, 2, 4096, answer=[1, 1, None, {"kind": "movable"}]
    )
    assert printed == "kind 2 ok"
    fields = {"start_gfn": 1, "page_count": 2, "start_uaddr": 4096, "kind": "auto"}
    assert request == [0, 1, "add_region", [fields | {"writable": True, "executable": False}]]


def test_prefault_says_how_far_it_came(programs: CPrograms, socket_path: Path) -> None:
    reply = {"later": 1, "mapped_gfns": 0, "page_count": 300}
    printed, request = asked(programs, socket_path, "prefault", 2**40, 4096, answer=[1, 1, None, reply])
    assert printed == "300 0 ok"
    assert request == [0, 1, "prefault", [{"start_gfn": 2**40, "page_count": 4096}]]


@pytest.mark.parametrize("reply", [{}, {"page_count": 0}, {"page_count": 5}, {"page_count": "4"}, [4]])
def test_a_prefault_reply_that_nobody_could_go_on_from_is_invalid(
    programs: CPrograms, socket_path: Path, reply: object
) -> None:
    printed, _ = asked(programs, socket_path, "prefault", 0, 4, answer=[1, 1, None, reply])
    assert printed.startswith("lost 74 answer to prefault: ")


def test_an_intercept_carries_the_message_that_the_daemon_reads(
    programs: CPrograms, socket_path: Path
) -> None:
    from intercept_protocol.hv_message import memory_access  # noqa: PLC0415 - of this test alone
    from intercept_protocol.messages import Architecture  # noqa: PLC0415
    from intercept_protocol.outcomes import Access  # noqa: PLC0415

    for verb, architecture in (("intercept", Architecture.X86_64), ("intercept_arm64", Architecture.ARM64)):
        printed, request = asked(programs, socket_path, verb, 0x123456789ABCD000, 1)
        assert printed == "resume mapped ok"
        assert isinstance(request, list)
        [message] = request[3]
        assert memory_access(message, architecture) == (0x123456789ABCD, Access.WRITE)
        socket_path = socket_path.with_name("next")


def test_a_reason_that_is_not_known_and_too_long_is_cut(programs: CPrograms, socket_path: Path) -> None:
    printed, _ = asked(programs, socket_path, "intercept", answer=[1, 1, None, ["retry", "x" * 40]])
    assert printed == f"retry {'x' * 23} ok"


def test_a_restart_of_the_daemon_is_a_retry(programs: CPrograms, socket_path: Path) -> None:
    printed, _ = asked(programs, socket_path, "intercept", answer=[1, 1, None, ["retry", "restarted"]])
    assert printed == "retry restarted ok"


@pytest.mark.parametrize(
    ("hello", "printed"),
    [
        ({"protocol": 1, "features": {"x": [1], "kept": True, "y": {}}, "later": {"kept": False}}, "kept ok"),
        ({"features": {"kept": False}, "later": {"kept": True}}, "ok"),
        ({"kept": True, "features": {"chaos": 5}}, "chaos ok"),
        ({"features": {"kept": 1}}, "ok"),
        ({"features": [["kept", True]]}, "ok"),
        ({"protocol": 1}, "ok"),
        (None, "ok"),
        ({"limits": {"later": 7, "operators": 2**63, "vmms_per_uid": "x"}}, f"operators={2**63} ok"),
        ({"limits": [], "version": "1.2"}, "version 1.2 ok"),
        (
            {
                "features": {
                    "address_spaces": ["declared", "process", "later"],
                    "hypervisors": [7, "software"],
                    "architectures": ["x86_64", "arm64"],
                }
            },
            "declared process x86_64 arm64 ok",
        ),
        ({"features": {"hypervisors": ["software", "vmm"]}}, "software vmm ok"),
    ],
)
def test_hello_says_what_the_daemon_can_and_what_its_limits_are(
    programs: CPrograms, socket_path: Path, hello: object, printed: str
) -> None:
    assert asked(programs, socket_path, "open_vmm", answer=[1, 1, None, hello])[0] == printed


def test_every_limit_that_the_daemon_states_is_read(programs: CPrograms, daemon: DaemonProcess) -> None:
    with BlockingVmm.open(daemon.socket) as vmm:
        stated = vmm.hello.limits
    [printed] = run(programs / "c_driver", daemon.socket, "open_vmm")
    assert {word for word in printed.split() if "=" in word} == {
        f"{key}={value}" for key, value in stated.items()
    }


STATISTICS = {
    "regions": 1, "vmas": 2, "vps": 3, "open_invalidations": 4, "mapped_gfns": 5, "no_access_gfns": 6,
    "slat_extents": 7, "restarts": 8, "map_calls": 9, "unmap_calls": 10, "deposits": 11, "invalidations": 12,
    "stale_attempts": 13, "split_large_pages": 2**64 - 1, "latency": list(range(24)),
    "latency_waited": [9] * 24,
    "intercepts": {"resume": {"mapped": 3, "later": 1}, "later": {}, "retry": {"kicked": 2}},
}  # fmt: skip
FIGURES = "1 2 3 4 5 6 7 {} 9 10 11 12 13 {} 23 {} resume mapped 3 resume later 1 retry kicked 2 ok"


def test_statistics_are_read_wherever_they_stand(programs: CPrograms, socket_path: Path) -> None:
    reply = {"later": [1], **dict(reversed(STATISTICS.items()))}
    printed, request = asked(programs, socket_path, "statistics", answer=[1, 1, None, reply])
    assert printed == FIGURES.format(8, 2**64 - 1, 9)
    assert request == [0, 1, "statistics", [{}]]


def test_statistics_of_an_earlier_daemon_lack_what_it_does_not_count(
    programs: CPrograms, socket_path: Path
) -> None:
    later = "restarts", "split_large_pages", "latency_waited"
    reply = {key: value for key, value in STATISTICS.items() if key not in later}
    assert asked(programs, socket_path, "statistics", answer=[1, 1, None, reply])[0] == FIGURES.format(
        0, 0, 0
    )


def test_more_reasons_than_there_is_room_for_are_left_out(programs: CPrograms, socket_path: Path) -> None:
    reply = STATISTICS | {"intercepts": {"retry": {f"r{n}": n for n in range(40)}}}
    printed, _ = asked(programs, socket_path, "statistics", answer=[1, 1, None, reply])
    assert printed.endswith("retry r30 30 retry r31 31 ok")


@pytest.mark.parametrize(
    ("result", "printed"),
    [
        (None, "nothing ok"),
        ({"frame": ["host", 5], "access": 3, "pfn": 2**52}, f"host 5 3 {2**52} ok"),
        ({"access": 1, "frame": ["file 0:1:18446744073709551615", 0]}, None),
    ],
)
def test_translate_says_what_the_guest_reaches(
    programs: CPrograms, socket_path: Path, result: object, printed: str | None
) -> None:
    said, request = asked(programs, socket_path, "translate", 2**40, answer=[1, 1, None, result])
    assert said == (printed or "file 0:1:18446744073709551615 0 1 ok")
    assert request == [0, 1, "translate", [{"gfn": 2**40}]]


REGION = {
    "start_gfn": 1, "page_count": 2, "start_uaddr": 4096, "kind": "later", "state": "live", "writable": True,
    "executable": False, "mapped_gfns": 7,
}  # fmt: skip
VMA = {
    "start_uaddr": 4096, "page_count": 2, "start_pfn": 9, "readable": True, "writable": False,
    "executable": True, "io": True,
}  # fmt: skip
MAPPING = {"frame": ["anonymous", 8], "start_gfn": 1, "page_count": 2, "start_uaddr": 4096, "access": 5}


@pytest.mark.parametrize(
    ("key", "element", "words"),
    [
        ("regions", REGION, "1 2 4096 later live 7 1 0 "),
        ("vmas", VMA, "4096 2 9 1 0 1 1 "),
        ("mappings", MAPPING, "1 2 4096 anonymous 8 5 "),
    ],
)
def test_a_list_comes_in_pages_as_large_as_there_is_room_for(
    programs: CPrograms, socket_path: Path, key: str, element: dict[str, object], words: str
) -> None:
    later, method = {"later": {"x": 1}, **element}, f"list_{key}"
    for told, more, after, printed in (
        (0, False, 0, "ok"),
        (2, False, 0, words * 2 + "ok"),
        (1, True, 5, words + "more ok"),
        (3, False, 2**40, words * 2 + "more ok"),
    ):
        reply = {"more": more, key: [later] * told}
        said, request = asked(programs, socket_path, method, 2, after, answer=[1, 1, None, reply])
        assert (said, request) == (printed, [0, 1, method, [{"after": after} if after else {}]])
        socket_path = socket_path.with_name(socket_path.name + "x")


@pytest.mark.parametrize(
    "error", [{"list": "add", "index": 3, "field": "kind"}, {"limit": "regions_per_uid"}]
)
def test_an_error_says_which_field_limit_and_element_it_is_about(
    programs: CPrograms, socket_path: Path, error: dict[str, object]
) -> None:
    reply = [1, 1, [22, "EINVAL", "no", {"later": 1, **error}], None]
    printed, _ = asked(programs, socket_path, "kick", answer=reply)
    ends = {"kind": " field=kind list=add index=3", "regions_per_uid": " limit=regions_per_uid"}
    assert printed == "refused 22 EINVAL no" + ends[str(list(error.values())[-1])]


@pytest.mark.parametrize("details", [None, [], {"field": 7, "limit": [], "index": "x"}, {7: 8}])
def test_details_of_another_form_say_nothing(programs: CPrograms, socket_path: Path, details: object) -> None:
    reply = [1, 1, [22, "EINVAL", "no", details], None]
    assert asked(programs, socket_path, "kick", answer=reply)[0].startswith("refused 22 EINVAL no")


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


def test_the_headers_may_be_included_in_several_files_of_a_program(tmp_path: Path) -> None:
    include = '#include "intercept_hypervisor.h"\n#include "intercept_memory.h"\n'
    for name, text in (("both.c", "int main(void) { return 0; }"), ("b.c", "int other(void) { return 1; }")):
        (tmp_path / name).write_text(f"{include}{text}\n")
    assert run(build(tmp_path, tmp_path / "both.c", tmp_path / "b.c")) == []
