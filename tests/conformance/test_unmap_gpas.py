"""`unmap_gpas`: the server unmaps several ranges from the guest with one request."""

from __future__ import annotations

import pytest

from conformance.guests import GFN, PAGE, UADDR, RawVmm, pages
from conformance.hosts import REFUSAL, SPREAD, ListHost, refusal_after
from conformance.statements import needs, statement
from conformance.wire import request


@pytest.fixture
def host(hosted: RawVmm) -> ListHost:
    """A host with its memory mapped."""
    host = ListHost(hosted, lists=True)
    host.map()
    return host


def invalidate(host: ListHost) -> None:
    host.notifier.send(request("invalidate", pages(UADDR, SPREAD)))


@statement("Y-13", "Y-3")
@needs("notifier")
def test_an_invalidate_is_answered_when_all_pieces_are_unmapped(host: ListHost) -> None:
    invalidate(host)
    asked = host.asked_for_a_list("unmap_gpa")
    for _ in range(3):
        host.vmm.ask("statistics")
    assert not host.notifier.is_readable()
    host.answer(asked)
    assert host.notifier.answer() is None
    assert sorted(asked.starts) == [GFN + 2 * page for page in range(SPREAD)]


@statement("H-17")
@needs("notifier")
def test_a_vmm_that_does_not_take_lists_is_asked_for_each_piece(hosted: RawVmm) -> None:
    host = ListHost(hosted)
    host.map()
    invalidate(host)
    for _ in range(SPREAD):
        asked = host.asked()
        assert (asked.method, len(asked.pieces)) == ("unmap_gpa", 1)
        host.answer(asked)
    assert host.notifier.answer() is None


@statement("Y-13")
@needs("notifier")
def test_a_single_piece_may_come_as_either_request(host: ListHost) -> None:
    host.notifier.send(request("invalidate", pages(UADDR + PAGE, 1)))
    asked = host.asked()
    host.answer(asked)
    assert (asked.method, asked.starts) == ("unmap_gpa", [GFN + 2])
    assert host.notifier.answer() is None


@statement("Y-14", "Y-7")
@needs("notifier")
@pytest.mark.parametrize("error", [REFUSAL, *map(refusal_after, range(SPREAD))], ids=str)
def test_a_refusal_loses_the_partition_however_much_was_done(host: ListHost, error: object) -> None:
    invalidate(host)
    host.answer(host.asked(), error)
    assert host.vmm.connection.farewell().name == "EIO"
    host.vp.receive_all()
