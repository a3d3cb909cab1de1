"""What a restored guest and its starter do while their daemon is killed.

Each deed prepares, yields, and does one thing; a test plans the kills at the yield. A guest then finds the
image's content in all of its memory but what it has given back, which is zero.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from struct import pack

from fakes.eventually import eventually
from fakes.kept_daemon import KeptDaemon
from fakes.raw_client import Refused
from fakes.restore_asker import PAGES, Asker
from fakes.restoring_vmm import RestoringVmm

Deed = Callable[[Asker], Iterator[None]]


class Guest:
    """Of a VMM that has handed its memory over."""

    def __init__(self, vmm: RestoringVmm) -> None:
        self.vmm = vmm
        self._given_back: set[int] = set()

    def read(self, first: int, count: int) -> None:
        pages = range(first, first + count)
        expected = " ".join("0" if page in self._given_back else str(page) for page in pages)
        assert self.vmm.ask("read", first, count) == expected

    def give_back(self, first: int, count: int) -> None:
        assert self.vmm.ask("give_back", first, count) == "given back"
        self._given_back |= set(range(first, first + count))


@contextmanager
def guest_of(asker: Asker, restored: int) -> Iterator[Guest]:
    """A guest whose whole memory is read in the end."""
    with RestoringVmm(asker.listener, [PAGES - 100, 100]) as vmm:
        guest = Guest(vmm)
        yield guest
        guest.read(0, PAGES)
        assert asker.progress(restored)["pid"] == vmm.pid
    eventually(lambda: _has_ended(asker, restored), True)


def _has_ended(asker: Asker, restored: int) -> bool:
    """Figures of what has ended do not outlive a daemon."""
    try:
        ended: bool = asker.progress(restored)["state"] == "ended"
    except Refused as refused:
        return refused.refusal.name == "ENOENT"
    return ended


def asks(asker: Asker) -> Iterator[None]:
    """Who asked is answered, or told to ask again."""
    with tempfile.TemporaryFile() as prefetch:
        prefetch.write(pack("<2I", 10, 20))
        prefetch.flush()
        yield
        restored = None
        while restored is None:
            try:
                restored = asker.restore(prefetch.fileno(), prefetch=True)
            except Refused as refused:
                assert refused.refusal.name == "EAGAIN", refused  # noqa: PT017 - and nothing else
    with guest_of(asker, restored):
        pass


def asks_once(asker: Asker) -> Iterator[None]:
    """What is recorded is answered, and need not be asked again."""
    yield
    restored = asker.restore()
    with guest_of(asker, restored):
        pass


def hands_over(asker: Asker) -> Iterator[None]:
    restored = asker.restore()
    yield
    with guest_of(asker, restored):
        pass


def touches(asker: Asker) -> Iterator[None]:
    restored = asker.restore(around_pages=8)
    with guest_of(asker, restored) as guest:
        guest.read(3, 1)
        yield
        guest.read(100, 1)


def gives_back(asker: Asker) -> Iterator[None]:
    """Pages that are in and others, and then it touches them."""
    restored = asker.restore(around_pages=8)
    with guest_of(asker, restored) as guest:
        guest.read(0, 8)
        yield
        guest.give_back(4, 8)
        guest.read(0, 16)


def touches_all(asker: Asker) -> Iterator[None]:
    """One page after the other: a long log, and in the end nothing is missing."""
    restored = asker.restore(around_pages=1)
    with guest_of(asker, restored) as guest:
        guest.give_back(7, 2)
        yield
        guest.read(0, PAGES)
        asker.wait_state(restored, "complete")
        guest.give_back(500, 9)  # which now is the kernel's business alone


def killed(kept: KeptDaemon, asker: Asker, deed: Deed, *steps: tuple[str, int]) -> bool:
    """Do it while daemons die at these points. Returns whether each was reached."""
    doing = deed(asker)
    next(doing)
    kept.plan(*steps)
    for _ in doing:
        raise AssertionError("a deed yields once")
    reached = kept.reached
    kept.plan()
    assert not kept.troubles()
    return reached
