"""A VP over a real socket pair: every intercept gets exactly one answer (I4)."""

from __future__ import annotations

import errno

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

from explorer.pauses import Point
from fakes.drawn import pauses
from fakes.model_partition import TIMEOUT, ModelPartition
from fakes.model_vp import attached_vp
from fakes.one_region import GFN, PAGE, PAGES, PFN, with_region
from fakes.pauses import DrawnPauses
from intercept_protocol import rpc
from intercept_protocol.addresses import PAGE_SHIFT, UaddrRange
from intercept_protocol.errors import WireError
from intercept_protocol.hv_message import MessageType, build_memory_intercept
from intercept_protocol.messages import INTERCEPT_METHOD
from intercept_protocol.outcomes import Access, Answer
from interceptd.errors import PartitionLost

SHORTEST = rpc.encode_request(
    7, INTERCEPT_METHOD, [build_memory_intercept(gpa=GFN << PAGE_SHIFT, access=Access.READ)]
)
SPELLED_OUT = b"\x94\x00\xce\x00\x00\x00\x07" + SHORTEST.removeprefix(b"\x94\x00\x07").replace(
    b"\x91", b"\xdc\x00\x01", 1
)


@pytest.fixture
async def backed(model: ModelPartition) -> ModelPartition:
    """With one MMIO region that nothing is mapped of."""
    await with_region(model)
    return model


# ------------------------------------------------ one answer each


async def test_vp_answers_under_the_msgid_of_the_request(backed: ModelPartition) -> None:
    async with attached_vp(backed) as vp:
        msgid = await vp.peer.send_intercept(GFN)
        assert await vp.peer.response() == rpc.Response(msgid, None, ["resume", "mapped"])


async def test_vp_forwards_messages_other_than_memory_faults(backed: ModelPartition) -> None:
    message = build_memory_intercept(gpa=0, access=Access.READ, message_type=MessageType.X64_HALT)
    async with attached_vp(backed) as vp:
        await vp.peer.request(INTERCEPT_METHOD, message)
        assert await vp.peer.answer() is Answer.NOT_MEMORY


@pytest.mark.parametrize(
    ("method", "params", "number"),
    [
        ("statistics", [{}], errno.ENOSYS),
        (INTERCEPT_METHOD, [], errno.EINVAL),
        (INTERCEPT_METHOD, [bytes(255)], errno.EINVAL),
        (INTERCEPT_METHOD, [bytes(257)], errno.EINVAL),
        (INTERCEPT_METHOD, ["x" * 256], errno.EINVAL),
        (INTERCEPT_METHOD, [bytes(256), 0], errno.EINVAL),
    ],
)
async def test_vp_refuses_another_request_and_continues(
    backed: ModelPartition, method: str, params: list[object], number: int
) -> None:
    async with attached_vp(backed) as vp:
        await vp.peer.request(method, *params)
        assert WireError.from_wire((await vp.peer.response()).error).number == number
        assert await vp.peer.intercept(GFN) is Answer.MAPPED


async def test_vp_answers_an_intercept_in_another_encoding_too(backed: ModelPartition) -> None:
    """MessagePack has longer forms than a number needs, and some libraries write them."""
    async with attached_vp(backed) as vp:
        await vp.peer.send(SPELLED_OUT)
        assert await vp.peer.response() == rpc.Response(7, None, ["resume", "mapped"])


@pytest.mark.parametrize("request_", [SHORTEST, SPELLED_OUT], ids=["the shortest form", "a longer one"])
async def test_vp_that_sends_a_second_request_is_refused_under_msgid_0_and_closed(
    backed: ModelPartition, request_: bytes
) -> None:
    """T-7, in whatever encoding the intercept that waits came: the answer under its own msgid would say that
    the connection goes on."""
    await backed.begin(PAGE, PAGES)
    async with attached_vp(backed) as vp:
        await vp.peer.send(request_)
        await wait_all_tasks_blocked()
        await vp.peer.send(request_)
        assert (await vp.peer.last_words()).number == errno.EPROTO


async def test_vp_counts_what_it_answered(backed: ModelPartition) -> None:
    async with attached_vp(backed) as vp:
        for gfn in (GFN, GFN, 0):
            await vp.peer.intercept(gfn)
        assert vp.processor.intercepts == 3
    counted = backed.partition.statistics().intercepts
    assert (counted["resume"], counted["forward"]["no_region"]) == ({"mapped": 1, "already_mapped": 1}, 1)


