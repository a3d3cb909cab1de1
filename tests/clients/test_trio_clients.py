"""The trio clients against a scripted daemon on a real socket."""

from __future__ import annotations

import errno
import math
import threading
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest
import trio
import trio.testing

from fakes.scripted_daemon import (
    HELLO_REPLY,
    Answer,
    Await,
    HangUp,
    Hear,
    Refuse,
    Say,
    ScriptedDaemon,
    Signal,
    Step,
    hello,
    replies,
)
from intercept_client import (
    ConnectionLost,
    TrioNotifier,
    TrioOperator,
    TrioVmm,
    TrioVp,
)
from intercept_client._connecting import connect_now
from intercept_client._exchange import END_TIMEOUT
from intercept_protocol import outcomes, rpc
from intercept_protocol.addresses import UaddrRange
from intercept_protocol.errors import WireError
from intercept_protocol.events import EVENT_METHOD, Event, EventName, VpAttached
from intercept_protocol.messages import (
    AddressSpaceKind,
    CreatePartition,
    HypervisorKind,
    InvalidateBegin,
    Kick,
    ListPartitions,
    PartitionCredentials,
    PartitionList,
    Subscribe,
    Translate,
    Translation,
)

PARTITION = PartitionCredentials(partition_id=7, token=bytes(range(16)))
RANGE = UaddrRange.of_bytes(0x7000_0000, 0x3000)
RANGE_FIELDS = {"start_uaddr": 0x7000_0000, "length": 0x3000}


async def reached(event: threading.Event) -> None:
    """Wait until the script signals."""
    assert await trio.to_thread.run_sync(event.wait, 10)


async def test_open_vmm_says_hello_and_keeps_the_daemons_answer(socket_path: Path) -> None:
    with ScriptedDaemon(socket_path, (hello(),)) as daemon:
        async with TrioVmm.open(socket_path, name="guest") as vmm:
            assert vmm.hello == HELLO_REPLY

    assert daemon.heard == [("hello", [{"role": "vmm", "protocol": 1, "name": "guest"}])]


async def test_a_call_is_answered_with_its_typed_reply(socket_path: Path) -> None:
    create = CreatePartition(address_space=AddressSpaceKind.DECLARED, hypervisor=HypervisorKind.SOFTWARE)
    with ScriptedDaemon(socket_path, ([*hello(), *replies(PARTITION)],)):
        async with TrioVmm.open(socket_path) as vmm:
            assert await vmm.call(create) == PARTITION


async def test_open_vp_attaches_with_the_partitions_token(socket_path: Path) -> None:
    with ScriptedDaemon(socket_path, (hello(),)) as daemon:
        async with TrioVp.open(socket_path, PARTITION, vp_index=3):
            pass

    assert daemon.heard == [
        ("hello", [{"role": "vp", "protocol": 1, "partition_id": 7, "token": PARTITION.token, "vp_index": 3}])
    ]


async def test_intercept_hands_in_the_message_and_returns_the_answer(socket_path: Path) -> None:
    with ScriptedDaemon(socket_path, ([*hello(), *replies(["forward", "no_region"])],)) as daemon:
        async with TrioVp.open(socket_path, PARTITION, vp_index=0) as vp:
            assert await vp.intercept(bytes(range(256))) is outcomes.Answer.NO_REGION

    assert daemon.heard[1:] == [("intercept", [bytes(range(256))])]


async def test_an_absent_socket_is_named(socket_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=str(socket_path)):
        async with TrioVmm.open(socket_path):
            pass


async def test_calls_of_several_tasks_take_turns(socket_path: Path) -> None:
    replied: list[Translation | None] = []
    answers = [{"frame": ["host", gfn], "access": 1} for gfn in range(8)]
    with ScriptedDaemon(socket_path, ([*hello(), *replies(*answers)],)) as daemon:
        async with TrioVmm.open(socket_path) as vmm:

            async def translate(gfn: int) -> None:
                replied.append(await vmm.translate(gfn))

            async with trio.open_nursery() as nursery:
                for gfn in range(8):
                    nursery.start_soon(translate, gfn)

    assert sorted(reply.frame[1] for reply in replied if reply) == list(range(8))
    assert daemon.methods == ["hello"] + ["translate"] * 8


async def test_a_call_cancelled_before_it_is_sent_is_not_made(socket_path: Path) -> None:
    with ScriptedDaemon(socket_path, ([*hello(), *replies(None)],)) as daemon:
        async with TrioVmm.open(socket_path) as vmm:
            with trio.CancelScope() as scope:
                scope.cancel()
                await vmm.call(Kick(vp_index=1))
            await vmm.call(Kick(vp_index=2))

    assert daemon.heard[1:] == [("kick", [{"vp_index": 2}])]


