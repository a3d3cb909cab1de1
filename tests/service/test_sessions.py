"""The methods of VMMs, notifiers and operators, over the wire of an in-process daemon."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from functools import partial

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from fakes.model_partition import ModelPartition
from fakes.served import Guest, Served, serving
from intercept_protocol import codec, messages, rpc
from intercept_protocol.addresses import UaddrRange
from intercept_protocol.errors import WireError
from intercept_protocol.outcomes import Answer
from interceptd.address_space import Caller, KindUnknown, Undecided
from interceptd.address_space.attachment import Attachment
from interceptd.address_space.declared import DeclaredAddressSpace
from interceptd.address_space.handover import Handover
from interceptd.address_space.refusals import Cause
from interceptd.config.schema import Limits
from interceptd.connections import received_fds
from interceptd.quota import Quota
from interceptd.sessions.notifier import NotifierSession
from interceptd.sessions.vmm import kick

RANGE = {"start_uaddr": 0x9000000, "length": 0x4000}


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async with serving() as running:
        yield running


@pytest.fixture
async def guest(served: Served) -> Guest:
    guest = await served.guest()
    await served.mmio(guest)
    return guest


# ------------------------------------------------ notifiers


async def test_faults_in_a_begun_range_wait_for_its_end(served: Served, guest: Guest) -> None:
    vp, notifier = await served.vp(guest), await served.notifier(guest)
    await notifier.ask("invalidate_begin", **RANGE)
    await vp.send_intercept(0x101)
    await wait_all_tasks_blocked()
    await notifier.ask("invalidate_end", **RANGE)
    assert await vp.answer() is Answer.MAPPED


async def test_an_end_without_a_begin_of_just_this_range_is_enoent(served: Served, guest: Guest) -> None:
    notifier = await served.notifier(guest)
    await notifier.ask("invalidate_begin", **RANGE)
    with pytest.raises(WireError, match="ENOENT"):
        await notifier.ask("invalidate_end", start_uaddr=0x9000000, length=0x3000)


async def test_the_end_of_another_connections_begin_is_enoent(served: Served, guest: Guest) -> None:
    ours, theirs = await served.notifier(guest), await served.notifier(guest)
    await ours.ask("invalidate_begin", **RANGE)
    with pytest.raises(WireError, match="ENOENT"):
        await theirs.ask("invalidate_end", **RANGE)


async def test_a_notifier_that_closes_ends_its_own_begins_and_no_others(served: Served, guest: Guest) -> None:
    vp = await served.vp(guest)
    leaving, staying = await served.notifier(guest), await served.notifier(guest)
    for notifier in (leaving, leaving, staying):
        await notifier.ask("invalidate_begin", **RANGE)
    leaving.close()
    await vp.send_intercept(0x101)
    await wait_all_tasks_blocked()
    await staying.ask("invalidate_end", **RANGE)
    assert await vp.answer() is Answer.MAPPED


async def test_invalidate_is_both_at_once(served: Served, guest: Guest) -> None:
    vp, notifier = await served.vp(guest), await served.notifier(guest)
    await vp.intercept(0x100)
    await notifier.ask("invalidate", **RANGE)
    assert await guest.vmm.ask("translate", gfn=0x100) is None
    assert await vp.intercept(0x100) is Answer.MAPPED


@pytest.mark.parametrize(
    ("start_uaddr", "length", "field"),
    [
        (0x1001, 0x1000, "start_uaddr"),
        (0x1000, 0, "length"),
        (0x1000, 0x1001, "length"),
        ((1 << 64) - 0x1000, 0x2000, "length"),
    ],
)
async def test_a_range_that_is_not_whole_pages_or_wraps_is_einval_by_its_field(
    served: Served, guest: Guest, start_uaddr: int, length: int, field: str
) -> None:
    notifier = await served.notifier(guest)
    with pytest.raises(WireError) as refused:
        await notifier.ask("invalidate", start_uaddr=start_uaddr, length=length)
    assert (refused.value.number, refused.value.details["field"]) == (errno.EINVAL, field)


async def test_i7_endless_begins_and_ends_accumulate_nothing() -> None:
    async with ModelPartition().running() as model:
        session = NotifierSession(model.notifier, model.regions, partial(kick, model.partition))
        for page in range(200):
            where = {"start_uaddr": page << 12, "length": 0x1000}
            begun = session.answer(messages.InvalidateBegin(**where))
            assert begun is not None
            await begun
            assert session.answer(messages.InvalidateEnd(**where)) is None
        assert len(session._begun) == 0
        assert model.notifier.open_at(UaddrRange(start=0, end=1 << 40)) is None


async def test_invalidate_is_answered_after_catching_up_with_unannounced_changes() -> None:
    async with ModelPartition().running() as model:
        caught_up = trio.Event()
        session = NotifierSession(
            model.notifier, model.regions, partial(kick, model.partition), caught_up.wait
        )
        answering = session.answer(messages.Invalidate(**RANGE))
        assert answering is not None
        answered: list[str] = []

        async def ask() -> None:
            await answering
            answered.append("answered")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await wait_all_tasks_blocked()
            assert (answered, model.notifier.invalidation_of(RANGE["start_uaddr"] >> 12)) == ([], None)
            caught_up.set()
        assert answered == ["answered"]


async def test_an_invalidate_that_cannot_catch_up_is_etimedout_but_its_range_is_revoked() -> None:
    async def catch_up() -> None:
        raise Undecided("the process does not answer")

    async with ModelPartition().running() as model:
        session = NotifierSession(model.notifier, model.regions, partial(kick, model.partition), catch_up)
        answering = session.answer(messages.Invalidate(**RANGE))
        assert answering is not None
        with pytest.raises(WireError, match="the process does not answer") as refused:
            await answering
        assert refused.value.number == errno.ETIMEDOUT
        assert model.notifier.invalidation_of(RANGE["start_uaddr"] >> 12) is None


# ------------------------------------------------ VMMs


async def test_kick_of_a_vp_that_is_not_attached_is_enoent(guest: Guest) -> None:
    await guest.vmm.ask("kick", vp_index="all")
    with pytest.raises(WireError, match="ENOENT"):
        await guest.vmm.ask("kick", vp_index=3)


@pytest.mark.parametrize("whom", [0, "all"])
async def test_kick_answers_a_vp_that_waits(served: Served, guest: Guest, whom: int | str) -> None:
    vp, notifier = await served.vp(guest), await served.notifier(guest)
    await notifier.ask("invalidate_begin", **RANGE)
    await vp.send_intercept(0x100)
    await wait_all_tasks_blocked()
    await guest.vmm.ask("kick", vp_index=whom)
    assert await vp.answer() is Answer.KICKED


async def test_policy_is_changed_for_faults_from_now_on(served: Served, guest: Guest) -> None:
    vp = await served.vp(guest)
    await guest.vmm.ask("set_policy", mmio_granularity="page")
    await vp.intercept(0x104)
    translated = [await guest.vmm.ask("translate", gfn=gfn) for gfn in (0x103, 0x104, 0x105)]
    assert [each is None for each in translated] == [True, False, True]


async def test_statistics_count_what_happened(served: Served, guest: Guest) -> None:
    vp = await served.vp(guest)
    await vp.intercept(0x100)
    await vp.intercept(0)
    statistics = await guest.vmm.ask("statistics")
    assert isinstance(statistics, dict)
    told = {name: statistics[name] for name in ("regions", "vmas", "vps", "mapped_gfns", "map_calls")}
    assert told == {"regions": 1, "vmas": 1, "vps": 1, "mapped_gfns": 16, "map_calls": 1}


async def test_remove_region_of_no_region_is_enoent(guest: Guest) -> None:
    with pytest.raises(WireError, match="ENOENT"):
        await guest.vmm.ask("remove_region", start_gfn=0x101, page_count=1, start_uaddr=0)


@pytest.mark.parametrize("brings_them", ["hello", "statistics"])
async def test_descriptors_that_come_before_there_is_a_partition_are_charged_once(
    monkeypatch: pytest.MonkeyPatch, brings_them: str
) -> None:
    """On a clock of the test's, and as before Linux 6.16, which refuses those of a hello."""
    monkeypatch.setattr(received_fds, "SO_PASSRIGHTS", 9999)
    pace = 10
    calls = {"hello": {"protocol": 1, "role": "vmm"}, "statistics": {}, "kick": {"vp_index": 0}}
    async with serving(Limits(control_requests_per_second=pace)) as served:
        vmm = await served.connect()
        took = {}
        for method, fields in calls.items():
            began = trio.current_time()
            stderrs = [2] * 30 if method == brings_them else []
            vmm.send_now(rpc.encode_request(1, method, [fields]), stderrs)
            await vmm.response()
            took[method] = trio.current_time() - began
    assert [method for method in calls if took[method] > 2] == [brings_them]


