"""`restore` and `restore_progress`: a VMM that knows nothing of the wire hands its guest's memory over."""

from __future__ import annotations

import os
import socket
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from conformance.conftest import Server
from conformance.guests import MODEL, PAGE, RawVmm
from conformance.restoring import PAGES, ZERO, Asker, VmmProcess, as_json, content, found, memfd
from conformance.statements import needs, statement
from conformance.wire import RawConnection, Refusal, Refused, events_until

pytestmark = needs("restore")
HEADROOM = 600


@pytest.fixture
def asker(server: Server) -> Iterator[Asker]:
    with tempfile.TemporaryDirectory() as directory, Asker(server.socket, Path(directory)) as asker:
        yield asker


# ------------------------------------------------ the request


def image(asker: Asker) -> int:
    return os.open(asker.image, os.O_RDONLY)


def listener(asker: Asker) -> int:
    return asker.listener().detach()


def not_listening(_: Asker) -> int:
    return socket.socket(socket.AF_UNIX).detach()


def of_another_type(asker: Asker) -> int:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(os.fspath(asker.listen))
    listener.listen()
    return listener.detach()


def a_file(data: bytes) -> Callable[[Asker], int]:
    return lambda _: memfd(data)


def opened(path: str, flags: int) -> Callable[[Asker], int]:
    return lambda _: os.open(path, flags)


Make = Callable[[Asker], int]
WRONG: list[tuple[str, list[Make], dict[str, object]]] = [
    ("image", [a_file(b""), listener], {}),
    ("image", [a_file(bytes(PAGE + 1)), listener], {}),
    ("image", [opened("/dev/null", os.O_RDONLY), listener], {}),
    ("image", [opened("/", os.O_RDONLY), listener], {}),
    ("image", [lambda asker: os.open(asker.image, os.O_WRONLY), listener], {}),
    ("image", [lambda asker: os.open(asker.image, os.O_PATH), listener], {}),
    ("image", [listener, image], {}),
    ("listener", [image, a_file(bytes(PAGE))], {}),
    ("listener", [image, not_listening], {}),
    ("listener", [image, of_another_type], {}),
    ("prefetch", [image, listener, a_file(bytes(7))], {"prefetch": True}),
    ("prefetch", [image, listener, a_file(struct.pack("<4I", 0, PAGES, PAGES - 1, 2))], {"prefetch": True}),
    ("prefetch", [image, listener, a_file(struct.pack("<2I", 1, 0))], {"prefetch": True}),
    ("prefetch", [image, listener, listener], {"prefetch": True}),
    ("trace", [image, listener, a_file(bytes(4096 + 256 * 64))], {"trace": True}),
]


@statement("P-42", "E-2")
@pytest.mark.parametrize(("field", "makes", "fields"), WRONG)
def test_a_descriptor_of_another_kind_is_einval_and_named(
    asker: Asker, field: str, makes: list[Make], fields: dict[str, object]
) -> None:
    refusal = sent(asker, makes, fields)
    assert isinstance(refusal, Refusal), refusal
    assert (refusal.name, refusal.details.get("field")) == ("EINVAL", field)
    assert asker.connection.ask("create_partition", MODEL)["partition_id"] > 0


@statement("P-42", "T-9")
@pytest.mark.parametrize(
    ("makes", "fields"),
    [
        ([], {}),
        ([image], {}),
        ([image, listener, image], {}),
        ([image, listener], {"prefetch": True}),
        ([image, listener, a_file(b"")], {"prefetch": True, "trace": True}),
    ],
)
def test_another_number_of_descriptors_is_einval(
    asker: Asker, makes: list[Make], fields: dict[str, object]
) -> None:
    refusal = sent(asker, makes, fields)
    assert isinstance(refusal, Refusal), refusal
    assert refusal.name == "EINVAL"


def sent(asker: Asker, makes: list[Make], fields: dict[str, object]) -> Any:
    """The answer to a request with these descriptors, which are closed."""
    with ExitStack() as held:
        descriptors = []
        for make in makes:
            with suppress(FileNotFoundError):
                asker.listen.unlink()
            descriptors.append(make(asker))
            held.callback(os.close, descriptors[-1])
        return asker.send(descriptors, **fields)


@statement("P-43", "P-49", "P-1")
def test_a_restore_belongs_to_no_connection(asker: Asker, server: Server) -> None:
    partition_id = asker.ask()
    assert asker.connection.ask("create_partition", MODEL)["partition_id"] != partition_id
    asker.connection.leave()
    asker.connection = RawConnection(server.socket)
    asker.connection.say_hello("vmm")
    waiting = asker.progress(partition_id)
    assert (waiting["state"], waiting["error"], waiting["pid"]) == ("waiting", "", 0)
    assert (waiting["image_pages"], waiting["pages_in"], waiting["faults"]) == (PAGES, 0, 0)
    assert "first_fault_ms" not in waiting


