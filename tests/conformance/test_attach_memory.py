"""`attach_memory`: the VMM's real memory, by descriptors that it hands over."""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from conformance.conftest import Server
from conformance.guests import GFN, PAGE, WHOLE_MEMORY, RawVmm, region, require_offered
from conformance.statements import needs, statement
from conformance.wire import RawConnection, Refusal, request

pytestmark = needs("process")
COUNT = 4
MAPS = ["/proc/self/maps", "/proc/self/smaps"]
USERFAULTFD = {"x86_64": 323, "aarch64": 282, "riscv64": 282}
"""The system call's number."""
USER_MODE_ONLY = 1
PATIENCE = 10_000
"""Attempts, each of whose answers is delayed by 20 ms."""


@pytest.fixture
def live(server: Server) -> Iterator[RawVmm]:
    with RawVmm(server.socket, address_space="process") as vmm:
        yield vmm


@pytest.fixture
def memory() -> Iterator[int]:
    """The address of a few pages of this process."""
    with mmap.mmap(-1, COUNT * PAGE) as pages:
        exported = ctypes.c_char.from_buffer(pages)
        yield ctypes.addressof(exported)
        del exported


def attach(vmm: RawVmm, paths: Sequence[str], *more: int, **fields: object) -> Refusal | None:
    """Hand over descriptors of these files and `more`, which is closed; returns the refusal, or None."""
    with ExitStack() as opened:
        files = [opened.enter_context(Path(path).open("rb")) for path in paths]
        for descriptor in more:
            opened.callback(os.close, descriptor)
        descriptors = [*(file.fileno() for file in files), *more]
        vmm.connection.send(request("attach_memory", fields), descriptors)
    _, _, error, result = vmm.connection.receive()
    assert result is None
    return Refusal(*error) if error is not None else None


@statement("T-19", "P-19")
@pytest.mark.parametrize("others", [(0, 0), (1, 0), (0, 1), (2, 3)], ids=str)
def test_a_request_between_others_has_its_own_descriptors(live: RawVmm, others: tuple[int, int]) -> None:
    """One too many would be refused, and one too few."""
    before, behind = others
    with ExitStack() as opened:
        files = [opened.enter_context(Path(path).open("rb")).fileno() for path in MAPS]
        null = opened.enter_context(Path(os.devnull).open("rb")).fileno()
        live.connection.send(request("statistics", {}, 1), [null] * before)
        live.connection.send(request("attach_memory", {"promise_begin_end": True}, 2), files)
        live.connection.send(request("statistics", {}, 3), [null] * behind)
    answers = [live.connection.receive() for _ in range(3)]
    assert [(msgid, error) for _, msgid, error, _ in answers] == [(1, None), (2, None), (3, None)]


def userfaultfd() -> int:
    """A new userfaultfd of this process."""
    number = USERFAULTFD.get(platform.machine())
    if number is None:
        pytest.skip(f"the number of userfaultfd is not known on {platform.machine()}")
    flags = os.O_CLOEXEC | os.O_NONBLOCK | USER_MODE_ONLY
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor: int = libc.syscall(ctypes.c_long(number), ctypes.c_long(flags))
    if descriptor < 0:
        pytest.skip(f"no userfaultfd here: {os.strerror(ctypes.get_errno())}")
    return descriptor


@contextmanager
def userfaultfd_of_a_child() -> Iterator[int]:
    """A userfaultfd of a process with memory at the same addresses, which lives as long as the block."""
    os.close(userfaultfd())  # or skip
    ours, theirs = socket.socketpair()
    with ours, theirs:
        child = os.fork()
        if not child:
            socket.send_fds(theirs, [b"u"], [userfaultfd()])
            signal.pause()
        _, (descriptor,), _, _ = socket.recv_fds(ours, 1, 1)
        yield descriptor
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@contextmanager
def mapped(file: int, flags: int) -> Iterator[int]:
    """The address of `COUNT` pages of a file."""
    with mmap.mmap(file, COUNT * PAGE, flags) as pages:
        exported = ctypes.c_char.from_buffer(pages)
        yield ctypes.addressof(exported)
        del exported


@statement("P-26")
def test_memory_is_not_attached_in_declared_mode(vmm: RawVmm, hello: dict[str, Any]) -> None:
    require_offered(hello, {"address_space": "process"})
    assert vmm.connection.refusal("attach_memory").name == "EINVAL"


@statement("P-26", "P-19")
@pytest.mark.parametrize("paths", [["/proc/self/maps"], ["/proc/self/smaps", "/proc/self/maps"]])
def test_a_second_handover_is_eexist(live: RawVmm, paths: list[str]) -> None:
    assert attach(live, paths) is None
    refusal = attach(live, paths)
    assert (refusal and refusal.name) == "EEXIST"


@statement("P-19")
@pytest.mark.parametrize(
    "paths",
    [[], ["/dev/null"], ["/proc/self/maps", "/dev/null"], ["/proc/self/maps"] * 2],
    ids=["none", "something else", "something else besides", "twice"],
)
def test_a_wrong_handover_is_einval_and_the_right_one_may_follow(live: RawVmm, paths: list[str]) -> None:
    refusal = attach(live, paths)
    assert (refusal and refusal.name) == "EINVAL"
    assert attach(live, ["/proc/self/maps"]) is None