@pytest.mark.parametrize(
    ("element", "why"),
    [
        ({"start_gfn": 1, "page_count": 1, "start_uaddr": 0}, "no region starts at gfn 0x1"),
        ({"start_gfn": 1, "page_count": 0, "start_uaddr": 0}, "page_count: must be at least 1 page, got 0"),
        ({"start_gfn": 1, "page_count": 1}, "start_uaddr: is missing"),
        (7, "must be a map of fields"),
        ([], "must be a map of fields"),
    ],
    ids=["refused", "no range", "incomplete", "a number", "an array"],
)
async def test_an_error_about_an_element_names_the_method_the_element_and_what_is_wrong(
    guest: Guest, element: object, why: str
) -> None:
    with pytest.raises(WireError) as refusal:
        await guest.vmm.ask("change_regions", remove=[element])
    assert refusal.value.message == f"change_regions: remove[0]: {why}"


async def test_a_vmm_that_leaves_during_a_pinned_add_leaves_nothing_behind() -> None:
    async with serving(chaos=20) as served:
        guest = await served.guest()
        await served.mmio(guest)
        await guest.vmm.request(
            "add_region",
            {"start_gfn": 0x200, "page_count": 16, "start_uaddr": 0x9000000}
            | {"kind": "pinned", "writable": True, "executable": False},
        )
        guest.vmm.close()
        await wait_all_tasks_blocked()
        assert len(served.daemon.partitions) == 0


