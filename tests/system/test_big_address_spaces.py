"""Work that takes long for one VMM does not stop the others: counted in answers, not in seconds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from fakes.daemon_process import DaemonProcess
from fakes.raw_client import RawConnection, intercept_message, request
from fakes.raw_vmm import PAGE, UADDR, RawVmm
from fakes.witness import Witness

pytestmark = pytest.mark.verify

VMA_COUNT = 100_000
HALF = {"start_uaddr": UADDR, "page_count": VMA_COUNT}
"""The pages that half of the VMAs lie in, for there is a hole behind each."""
RIGHTS = {"readable": True, "writable": False, "executable": False}
TURNS = 10
"""Answers that others must get meanwhile. In one go, the daemon still gives a few before and after it."""
INTERCEPT = request("intercept", intercept_message(0, 0))


@pytest.fixture
def vmm(daemon: DaemonProcess, witness: Witness) -> Iterator[RawVmm]:  # noqa: ARG001 - it looks before and after
    """A VMM with 100,000 VMAs of a page, none of which touch."""
    with RawVmm(daemon.socket) as vmm:
        for number in range(VMA_COUNT):
            vmm.map_vma(UADDR + 2 * number * PAGE, 1, start_pfn=2 * number)
        yield vmm


@contextmanager
def in_flight(connection: RawConnection, long_request: bytes) -> Iterator[None]:
    connection.send(long_request)
    yield
    assert connection.answer() is None


@pytest.mark.parametrize(
    ("long_request", "left"),
    [
        (request("protect_vma", HALF | RIGHTS), VMA_COUNT),
        (request("unmap_vma", HALF), VMA_COUNT // 2),
    ],
    ids=["protect_vma", "unmap_vma"],
)
def test_others_are_answered_in_the_middle_of_a_long_edit(
    witness: Witness, vmm: RawVmm, long_request: bytes, left: int
) -> None:
    answered = 0
    with in_flight(vmm.connection, long_request):
        while not vmm.connection.is_readable():
            assert witness.first_vp.intercept(0) == ["forward", "no_region"]
            answered += 1
    assert (vmm.ask("statistics")["vmas"], answered >= TURNS) == (left, True)
