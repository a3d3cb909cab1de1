"""Handing over the wrong descriptors, in every way that a VMM might.

Owns opening them and closing our copies. The right way is the client library's `own_memory`.
"""

from __future__ import annotations

import fcntl
import os
import select
import signal
import socket
import struct
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from fakes import private_mounts, stale_maps
from fakes.live_vmm import ELSEWHERE, GFN, LiveVmm
from fakes.private_mounts import Mount
from fakes.raw_client import READ, RawConnection, intercept_message, request
from fakes.rude_peers import send_with_descriptors
from intercept_client.memory import open_userfaultfd
from intercept_protocol.addresses import UaddrRange
from intercept_protocol.messages import AttachMemory, Statistics
from intercept_protocol.outcomes import AnyAnswer

UFFDIO_API, UFFD_API = 0xC018AA3F, 0xAA


def nothing(vmm: LiveVmm) -> None:
    _hand_over(vmm)


def smaps_alone(vmm: LiveVmm) -> None:
    _hand_over(vmm, _open("/proc/self/smaps"))


def a_file(vmm: LiveVmm) -> None:
    with tempfile.TemporaryFile() as file:
        _hand_over(vmm, os.dup(file.fileno()))


def a_directory(vmm: LiveVmm) -> None:
    _hand_over(vmm, _open("/"))


def a_socket(vmm: LiveVmm) -> None:
    with socket.socket(socket.AF_UNIX) as unconnected:
        _hand_over(vmm, os.dup(unconnected.fileno()))


def a_pipe(vmm: LiveVmm) -> None:
    _hand_over(vmm, *os.pipe()[:1])


def a_device(vmm: LiveVmm) -> None:
    _hand_over(vmm, _open("/dev/null"))


def an_epoll(vmm: LiveVmm) -> None:
    with select.epoll() as poll:
        _hand_over(vmm, os.dup(poll.fileno()))


def another_proc_file(vmm: LiveVmm) -> None:
    _hand_over(vmm, _open("/proc/self/status"))


def a_file_with_a_maps_files_name(vmm: LiveVmm) -> None:
    """Its path ends as a maps file's does."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "proc", str(os.getpid()), "maps")
        path.parent.mkdir(parents=True)
        path.write_bytes(Path("/proc/self/maps").read_bytes())
        _hand_over(vmm, _open(str(path)))


def maps_twice(vmm: LiveVmm) -> None:
    _hand_over(vmm, _open("/proc/self/maps"), _open("/proc/self/maps"))


def four_descriptors(vmm: LiveVmm) -> None:
    _hand_over(vmm, *[_open("/proc/self/maps") for _ in range(4)])


def as_many_as_a_message_brings(vmm: LiveVmm) -> None:
    _hand_over(vmm, *[_open("/proc/self/maps") for _ in range(253)])


def maps_of_another_process(vmm: LiveVmm) -> None:
    with _child() as child:
        _hand_over(vmm, _open(f"/proc/{child}/maps"))


def maps_of_a_dead_process(vmm: LiveVmm) -> None:
    with _child() as child:
        maps = _open(f"/proc/{child}/maps")
    _hand_over(vmm, maps)


def maps_from_before_the_exec(vmm: LiveVmm) -> None:
    """For a process that `stale_maps` has launched."""
    _hand_over(vmm, int(os.environ[stale_maps.VARIABLE]))


def an_initialised_userfaultfd(vmm: LiveVmm) -> None:
    userfaultfd = open_userfaultfd()
    fcntl.ioctl(userfaultfd, UFFDIO_API, bytearray(struct.pack("<3Q", UFFD_API, 0, 0)))
    _hand_over(vmm, _open("/proc/self/maps"), userfaultfd)


def a_userfaultfd_of_a_child(vmm: LiveVmm) -> None:
    """The child has memory wherever this process has."""
    with child_with_a_userfaultfd() as userfaultfd:
        _hand_over(vmm, _open("/proc/self/maps"), _open("/proc/self/smaps"), os.dup(userfaultfd))


def a_userfaultfd_of_a_child_that_is_dead(vmm: LiveVmm) -> None:
    with child_with_a_userfaultfd() as theirs:
        userfaultfd = os.dup(theirs)
    _hand_over(vmm, _open("/proc/self/maps"), userfaultfd)


@contextmanager
def child_with_a_userfaultfd() -> Iterator[int]:
    """What a child of this process created, and lives as long as the block."""
    ours, theirs = socket.socketpair()
    with ours, theirs, _child(partial(_send_a_userfaultfd, theirs)):
        _, (userfaultfd,), _, _ = socket.recv_fds(ours, 1, 1)
        try:
            yield userfaultfd
        finally:
            os.close(userfaultfd)


def _send_a_userfaultfd(theirs: socket.socket) -> None:
    socket.send_fds(theirs, [b"u"], [open_userfaultfd()])


def maps_by_path_alone(vmm: LiveVmm) -> None:
    _hand_over(vmm, os.open("/proc/self/maps", os.O_PATH))


def smaps_by_path_alone(vmm: LiveVmm) -> None:
    _hand_over(vmm, _open("/proc/self/maps"), os.open("/proc/self/smaps", os.O_PATH))


def a_userfaultfd_by_path_alone(vmm: LiveVmm) -> None:
    userfaultfd = open_userfaultfd()
    try:
        _hand_over(vmm, _open("/proc/self/maps"), os.open(f"/proc/self/fd/{userfaultfd}", os.O_PATH))
    finally:
        os.close(userfaultfd)


def maps_for_writing_alone(vmm: LiveVmm) -> None:
    """Which root alone may."""
    _hand_over(vmm, os.open("/proc/self/maps", os.O_WRONLY))


# ------------------------------------------------ the right one, by other ways


def maps_of_this_thread(vmm: LiveVmm) -> None:
    _hand_over_both(vmm, Path("/proc/thread-self"))


def maps_by_a_threads_id(vmm: LiveVmm) -> None:
    """Of another thread than the main one, whose id is the process's."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: _hand_over_both(vmm, Path(f"/proc/{threading.get_native_id()}"))).result()