# ------------------------------------------------ operators


async def test_an_operator_sees_partitions_and_steers_their_policy(served: Served, guest: Guest) -> None:
    operator = await served.operator()
    listed = await operator.ask("list_partitions")
    assert isinstance(listed, dict)
    assert [each["partition_id"] for each in listed["partitions"]] == [guest.partition_id]
    await operator.ask("set_policy", partition_id=guest.partition_id, mmio_granularity="page")
    inspected = await operator.ask("inspect_partition", partition_id=guest.partition_id)
    assert isinstance(inspected, dict)
    assert inspected["mmio_granularity"] == "page"
    assert [region["start_gfn"] for region in inspected["regions"]] == [0x100]


@pytest.mark.parametrize("method", ["inspect_partition", "histograms"])
async def test_an_operator_request_about_an_unknown_partition_is_enoent(served: Served, method: str) -> None:
    operator = await served.operator()
    with pytest.raises(WireError, match="ENOENT"):
        await operator.ask(method, partition_id=99)


async def test_histograms_tell_each_vp_apart(served: Served, guest: Guest) -> None:
    often, once = await served.vp(guest, 3), await served.vp(guest, 1)
    for gfn in (0x100, 0x101, 0):
        await often.intercept(gfn)
    await once.intercept(0x100)

    page = await histograms(served, guest)

    counted = [(vp.vp_index, vp.intercepts, sum(vp.buckets)) for vp in page.virtual_processors]
    assert counted == [(1, 1, 1), (3, 3, 3)]
    assert all(vp.total_ns > 0 for vp in page.virtual_processors)