async def test_after_a_call_cancelled_half_way_the_next_gets_its_own_answer(socket_path: Path) -> None:
    heard, go_on = threading.Event(), threading.Event()
    late, own = {"frame": ["host", 1], "access": 1}, {"frame": ["host", 2], "access": 1}
    script = [*hello(), Hear(), Signal(heard), Await(go_on), Answer(late), *replies(own)]
    with ScriptedDaemon(socket_path, (script,)) as daemon:
        async with TrioVmm.open(socket_path) as vmm, trio.open_nursery() as nursery:
            nursery.start_soon(vmm.call, Translate(gfn=1))
            await reached(heard)
            nursery.cancel_scope.cancel()
            with trio.CancelScope(shield=True):
                async with trio.open_nursery() as releasing:
                    releasing.start_soon(release_when_all_wait, go_on)
                    reply = await vmm.translate(2)

    assert reply == Translation(frame=("host", 2), access=1)
    assert [params for _, params in daemon.heard[1:]] == [[{"gfn": 1}], [{"gfn": 2}]]


async def release_when_all_wait(gate: threading.Event) -> None:
    await trio.testing.wait_all_tasks_blocked()
    gate.set()


async def test_close_ends_the_call_of_another_task(socket_path: Path) -> None:
    heard = threading.Event()
    with ScriptedDaemon(socket_path, ([*hello(), Hear(), Signal(heard)],)):
        async with TrioVp.open(socket_path, PARTITION, vp_index=0) as vp, trio.open_nursery() as nursery:

            async def intercept() -> None:
                with pytest.raises(ConnectionLost, match="closed by this client"):
                    await vp.intercept(bytes(256))

            nursery.start_soon(intercept)
            await reached(heard)
            vp.close()


async def test_invalidation_begins_before_its_block_and_ends_after_it(socket_path: Path) -> None:
    with ScriptedDaemon(socket_path, ([*hello(), *replies(None, None)],)) as daemon:
        async with TrioNotifier.open(socket_path, PARTITION) as notifier, notifier.invalidation(RANGE):
            assert daemon.heard[1:] == [("invalidate_begin", [RANGE_FIELDS])]

    assert daemon.heard[2:] == [("invalidate_end", [RANGE_FIELDS])]


async def test_invalidation_ends_when_its_block_raises(socket_path: Path) -> None:
    with ScriptedDaemon(socket_path, ([*hello(), *replies(None, None)],)) as daemon:
        async with TrioNotifier.open(socket_path, PARTITION) as notifier:
            with pytest.raises(ZeroDivisionError):
                async with notifier.invalidation(RANGE):
                    raise ZeroDivisionError

    assert daemon.methods == ["hello", "invalidate_begin", "invalidate_end"]


async def test_invalidation_ends_when_its_block_is_cancelled(socket_path: Path) -> None:
    with ScriptedDaemon(socket_path, ([*hello(), *replies(None, None)],)) as daemon:
        async with TrioNotifier.open(socket_path, PARTITION) as notifier:
            with trio.CancelScope() as scope:
                async with notifier.invalidation(RANGE):
                    scope.cancel()
                    await trio.sleep_forever()

    assert scope.cancelled_caught
    assert daemon.methods == ["hello", "invalidate_begin", "invalidate_end"]


async def test_a_begin_cancelled_half_way_is_ended_once_it_was_carried_out(socket_path: Path) -> None:
    heard, go_on = threading.Event(), threading.Event()
    script = [*hello(), Hear(), Signal(heard), Await(go_on), Answer(), *replies(None)]
    with ScriptedDaemon(socket_path, (script,)) as daemon:
        async with TrioNotifier.open(socket_path, PARTITION) as notifier, trio.open_nursery() as nursery:
            nursery.start_soon(enter_and_stay, notifier.invalidation(RANGE))
            await reached(heard)
            nursery.cancel_scope.cancel()
            go_on.set()

    assert daemon.methods == ["hello", "invalidate_begin", "invalidate_end"]


async def test_a_begin_cancelled_half_way_and_then_refused_is_not_ended(socket_path: Path) -> None:
    heard, go_on = threading.Event(), threading.Event()
    script = [*hello(), Hear(), Signal(heard), Await(go_on), Refuse(WireError(errno.ENOSPC, "too many"))]
    with ScriptedDaemon(socket_path, (script,)) as daemon:
        async with TrioNotifier.open(socket_path, PARTITION) as notifier, trio.open_nursery() as nursery:
            nursery.start_soon(enter_and_stay, notifier.invalidation(RANGE))
            await reached(heard)
            nursery.cancel_scope.cancel()
            go_on.set()

    assert daemon.methods == ["hello", "invalidate_begin"]