@statement("P-32")
def test_without_descriptors_memory_is_not_attached_and_faults_are_unbacked(
    live: RawVmm, memory: int
) -> None:
    assert live.connection.refusal("attach_memory", {"promise_begin_end": True}).name == "EINVAL"
    live.ask("add_region", **region(GFN, COUNT, memory))
    assert live.vp().intercept(GFN) == ["forward", "unbacked"]


@statement("P-32")
def test_declared_memory_needs_no_descriptor(vmm: RawVmm) -> None:
    vmm.add_memory()
    assert vmm.vp().intercept(GFN) == ["resume", "mapped"]


@statement("P-19", "E-1")
@pytest.mark.parametrize("name", ["\udcff", "a\n\x1b[2J\u202e"], ids=["no UTF-8", "control characters"])
def test_a_refusal_that_quotes_a_path_is_an_answer_of_printable_characters(
    live: RawVmm, tmp_path: Path, name: str
) -> None:
    (tmp_path / name).touch()
    refusal = attach(live, [str(tmp_path / name)])
    assert refusal is not None
    assert (refusal.name, refusal.message.isprintable()) == ("EINVAL", True)
    assert live.ask("statistics")["regions"] == 0


@statement("P-19")
def test_the_maps_of_a_thread_are_the_processs(live: RawVmm) -> None:
    assert attach(live, ["/proc/thread-self/maps", "/proc/thread-self/smaps"]) is None


@statement("P-19")
@pytest.mark.parametrize("name", ["maps", "smaps"])
def test_a_descriptor_that_cannot_be_read_is_einval(live: RawVmm, name: str) -> None:
    path_only = os.open(f"/proc/self/{name}", os.O_PATH)
    refusal = attach(live, ["/proc/self/maps"] if name == "smaps" else [], path_only)
    assert (refusal and refusal.name) == "EINVAL"
    assert attach(live, ["/proc/self/maps"]) is None


@statement("P-19")
def test_the_maps_of_another_process_are_einval(live: RawVmm) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        refusal = attach(live, [f"/proc/{child.pid}/maps"])
    assert (refusal and refusal.name) == "EINVAL"


@statement("P-9", "P-19")
def test_auto_takes_smaps_and_without_it_the_kind_must_be_stated(live: RawVmm, memory: int) -> None:
    assert attach(live, ["/proc/self/maps"]) is None
    refusal = live.connection.refusal("add_region", region(GFN, COUNT, memory, kind="auto"))
    assert (refusal.name, refusal.details.get("field")) == ("EINVAL", "kind")
    live.ask("add_region", **region(GFN, COUNT, memory))


@statement("P-9", "P-19")
def test_auto_is_movable_for_memory_that_smaps_shows_as_ordinary(live: RawVmm, memory: int) -> None:
    assert attach(live, MAPS) is None
    kind = live.ask("add_region", **region(GFN, COUNT, memory, kind="auto"))
    assert kind == {"kind": "movable"}


@statement("P-29")
def test_a_userfaultfd_of_another_process_is_einval_and_ones_own_may_follow(live: RawVmm) -> None:
    with userfaultfd_of_a_child() as theirs:
        refusal = attach(live, MAPS, theirs)
    assert (refusal and refusal.name) == "EINVAL"
    assert attach(live, MAPS, userfaultfd()) is None


@statement("P-20", "P-41")
def test_faults_before_the_handover_are_unbacked(live: RawVmm, memory: int) -> None:
    live.ask("add_region", **region(GFN, COUNT, memory))
    assert live.vp().intercept(GFN) == ["forward", "unbacked"]
    assert live.ask("statistics")["unresolved"] == {"unattached": 1}


@statement("P-20", "P-41")
def test_memory_neither_promised_nor_watched_is_unbacked(live: RawVmm, memory: int) -> None:
    assert attach(live, ["/proc/self/maps"]) is None
    live.ask("add_region", **region(GFN, COUNT, memory))
    assert live.vp().intercept(GFN) == ["forward", "unbacked"]
    assert live.ask("statistics")["unresolved"] == {"unannounced": 1}


@statement("O-17", "P-40")
@pytest.mark.parametrize(
    ("fields", "watch"),
    [
        ({"userfaultfd_errno": 1}, "none"),
        ({"userfaultfd_errno": 4095, "promise_begin_end": True}, "promised"),
    ],
    ids=["neither", "promised"],
)
def test_an_operator_sees_how_changes_become_known(
    live: RawVmm, operator: RawConnection, fields: dict[str, object], watch: str
) -> None:
    def seen() -> tuple[object, object]:
        inspected = operator.ask("inspect_partition", {"partition_id": live.partition_id})
        return inspected["summary"]["watch"], inspected.get("userfaultfd_errno")

    assert seen() == ("unattached", None)
    assert attach(live, ["/proc/self/maps"], **fields) is None
    assert seen() == (watch, fields["userfaultfd_errno"])