@given(
    pauses(),
    st.lists(st.sampled_from([0, GFN, GFN + 8, GFN + 15, GFN + 16]), min_size=1, max_size=20),
    st.lists(st.integers(0, 12), max_size=6),
)
def test_i4_every_intercept_gets_exactly_one_answer_while_kicked_and_drained(
    checkpoints: list[int], gfns: list[int], kicks: list[int]
) -> None:
    async def main() -> list[object]:
        async with (
            ModelPartition(pauses=DrawnPauses(checkpoints)).running() as model,
            attached_vp(model) as vp,
        ):
            await model.map_vma(PAGE, PAGES, PFN)
            await model.add_region(GFN, PAGES, PAGE)

            async def kick() -> None:
                for wait in kicks:
                    for _ in range(wait):
                        await trio.lowlevel.checkpoint()
                    vp.processor.kick()
                vp.processor.drain()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(kick)
                return [(await vp.peer.send_intercept(gfn), (await vp.peer.response()).msgid) for gfn in gfns]

    assert trio.run(main, clock=MockClock(autojump_threshold=0)) == [
        (msgid, msgid) for msgid in range(1, len(gfns) + 1)
    ]


# ------------------------------------------------ kicks


async def test_kick_answers_the_intercept_that_waits(backed: ModelPartition) -> None:
    await backed.begin(PAGE, PAGES)
    async with attached_vp(backed) as vp:
        await vp.peer.send_intercept(GFN)
        await wait_all_tasks_blocked()
        started = trio.current_time()
        vp.processor.kick()
        assert await vp.peer.answer() is Answer.KICKED
        assert trio.current_time() == started


async def test_a_kick_while_idle_answers_only_the_next_wait(
    backed: ModelPartition,
) -> None:
    await backed.begin(PAGE, PAGES)
    async with attached_vp(backed) as vp:
        vp.processor.kick()
        started = trio.current_time()
        assert await vp.peer.intercept(GFN) is Answer.KICKED
        assert trio.current_time() == started
        assert await vp.peer.intercept(GFN) is Answer.INVALIDATING


async def test_kick_after_a_wait_that_is_over_is_kept_for_the_next(backed: ModelPartition) -> None:
    async with attached_vp(backed) as vp:
        assert await vp.peer.intercept(GFN) is Answer.MAPPED
        assert vp.processor.state == "running"
        vp.processor.kick()
        await backed.begin(PAGE, PAGES)
        assert await vp.peer.intercept(GFN) is Answer.KICKED


async def test_a_kept_kick_does_not_affect_intercepts_that_need_not_wait(backed: ModelPartition) -> None:
    async with attached_vp(backed) as vp:
        vp.processor.kick()
        assert await vp.peer.intercept(0) is Answer.NO_REGION
        assert await vp.peer.intercept(GFN) is Answer.MAPPED
        await backed.begin(PAGE, PAGES)
        assert await vp.peer.intercept(GFN) is Answer.KICKED


async def test_kick_while_it_resolves_gives_the_attempt_up(backed: ModelPartition) -> None:
    backed.address_space.may_block = True
    backed.gates.hold(Point.RESOLVE)
    async with attached_vp(backed) as vp:
        await vp.peer.send_intercept(GFN)
        await wait_all_tasks_blocked()
        vp.processor.kick()
        assert await vp.peer.answer() is Answer.KICKED
        assert await vp.peer.intercept(GFN) is Answer.MAPPED


async def test_kick_while_the_map_is_out_does_not_hide_that_it_was_made(backed: ModelPartition) -> None:
    gate = backed.gates.hold(Point.MAP)
    async with attached_vp(backed) as vp:
        await vp.peer.send_intercept(GFN)
        await gate.wait_reached()
        vp.processor.kick()
        gate.open()
        assert await vp.peer.answer() is Answer.MAPPED


async def test_state_tells_a_vp_that_waits_from_one_that_does_not(backed: ModelPartition) -> None:
    await backed.begin(PAGE, PAGES)
    async with attached_vp(backed) as vp:
        before = vp.processor.state
        await vp.peer.send_intercept(GFN)
        await wait_all_tasks_blocked()
        assert (before, vp.processor.state) == ("running", "waiting")


# ------------------------------------------------ draining


async def test_drain_answers_waiting_and_later_intercepts(backed: ModelPartition) -> None:
    await backed.begin(PAGE, PAGES)
    async with attached_vp(backed) as vp:
        await vp.peer.send_intercept(GFN)
        await wait_all_tasks_blocked()
        vp.processor.drain()
        answers = [await vp.peer.answer(), await vp.peer.intercept(GFN), await vp.peer.intercept(0)]
    assert answers == [Answer.DRAINING] * 3


async def test_drain_of_an_idle_vp_answers_its_next_request(backed: ModelPartition) -> None:
    async with attached_vp(backed) as vp:
        vp.processor.drain()
        await vp.processor.wait_quiet()
        assert await vp.peer.intercept(GFN) is Answer.DRAINING


async def test_wait_quiet_returns_after_the_answer_in_flight(backed: ModelPartition) -> None:
    gate = backed.gates.hold(Point.MAP)
    async with attached_vp(backed) as vp:
        await vp.peer.send_intercept(GFN)
        await gate.wait_reached()
        vp.processor.drain()
        with trio.move_on_after(1) as waited:
            await vp.processor.wait_quiet()
        assert waited.cancelled_caught
        gate.open()
        await vp.processor.wait_quiet()
        assert vp.peer.has_bytes


