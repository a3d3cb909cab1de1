"""Accesses on memory that faults, and on memory that the kernel does not copy."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest

from fakes.locked_memory import lock
from intercept_client import libc
from intercept_client.kvm import _device_memory as device_memory
from intercept_client.kvm._copying import AnnouncedCopier, CheckedCopier, Copier, MemoryGone
from intercept_client.libc import Sharing
from intercept_protocol.addresses import PAGE_SIZE, UaddrRange
from intercept_protocol.outcomes import Access

RW = Access.READ | Access.WRITE
MADV_GUARD_INSTALL = 102
"""Linux 6.13."""
MEMFD_SECRET = 447
PERF_EVENT_OPEN = 298
SOFTWARE_CPU_CLOCK = bytes.fromhex("01000000 80000000").ljust(128, b"\0")
"""perf_event_attr: PERF_TYPE_SOFTWARE, its size, PERF_COUNT_SW_CPU_CLOCK."""

Spoil = Callable[[UaddrRange, int], None]


def truncate(_: UaddrRange, file: int) -> None:
    os.ftruncate(file, 0)


def guard(uaddrs: UaddrRange, _: int) -> None:
    try:
        libc.madvise(uaddrs, MADV_GUARD_INSTALL)
    except OSError as refusal:
        pytest.skip(f"no guard pages on this kernel: {refusal}")


def protect(uaddrs: UaddrRange, _: int) -> None:
    libc.mprotect(uaddrs, Access.NONE)


def unmap(uaddrs: UaddrRange, _: int) -> None:
    libc.munmap(uaddrs)


def lock_and_protect(uaddrs: UaddrRange, _: int) -> None:
    """As QEMU's `-overcommit mem-lock=on` locks it."""
    lock(uaddrs)
    libc.mprotect(uaddrs, Access.NONE)


def lock_and_truncate(uaddrs: UaddrRange, file: int) -> None:
    lock(uaddrs)
    os.ftruncate(file, 0)


def lock_private_and_protect(uaddrs: UaddrRange, _: int) -> None:
    libc.mmap(uaddrs, RW, Sharing.PRIVATE, flags=libc.MAP_FIXED)
    lock(uaddrs)
    libc.mprotect(uaddrs, Access.NONE)


@pytest.fixture
def file() -> Iterator[int]:
    """A page."""
    file = os.memfd_create("page", os.MFD_CLOEXEC)
    os.ftruncate(file, PAGE_SIZE)
    yield file
    os.close(file)


@pytest.fixture
def page(file: int) -> Iterator[UaddrRange]:
    """Where it is mapped."""
    uaddrs = libc.mmap(UaddrRange(start=0, end=1), RW, Sharing.SHARED, file=file)
    yield uaddrs
    libc.munmap(uaddrs)


@pytest.mark.parametrize("copier", [CheckedCopier(), AnnouncedCopier()], ids=["checked", "announced"])
@pytest.mark.parametrize(
    "spoil",
    [truncate, guard, protect, unmap, lock_and_protect, lock_and_truncate, lock_private_and_protect],
)
def test_memory_that_faults_is_an_error_and_no_signal(
    page: UaddrRange, file: int, spoil: Spoil, copier: Copier
) -> None:
    spoil(page, file)

    with pytest.raises(MemoryGone):
        copier.read(page.start_uaddr, 4)
    with pytest.raises(MemoryGone):
        copier.write(page.start_uaddr, bytes(4))


def test_a_write_to_memory_that_may_only_be_read_is_an_error(page: UaddrRange) -> None:
    libc.mprotect(page, Access.READ)

    with pytest.raises(MemoryGone):
        AnnouncedCopier().write(page.start_uaddr, bytes(4))


@pytest.fixture
def device() -> Iterator[UaddrRange]:
    """The ring of a perf event: a page of VM_PFNMAP, as a BAR is, which no system call copies."""
    file = _system_call(PERF_EVENT_OPEN, SOFTWARE_CPU_CLOCK, 0, -1, -1, 0)
    uaddrs = libc.mmap(UaddrRange.of_pages(0, 1), RW, Sharing.SHARED, file=file)
    os.close(file)
    yield uaddrs
    with suppress(OSError):
        libc.munmap(uaddrs)


