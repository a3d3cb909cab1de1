"""The C client, built with all warnings as errors and with the sanitizers: a life, and calls that go out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fakes.answering_peer import AnsweringPeer
from fakes.c_driver import TOKEN, asked
from fakes.c_programs import CPrograms, build, run
from fakes.daemon_process import DaemonProcess
from intercept_client import BlockingVmm


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


@pytest.mark.parametrize(
    ("numbers", "fields"),
    [
        ((0, 0, 0), {}),
        ((1, 1, 0), {"prefetch": True, "trace": True}),
        ((0, 0, 1), {"around_pages": 512, "on_image_error": "kill", "connect_timeout_ms": 3_600_000}),
    ],
)
def test_a_restore_says_only_what_is_not_the_default(
    programs: CPrograms, socket_path: Path, numbers: tuple[int, ...], fields: dict[str, object]
) -> None:
    reply = {"partition_id": 2**64 - 1, "image_pages": 1}
    printed, request = asked(programs, socket_path, "restore", *numbers, answer=[1, 1, None, reply])
    assert printed == f"{2**64 - 1} 1 ok"
    assert request == [0, 1, "restore", [fields]]


@pytest.mark.parametrize("missing", ["partition_id", "image_pages"])
def test_a_restore_reply_that_lacks_something_is_invalid(
    programs: CPrograms, socket_path: Path, missing: str
) -> None:
    reply = {"partition_id": 1, "image_pages": 1}
    del reply[missing]
    printed, _ = asked(programs, socket_path, "restore", answer=[1, 1, None, reply])
    assert printed.startswith("lost 74 answer to restore: ")


PROGRESS = {
    "latency": [*[0] * 23, 14], "later": "x", "pid": 13, "age_ms": 11, "image_errors": 10, "retries": 9,
    "faults": 8, "removed_pages": 7, "zero_pages": 6, "prefetched_pages": 5, "around_pages": 4,
    "demand_pages": 3, "pages_in": 2, "image_pages": 1, "error": "nobody came", "state": "of_later_daemons",
}  # fmt: skip


@pytest.mark.parametrize(
    ("told", "shown"),
    [({}, f"{2**64 - 1} {2**64 - 1}"), ({"first_fault_ms": 0, "quiet_ms": 12}, "0 12")],
    ids=["before the first fault", "after it"],
)
def test_the_progress_of_a_restore_is_read_wherever_its_fields_stand(
    programs: CPrograms, socket_path: Path, told: dict[str, object], shown: str
) -> None:
    answer = [1, 1, None, PROGRESS | told]
    printed, request = asked(programs, socket_path, "restore_progress", 7, answer=answer)
    assert printed == f"of_later_da 'nobody came' 1 2 3 4 5 6 7 8 9 10 11 {shown} 13 14 ok"
    assert request == [0, 1, "restore_progress", [{"partition_id": 7}]]


@pytest.mark.parametrize("wrong", [{"state": 1}, {"latency": [0]}, {"pages_in": -1}, {"quiet_ms": "x"}])
def test_a_progress_of_another_form_is_invalid(
    programs: CPrograms, socket_path: Path, wrong: dict[str, object]
) -> None:
    answer = [1, 1, None, PROGRESS | wrong]
    printed, _ = asked(programs, socket_path, "restore_progress", 7, answer=answer)
    assert printed.startswith("lost 74 answer to restore_progress: ")


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


def test_every_limit_that_the_daemon_states_is_read(programs: CPrograms, daemon: DaemonProcess) -> None:
    with BlockingVmm.open(daemon.socket) as vmm:
        stated = vmm.hello.limits
    [printed] = run(programs / "c_driver", daemon.socket, "open_vmm")
    assert {word for word in printed.split() if "=" in word} == {
        f"{key}={value}" for key, value in stated.items()
    }


def test_the_headers_may_be_included_in_several_files_of_a_program(tmp_path: Path) -> None:
    include = '#include "intercept_hypervisor.h"\n#include "intercept_memory.h"\n'
    for name, text in (("both.c", "int main(void) { return 0; }"), ("b.c", "int other(void) { return 1; }")):
        (tmp_path / name).write_text(f"{include}{text}\n")
    assert run(build(tmp_path, tmp_path / "both.c", tmp_path / "b.c")) == []
