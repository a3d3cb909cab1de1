"""The messages of a userfaultfd, read from a pipe."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from intercept_protocol.addresses import UaddrRange
from interceptd.address_space.missing_faults import _MESSAGE, EVENT_REMOVE, MissingFaults
from interceptd.address_space.userfaultfd import EVENT_UNMAP
from interceptd.address_space.workers import Workers
from interceptd.config.schema import Limits
from interceptd.connections.tenants import Tenants


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    yield ends
    for end in ends:
        os.close(end)


def test_each_read_takes_one_message_whatever_it_is(pipe: tuple[int, int]) -> None:
    """Else a VMM whose threads unmap without end would keep the daemon reading."""
    readable, writable = pipe
    limits = Limits()
    uffd = MissingFaults(readable, Workers(1, "ioctls", Tenants(lambda: limits).of(0).closer))
    for event, page in ((EVENT_UNMAP, 1), (EVENT_REMOVE, 2), (EVENT_UNMAP, 3)):
        os.write(writable, _MESSAGE.pack(event, page << 12, page + 1 << 12, 0))
    assert uffd.read() == UaddrRange(start=1, end=2)
    assert uffd.read() == UaddrRange(start=2, end=3)
    assert uffd.read() == UaddrRange(start=3, end=4)
    assert uffd.read() is None
