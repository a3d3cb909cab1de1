"""The Python clients and a restarted daemon: answers that come twice, hellos without an answer."""

from __future__ import annotations

import errno
import socket
import threading
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest
import trio
import trio.testing

from fakes.eventually import PATIENCE
from fakes.scripted_daemon import (
    HELLO_REPLY,
    Answer,
    Ask,
    HangUp,
    Hear,
    Look,
    Refuse,
    Say,
    ScriptedDaemon,
    Signal,
    Step,
    hello,
    replies,
)
from intercept_client import (
    BlockingHypervisor,
    BlockingNotifier,
    BlockingOperator,
    BlockingVmm,
    BlockingVp,
    ConnectionEnded,
    ConnectionLost,
    OwnRegions,
    TrioHypervisor,
    TrioNotifier,
    TrioOperator,
    TrioVmm,
    TrioVp,
    _blocking_connection,
)
from intercept_client._connecting import RESTART_PAUSE, RESTART_SECONDS
from intercept_protocol import codec, rpc
from intercept_protocol.addresses import GfnRange, UaddrRange
from intercept_protocol.errors import WireError
from intercept_protocol.events import EVENT_METHOD, EventName
from intercept_protocol.messages import PartitionCredentials, PartitionList

PARTITION = PartitionCredentials(partition_id=7, token=bytes(range(16)))
RANGE = UaddrRange.of_bytes(0x7000_0000, 0x3000)
WELCOME = rpc.encode_result(1, codec.to_fields(HELLO_REPLY))
UNANSWERED: list[list[Step]] = [[HangUp()], [Hear(), HangUp()], [Hear(), Say(WELCOME[:-1]), HangUp()]]
"""The ways in which a connection ends before its hello was answered."""
EACCES = WireError(errno.EACCES, "no such partition")
BUSY = rpc.encode_error(0, WireError(errno.EAGAIN, "too many connections without hello"))
EVENT = rpc.encode_notification(
    EVENT_METHOD, [{"event": "vp_attached", "time_ms": 5, "partition_id": 7, "vp_index": 3}]
)


class Unmapper:
    """A hypervisor of which nothing is asked but to unmap."""

    def map(self, *_: object) -> None:
        raise AssertionError

    def unmap(self, gfns: GfnRange) -> None:
        assert gfns == GfnRange.of(1, 2)


class AsyncUnmapper(Unmapper):
    async def map(self, *_: object) -> None:  # type: ignore[override]
        raise AssertionError

    async def unmap(self, gfns: GfnRange) -> None:  # type: ignore[override]
        await trio.lowlevel.checkpoint()
        super().unmap(gfns)


Opening = Callable[[Path], "Closable"]
Closable = BlockingVmm | BlockingVp | BlockingNotifier | BlockingOperator | BlockingHypervisor
AsyncOpening = Callable[[Path], AbstractAsyncContextManager[object]]

BLOCKING: dict[str, Opening] = {
    "vmm": BlockingVmm.open,
    "vp": lambda path: BlockingVp.open(path, PARTITION, vp_index=3),
    "notifier": lambda path: BlockingNotifier.open(path, PARTITION),
    "operator": BlockingOperator.open,
    "hypervisor": lambda path: BlockingHypervisor.open(path, PARTITION, Unmapper(), regions=OwnRegions()),
}
TRIO: dict[str, AsyncOpening] = {
    "vmm": TrioVmm.open,
    "vp": lambda path: TrioVp.open(path, PARTITION, vp_index=3),
    "notifier": lambda path: TrioNotifier.open(path, PARTITION),
    "operator": TrioOperator.open,
    "hypervisor": lambda path: TrioHypervisor.open(path, PARTITION, AsyncUnmapper(), regions=OwnRegions()),
}
blocking_roles = pytest.mark.parametrize("opening", BLOCKING.values(), ids=BLOCKING)
trio_roles = pytest.mark.parametrize("opening", TRIO.values(), ids=TRIO)

# ------------------------------------------------ answers that come twice (T-12)

LIFE: list[Step] = [*hello(), *replies(None), Say(EVENT), *replies(PartitionList(partitions=[], more=False))]
"""Of an operator; `test_every_client` has those of a VMM's connections."""


def test_a_blocking_operator_lives_with_a_daemon_that_answers_everything_twice(socket_path: Path) -> None:
    with (
        ScriptedDaemon(socket_path, (LIFE,), answers_twice=True),
        BlockingOperator.open(socket_path) as operator,
    ):
        operator.subscribe([EventName.VP_ATTACHED])
        assert [event.partition_id for event in operator.next_events()] == [7]
        assert operator.list_partitions() == []


