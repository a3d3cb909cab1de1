"""The blocking clients against a scripted daemon on a real socket."""

from __future__ import annotations

import errno
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType

import pytest

from fakes.eventually import PATIENCE
from fakes.scripted_daemon import (
    HELLO_REPLY,
    Answer,
    Await,
    HangUp,
    Hear,
    Look,
    Say,
    ScriptedDaemon,
    Signal,
    Step,
    hello,
    replies,
)
from intercept_client import (
    BlockingNotifier,
    BlockingOperator,
    BlockingVmm,
    BlockingVp,
    ConnectionLost,
    _blocking_clients,
)
from intercept_client._blocking_connection import BlockingConnection
from intercept_client._connecting import connect_now
from intercept_protocol import outcomes, rpc
from intercept_protocol.addresses import UaddrRange
from intercept_protocol.errors import ProtocolViolation
from intercept_protocol.events import EVENT_METHOD, Event, EventName, VpAttached
from intercept_protocol.messages import (
    Kick,
    ListPartitions,
    PartitionCredentials,
    PartitionList,
    Subscribe,
    Translation,
)

PARTITION = PartitionCredentials(partition_id=7, token=bytes(range(16)))
RANGE = UaddrRange.of_bytes(0x7000_0000, 0x3000)
RANGE_FIELDS = {"start_uaddr": 0x7000_0000, "length": 0x3000}
SHORT = 0.05
"""Seconds that a test waits for an answer that is not given."""


def test_open_says_hello_and_keeps_the_daemons_answer(socket_path: Path) -> None:
    with (
        ScriptedDaemon(socket_path, (hello(),)) as daemon,
        BlockingVmm.open(socket_path, name="guest") as vmm,
    ):
        assert vmm.hello == HELLO_REPLY

    assert daemon.heard == [("hello", [{"role": "vmm", "protocol": 1, "name": "guest"}])]


@pytest.mark.parametrize("timeout", [None, 10.0])
def test_a_call_is_answered_with_its_typed_reply(socket_path: Path, timeout: float | None) -> None:
    script = [*hello(), *replies({"frame": ["host", 5], "access": 3})]
    with (
        ScriptedDaemon(socket_path, (script,)),
        BlockingVmm.open(socket_path, timeout=timeout) as vmm,
    ):
        assert vmm.translate(5) == Translation(frame=("host", 5), access=3)


def test_intercept_hands_in_the_message_and_returns_the_answer(socket_path: Path) -> None:
    script = [*hello(), *replies(["retry", "kicked"], ["resume", "mapped"])]
    with (
        ScriptedDaemon(socket_path, (script,)) as daemon,
        BlockingVp.open(socket_path, PARTITION, vp_index=3) as vp,
    ):
        answers = [vp.intercept(bytes(256)), vp.intercept(bytes(range(256)))]

    assert answers == [outcomes.Answer.KICKED, outcomes.Answer.MAPPED]
    assert daemon.heard == [
        (
            "hello",
            [{"role": "vp", "protocol": 1, "partition_id": 7, "token": PARTITION.token, "vp_index": 3}],
        ),
        ("intercept", [bytes(256)]),
        ("intercept", [bytes(range(256))]),
    ]


def test_an_absent_socket_is_named(socket_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=str(socket_path)):
        BlockingVmm.open(socket_path)


def test_a_path_too_long_for_a_socket_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="x" * 200) as caught:
        BlockingVmm.open(tmp_path / ("x" * 200))

    assert caught.value.errno == errno.ENAMETOOLONG


def test_a_hello_that_is_not_answered_times_out(socket_path: Path) -> None:
    with (
        ScriptedDaemon(socket_path, ([Hear()],)),
        pytest.raises(TimeoutError, match="did not answer in time"),
    ):
        BlockingVmm.open(socket_path, timeout=SHORT)


def test_a_signal_handler_that_raises_within_a_call_loses_the_connection(
    socket_path: Path, raising_signal: signal.Signals
) -> None:
    main_thread = threading.main_thread().ident or 0
    interrupt = Look(lambda: signal.pthread_kill(main_thread, raising_signal))
    with ScriptedDaemon(socket_path, ([*hello(), Hear(), interrupt],)), BlockingVmm.open(socket_path) as vmm:
        with pytest.raises(_Interrupted):
            vmm.statistics()
        with pytest.raises(ConnectionLost, match="interrupted"):
            vmm.statistics()


class _Interrupted(Exception):
    pass