async def test_a_page_of_histograms_ends_where_the_next_one_starts(served: Served, guest: Guest) -> None:
    for vp_index in range(messages.HistogramPage.PAGE + 1):
        await served.vp(guest, vp_index)

    first = await histograms(served, guest)
    last_index = first.virtual_processors[-1].vp_index
    second = await histograms(served, guest, after=last_index)

    assert (len(first.virtual_processors), first.more) == (messages.HistogramPage.PAGE, True)
    assert ([vp.vp_index for vp in second.virtual_processors], second.more) == ([last_index + 1], False)


async def test_latency_of_a_partition_and_of_the_daemon_outlives_their_vps(
    served: Served, guest: Guest
) -> None:
    vp, operator = await served.vp(guest), await served.operator()
    await vp.intercept(0x100)
    vp.close()
    await wait_all_tasks_blocked()
    [summary] = codec.decode_reply(
        messages.ListPartitions(), await operator.ask("list_partitions")
    ).partitions
    guest.vmm.close()
    await wait_all_tasks_blocked()
    daemon = codec.decode_reply(messages.OperatorStatistics(), await operator.ask("statistics"))
    assert (sum(summary.latency), sum(daemon.latency)) == (1, 1)


async def histograms(served: Served, guest: Guest, after: int | None = None) -> messages.HistogramPage:
    call = messages.Histograms(partition_id=guest.partition_id, after=after)
    operator = await served.operator()
    return codec.decode_reply(call, await operator.ask(call.METHOD, **codec.to_fields(call)))


# ------------------------------------------------ what cannot be found out about live memory


class Silent(DeclaredAddressSpace):
    """Cannot tell what a VMA is, for the reason given."""

    def __init__(self, why: Exception) -> None:
        super().__init__(lambda: 1, Quota(7, "VMAs", "vmas_per_uid", lambda: 1))
        self._why = why

    async def is_io(self, page: int, caller: Caller = Caller.GUEST) -> bool | None:  # noqa: ARG002 - of whatever
        raise self._why


@pytest.mark.parametrize(
    ("why", "number", "details"),
    [
        (Undecided.because(Cause.NO_RECORD), errno.EAGAIN, {}),
        (Undecided.because(Cause.NO_ANSWER), errno.ETIMEDOUT, {}),
        (Undecided.because(Cause.MM_GONE), errno.EINVAL, {}),
        (KindUnknown("smaps was not handed over"), errno.EINVAL, {"field": "kind"}),
    ],
)
async def test_an_unknown_kind_is_a_field_error_only_if_it_is_permanent(
    served: Served, guest: Guest, why: Exception, number: int, details: dict[str, str]
) -> None:
    (partition,) = served.daemon.partitions
    partition.address_space = Silent(why)
    with pytest.raises(WireError, match="kind auto: ") as refused:
        await guest.vmm.ask(
            "add_region", start_gfn=0x200, page_count=1, start_uaddr=0x9000000,
            kind="auto", writable=True, executable=False,
        )  # fmt: skip
    assert (refused.value.number, refused.value.details) == (number, details)


async def test_memory_that_cannot_be_attached_now_may_be_attached_later(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def slow(*_: object) -> Attachment:
        raise Undecided("a descriptor does not answer", errno.ETIMEDOUT)

    vmm = await served.hello("vmm")
    await vmm.ask("create_partition", address_space="process", hypervisor="software")
    monkeypatch.setattr(Handover, "made", slow)
    for _ in range(2):
        with pytest.raises(WireError, match="attach_memory: a descriptor does not answer") as refused:
            await vmm.ask("attach_memory")
        assert (refused.value.number, refused.value.details) == (errno.ETIMEDOUT, {})