async def test_a_trio_operator_lives_with_a_daemon_that_answers_everything_twice(socket_path: Path) -> None:
    with ScriptedDaemon(socket_path, (LIFE,), answers_twice=True):
        async with TrioOperator.open(socket_path) as operator:
            await operator.subscribe([EventName.VP_ATTACHED])
            assert [event.partition_id for event in await operator.next_events()] == [7]
            assert await operator.list_partitions() == []


UNMAP = Ask("unmap_gpa", {"start_gfn": 1, "page_count": 2})
WELCOMED_AGAIN: list[Step] = [Hear(), Answer(HELLO_REPLY), UNMAP, Say(WELCOME), UNMAP, HangUp()]


def test_a_blocking_hypervisor_that_is_welcomed_again_serves_on(socket_path: Path) -> None:
    with ScriptedDaemon(socket_path, (WELCOMED_AGAIN,), answers_twice=True) as daemon:
        hypervisor = BLOCKING["hypervisor"](socket_path)
        assert isinstance(hypervisor, BlockingHypervisor)
        assert hypervisor.serve() == "the daemon closed the hypervisor connection"
    assert daemon.answered == [None, None]


async def test_a_trio_hypervisor_that_is_welcomed_again_serves_on(socket_path: Path) -> None:
    with ScriptedDaemon(socket_path, (WELCOMED_AGAIN,), answers_twice=True) as daemon:
        async with TRIO["hypervisor"](socket_path) as hypervisor:
            assert isinstance(hypervisor, TrioHypervisor)
            assert await hypervisor.serve() == "the daemon closed the hypervisor connection"
    assert daemon.answered == [None, None]


# ------------------------------------------------ hellos without an answer (H-16)


@blocking_roles
def test_a_blocking_client_begins_again_until_its_hello_is_answered(
    socket_path: Path, opening: Opening
) -> None:
    with ScriptedDaemon(socket_path, (*UNANSWERED, hello())) as daemon, opening(socket_path):
        pass
    assert len(daemon.heard) == 3  # one was not read
    assert daemon.heard == daemon.heard[:1] * 3


@trio_roles
async def test_a_trio_client_begins_again_until_its_hello_is_answered(
    socket_path: Path, opening: AsyncOpening
) -> None:
    with ScriptedDaemon(socket_path, (*UNANSWERED, hello())) as daemon:
        async with opening(socket_path):
            pass
    assert len(daemon.heard) == 3  # one was not read
    assert daemon.heard == daemon.heard[:1] * 3


REFUSALS: list[tuple[list[Step], type[Exception]]] = [
    ([Hear(), Refuse(EACCES)], WireError),
    ([Hear(), Say(BUSY)], ConnectionEnded),
    ([Say(BUSY), HangUp()], ConnectionEnded),
]
BEGAN_AGAIN: list[Step] = [Hear(), Refuse(WireError(errno.EIO, "began again"))]
refused = pytest.mark.parametrize(("refusal", "error"), REFUSALS, ids=["hello", "under msgid 0", "unread"])


@refused
@blocking_roles
def test_a_blocking_client_that_is_refused_does_not_begin_again(
    socket_path: Path, opening: Opening, refusal: list[Step], error: type[Exception]
) -> None:
    with (
        ScriptedDaemon(socket_path, (UNANSWERED[1], refusal, BEGAN_AGAIN)) as daemon,
        pytest.raises(error, match=r"EACCES|EAGAIN"),
    ):
        opening(socket_path)
    assert len(daemon.heard) == 1 + (Hear() in refusal)


@refused
@trio_roles
async def test_a_trio_client_that_is_refused_does_not_begin_again(
    socket_path: Path, opening: AsyncOpening, refusal: list[Step], error: type[Exception]
) -> None:
    with (
        ScriptedDaemon(socket_path, (UNANSWERED[1], refusal, BEGAN_AGAIN)) as daemon,
        pytest.raises(error, match=r"EACCES|EAGAIN"),
    ):
        async with opening(socket_path):
            pass
    assert len(daemon.heard) == 1 + (Hear() in refusal)


