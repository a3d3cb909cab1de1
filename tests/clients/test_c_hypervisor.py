"""The hypervisor connection in C: what a daemon asks, what is refused (Y-12, Y-13), and what is answered."""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import msgpack
import pytest

from fakes.c_programs import Conversation, CPrograms, conversation, run
from fakes.eventually import PATIENCE, eventually
from fakes.lying_maps import LIES, RAM, ROM, RW, TRUTHS, at, request, uaddrs_of
from fakes.scripted_daemon import (
    Answer,
    Ask,
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
from intercept_protocol.addresses import UaddrRange
from intercept_protocol.errors import WireError
from intercept_protocol.messages.hypervisor import PIECES_LIMIT

MEMORY: Final = UaddrRange.of_pages(0x7000_0000, 16)
ADDED: Final = {"kind": "movable"}
ADD_BOTH: Final = [
    ("add", RAM.start, RAM.page_count, uaddrs_of(RAM, MEMORY).start_uaddr, 1, 0),
    ("add", ROM.start, ROM.page_count, uaddrs_of(ROM, MEMORY).start_uaddr, 0, 1),
]
ADD_RAM: Final = ADD_BOTH[0]
WHOLE_RAM: Final = at(MEMORY, TRUTHS["a whole region"])
ENDED: Final = "104 receive the daemon closed: Connection reset by peer"

serving = pytest.mark.parametrize("how", ["serve", "step"])


class Asked:
    """A VMM in C with RAM and ROM whose daemon follows two scripts."""

    def __init__(self, daemon: ScriptedDaemon, said: Conversation, ready: threading.Event) -> None:
        self.daemon = daemon
        self.do = said.do
        self.begin = said.begin
        self.end = said.end
        self._ready = ready

    def go_on(self) -> None:
        """Let the hypervisor's script begin."""
        self._ready.set()

    def ask(self) -> Sequence[object]:
        """Have the hypervisor's script go on to its end; the errors that were answered."""
        self.go_on()
        assert self.do("served").startswith("104 receive")
        return self.daemon.answered


@contextmanager
def vmm_in_c(
    programs: CPrograms,
    path: Path,
    asks: Sequence[Step],
    *,
    how: str = "serve",
    told: Sequence[Step] = (),
    calls: Sequence[tuple[object, ...]] = ADD_BOTH,
) -> Iterator[Asked]:
    """`told` is what its `vmm` connection hears behind the answers to `calls`; `asks` begins with
    `Asked.go_on`."""
    ready = threading.Event()
    vmm = [*hello(), *replies(*[ADDED] * len(calls)), *told]
    hypervisor = [*hello(), Await(ready), *asks, HangUp()]
    with (
        ScriptedDaemon(path, (vmm, hypervisor)) as daemon,
        conversation(programs / "c_hypervisor", path, how) as said,
    ):
        assert [said.do(*call) for call in calls] == ["ok"] * len(calls)
        yield Asked(daemon, said, ready)


def numbers(answered: Sequence[object]) -> list[object]:
    """The errno of each, None for none."""
    return [error[0] if isinstance(error, list) else error for error in answered]


@serving
def test_every_map_that_no_region_covers_is_refused_and_all_others_are_carried_out(
    programs: CPrograms, socket_path: Path, how: str
) -> None:
    lies = [at(MEMORY, fields) for fields, _ in LIES.values()]
    truths = [at(MEMORY, fields) for fields in TRUTHS.values()]
    asks: list[Step] = [Ask("map_gpa", fields) for fields in [*lies, *truths]]
    with vmm_in_c(programs, socket_path, asks, how=how) as asked:
        answered = asked.ask()
        calls = asked.do("calls")
    assert numbers(answered) == [errno.EPERM] * len(lies) + [None] * len(truths)
    assert calls == "".join(
        f"{what} {fields['start_gfn']:#x}+{fields['page_count']} {int(fields['access'])}, ".replace(
            "0x0+", "0+"
        )
        for what, many in (("refused", lies), ("map", truths))
        for fields in many
    )


@pytest.mark.parametrize("place", [0, 1, 2])
def test_one_lie_in_a_list_refuses_all_of_it_before_anything_is_carried_out(
    programs: CPrograms, socket_path: Path, place: int
) -> None:
    pieces = [WHOLE_RAM | {"page_count": 1}, WHOLE_RAM | {"page_count": 1, "access": 0}]
    pieces.insert(place, at(MEMORY, LIES["the heap, in no region"][0]))
    with vmm_in_c(programs, socket_path, [Ask("map_gpas", {"pieces": pieces})]) as asked:
        [answered] = asked.ask()
        calls = asked.do("calls")
    match answered:
        case [errno.EPERM, "EPERM", str(), {"done": 0}]:
            assert calls == "refused 0x200+1 3, "
        case _:
            pytest.fail(f"no refusal: {answered!r}")


def test_a_list_is_carried_out_in_order_and_a_refusal_says_how_far_it_came(
    programs: CPrograms, socket_path: Path
) -> None:
    maps = [at(MEMORY, request(0x100 + n, 1, n, RW)) for n in range(4)]
    unmaps = [{"start_gfn": n * 2, "page_count": 1} for n in range(PIECES_LIMIT)]
    middle = threading.Event()
    refused = threading.Event()
    asks: list[Step] = [
        Ask("map_gpas", {"pieces": maps}), Ask("unmap_gpas", {"pieces": unmaps}),
        Signal(middle), Await(refused),
        Ask("map_gpas", {"pieces": maps}), Ask("unmap_gpa", unmaps[3]),
    ]  # fmt: skip
    with vmm_in_c(programs, socket_path, asks) as asked:
        asked.go_on()
        assert middle.wait(PATIENCE)
        first = asked.do("calls")
        asked.do("refuse", 2)
        refused.set()
        answered = asked.ask()
        second = asked.do("calls")
    assert first.startswith(
        "map 0x100+1 3, map 0x101+1 3, map 0x102+1 3, map 0x103+1 3, unmap 0+1 0, unmap 0x2"
    )
    assert first.count("unmap") == PIECES_LIMIT
    assert second == "map 0x100+1 3, map 0x101+1 3, unmap 0x6+1 0, "
    assert answered == [None, None, [errno.ENOSPC, "E28", "No space left on device", {"done": 2}], None]


WRONG: Final[Mapping[str, tuple[str, Mapping[str, object], int, str | None]]] = {
    "a later method": ("map_everything", {}, errno.ENOSYS, None),
    "a later field": ("map_gpa", WHOLE_RAM | {"later": 1}, errno.EINVAL, "params"),
    "no field": ("unmap_gpa", {"start_gfn": 1}, errno.EINVAL, "page_count"),
    "a field of the other": ("unmap_gpa", WHOLE_RAM, errno.EINVAL, "params"),
    "text": ("map_gpa", WHOLE_RAM | {"start_gfn": "1"}, errno.EINVAL, "start_gfn"),
    "no pages": ("map_gpa", WHOLE_RAM | {"page_count": 0}, errno.EINVAL, "page_count"),
    "half a page": ("map_gpa", WHOLE_RAM | {"start_uaddr": 0x7000_0001}, errno.EINVAL, "start_uaddr"),
    "beyond all gfns": ("unmap_gpa", {"start_gfn": 2**52, "page_count": 1}, errno.EINVAL, "page_count"),
    "around the end": ("unmap_gpa", {"start_gfn": 2, "page_count": 2**64 - 1}, errno.EINVAL, "page_count"),
    "beyond all memory": (
        "map_gpa", WHOLE_RAM | {"start_uaddr": 2**64 - 4096}, errno.EINVAL, "start_uaddr",
    ),
    "no pieces": ("map_gpas", {"pieces": []}, errno.EINVAL, "pieces"),
    "too many": ("map_gpas", {"pieces": [WHOLE_RAM] * (PIECES_LIMIT + 1)}, errno.EINVAL, "pieces"),
    "a piece that is none": ("unmap_gpas", {"pieces": [7]}, errno.EINVAL, "start_gfn"),
}  # fmt: skip


@serving
def test_what_is_not_a_request_of_this_protocol_is_refused_and_the_next_is_carried_out(
    programs: CPrograms, socket_path: Path, how: str
) -> None:
    asks: list[Step] = [Ask(method, fields) for method, fields, _, _ in WRONG.values()]
    with vmm_in_c(programs, socket_path, [*asks, Ask("map_gpa", WHOLE_RAM)], how=how) as asked:
        *refusals, last = asked.ask()
        assert asked.do("calls") == "map 0x100+4 3, "
    assert last is None
    told = [
        (error[0], error[3].get("field"), error[3]["done"]) for error in refusals if isinstance(error, list)
    ]
    assert told == [(number, field, 0) for _, _, number, field in WRONG.values()]


@serving
def test_a_hypervisor_that_is_welcomed_again_serves_on(
    programs: CPrograms, socket_path: Path, how: str
) -> None:
    """T-12."""
    unmap = Ask("unmap_gpa", {"start_gfn": 1, "page_count": 2})
    asks: list[Step] = [unmap, Say(rpc.encode_result(1, {"protocol": 1})), unmap]
    with vmm_in_c(programs, socket_path, asks, how=how, calls=()) as asked:
        assert asked.ask() == [None, None]
        assert asked.do("calls") == "unmap 0x1+2 0, " * 2


@serving
@pytest.mark.parametrize(
    ("said", "end"),
    [
        (rpc.encode_error(0, WireError(errno.EIO, "the partition is lost")), "5 EIO the partition is lost"),
        (rpc.encode_result(2, None), "74 request Bad message"),
        (rpc.encode_result(0, None), "74 request Bad message"),
        (msgpack.packb([2, "event", [{}]]), "74 request Bad message"),
        (b"\xc1", "74 answer Bad message"),
        (b"", ENDED),
        (rpc.encode_request(9, "unmap_gpa", [{}])[:-3], ENDED),
    ],
)
def test_last_words_nonsense_and_the_end_are_the_end(
    programs: CPrograms, socket_path: Path, said: bytes, end: str, how: str
) -> None:
    with vmm_in_c(programs, socket_path, [Say(said)], how=how, calls=()) as asked:
        asked.go_on()
        assert asked.do("served") == end


@serving
def test_another_thread_may_end_it(programs: CPrograms, socket_path: Path, how: str) -> None:
    with vmm_in_c(programs, socket_path, [], how=how, calls=()) as asked:
        assert asked.do("stop") == "ok"
        assert asked.do("served") == ENDED
        asked.go_on()


@serving
def test_a_request_that_comes_with_the_answer_to_the_hello_is_carried_out(
    programs: CPrograms, socket_path: Path, how: str
) -> None:
    ask = Ask("unmap_gpa", {"start_gfn": 1, "page_count": 2}, before=rpc.encode_result(1, {"protocol": 1}))
    with (
        ScriptedDaemon(socket_path, (hello(), [Hear(), ask])) as daemon,
        conversation(programs / "c_hypervisor", socket_path, how) as said,
    ):
        eventually(lambda: said.do("calls"), "unmap 0x1+2 0, ")
    assert daemon.answered == [None]


# ------------------------------------------------ from when a region counts, and until when


def change(programs: CPrograms, path: Path, end: Sequence[Step], *verb: object) -> tuple[list[object], str]:
    """RAM is mapped while the request `verb` is in flight, and again once it has ended as `end` says: the
    errnos, and how it ended for the caller."""
    heard, asked_once, ended = threading.Event(), threading.Event(), threading.Event()
    told: list[Step] = [Hear(), Signal(heard), Await(asked_once), *end]
    mine = Ask("map_gpa", WHOLE_RAM)
    asks: list[Step] = [Await(heard), mine, Signal(asked_once), Await(ended), mine]
    calls = [ADD_RAM] if verb[0] != "add" else []
    with vmm_in_c(programs, path, asks, told=told, calls=calls) as asked:
        asked.go_on()
        result = asked.do(*verb)
        ended.set()
        return numbers(asked.ask()), result


REFUSED: Final = Refuse(WireError(errno.ENOSPC, "no"))
GONE: Final = Refuse(WireError(errno.ENOENT, "no such region"))
REMOVE: Final = ("remove", *ADD_RAM[1:4])
NEW: Final = ("change", *ADD_RAM[1:4], 0x500, 4, 0x7800_0000)
SAME: Final = ("change", *ADD_RAM[1:4], *ADD_RAM[1:4])


@pytest.mark.parametrize(
    ("verb", "end"),
    [
        (ADD_RAM, (Answer(ADDED), None, "ok")),
        (ADD_RAM, (REFUSED, errno.EPERM, "refused 28 ENOSPC")),
        (REMOVE, (Answer(None), errno.EPERM, "ok")),
        (REMOVE, (REFUSED, None, "refused 28 ENOSPC")),
        (REMOVE, (GONE, errno.EPERM, "refused 2 ENOENT")),
        (NEW, (Answer({"kinds": ["movable"]}), errno.EPERM, "ok")),
        (NEW, (REFUSED, None, "refused 28 ENOSPC")),
        (SAME, (Answer({"kinds": ["movable"]}), None, "ok")),
        (SAME, (REFUSED, None, "refused 28 ENOSPC")),
    ],
)
def test_a_region_counts_from_before_its_request_until_its_end(
    programs: CPrograms, socket_path: Path, verb: tuple[object, ...], end: tuple[Step, int | None, str]
) -> None:
    answer, after, result = end
    assert change(programs, socket_path, [answer], *verb) == ([None, after], result)


def test_during_a_change_its_new_regions_count_too(programs: CPrograms, socket_path: Path) -> None:
    heard, asked_once = threading.Event(), threading.Event()
    new = {"start_gfn": 0x500, "page_count": 4, "start_uaddr": 0x7800_0000, "access": 3}
    told: list[Step] = [Hear(), Signal(heard), Await(asked_once), REFUSED]
    refused = threading.Event()
    asks: list[Step] = [
        Await(heard),
        Ask("map_gpa", new),
        Signal(asked_once),
        Await(refused),
        Ask("map_gpa", new),
    ]
    with vmm_in_c(programs, socket_path, asks, told=told) as asked:
        asked.go_on()
        assert asked.do(*NEW) == "refused 28 ENOSPC"
        refused.set()
        assert numbers(asked.ask()) == [None, errno.EPERM]


def test_a_region_whose_answer_is_late_counts_and_goes_on_counting(
    programs: CPrograms, socket_path: Path
) -> None:
    late = threading.Event()
    told: list[Step] = [Hear(), Await(late), Answer(ADDED), *replies(None)]
    with vmm_in_c(programs, socket_path, [Ask("map_gpa", WHOLE_RAM)], told=told, calls=()) as asked:
        asked.do("timeout", 50)
        assert asked.do(*ADD_RAM) == "timed out"
        assert asked.ask() == [None]
        late.set()
        asked.do("timeout", 0)
        assert asked.do(*REMOVE) == "ok"


def test_a_region_whose_request_was_never_sent_takes_no_room(programs: CPrograms, socket_path: Path) -> None:
    """Room for 8. While one answer is outstanding, nothing else is sent (T-7)."""
    late = threading.Event()
    told: list[Step] = [Hear(), Await(late), Answer(ADDED), *replies(ADDED)]
    with vmm_in_c(programs, socket_path, [], told=told, calls=()) as asked:
        asked.go_on()
        asked.do("timeout", 10)
        assert [asked.do(*ADD_RAM) for _ in range(10)] == ["timed out"] * 10
        late.set()
        asked.do("timeout", 0)
        assert asked.do("add", 9, 1, 0x9000, 1, 0) == "ok"
        assert len(asked.daemon.heard) == 4


def test_more_regions_than_there_is_room_for_are_refused_before_the_daemon_hears_of_them(
    programs: CPrograms, socket_path: Path
) -> None:
    """Room for 8. What is removed makes room again."""
    adds = [("add", n, 1, 0x1000 * n, 1, 0) for n in range(1, 9)]
    with vmm_in_c(programs, socket_path, [], calls=adds, told=replies(None, ADDED)) as asked:
        asked.go_on()
        assert asked.do("add", 9, 1, 0x9000, 1, 0) == "refused 28 regions"
        assert asked.do("change", 1, 1, 0x1000, 9, 1, 0x9000) == "refused 28 regions"
        assert len(asked.daemon.heard) == 2 + len(adds)
        assert asked.do("remove", 1, 1, 0x1000) == "ok"
        assert asked.do("add", 9, 1, 0x9000, 1, 0) == "ok"


def test_a_pfn_has_to_be_what_the_vmm_declared_for_the_memory(programs: CPrograms, socket_path: Path) -> None:
    """Y-12; of several VMAs with contiguous host pages, and of what is left of one that was split."""
    start = MEMORY.start_uaddr
    declared = [("map_vma", start, 2, 0x500), ("map_vma", start + 0x2000, 2, 0x502)]
    split, asked_once = ("unmap_vma", start + 0x1000, 1), threading.Event()
    carved = threading.Event()

    def piece(gfn: int, pages: int, pfn: int) -> Ask:
        uaddr = start + (gfn - RAM.start) * 4096
        fields = {"start_gfn": gfn, "page_count": pages, "start_uaddr": uaddr, "access": 1, "start_pfn": pfn}
        return Ask("map_gpa", fields)

    asks: list[Step] = [
        piece(0x100, 4, 0x500), piece(0x101, 2, 0x501), piece(0x101, 2, 0x502),
        Signal(asked_once), Await(carved),
        piece(0x100, 4, 0x500), piece(0x101, 1, 0x501), piece(0x100, 1, 0x500), piece(0x102, 2, 0x502),
    ]  # fmt: skip
    with vmm_in_c(programs, socket_path, asks, calls=[*declared, ADD_RAM], told=replies(None)) as asked:
        asked.go_on()
        assert asked_once.wait(PATIENCE)
        assert asked.do(*split) == "ok"
        carved.set()
        answered = numbers(asked.ask())
    lie = errno.EPERM
    assert answered == [None, None, lie, lie, lie, None, None]


# ------------------------------------------------ without a socket


@serving
def test_requests_are_understood_wherever_they_are_cut(programs: CPrograms, how: str) -> None:
    asked = [
        ("map_gpa", WHOLE_RAM), ("unmap_gpa", {"start_gfn": 0, "page_count": 1}),
        ("map_gpas", {"pieces": [WHOLE_RAM, WHOLE_RAM]}), ("later", {}),
    ]  # fmt: skip
    said = b"".join(rpc.encode_request(300 + n, method, [fields]) for n, (method, fields) in enumerate(asked))
    printed = run(programs / "c_restarts", how, said.hex())
    assert len(printed) == len(said) + 1
    [answers, number, name] = {line.replace("/", "") for line in printed}.pop().split()
    unpacker = msgpack.Unpacker()
    unpacker.feed(bytes.fromhex(answers))
    assert [(msgid, error and error[0]) for _, msgid, error, _ in unpacker] == [
        (300, None), (301, None), (302, None), (303, errno.ENOSYS),
    ]  # fmt: skip
    assert (len(set(printed)) == 1 or how == "step", number, name) == (True, "104", "receive")