def smaps_of_a_thread_that_ends_later(vmm: LiveVmm) -> Callable[[], None]:
    """Hand over memory with the smaps of a thread that lives until the result is called."""
    thread = ThreadPoolExecutor(1)
    identifier = thread.submit(threading.get_native_id).result()
    _hand_over_both(vmm, Path(f"/proc/self/task/{identifier}"))
    return thread.shutdown


def lose_the_thread_of_smaps(vmm: LiveVmm, memory: UaddrRange) -> AnyAnswer:
    """A region of kind auto, whose flags must be read anew for a fault after the thread has ended."""
    end = smaps_of_a_thread_that_ends_later(vmm)
    vmm.add_region(GFN, memory, "auto")
    vmm.notifier.invalidate(memory)
    end()
    return vmm.fault(GFN)


def maps_of_a_procfs(vmm: LiveVmm, mount: Mount, place: Path) -> None:
    """Opened while it is mounted, and handed over afterwards."""
    with ExitStack() as opened:
        with mount(place) as procfs:
            descriptors = _open_both(procfs / "self", opened)
        vmm.vmm.call(AttachMemory(promise_begin_end=True), descriptors=descriptors)


def own_maps_bound_to(vmm: LiveVmm, place: Path) -> None:
    private_mounts.bind(Path(f"/proc/{os.getpid()}"), place)
    _hand_over_both(vmm, place)


def anothers_maps_bound_to(vmm: LiveVmm, place: Path) -> None:
    with _child() as child:
        private_mounts.bind(Path(f"/proc/{child}"), place)
        _hand_over_both(vmm, place)


# ------------------------------------------------ methods that take none


def to_statistics(vmm: LiveVmm, count: int) -> None:
    with _opened(count) as descriptors:
        vmm.vmm.call(Statistics(), descriptors=descriptors)


def to_intercept(vmm: LiveVmm, count: int) -> None:
    hello = {"role": "vp", "vp_index": 9, **vmm.credentials}
    _send(vmm, hello, request("intercept", intercept_message(GFN, READ)), count)


def to_invalidate(vmm: LiveVmm, count: int) -> None:
    fields = {"start_uaddr": ELSEWHERE.start_uaddr, "length": ELSEWHERE.length}
    _send(vmm, {"role": "notifier", **vmm.credentials}, request("invalidate", fields), count)


def to_hello(vmm: LiveVmm, count: int) -> None:
    with RawConnection(vmm.path) as connection:
        send_with_descriptors(connection, request("hello", {"protocol": 1, "role": "vmm"}), count)
        connection.answer()


# ------------------------------------------------ helpers


def _send(vmm: LiveVmm, hello: dict[str, object], data: bytes, count: int) -> None:
    with RawConnection(vmm.path) as connection:
        connection.ask("hello", {"protocol": 1, **hello})
        send_with_descriptors(connection, data, count)
        connection.answer()


def _hand_over(vmm: LiveVmm, *descriptors: int) -> None:
    """Sends copies, and closes ours."""
    try:
        vmm.vmm.call(AttachMemory(), descriptors=descriptors)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _hand_over_both(vmm: LiveVmm, directory: Path) -> None:
    with ExitStack() as opened:
        descriptors = _open_both(directory, opened)
        vmm.vmm.call(AttachMemory(promise_begin_end=True), descriptors=descriptors)


def _open_both(directory: Path, opened: ExitStack) -> list[int]:
    descriptors = [_open(str(directory / name)) for name in ("maps", "smaps")]
    for descriptor in descriptors:
        opened.callback(os.close, descriptor)
    return descriptors


def _open(path: str) -> int:
    return os.open(path, os.O_RDONLY)


@contextmanager
def _opened(count: int) -> Iterator[list[int]]:
    with ExitStack() as opened:
        descriptors = [_open("/dev/null") for _ in range(count)]
        for descriptor in descriptors:
            opened.callback(os.close, descriptor)
        yield descriptors


@contextmanager
def _child(act: Callable[[], None] = lambda: None) -> Iterator[int]:
    """The pid of a child that does something, and lives as long as the block."""
    child = os.fork()
    if not child:
        act()
        while True:
            signal.pause()
    try:
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
