"""A restore is asked for with its descriptors in order, and again where that may help."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
import trio

from fakes.eventually import PATIENCE
from fakes.scripted_daemon import Hear, Refuse, ScriptedDaemon, Step, hello, replies
from intercept_client import (
    BlockingVmm,
    OnImageError,
    RestoreReply,
    RestoreState,
    RestoreStatistics,
    TraceRing,
    TrioVmm,
    WireError,
    _vmm_requests,
)

DEFAULTS = {
    "around_pages": 64, "on_image_error": "hold", "connect_timeout_ms": 60_000, "prefetch": False,
    "trace": False,
}  # fmt: skip
REPLY = RestoreReply(partition_id=7, image_pages=512)
FIGURES = RestoreStatistics(
    state=RestoreState.SERVING, image_pages=512, pages_in=65, demand_pages=1, around_pages=63,
    prefetched_pages=1, zero_pages=0, removed_pages=0, faults=1, retries=0, image_errors=0, first_fault_ms=3,
)  # fmt: skip


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as listener:
        yield listener


def restore_blocking(path: Path, listener: socket.socket) -> tuple[RestoreReply, RestoreStatistics]:
    """The image is not looked at: nobody serves."""
    with BlockingVmm.open(path, timeout=PATIENCE) as vmm:
        reply = vmm.restore(listener, listener)
        return reply, vmm.restore_progress(reply.partition_id)


def restore_trio(path: Path, listener: socket.socket) -> tuple[RestoreReply, RestoreStatistics]:
    async def restored() -> tuple[RestoreReply, RestoreStatistics]:
        with trio.fail_after(PATIENCE):
            async with TrioVmm.open(path) as vmm:
                reply = await vmm.restore(listener, listener)
                return reply, await vmm.restore_progress(reply.partition_id)

    return trio.run(restored)


shells = pytest.mark.parametrize("restore", [restore_blocking, restore_trio], ids=["blocking", "trio"])
Restored = Callable[[Path, socket.socket], tuple[RestoreReply, RestoreStatistics]]


@shells
def test_a_restore_is_asked_for_until_the_daemon_has_stored_it(
    socket_path: Path, listener: socket.socket, restore: Restored
) -> None:
    again: list[Step] = [Hear(), Refuse(WireError(errno.EAGAIN, "the daemon was restarted"))]
    script = [*hello(), *again, *again, *replies(REPLY, FIGURES)]
    with ScriptedDaemon(socket_path, (script,)) as daemon:
        assert restore(socket_path, listener) == (REPLY, FIGURES)
    assert daemon.heard[1:] == [("restore", [DEFAULTS])] * 3 + [("restore_progress", [{"partition_id": 7}])]
    assert listener.fileno() >= 0, "it stays the caller's"


@shells
@pytest.mark.parametrize(("number", "times"), [(errno.EAGAIN, 3), (errno.EINVAL, 1)])
def test_a_refusal_that_stays_is_raised(
    socket_path: Path, listener: socket.socket, restore: Restored, number: int, times: int
) -> None:
    refusal: list[Step] = [Hear(), Refuse(WireError(number, "no"))]
    with (
        ScriptedDaemon(socket_path, ([*hello(), *refusal * times],)) as daemon,
        pytest.raises(WireError, match=errno.errorcode[number]),
    ):
        restore(socket_path, listener)
    assert len(daemon.heard) == 1 + times


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("prefetched", [False, True])
def test_descriptors_go_along_in_the_order_of_the_specification(
    listener: socket.socket, *, prefetched: bool, traced: bool
) -> None:
    with closing(TraceRing(256)) as ring, open("/dev/null", "rb") as image, open("/dev/null", "rb") as pages:
        asked = next(
            _vmm_requests.restore(
                image,
                listener,
                around_pages=512,
                on_image_error=OnImageError.KILL,
                connect_timeout=1.5,
                prefetch=pages if prefetched else None,
                trace=ring if traced else None,
            )
        )
        assert list(asked.descriptors) == [
            *(image.fileno(), listener.fileno()),
            *[pages.fileno()] * prefetched,
            *[ring.descriptor] * traced,
        ]
    assert asked.params == [
        {
            "around_pages": 512,
            "on_image_error": "kill",
            "connect_timeout_ms": 1500,
            "prefetch": prefetched,
            "trace": traced,
        }
    ]