class FakeTime:
    """Time that goes by in sleep alone; `at_pause` is called in each."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.at_pause: Callable[[int], None] = lambda _: None
        self.pauses = 0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.pauses += 1
        self.now += seconds
        self.at_pause(self.pauses)


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    fake = FakeTime()
    monkeypatch.setattr(_blocking_connection, "time", fake)
    return fake


def last_script(path: Path) -> list[Step]:
    """The daemon hears a hello, and is gone with its socket."""
    return [Hear(), Look(path.unlink), HangUp()]


@blocking_roles
def test_a_blocking_client_waits_for_the_successors_socket(
    socket_path: Path, opening: Opening, time: FakeTime
) -> None:
    bound = socket.socket(socket.AF_UNIX)

    def go_on(pauses: int) -> None:
        if pauses == 3:
            bound.bind(str(socket_path))  # and refuses: it does not listen yet
        if pauses == 6:
            bound.close()
            socket_path.unlink()
            successor.__enter__()

    time.at_pause = go_on
    successor = ScriptedDaemon(socket_path, (hello(),))
    try:
        with ScriptedDaemon(socket_path, (last_script(socket_path),)), opening(socket_path):
            pass
    finally:
        successor.__exit__(None, None, None)
    assert (len(successor.heard), time.pauses) == (1, 6)


async def test_a_trio_client_waits_for_the_successors_socket(
    socket_path: Path, mock_clock: trio.testing.MockClock
) -> None:
    gone = threading.Event()
    script = [*last_script(socket_path), Signal(gone)]
    with ScriptedDaemon(socket_path, (script,)), ScriptedDaemon(socket_path.with_name("next"), (hello(),)):
        async with trio.open_nursery() as nursery:
            welcomed = trio.Event()
            nursery.start_soon(open_and_close, TRIO["vp"], socket_path, welcomed)
            await trio.to_thread.run_sync(gone.wait, PATIENCE)
            for _ in range(3):
                await trio.testing.wait_all_tasks_blocked()
                mock_clock.jump(1)
            assert not welcomed.is_set()
            socket_path.with_name("next").rename(socket_path)
            mock_clock.jump(1)
            await welcomed.wait()


async def open_and_close(opening: AsyncOpening, path: Path, welcomed: trio.Event) -> None:
    async with opening(path):
        welcomed.set()


@blocking_roles
def test_a_blocking_client_gives_up_after_ten_seconds(
    socket_path: Path, opening: Opening, time: FakeTime
) -> None:
    begun = time.now
    with (
        ScriptedDaemon(socket_path, (last_script(socket_path),)) as daemon,
        pytest.raises(FileNotFoundError, match=str(socket_path)),
    ):
        opening(socket_path)
    assert len(daemon.heard) == 1
    assert time.now - begun == pytest.approx(RESTART_SECONDS, abs=0.1)


@trio_roles
async def test_a_trio_client_gives_up_after_ten_seconds(
    socket_path: Path, opening: AsyncOpening, mock_clock: trio.testing.MockClock
) -> None:
    gone = threading.Event()

    async def open_in_vain() -> None:
        with pytest.raises(FileNotFoundError, match=str(socket_path)):
            async with opening(socket_path):
                pass

    with ScriptedDaemon(socket_path, ([*last_script(socket_path), Signal(gone)],)) as daemon:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(open_in_vain)
            await trio.to_thread.run_sync(gone.wait, PATIENCE)
            mock_clock.autojump_threshold = 0
    assert len(daemon.heard) == 1
    assert trio.current_time() == pytest.approx(RESTART_SECONDS, abs=0.1)


def test_a_daemon_that_hangs_up_all_the_time_is_the_error_in_the_end(
    socket_path: Path, time: FakeTime
) -> None:
    with (
        ScriptedDaemon(socket_path, tuple([Hear(), HangUp()] for _ in range(300))) as daemon,
        pytest.raises(ConnectionLost, match="the connection ended"),
    ):
        BlockingVmm.open(socket_path)
    assert len(daemon.heard) == time.pauses + 1
    assert time.pauses == pytest.approx(RESTART_SECONDS / RESTART_PAUSE, abs=1)


def test_the_timeout_ends_a_blocking_client_that_begins_again(socket_path: Path, time: FakeTime) -> None:
    begun = time.now
    with ScriptedDaemon(socket_path, (last_script(socket_path),)), pytest.raises(TimeoutError):
        BlockingVmm.open(socket_path, timeout=3.0)
    assert time.now - begun == pytest.approx(3.0)


async def test_a_trio_client_that_begins_again_may_be_cancelled(
    socket_path: Path, mock_clock: trio.testing.MockClock
) -> None:
    gone, welcomed = threading.Event(), trio.Event()
    with ScriptedDaemon(socket_path, ([*last_script(socket_path), Signal(gone)],)) as daemon:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(open_and_close, TRIO["vp"], socket_path, welcomed)
            await trio.to_thread.run_sync(gone.wait, PATIENCE)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
    assert (len(daemon.heard), mock_clock.current_time()) == (1, 0)
    assert not welcomed.is_set()


@blocking_roles
def test_a_socket_on_which_nobody_listens_is_an_error_at_once(
    socket_path: Path, opening: Opening, time: FakeTime
) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(socket_path))
        with pytest.raises(ConnectionRefusedError, match=str(socket_path)):
            opening(socket_path)
    assert time.pauses == 0