@statement("P-43", "P-49")
def test_on_a_connection_that_has_a_partition_both_are_eexist(asker: Asker) -> None:
    partition_id = asker.connection.ask("create_partition", MODEL)["partition_id"]
    refusal = sent(asker, [image, listener], {})
    assert isinstance(refusal, Refusal), refusal
    assert refusal.name == "EEXIST"
    assert asker.connection.refusal("restore_progress", {"partition_id": partition_id}).name == "EEXIST"


@statement("P-43")
def test_a_listener_at_which_a_restore_waits_is_ebusy(asker: Asker) -> None:
    with asker.listener() as listener, asker.image.open("rb") as file:
        descriptors = [file.fileno(), listener.fileno()]
        asker.begun(asker.send(descriptors))
        refusal = asker.send(descriptors)
    assert isinstance(refusal, Refusal), refusal
    assert (refusal.name, refusal.details.get("field")) == ("EBUSY", "listener")


@statement("P-43", "L-1")
def test_a_restore_too_many_is_enospc(asker: Asker, server: Server, limits: dict[str, int]) -> None:
    if limits["partitions_per_uid"] > HEADROOM:
        pytest.skip(f"limits.partitions_per_uid is {limits['partitions_per_uid']}: set it lower")
    with ExitStack() as opened:
        with suppress(Refused):
            while True:
                opened.enter_context(RawVmm(server.socket))
        refusal = sent(asker, [image, listener], {})
    assert isinstance(refusal, Refusal), refusal
    assert refusal.name == "ENOSPC"
    assert refusal.details.get("limit") in {"partitions_per_uid", "vmms_per_uid"}


@statement("P-49")
def test_the_progress_of_what_is_no_restore_is_enoent(asker: Asker, vmm: RawVmm) -> None:
    for partition_id in (vmm.partition_id, 2**60):
        refusal = asker.connection.refusal("restore_progress", {"partition_id": partition_id})
        assert refusal.name == "ENOENT"


@statement("P-43", "P-49", "O-1", "O-2")
@needs("operator")
def test_operators_see_a_guest_that_was_handed_over_like_any_other(
    asker: Asker, operator: RawConnection
) -> None:
    partition_id = asker.ask()
    asker.served(partition_id)
    listed = operator.ask("list_partitions", {"after": partition_id - 1})["partitions"][0]
    assert (listed["partition_id"], listed["uid"]) == (partition_id, os.getuid())
    view = operator.ask("inspect_partition", {"partition_id": partition_id})
    assert view["statistics"]["restore"]["state"] == "serving"


@statement("O-22")
@needs("operator")
def test_operators_see_a_restore_that_waits(asker: Asker, operator: RawConnection) -> None:
    partition_id = asker.ask()

    def listed() -> dict[str, Any]:
        seen: dict[str, Any] = operator.ask("list_partitions", {"after": partition_id - 1})["partitions"][0]
        return seen

    waiting = listed()
    assert (waiting["partition_id"], waiting["restore"], waiting["pid"]) == (partition_id, "waiting", 0)
    assert (waiting["uid"], waiting["mapped_gfns"]) == (os.getuid(), 0)
    refusal = operator.refusal("inspect_partition", {"partition_id": partition_id})
    assert refusal.name == "ENOENT"
    asker.served(partition_id)
    assert (listed()["partition_id"], listed()["restore"]) == (partition_id, "serving")


@statement("P-44", "O-11")
@needs("operator")
def test_operators_are_told_of_hand_offs(asker: Asker, operator: RawConnection) -> None:
    told = ["restore_begun", "handoff_refused", "partition_created"]
    assert operator.ask("subscribe", {"events": told}) is None
    partition_id = asker.ask()
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.connect(os.fspath(asker.listen))
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        stranger.shutdown(socket.SHUT_WR)
        assert stranger.recv(1) == b""
    asker.served(partition_id)
    heard = events_until(operator, "partition_created")
    own = [event for event in heard if event["partition_id"] == partition_id]
    assert [event["event"] for event in own] == told
    assert own[0]["image_pages"] == PAGES
    assert own[1]["error"]


# ------------------------------------------------ the hand-off


@statement("P-44", "P-49")
def test_a_listener_to_which_nobody_comes_ends_the_restore(asker: Asker) -> None:
    partition_id = asker.ask(connect_timeout_ms=1)
    ended = asker.until(partition_id, lambda now: now["state"] == "ended")
    assert ended["error"]
    with socket.socket(socket.AF_UNIX) as late, pytest.raises(ConnectionRefusedError):
        late.connect(os.fspath(asker.listen))