@pytest.fixture
def raising_signal() -> Iterator[signal.Signals]:
    """A signal whose handler raises `_Interrupted`."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise _Interrupted

    before = signal.signal(signal.SIGUSR1, interrupt)
    yield signal.SIGUSR1
    signal.signal(signal.SIGUSR1, before)


def test_connecting_waits_while_the_backlog_is_full_up_to_the_timeout(socket_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(socket_path))
        listener.listen(0)
        with connect_now(socket_path), pytest.raises(TimeoutError, match="did not answer in time"):
            BlockingVmm.open(socket_path, timeout=SHORT)


@pytest.mark.parametrize(
    ("last", "why"), [(HangUp(), "the connection ended"), (Say(b"\xc1"), "EBADMSG: not a MessagePack-RPC")]
)
def test_an_end_that_fails_after_the_block_raised_is_a_note_on_its_error(
    socket_path: Path, last: Step, why: str
) -> None:
    with (
        ScriptedDaemon(socket_path, ([*hello(), *replies(None), Hear(), last],)),
        BlockingNotifier.open(socket_path, PARTITION) as notifier,
        pytest.raises(ZeroDivisionError) as caught,
        notifier.invalidation(RANGE),
    ):
        raise ZeroDivisionError

    [note] = caught.value.__notes__
    assert note.startswith(f"invalidation of [0x70000000, 0x70003000): the end failed: {why}")


def test_calls_of_several_threads_take_turns(socket_path: Path) -> None:
    answers = [{"frame": ["host", number], "access": 1} for number in range(64)]
    with (
        ScriptedDaemon(socket_path, ([*hello(), *replies(*answers)],)) as daemon,
        BlockingVmm.open(socket_path) as vmm,
        ThreadPoolExecutor(8) as threads,
    ):
        replied = list(threads.map(vmm.translate, range(64)))

    gfns = [params for _, params in daemon.heard[1:]]
    assert [replied.index(Translation(frame=("host", number), access=1)) for number in range(64)] == [
        fields["gfn"] for (fields,) in gfns if isinstance(fields, dict)
    ]


def test_waiting_for_another_threads_call_counts_against_the_timeout(socket_path: Path) -> None:
    heard, go_on = threading.Event(), threading.Event()
    script = [*hello(), Hear(), Signal(heard), Await(go_on), Answer()]
    with (
        ScriptedDaemon(socket_path, (script,)) as daemon,
        BlockingVmm.open(socket_path) as vmm,
        ThreadPoolExecutor(1) as threads,
    ):
        first = threads.submit(vmm.call, Kick(vp_index=1))
        assert heard.wait(PATIENCE)
        vmm.timeout = SHORT
        with pytest.raises(TimeoutError, match="other threads"):
            vmm.call(Kick(vp_index=2))
        go_on.set()
        first.result()

    assert daemon.heard[1:] == [("kick", [{"vp_index": 1}])]


def test_close_wakes_the_thread_that_waits(socket_path: Path) -> None:
    heard = threading.Event()
    with (
        ScriptedDaemon(socket_path, ([*hello(), Hear(), Signal(heard)],)),
        BlockingVp.open(socket_path, PARTITION, vp_index=0) as vp,
        ThreadPoolExecutor(1) as threads,
    ):
        waiting = threads.submit(vp.intercept, bytes(256))
        assert heard.wait(PATIENCE)
        vp.close()
        with pytest.raises(ConnectionLost):
            waiting.result(10)


def test_invalidation_begins_before_its_block_and_ends_after_it(socket_path: Path) -> None:
    with (
        ScriptedDaemon(socket_path, ([*hello(), *replies(None, None)],)) as daemon,
        BlockingNotifier.open(socket_path, PARTITION) as notifier,
    ):
        with notifier.invalidation(RANGE):
            assert daemon.heard[1:] == [("invalidate_begin", [RANGE_FIELDS])]
        assert daemon.heard[2:] == [("invalidate_end", [RANGE_FIELDS])]


def test_invalidation_ends_when_its_block_raises(socket_path: Path) -> None:
    with (
        ScriptedDaemon(socket_path, ([*hello(), *replies(None, None)],)) as daemon,
        BlockingNotifier.open(socket_path, PARTITION) as notifier,
        pytest.raises(ZeroDivisionError),
        notifier.invalidation(RANGE),
    ):
        raise ZeroDivisionError

    assert daemon.methods == ["hello", "invalidate_begin", "invalidate_end"]


def test_a_begin_that_timed_out_is_ended_once_it_was_carried_out(
    socket_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, settle = threading.Event(), BlockingConnection.wait_idle

    def answered_late(connection: BlockingConnection, deadline: float | None) -> None:
        go_on.set()
        settle(connection, deadline)

    script = [*hello(), Hear(), Await(go_on), Answer(), *replies(None)]
    with (
        ScriptedDaemon(socket_path, (script,)) as daemon,
        BlockingNotifier.open(socket_path, PARTITION) as notifier,
    ):
        notifier.timeout = SHORT
        monkeypatch.setattr(BlockingConnection, "wait_idle", answered_late)
        with pytest.raises(TimeoutError), notifier.invalidation(RANGE):
            pytest.fail("the block ran")

    assert daemon.methods == ["hello", "invalidate_begin", "invalidate_end"]


def test_an_end_that_is_not_answered_in_time_closes_the_connection(
    socket_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_blocking_clients, "END_TIMEOUT", SHORT)
    with (
        ScriptedDaemon(socket_path, ([*hello(), *replies(None), Hear()],)),
        BlockingNotifier.open(socket_path, PARTITION) as notifier,
        pytest.raises(ConnectionLost, match="invalidate_end was not answered within"),
        notifier.invalidation(RANGE),
    ):
        pass


TOLD = Event(1_764_000_000_000, VpAttached(vp_index=3), 7)
NOTIFICATION = rpc.encode_notification(EVENT_METHOD, [TOLD.to_fields()])


def test_next_events_waits_for_the_first_and_takes_what_came_with_it(socket_path: Path) -> None:
    script: list[Step] = [*hello(), *replies(None), Say(2 * NOTIFICATION)]
    with (
        ScriptedDaemon(socket_path, (script,)),
        BlockingOperator.open(socket_path, timeout=PATIENCE) as operator,
    ):
        operator.call(Subscribe(events=[EventName.VP_ATTACHED]))

        assert operator.next_events() == [TOLD, TOLD]


def test_events_that_came_with_an_answer_are_not_lost(socket_path: Path) -> None:
    script: list[Step] = [*hello(), Hear(), Say(NOTIFICATION), Answer(), HangUp()]
    with (
        ScriptedDaemon(socket_path, (script,)),
        BlockingOperator.open(socket_path, timeout=PATIENCE) as operator,
    ):
        operator.call(Subscribe(events=[EventName.VP_ATTACHED]))

        assert operator.next_events() == [TOLD]
        with pytest.raises(ConnectionLost, match="the connection ended"):
            operator.next_events()


def test_a_timeout_does_not_harm_the_connection(socket_path: Path) -> None:
    waited = threading.Event()
    script: list[Step] = [*hello(), *replies(None), Await(waited), Say(NOTIFICATION)]
    with (
        ScriptedDaemon(socket_path, (script,)),
        BlockingOperator.open(socket_path, timeout=PATIENCE) as operator,
    ):
        operator.call(Subscribe(events=[EventName.VP_ATTACHED]))
        operator.timeout = SHORT
        with pytest.raises(TimeoutError):
            operator.next_events()
        operator.timeout = 10
        waited.set()

        assert operator.next_events() == [TOLD]


def test_an_invalid_event_is_a_permanent_protocol_violation(socket_path: Path) -> None:
    script: list[Step] = [*hello(), Say(rpc.encode_notification(EVENT_METHOD, [{"event": 5}]))]
    with (
        ScriptedDaemon(socket_path, (script,)),
        BlockingOperator.open(socket_path, timeout=PATIENCE) as operator,
    ):
        with pytest.raises(ProtocolViolation, match="malformed event"):
            operator.next_events()
        with pytest.raises(ProtocolViolation, match="malformed event"):
            operator.call(ListPartitions())


def test_notifications_between_answers_can_be_taken(socket_path: Path) -> None:
    tick = rpc.encode_notification("tick", [{"n": 1}])
    script = [*hello(), Hear(), Say(tick), Answer(PartitionList(partitions=[], more=False))]
    with ScriptedDaemon(socket_path, (script,)), BlockingOperator.open(socket_path) as operator:
        operator.call(ListPartitions())
        assert operator.take_notifications() == [rpc.Notification("tick", [{"n": 1}])]


def test_programs_of_threads_do_not_import_trio() -> None:
    program = "import intercept_client.memory, sys; sys.exit('trio' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