# ------------------------------------------------ bounds


async def test_an_intercept_in_an_open_invalidation_is_answered_within_the_timeout(
    backed: ModelPartition,
) -> None:
    await backed.begin(PAGE, PAGES)
    async with attached_vp(backed) as vp:
        started = trio.current_time()
        assert await vp.peer.intercept(GFN) is Answer.INVALIDATING
        assert trio.current_time() - started == pytest.approx(TIMEOUT)


async def test_i8_another_answer_in_between_starts_the_count_again(backed: ModelPartition) -> None:
    async with attached_vp(backed) as vp:
        await vp.peer.intercept(GFN)
        first = [await vp.peer.intercept(GFN) for _ in range(16)]
        await vp.peer.intercept(0)
        second = [await vp.peer.intercept(GFN) for _ in range(17)]
    assert first == [Answer.ALREADY_MAPPED] * 16
    assert second == [*[Answer.ALREADY_MAPPED] * 16, Answer.NO_PROGRESS]


async def test_i8_a_change_of_the_extent_in_between_starts_the_count_again(backed: ModelPartition) -> None:
    async with attached_vp(backed) as vp:
        await vp.peer.intercept(GFN)
        for _ in range(16):
            await vp.peer.intercept(GFN)
        await backed.invalidate(PAGE + 8, 1)
        assert await vp.peer.intercept(GFN) is Answer.ALREADY_MAPPED


async def test_a_mapping_that_went_is_not_answered_from_memory(backed: ModelPartition) -> None:
    """The VP remembers what served it last, and that is for its progress guard alone."""
    async with attached_vp(backed) as vp:
        assert await vp.peer.intercept(GFN) is Answer.MAPPED
        assert await vp.peer.intercept(GFN) is Answer.ALREADY_MAPPED
        await backed.unmap_vma(PAGE, PAGES)
        assert await vp.peer.intercept(GFN) is Answer.UNBACKED


# ------------------------------------------------ the end of the connection


async def test_closing_while_it_waits_ends_the_attempt(backed: ModelPartition) -> None:
    backed.gates.hold(Point.RESOLVE)
    async with attached_vp(backed) as vp:
        await vp.peer.send_intercept(GFN)
        await wait_all_tasks_blocked()
        vp.peer.close()
        await vp.ended.wait()
    assert len(backed.notifier._windows) == 0


async def test_a_second_request_before_the_answer_ends_the_connection_with_eproto(
    backed: ModelPartition,
) -> None:
    backed.address_space.may_block = True
    backed.gates.hold(Point.RESOLVE)
    async with attached_vp(backed) as vp:
        await vp.peer.send_intercept(GFN)
        await wait_all_tasks_blocked()
        await vp.peer.send_intercept(GFN)
        assert (await vp.peer.last_words()).number == errno.EPROTO
        await vp.ended.wait()
    assert len(backed.notifier._windows) == 0


async def test_garbage_ends_the_connection_with_an_error(backed: ModelPartition) -> None:
    async with attached_vp(backed) as vp:
        await vp.peer.send(b"\x00 not a request")
        assert (await vp.peer.last_words()).number == errno.EBADMSG


# ------------------------------------------------ losing the partition


async def test_a_waiting_vp_fails_when_the_partition_is_lost(backed: ModelPartition) -> None:
    await backed.begin(PAGE, PAGES)
    async with attached_vp(backed) as vp:
        await vp.peer.send_intercept(GFN)
        await wait_all_tasks_blocked()
        vp.processor.fail()
        assert await vp.peer.answer() is Answer.HYPERVISOR_ERROR


async def test_a_vp_whose_wait_ends_in_the_step_that_loses_the_partition_fails_too(
    backed: ModelPartition,
) -> None:
    await backed.begin(PAGE, PAGES)
    async with attached_vp(backed) as vp:
        await vp.peer.send_intercept(GFN)
        await wait_all_tasks_blocked()
        backed.notifier.end(UaddrRange(start=PAGE, end=PAGE + PAGES))
        vp.processor.fail()
        assert await vp.peer.answer() is Answer.HYPERVISOR_ERROR


async def test_vp_that_does_not_wait_when_the_partition_is_lost_continues(backed: ModelPartition) -> None:
    async with attached_vp(backed) as vp:
        vp.processor.fail()
        assert await vp.peer.intercept(GFN) is Answer.MAPPED


async def test_vp_whose_own_map_loses_the_partition_has_its_answer_first(
    backed: ModelPartition, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def break_down(_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(backed.hypervisor, "map_gpas", break_down)
    answers: list[Answer] = []
    with pytest.RaisesGroup(PartitionLost, flatten_subgroups=True):
        async with attached_vp(backed) as vp:
            with trio.CancelScope(shield=True):
                answers.append(await vp.peer.intercept(GFN))
                await vp.ended.wait()
    assert answers == [Answer.HYPERVISOR_ERROR]