@statement("P-43", "P-44", "P-49")
def test_a_guest_is_served_until_its_vmm_ends_whether_its_connection_lives_or_not(asker: Asker) -> None:
    partition_id = asker.ask(around_pages=1)
    vmm = asker.vmm()
    vmm.hand_over(as_json(vmm.region), "userfaultfd")
    assert vmm.do("leave") == "left"
    assert [vmm.do("read", page) for page in (0, PAGES - 1, 7)] == [found(0), found(PAGES - 1), found(7)]
    with socket.socket(socket.AF_UNIX) as late, pytest.raises(ConnectionRefusedError):
        late.connect(os.fspath(asker.listen))
    assert asker.progress(partition_id)["state"] == "serving"
    vmm.end()
    ended = asker.until(partition_id, lambda now: now["state"] == "ended")
    assert (ended["error"], ended["pages_in"], ended["faults"]) == ("", 3, 3)


OLDER: list[Callable[[dict[str, object]], bytes]] = [
    lambda region: as_json({name: value for name, value in region.items() if name != "page_size"}),
    lambda region: as_json({"page_size_kib": PAGE} | {k: v for k, v in region.items() if k != "page_size"}),
    lambda region: as_json(region | {"page_size_kib": 4}),
    lambda region: as_json({"later": '{"a":[1.5,null]}', **dict(reversed(region.items()))}) + b" \n",
]


@statement("P-45")
@pytest.mark.parametrize("form", OLDER)
def test_a_hand_off_is_taken_in_all_its_forms(
    asker: Asker, form: Callable[[dict[str, object]], bytes]
) -> None:
    asker.ask()
    vmm = asker.vmm()
    vmm.hand_over(form(vmm.region), "userfaultfd")
    assert vmm.do("read", 3) == found(3)


@statement("P-45")
def test_a_hand_off_may_come_in_pieces_and_bring_more_descriptors(asker: Asker) -> None:
    asker.ask()
    vmm = asker.vmm()
    text = as_json(vmm.region)
    vmm.hand_over(text[:1], "userfaultfd", "null", "silent")
    for at in range(1, len(text), 16):
        assert vmm.do("send", text[at : at + 16].hex()) == "sent"
    assert vmm.do("read", 3) == found(3)


