"""Descriptors on their way to an attachment: a slow one blocks no other peer, and none is left open.

A pipe's writing end stands for what was handed over: its reading end tells when all copies are closed.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from functools import partial

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from fakes.closers import closer
from fakes.eventually import PATIENCE
from fakes.userfaultfd_kernel import UserfaultfdKernel
from intercept_protocol.errors import WireError
from interceptd.address_space import Undecided
from interceptd.address_space.attachment import Attachment
from interceptd.address_space.descriptors import attach
from interceptd.address_space.handover import Handover
from interceptd.address_space.procmaps import ProcMaps
from interceptd.address_space.workers import Workers
from interceptd.connections.peer import Peer

SOON, LATE = 0.05, 600.0
"""Seconds: short, for what is to be given up; and for what is not, longer than any machine needs."""
OURS = Peer(os.getpid(), 0, 0)


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """The reading end, which the test owns, and the writing end, which is handed over."""
    reading, writing = os.pipe()
    yield reading, writing
    os.close(reading)


@pytest.fixture
def workers() -> Iterator[Workers]:
    """One, as few as there can be."""
    one = Workers(1, "handovers", closer())
    yield one
    one.close()


async def closed(reading: int) -> bool:
    """Wait until no copy of the writing end is open."""
    with trio.fail_after(PATIENCE):
        return not await trio.to_thread.run_sync(os.read, reading, 1, abandon_on_cancel=True)


class Slow:
    """Stands in for looking at a file on a peer's mount: takes until `answer`, and then is content."""

    def __init__(self) -> None:
        self.answer = threading.Event()
        self.begun = trio.Event()
        self._token = trio.lowlevel.current_trio_token()

    def __call__(self, descriptors: list[int]) -> Attachment:
        self._token.run_sync_soon(self.begun.set)
        self.answer.wait()
        return Attachment(ProcMaps(descriptors[0]), None, None, promised=True, closer=closer())


def never(_: list[int]) -> Attachment:
    raise AssertionError("abandoned before it began")


async def test_a_descriptor_that_blocks_is_abandoned_in_time_and_closed_later(
    pipe: tuple[int, int], workers: Workers
) -> None:
    reading, writing = pipe
    slow = Slow()
    with pytest.raises(Undecided, match="examining a descriptor timed out") as undecided:
        await Handover([writing], slow, closer()).made(SOON, workers)
    slow.answer.set()
    assert (await closed(reading), undecided.value.number) == (True, errno.ETIMEDOUT)


async def test_pending_descriptors_are_closed_when_abandoned(
    pipe: tuple[int, int], workers: Workers, nursery: trio.Nursery
) -> None:
    reading, writing = pipe
    another_answers = threading.Event()
    nursery.start_soon(workers.ask, partial(another_answers.wait, PATIENCE))
    await wait_all_tasks_blocked()
    with pytest.raises(Undecided, match="examining a descriptor timed out"):
        await Handover([writing], never, closer()).made(SOON, workers)
    assert await closed(reading)
    another_answers.set()


async def test_without_a_thread_descriptors_are_abandoned_and_closed_with_the_next(
    pipe: tuple[int, int], workers: Workers
) -> None:
    reading, writing = pipe
    one = closer()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(threading.Thread, "start", no_thread)
        with pytest.raises(Undecided, match="no thread to ask with"):
            await Handover([writing], never, one).made(LATE, workers)
    one.close([UNUSED])
    assert await closed(reading)


async def test_the_owner_of_an_attachment_closes_nothing_in_its_own_thread(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To close a userfaultfd takes its process's mmap lock, which that process may hold."""
    reading, writing = pipe
    close, closers = os.closerange, dict[int, int]()

    def recording(first: int, end: int) -> None:
        closers[first] = threading.get_ident()
        close(first, end)

    monkeypatch.setattr(os, "closerange", recording)
    Attachment(ProcMaps(writing), None, None, promised=True, closer=closer()).close()
    assert await closed(reading)
    assert closers[writing] != threading.get_ident()


async def test_an_attachment_is_closed_after_the_last_worker_has_used_it(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    attachment = Attachment(ProcMaps(writing), None, None, promised=True, closer=closer())
    with attachment.in_use():
        attachment.close()
        os.fstat(writing)
    assert await closed(reading)


def no_thread(_: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


UNUSED = 1 << 20
"""No descriptor of ours, so that its close fails, as of a file on NFS or FUSE it may."""


def test_a_wrong_descriptor_whose_close_fails_is_einval_and_keeps_no_other_open(
    pipe: tuple[int, int],
) -> None:
    reading, writing = pipe
    with pytest.raises(WireError, match="not 4 descriptors"):
        attach([UNUSED, writing], 4, OURS, promised=False, closer=closer())
    assert os.read(reading, 1) == b""


async def test_a_vmm_that_leaves_while_its_descriptor_is_looked_at_leaves_none_open(
    pipe: tuple[int, int], workers: Workers, nursery: trio.Nursery
) -> None:
    reading, writing = pipe
    slow = Slow()
    handing = Handover([writing], slow, closer())
    with trio.CancelScope() as leaving:
        nursery.start_soon(cancel_once, slow.begun, leaving)
        await handing.made(LATE, workers)
    slow.answer.set()
    assert (leaving.cancelled_caught, await closed(reading)) == (True, True)


async def cancel_once(happened: trio.Event, scope: trio.CancelScope) -> None:
    with trio.CancelScope(shield=True):
        await happened.wait()
    scope.cancel()


async def test_an_attachment_made_in_time_stays_open_until_its_owner_closes_it(
    pipe: tuple[int, int], workers: Workers
) -> None:
    reading, writing = pipe
    slow = Slow()
    slow.answer.set()
    made = await Handover([writing], slow, closer()).made(LATE, workers)
    os.set_blocking(reading, False)
    with pytest.raises(BlockingIOError):
        os.read(reading, 1)
    os.set_blocking(reading, True)
    made.close()
    assert await closed(reading)


def test_a_userfaultfd_that_cannot_be_read_without_waiting_is_einval_and_closed(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Linux before 6.10, where RWF_NOWAIT is refused on it."""
    reading, writing = pipe
    stand_in = os.open(f"/proc/self/fd/{writing}", os.O_RDWR)  # like a userfaultfd, it may be read
    os.close(writing)

    def no_such_read(*_: object) -> int:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    link = os.readlink(f"/proc/self/fd/{stand_in}")
    monkeypatch.setattr("interceptd.address_space.descriptors.USERFAULTFD_LINK", link)
    monkeypatch.setattr("interceptd.address_space.userfaultfd.fcntl.ioctl", UserfaultfdKernel())
    monkeypatch.setattr("interceptd.address_space.userfaultfd.os.preadv", no_such_read)
    maps = os.open("/proc/self/maps", os.O_RDONLY)
    with pytest.raises(WireError, match=r"needs Linux 6\.10\): do not hand one over") as refused:
        attach([maps, stand_in], 2, OURS, promised=False, closer=closer())
    assert (refused.value.number, os.read(reading, 1)) == (errno.EINVAL, b"")
