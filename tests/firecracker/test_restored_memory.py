"""A guest in a real Firecracker finds its memory as it left it, and zeroes where it gave pages away."""

from __future__ import annotations

from fakes.eventually import eventually
from firecracker.content import PAGE
from firecracker.machine import MIB, Snapshot
from firecracker.restoring import FIRST, GIVEN, SAVED_MIB, Restores, Span, all_memory, pages

ALL = all_memory(SAVED_MIB)
LAST_WORDS = Span(FIRST + PAGE - 8, ALL[0].words)
BEFORE = pages(16 * MIB, 20 * MIB)
"""Read before some of it is given away."""


def test_every_page_is_the_images_or_zero_after_the_balloon(saved: Snapshot, restores: Restores) -> None:
    guest = restores.start(saved)
    assert guest.looks(BEFORE) == guest.must_find(BEFORE)
    guest.inflate(17 * MIB // PAGE, 300)
    guest.inflate(40 * MIB // PAGE + 5, 77)  # never read before
    guest.write(17 * MIB, 0xABCD)
    guest.write(50 * MIB, 0xEF)
    assert guest.content.read(FIRST) != 0
    assert guest.content.read(GIVEN.start * PAGE) == 0
    assert guest.looks(*ALL, LAST_WORDS) == guest.must_find(*ALL, LAST_WORDS)


def test_a_guest_whose_pages_are_all_in_needs_the_daemon_no_more(saved: Snapshot, restores: Restores) -> None:
    guest = restores.start(saved, prefetch=[(0, SAVED_MIB * MIB // PAGE)])
    eventually(lambda: restores.progress(guest)["state"], "complete")
    before = restores.progress(guest)
    assert before["pages_in"] == before["image_pages"] == SAVED_MIB * MIB // PAGE
    guest.inflate(30 * MIB // PAGE, 10)
    assert guest.looks(*ALL) == guest.must_find(*ALL)
    assert restores.progress(guest)["faults"] == before["faults"]