def _system_call(number: int, *arguments: int | bytes) -> int:
    """The descriptor, or a skip with the reason."""
    libc_ = ctypes.CDLL(None, use_errno=True)
    descriptor: int = libc_.syscall(
        *(ctypes.c_long(value) if isinstance(value, int) else value for value in (number, *arguments))
    )
    if descriptor < 0:
        pytest.skip(f"system call {number}: {os.strerror(ctypes.get_errno())}")
    return descriptor


LAST_WORD = PAGE_SIZE - 8
"""Of a perf event's ring page, reserved and so ours to write."""


def test_a_devices_memory_is_read_and_written(device: UaddrRange) -> None:
    copier, word = AnnouncedCopier(), device.start_uaddr + LAST_WORD

    copier.write(word, b"register")

    assert copier.read(word, 8) == b"register"
    assert ctypes.string_at(word, 8) == b"register"


def test_a_devices_memory_that_is_unmapped_is_an_error(device: UaddrRange) -> None:
    libc.munmap(device)

    with pytest.raises(MemoryGone):
        AnnouncedCopier().read(device.start_uaddr, 8)


def test_a_devices_memory_without_rights_is_an_error(device: UaddrRange) -> None:
    libc.mprotect(device, Access.NONE)

    with pytest.raises(MemoryGone):
        AnnouncedCopier().read(device.start_uaddr, 8)
    with pytest.raises(MemoryGone):
        AnnouncedCopier().write(device.start_uaddr + LAST_WORD, bytes(8))


def test_a_write_to_a_devices_memory_that_may_only_be_read_is_an_error(device: UaddrRange) -> None:
    libc.mprotect(device, Access.READ)

    assert AnnouncedCopier().read(device.start_uaddr + LAST_WORD, 8) == bytes(8)
    with pytest.raises(MemoryGone):
        AnnouncedCopier().write(device.start_uaddr + LAST_WORD, bytes(8))


def test_without_a_promise_a_devices_memory_is_never_touched(device: UaddrRange) -> None:
    """It cannot be watched, so the guest never had it."""
    with pytest.raises(MemoryGone):
        CheckedCopier().read(device.start_uaddr, 8)


@pytest.mark.parametrize("page", [0, 1], ids=["within the file", "beyond its end"])
def test_secret_memory_is_an_error(page: int) -> None:
    """KVM cannot map it for a guest either. Beyond the file's end a load of ours would be SIGBUS."""
    file = _system_call(MEMFD_SECRET, 0)
    os.ftruncate(file, PAGE_SIZE)
    uaddrs = libc.mmap(UaddrRange.of_pages(0, 2), RW, Sharing.SHARED, file=file)
    os.close(file)

    with pytest.raises(MemoryGone):
        AnnouncedCopier().read(uaddrs.start_uaddr + page * PAGE_SIZE, 8)
    with pytest.raises(MemoryGone):
        AnnouncedCopier().write(uaddrs.start_uaddr + page * PAGE_SIZE, bytes(8))
    libc.munmap(uaddrs)


def test_ordinary_memory_that_faults_is_told_from_a_devices_without_smaps(
    page: UaddrRange, file: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guest may touch it as often as it likes, and smaps takes long in a large VMM."""
    monkeypatch.setattr(device_memory, "SMAPS", "/nonexistent")
    truncate(page, file)

    with pytest.raises(MemoryGone, match=r"faults$"):
        AnnouncedCopier().read(page.start_uaddr, 4)


def test_where_smaps_cannot_be_read_a_devices_memory_is_an_error_that_says_why(
    device: UaddrRange, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_memory, "SMAPS", "/nonexistent")

    with pytest.raises(MemoryGone, match=r"faults, and .* No such file or directory: '/nonexistent'"):
        AnnouncedCopier().read(device.start_uaddr, 8)
