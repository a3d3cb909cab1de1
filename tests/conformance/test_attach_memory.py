"""`attach_memory`: the VMM's real memory, known by descriptors that it hands over."""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from conformance.conftest import Server
from conformance.guests import GFN, PAGE, RawVmm, region, require_offered
from conformance.statements import needs, statement
from conformance.wire import Refusal, request

pytestmark = needs("process")
COUNT = 4
USERFAULTFD = {"x86_64": 323, "aarch64": 282, "riscv64": 282}
"""The system call's number."""
UFFD_USER_MODE_ONLY = 1
PATIENCE = 10_000
"""Times to ask again, with answers that are held back for 20 ms."""


@pytest.fixture
def live(server: Server) -> Iterator[RawVmm]:
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
        descriptors = [*(file.fileno() for file in files), *more]
        vmm.connection.send(request("attach_memory", fields), descriptors)
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
def test_memory_is_not_attached_in_the_declared_setting(vmm: RawVmm, hello: dict[str, Any]) -> None:
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
@needs("notifier")
def test_what_is_promised_is_mapped_and_taken_away_by_a_begin(live: RawVmm, memory: int) -> None:
    assert attach(live, ["/proc/self/maps"], promise_begin_end=True) is None
    live.ask("add_region", **region(GFN, COUNT, memory))
    assert live.vp().intercept(GFN + 1) == ["resume", "mapped"]
    assert live.ask("translate", gfn=GFN + 1)["access"] == 3
    live.notifier().ask("invalidate_begin", {"start_uaddr": memory, "length": COUNT * PAGE})
    assert live.ask("translate", gfn=GFN + 1) is None


@statement("V-8", "P-27")
def test_memory_that_another_partition_watches_decides_nothing_until_that_one_has_ended(
    server: Server, live: RawVmm, memory: int
) -> None:
    with RawVmm(server.socket, address_space="process") as first:
        attach_watched(first)
        first.ask("add_region", **region(GFN, COUNT, memory))
        assert first.vp().intercept(GFN) == ["resume", "mapped"]
        attach_watched(live)
        live.ask("add_region", **region(GFN, COUNT, memory))
        vp = live.vp()
        assert [vp.intercept(GFN) for _ in range(3)] == [["retry", "contended"]] * 3
        pinned = region(2 * GFN, COUNT, memory, kind="pinned")
        refusal = live.connection.refusal("add_region", pinned)
        assert (refusal.name, refusal.details) == ("EAGAIN", {})
    answers = (vp.intercept(GFN) for _ in range(PATIENCE))
    assert next(answer for answer in answers if answer != ["retry", "contended"]) == ["resume", "mapped"]
    live.ask("add_region", **pinned)