async def enter_and_stay(invalidation: AbstractAsyncContextManager[None]) -> None:
    async with invalidation:
        await trio.sleep_forever()


async def test_a_refused_begin_keeps_the_block_from_running(socket_path: Path) -> None:
    script = [*hello(), Hear(), Refuse(WireError(errno.EINVAL, "length: too short"))]
    with ScriptedDaemon(socket_path, (script,)) as daemon:
        async with TrioNotifier.open(socket_path, PARTITION) as notifier:
            with pytest.raises(WireError, match="too short"):
                async with notifier.invalidation(RANGE):
                    pytest.fail("the block ran")

    assert daemon.methods == ["hello", "invalidate_begin"]


async def test_an_end_that_is_not_answered_in_time_closes_the_connection(
    socket_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    with ScriptedDaemon(socket_path, ([*hello(), *replies(None), Hear()],)):
        async with TrioNotifier.open(socket_path, PARTITION, open_timeout=math.inf) as notifier:
            with pytest.raises(ConnectionLost, match="invalidate_end was not answered within 10 s"):
                async with notifier.invalidation(RANGE):
                    began = autojump_clock.current_time()
            assert autojump_clock.current_time() == pytest.approx(began + END_TIMEOUT)
            with pytest.raises(ConnectionLost, match="closed by this client"):
                await notifier.call(InvalidateBegin(start_uaddr=0, length=4096))


@pytest.mark.parametrize(
    ("last", "why"), [(HangUp(), "the connection ended"), (Say(b"\xc1"), "EBADMSG: not a MessagePack-RPC")]
)
async def test_when_the_block_raised_a_failed_end_is_a_note_on_its_error(
    socket_path: Path, last: Step, why: str
) -> None:
    with ScriptedDaemon(socket_path, ([*hello(), *replies(None), Hear(), last],)):
        async with TrioNotifier.open(socket_path, PARTITION) as notifier:
            with pytest.raises(ZeroDivisionError) as caught:
                async with notifier.invalidation(RANGE):
                    raise ZeroDivisionError

    [note] = caught.value.__notes__
    assert note.startswith(f"invalidation of [0x70000000, 0x70003000): the end failed: {why}")


async def test_next_events_waits_may_be_cancelled_and_tells_of_the_end(socket_path: Path) -> None:
    told = Event(1_764_000_000_000, VpAttached(vp_index=3), 7)
    cancelled = threading.Event()
    say = Say(rpc.encode_notification(EVENT_METHOD, [told.to_fields()]))
    script: list[Step] = [*hello(), *replies(None), Await(cancelled), say, HangUp()]
    with ScriptedDaemon(socket_path, (script,)):
        async with TrioOperator.open(socket_path) as operator:
            await operator.call(Subscribe(events=[EventName.VP_ATTACHED]))
            with trio.CancelScope() as scope:
                scope.cancel()
                await operator.next_events()
            cancelled.set()

            assert await operator.next_events() == [told]
            with pytest.raises(ConnectionLost, match="the connection ended"):
                await operator.next_events()


async def test_notifications_between_answers_can_be_taken(socket_path: Path) -> None:
    tick = rpc.encode_notification("tick", [{"n": 1}])
    script = [*hello(), Hear(), Say(tick), Answer(PartitionList(partitions=[], more=False))]
    with ScriptedDaemon(socket_path, (script,)):
        async with TrioOperator.open(socket_path) as operator:
            await operator.call(ListPartitions())
            assert operator.take_notifications() == [rpc.Notification("tick", [{"n": 1}])]


async def test_connecting_waits_while_the_backlog_is_full(socket_path: Path) -> None:
    listener = trio.socket.socket(trio.socket.AF_UNIX)
    await listener.bind(str(socket_path))
    listener.listen(0)
    with listener, connect_now(socket_path):
        with pytest.raises(BlockingIOError, match=str(socket_path)):
            connect_now(socket_path)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connect_and_leave, socket_path)
            await trio.testing.wait_all_tasks_blocked()
            first, _ = await listener.accept()
            second, _ = await listener.accept()
            with first, second:
                assert await second.recv(4096)
                nursery.cancel_scope.cancel()


async def connect_and_leave(path: Path) -> None:
    async with TrioVmm.open(path):
        pass