@statement("P-45")
def test_regions_are_served_by_their_offsets(asker: Asker) -> None:
    asker.ask(around_pages=1)
    vmm = asker.vmm()
    half = vmm.size // 2
    lower = vmm.region | {"size": half, "offset": half}
    upper = vmm.region | {"size": half, "base_host_virt_addr": vmm.start + half}
    vmm.hand_over(as_json(upper, lower), "userfaultfd")
    assert [vmm.do("read", page) for page in (0, PAGES // 2)] == [found(PAGES // 2), found(0)]


Wrong = Callable[[VmmProcess], tuple[bytes, list[str]]]


def but(**fields: object) -> Wrong:
    """A region that differs."""
    return lambda vmm: (as_json(vmm.region | fields), ["userfaultfd"])


UFFD = ["userfaultfd"]
WRONG_HAND_OFFS: dict[str, Wrong] = {
    "no descriptor": lambda vmm: (as_json(vmm.region), []),
    "no userfaultfd": lambda vmm: (as_json(vmm.region), ["null"]),
    "without REMOVE": lambda vmm: (as_json(vmm.region), ["silent"]),
    "the userfaultfd second": lambda vmm: (as_json(vmm.region), ["null", "userfaultfd"]),
    "no regions": lambda _: (b"[    ]", UFFD),
    "a map": lambda vmm: (b'{"type":0,"regions":' + as_json(vmm.region) + b"}", UFFD),
    "no JSON": lambda _: (b"GET / HTTP/1.1\r\n\r\n", UFFD),
    "something behind": lambda vmm: (as_json(vmm.region) + b"[]", UFFD),
    "a field twice": lambda vmm: (as_json(vmm.region).replace(b"}", b',"offset":0}'), UFFD),
    "a float": but(offset="0.0"),
    "a boolean": but(offset="false"),
    "pages of another size": but(page_size=8192),
    "no whole pages": but(size=PAGES * PAGE - 1),
    "a part of the image": but(size=(PAGES - 1) * PAGE),
    "more than the image": but(offset=PAGE),
    "by address": lambda vmm: (
        as_json(
            vmm.region | {"size": vmm.size // 2},
            vmm.region | {"size": vmm.size // 2, "offset": vmm.size // 2},
        ),
        UFFD,
    ),
    "too long": lambda vmm: (as_json(vmm.region).replace(b"[", b"[".ljust(65537)), UFFD),
}


@statement("P-44", "P-45", "P-49")
@pytest.mark.parametrize("wrong", WRONG_HAND_OFFS.values(), ids=WRONG_HAND_OFFS)
def test_a_wrong_hand_off_is_closed_and_told_and_another_may_follow(asker: Asker, wrong: Wrong) -> None:
    partition_id = asker.ask()
    vmm = asker.vmm()
    text, descriptors = wrong(vmm)
    vmm.hand_over(text, *descriptors)
    assert vmm.do("closed") == "closed"
    refused = asker.until(partition_id, lambda now: bool(now["error"]))
    assert (refused["state"], refused["error"].isprintable()) == ("waiting", True)
    vmm.hand_over(as_json(vmm.region), "userfaultfd")
    assert vmm.do("read", 3) == found(3)
    assert asker.progress(partition_id)["error"] == ""


# ------------------------------------------------ the memory


@statement("P-46", "P-49")
@pytest.mark.parametrize(("around", "page", "brought"), [(1, 5, 1), (4, 5, 4), (6, 15, 4), (512, 5, 16)])
def test_a_first_touch_brings_in_the_block_around_it(
    asker: Asker, around: int, page: int, brought: int
) -> None:
    partition_id = asker.ask(around_pages=around)
    vmm = asker.served(partition_id)
    assert vmm.do("read", page) == found(page)
    now = asker.until(partition_id, lambda now: now["pages_in"] == brought)
    assert (now["demand_pages"], now["around_pages"], now["zero_pages"]) == (1, brought - 1, 0)
    if brought == PAGES:
        now = asker.until(partition_id, lambda now: now["state"] == "complete")
    assert (now["state"] == "serving") == (brought < PAGES)
    assert (now["faults"], sum(now["latency"]), len(now["latency"])) == (1, 1, 24)
    assert 0 <= now["first_fault_ms"] <= now["quiet_ms"] <= now["age_ms"]
    if brought < PAGES:
        outside = PAGES - 1 - page
        assert vmm.do("read", outside) == found(outside)


@statement("P-47", "P-49")
def test_a_page_that_was_given_back_is_zero_whether_it_was_in_or_not(asker: Asker) -> None:
    partition_id = asker.ask(around_pages=1)
    vmm = asker.served(partition_id)
    assert vmm.do("read", 2) == found(2)
    assert vmm.do("give_back", 2, 2) == "given back"
    assert [vmm.do("read", page) for page in (1, 2, 3, 4)] == [found(1), ZERO, ZERO, found(4)]
    now = asker.progress(partition_id)
    assert (now["removed_pages"], now["zero_pages"]) == (2, 2)


@statement("P-42", "P-47")
def test_the_pages_of_the_list_come_in_without_a_touch_but_for_those_given_back(asker: Asker) -> None:
    runs = memfd(struct.pack("<4I", 8, 4, 1, 2))
    try:
        partition_id = asker.ask(runs, prefetch=True, around_pages=1)
    finally:
        os.close(runs)
    vmm = asker.served(partition_id)
    now = asker.until(partition_id, lambda now: now["prefetched_pages"] == 6)
    assert (now["pages_in"], now["faults"], now["state"]) == (6, 0, "serving")
    assert [vmm.do("read", page) for page in (1, 8, 3)] == [found(1), found(8), found(3)]
    assert asker.progress(partition_id)["faults"] == 1


@statement("P-48", "P-49")
def test_a_guest_whose_image_cannot_be_read_waits_until_it_can(asker: Asker) -> None:
    partition_id = asker.ask(around_pages=1)
    vmm = asker.served(partition_id)
    os.truncate(asker.image, PAGE)
    vmm.begin("read", 8)
    failing = asker.until(partition_id, lambda now: now["image_errors"] > 0 and bool(now["error"]))
    assert (failing["state"], vmm.is_waiting()) == ("serving", True)
    with asker.image.open("r+b") as file:
        file.write(b"".join(map(content, range(PAGES))))
    assert vmm.said() == found(8)


@statement("P-48", "P-49")
def test_a_guest_whose_image_cannot_be_read_is_killed_if_that_is_wanted(asker: Asker) -> None:
    partition_id = asker.ask(around_pages=1, on_image_error="kill")
    vmm = asker.served(partition_id)
    os.truncate(asker.image, PAGE)
    vmm.begin("read", 8)
    assert vmm.wait() == -9
    ended = asker.until(partition_id, lambda now: now["state"] == "ended")
    assert ended["error"]
