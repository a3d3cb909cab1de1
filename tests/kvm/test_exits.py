"""Exits as they stand in the kvm_run page."""

from __future__ import annotations

import struct

import pytest

from intercept_client.kvm._exits import (
    Broken,
    Exit,
    Halted,
    HostFault,
    MmioRead,
    MmioWrite,
    NotEmulated,
    PortRead,
    PortWrite,
    Shutdown,
    read_exit,
    read_host_fault,
)
from intercept_client.kvm._locked import is_locked


def run_page(reason: int, payload: bytes = b"", data: bytes = b"") -> bytearray:
    page = bytearray(4096)
    struct.pack_into("<I", page, 8, reason)
    page[32 : 32 + len(payload)] = payload
    page[2048 : 2048 + len(data)] = data
    return page


@pytest.mark.parametrize(
    ("page", "expected"),
    [
        (run_page(6, struct.pack("<Q8sIB", 0xF0000, b"12345678", 3, 1)), MmioWrite(0xF0000, b"123")),
        (run_page(6, struct.pack("<Q8sIB", 1 << 40, bytes(8), 8, 0)), MmioRead(1 << 40, 8)),
        (run_page(2, struct.pack("<BBHIQ", 1, 2, 0x10, 2, 2048), b"abcdef"), PortWrite(0x10, 2, b"abcd")),
        (run_page(2, struct.pack("<BBHIQ", 0, 4, 0xCF8, 1, 2048)), PortRead(0xCF8, 4, 1, 2048)),
        (run_page(5), Halted()),
        (run_page(8), Shutdown()),
        (run_page(17, struct.pack("<I", 1)), NotEmulated()),
        (run_page(17, struct.pack("<I", 3)), Broken("internal error 3")),
        (run_page(9, struct.pack("<Q", 0x80000021)), Broken("entry failed: 0x80000021")),
        (run_page(99), Broken("exit reason 99")),
    ],
)
def test_an_exit_is_read_from_the_page(page: bytearray, expected: Exit) -> None:
    assert read_exit(page) == expected


def test_a_host_fault_has_its_gpa_where_the_kernel_says_it() -> None:
    assert read_host_fault(run_page(39, struct.pack("<QQQ", 0, 0x5000, 0x1000))) == HostFault(0x5000)


def test_a_host_fault_of_an_older_kernel_has_none() -> None:
    assert read_host_fault(run_page(6)) == HostFault(None)


@pytest.mark.parametrize(
    ("code", "locked"),
    [
        ("f0 ff 06", True),
        ("66 f0 0f c1 06", True),
        ("87 06", True),
        ("48 87 06", True),
        ("ff 06", False),
        ("f3 a5", False),
        ("8b 06 f0 ff 06", False),
        ("", False),
    ],
)
def test_a_locked_instruction_is_known_by_its_prefix_or_by_being_an_exchange(code: str, locked: bool) -> None:
    assert is_locked(bytes.fromhex(code)) is locked
