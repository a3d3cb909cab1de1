"""An image that does not answer, or fails: its guest waits or is killed, and no other guest notices."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from fakes import fuse_image
from fakes.eventually import eventually
from fakes.fuse_image import FuseImage, Order
from firecracker.machine import MIB, Snapshot
from firecracker.restoring import SAVED_MIB, Restores, all_memory, pages

PART = pages(64 * MIB, 80 * MIB)
ALL = all_memory(SAVED_MIB)


@pytest.fixture
def image(saved: Snapshot) -> Iterator[FuseImage]:
    """The snapshot's memory, in FUSE."""
    if (reason := fuse_image.needs()) is not None:
        pytest.skip(reason)
    with fuse_image.fuse_image(saved.memory) as image:
        yield image


def test_while_an_image_is_stuck_other_guests_are_served(
    saved: Snapshot, image: FuseImage, restores: Restores
) -> None:
    guest, other = restores.start(saved, image.file), restores.start(saved)
    faults = restores.progress(guest)["faults"]
    image.reads(Order.HOLD)
    guest.machine.say("hash", *PART)
    assert other.looks(*ALL) == other.must_find(*ALL)
    assert restores.progress(guest)["faults"] == faults, "its page came from nowhere"
    image.reads(Order.SERVE)
    assert guest.machine.answer() == guest.content.hash(*PART)


def test_a_guest_whose_image_fails_waits_until_it_can_be_read(
    saved: Snapshot, image: FuseImage, restores: Restores
) -> None:
    guest = restores.start(saved, image.file)
    image.reads(Order.FAIL)
    guest.machine.say("hash", *PART)
    eventually(lambda: restores.progress(guest)["error"] != "", True)
    assert restores.progress(guest)["state"] == "serving"
    assert restores.progress(guest)["image_errors"] > 0
    image.reads(Order.SERVE)
    assert guest.machine.answer() == guest.content.hash(*PART)
    eventually(lambda: restores.progress(guest)["error"], "")


def test_a_guest_whose_image_fails_is_killed_if_so_configured(
    saved: Snapshot, image: FuseImage, restores: Restores
) -> None:
    guest = restores.start(saved, image.file, on_image_error="kill")
    image.reads(Order.FAIL)
    guest.machine.say("hash", *PART)
    assert guest.machine.wait_ended() == -signal.SIGKILL
    eventually(lambda: restores.progress(guest)["state"], "ended")
    assert "image" in restores.progress(guest)["error"]