@statement("O-17")
def test_an_operator_sees_that_memory_is_watched(live: RawVmm, operator: RawConnection) -> None:
    assert attach(live, MAPS, userfaultfd()) is None
    listed = operator.ask("list_partitions", {"after": live.partition_id - 1})["partitions"]
    assert listed[0]["watch"] == "userfaultfd"


@statement("P-40", "P-3")
@pytest.mark.parametrize("number", [0, 4096, -1, "EPERM", True])
def test_another_errno_is_einval(live: RawVmm, number: object) -> None:
    refusal = attach(live, ["/proc/self/maps"], userfaultfd_errno=number)
    assert (refusal and (refusal.name, refusal.details.get("field"))) == ("EINVAL", "userfaultfd_errno")
    assert attach(live, ["/proc/self/maps"]) is None


@statement("P-20", "P-18", "N-2")
@needs("notifier")
def test_promised_memory_is_mapped_and_revoked_by_a_begin(live: RawVmm, memory: int) -> None:
    assert attach(live, ["/proc/self/maps"], promise_begin_end=True) is None
    live.ask("add_region", **region(GFN, COUNT, memory))
    assert live.vp().intercept(GFN + 1) == ["resume", "mapped"]
    assert live.ask("translate", gfn=GFN + 1)["access"] == 3
    live.notifier().ask("invalidate_begin", {"start_uaddr": memory, "length": COUNT * PAGE})
    assert live.ask("translate", gfn=GFN + 1) is None


@statement("V-8", "P-27")
def test_memory_watched_by_another_partition_is_retry_until_that_one_ends(
    server: Server, live: RawVmm, memory: int
) -> None:
    with RawVmm(server.socket, address_space="process") as first:
        assert attach(first, MAPS, userfaultfd()) is None
        first.ask("add_region", **region(GFN, COUNT, memory))
        assert first.vp().intercept(GFN) == ["resume", "mapped"]
        assert attach(live, MAPS, userfaultfd()) is None
        live.ask("add_region", **region(GFN, COUNT, memory))
        vp = live.vp()
        assert [vp.intercept(GFN) for _ in range(3)] == [["retry", "contended"]] * 3
        pinned = region(2 * GFN, COUNT, memory, kind="pinned")
        refusal = live.connection.refusal("add_region", pinned)
        assert (refusal.name, refusal.details) == ("EAGAIN", {})
    answers = (vp.intercept(GFN) for _ in range(PATIENCE))
    assert next(answer for answer in answers if answer != ["retry", "contended"]) == ["resume", "mapped"]
    live.ask("add_region", **pinned)


@statement("N-8")
@needs("notifier")
def test_an_unreported_change_is_revoked_before_any_invalidate_is_answered(live: RawVmm, memory: int) -> None:
    assert attach(live, MAPS, userfaultfd()) is None
    live.ask("add_region", **region(GFN, COUNT, memory))
    assert live.vp().intercept(GFN) == ["resume", "mapped"]
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    assert protect(ctypes.c_void_p(memory), ctypes.c_size_t(COUNT * PAGE), mmap.PROT_READ) == 0
    live.notifier().ask("invalidate", WHOLE_MEMORY)
    assert live.ask("translate", gfn=GFN) is None
    assert live.vp(1).intercept(GFN) == ["resume", "mapped"]
    assert live.ask("translate", gfn=GFN)["access"] == 1


def frames(vmm: RawVmm, *addresses: int) -> list[list[object]]:
    """What the guest reaches at the second page of each."""
    assert attach(vmm, MAPS, promise_begin_end=True) is None
    vp = vmm.vp()
    reached = []
    for number, address in enumerate(addresses):
        gfn = GFN + number * COUNT
        vmm.ask("add_region", **region(gfn, COUNT, address))
        assert vp.intercept(gfn + 1) == ["resume", "mapped"]
        reached.append(vmm.ask("translate", gfn=gfn + 1)["frame"])
    return reached


@pytest.fixture
def file() -> Iterator[int]:
    """A memfd of `COUNT` pages."""
    descriptor = os.memfd_create("file")
    os.ftruncate(descriptor, COUNT * PAGE)
    yield descriptor
    os.close(descriptor)


@statement("P-30", "P-18")
def test_two_shared_mappings_of_a_file_have_the_files_frames(live: RawVmm, file: int) -> None:
    status = os.fstat(file)
    backing = f"file {os.major(status.st_dev)}:{os.minor(status.st_dev)}:{status.st_ino}"
    with mapped(file, mmap.MAP_SHARED) as one, mapped(file, mmap.MAP_SHARED) as another:
        assert frames(live, one, another) == [[backing, 1]] * 2


@statement("P-30", "P-18")
def test_two_private_mappings_of_a_file_have_frames_of_the_vmms_own(live: RawVmm, file: int) -> None:
    with mapped(file, mmap.MAP_PRIVATE) as one, mapped(file, mmap.MAP_PRIVATE) as another:
        own = [["anonymous", address // PAGE + 1] for address in (one, another)]
        assert frames(live, one, another) == own
