"""`attach_memory`: the VMM's real memory, known by descriptors that it hands over."""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from conformance.conftest import Server
from conformance.guests import GFN, PAGE, WHOLE_MEMORY, RawVmm, region
from conformance.statements import statement
from conformance.wire import Refusal, request

COUNT = 4
USERFAULTFD = {"x86_64": 323, "aarch64": 282, "riscv64": 282}
"""The system call's number."""
UFFD_USER_MODE_ONLY = 1


@pytest.fixture
def live(server: Server, hello: dict[str, dict[str, list[str]]]) -> Iterator[RawVmm]:
    if "process" not in hello["features"]["address_spaces"]:
        pytest.skip("features.address_spaces has no process")
    with RawVmm(server.socket, address_space="process") as vmm:
        yield vmm


@pytest.fixture
def memory() -> Iterator[int]:
    """The address of a few pages of ours."""
    with mmap.mmap(-1, COUNT * PAGE) as pages:
        exported = ctypes.c_char.from_buffer(pages)
        yield ctypes.addressof(exported)
        del exported


def attach(vmm: RawVmm, paths: Sequence[str], *more: int, **fields: object) -> Refusal | None:
    """Hand over descriptors of these files, and `more`; what is refused, None for nothing."""
    with ExitStack() as opened:
        files = [opened.enter_context(Path(path).open("rb")) for path in paths]
        with socket.socket(fileno=os.dup(vmm.connection.fileno())) as duplicate:
            descriptors = [*(file.fileno() for file in files), *more]
            socket.send_fds(duplicate, [request("attach_memory", fields)], descriptors)
    _, _, error, result = vmm.connection.receive()
    assert result is None
    return Refusal(*error) if error is not None else None


def attach_watched(vmm: RawVmm) -> None:
    """Hand over our maps and a userfaultfd, of which no copy stays with us."""
    number = USERFAULTFD.get(platform.machine())
    if number is None:
        pytest.skip(f"the number of userfaultfd(2) is not known on {platform.machine()}")
    flags = os.O_CLOEXEC | os.O_NONBLOCK | UFFD_USER_MODE_ONLY
    userfaultfd = ctypes.CDLL(None, use_errno=True).syscall(number, flags)
    if userfaultfd < 0:
        pytest.skip(f"userfaultfd(2): {os.strerror(ctypes.get_errno())}")
    try:
        assert attach(vmm, ["/proc/self/maps"], userfaultfd) is None
    finally:
        os.close(userfaultfd)


@statement("P-26")
def test_memory_is_not_attached_in_the_declared_setting(vmm: RawVmm) -> None:
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


@statement("P-19")
def test_the_maps_of_a_thread_are_the_processs(live: RawVmm) -> None:
    assert attach(live, ["/proc/thread-self/maps", "/proc/thread-self/smaps"]) is None


@statement("P-19")
@pytest.mark.parametrize("name", ["maps", "smaps"])
def test_a_descriptor_that_cannot_be_read_is_einval(live: RawVmm, name: str) -> None:
    path_only = os.open(f"/proc/self/{name}", os.O_PATH)
    try:
        refusal = attach(live, ["/proc/self/maps"] if name == "smaps" else [], path_only)
    finally:
        os.close(path_only)
    assert (refusal and refusal.name) == "EINVAL"
    assert attach(live, ["/proc/self/maps"]) is None


@statement("P-19")
def test_the_maps_of_another_process_are_einval(live: RawVmm) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        refusal = attach(live, [f"/proc/{child.pid}/maps"])
    assert (refusal and refusal.name) == "EINVAL"


@statement("P-20")
def test_faults_before_the_handover_are_unbacked(live: RawVmm, memory: int) -> None:
    live.ask("add_region", **region(GFN, COUNT, memory))
    assert live.vp().intercept(GFN) == ["forward", "unbacked"]


@statement("P-20")
def test_what_is_neither_promised_nor_watched_is_unbacked(live: RawVmm, memory: int) -> None:
    assert attach(live, ["/proc/self/maps"]) is None
    live.ask("add_region", **region(GFN, COUNT, memory))
    assert live.vp().intercept(GFN) == ["forward", "unbacked"]


@statement("P-20", "P-18", "N-2")
def test_what_is_promised_is_mapped_and_taken_away_by_a_begin(live: RawVmm, memory: int) -> None:
    assert attach(live, ["/proc/self/maps"], promise_begin_end=True) is None
    live.ask("add_region", **region(GFN, COUNT, memory))
    assert live.vp().intercept(GFN + 1) == ["resume", "mapped"]
    assert live.ask("translate", gfn=GFN + 1)["access"] == 3
    live.notifier().ask("invalidate_begin", {"start_uaddr": memory, "length": COUNT * PAGE})
    assert live.ask("translate", gfn=GFN + 1) is None


@statement("N-8")
def test_a_change_without_an_event_is_taken_away_before_an_invalidate_of_anything_is_answered(
    live: RawVmm, memory: int
) -> None:
    attach_watched(live)
    live.ask("add_region", **region(GFN, COUNT, memory))
    assert live.vp().intercept(GFN) == ["resume", "mapped"]
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    assert protect(ctypes.c_void_p(memory), ctypes.c_size_t(COUNT * PAGE), mmap.PROT_READ) == 0
    live.notifier().ask("invalidate", WHOLE_MEMORY)
    assert live.ask("translate", gfn=GFN) is None
    assert live.vp(1).intercept(GFN) == ["resume", "mapped"]
    assert live.ask("translate", gfn=GFN)["access"] == 1
