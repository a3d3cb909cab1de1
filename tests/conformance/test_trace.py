"""`trace`: a partition's records, written into an operator's memory."""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
from collections.abc import Iterator

import pytest

from conformance.conftest import Server
from conformance.guests import GFN, PAGES, UADDR, RawVmm
from conformance.statements import statement
from conformance.wire import RawConnection, Refused, request

HEADER, RECORD, RECORDS = 4096, 64, 256
INTERCEPT = 1
FUTURE_WRITE = 0x10
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


@pytest.fixture
def ring() -> Iterator[int]:
    descriptor = memfd()
    yield descriptor
    os.close(descriptor)


def memfd(*, seals: int = SEALS) -> int:
    descriptor = os.memfd_create("ring", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.posix_fallocate(descriptor, 0, HEADER + RECORDS * RECORD)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return descriptor


def trace(operator: RawConnection, partition_id: int, *descriptors: int) -> dict[str, object]:
    operator.send(request("trace", {"partition_id": partition_id}), descriptors)
    begun: dict[str, object] = operator.answer()
    return begun


def records(ring: int) -> list[tuple[int, ...]]:
    with mmap.mmap(ring, 0, prot=mmap.PROT_READ) as memory:
        magic, version, size, written = struct.unpack_from("<8sIIQ", memory)
        assert (magic, version, size) == (b"ICPTRACE", 1, RECORD)
        return [struct.unpack_from("<QHHI6Q", memory, HEADER + RECORD * number) for number in range(written)]


@statement("O-20", "T-9")
def test_what_a_partition_does_is_written_into_the_operators_memory(
    operator: RawConnection, vmm: RawVmm, ring: int
) -> None:
    begun = trace(operator, vmm.partition_id, ring)
    assert (begun["records"], begun["record_size"]) == (RECORDS, RECORD)
    assert fcntl.fcntl(ring, fcntl.F_GET_SEALS) & FUTURE_WRITE
    vmm.map_vma(UADDR, PAGES)
    vmm.add_region(GFN, PAGES, UADDR, "mmio")
    vp = vmm.vp()
    assert vp.intercept(GFN) == ["resume", "mapped"]
    assert vp.intercept(0) == ["forward", "no_region"]
    answered = [record for record in records(ring) if record[1] == INTERCEPT]
    words = [begun["answers"][record[3] & 0xFF] for record in answered]  # type: ignore[index]
    assert words == [["resume", "mapped"], ["forward", "no_region"]]
    assert [record[4] for record in answered] == [GFN, 0]


@statement("O-20")
def test_nothing_is_traced_twice_at_a_time(
    server: Server, operator: RawConnection, vmm: RawVmm, ring: int
) -> None:
    assert server.operator_socket is not None
    trace(operator, vmm.partition_id, ring)
    other = memfd()
    with RawConnection(server.operator_socket) as another:
        another.say_hello("operator")
        for connection in (operator, another):
            with pytest.raises(Refused) as caught:
                trace(connection, vmm.partition_id, other)
            assert caught.value.refusal.name == "EBUSY"
    os.close(other)


@statement("O-20", "E-3")
def test_memory_that_may_shrink_or_none_is_einval(operator: RawConnection, vmm: RawVmm, ring: int) -> None:
    unsealed = memfd(seals=0)
    try:
        for descriptors in ((), (unsealed,), (ring, ring)):
            with pytest.raises(Refused) as caught:
                trace(operator, vmm.partition_id, *descriptors)
            assert caught.value.refusal.name == "EINVAL"
    finally:
        os.close(unsealed)
    assert trace(operator, vmm.partition_id, ring)["records"] == RECORDS


@statement("O-20")
def test_the_trace_of_no_such_partition_is_enoent(operator: RawConnection, ring: int) -> None:
    with pytest.raises(Refused) as caught:
        trace(operator, 2**63, ring)
    assert caught.value.refusal.name == "ENOENT"
