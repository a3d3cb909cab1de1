"""A vCPU's loop against scripted exits and answers: what is asked, what is completed, and why it stops."""

from __future__ import annotations

import threading

import pytest

from fakes.vcpu_rig import GFN, GPA, RW, SCRATCH, Rig
from intercept_client import ConnectionLost, libc
from intercept_client.kvm._copying import AnnouncedCopier, CheckedCopier, Copier, DirectCopier
from intercept_client.kvm._exits import (
    Broken,
    Exit,
    Interrupted,
    MmioRead,
    MmioWrite,
    PortRead,
    PortWrite,
    Shutdown,
)
from intercept_client.kvm._stop import Stop, StopReason
from intercept_client.libc import Sharing
from intercept_protocol.addresses import PAGE_SIZE, GfnRange, UaddrRange
from intercept_protocol.errors import ProtocolViolation, WireError
from intercept_protocol.hv_message import InterceptMessage, MessageType
from intercept_protocol.messages import Architecture
from intercept_protocol.outcomes import Access, Answer, AnyAnswer, LaterAnswer, Outcome


def test_a_read_is_one_well_formed_intercept_and_completed_after_resume(rig: Rig) -> None:
    rig.put(8, b"\x11\x22\x33\x44")
    loop = rig.script([MmioRead(GPA + 8, 4), Interrupted()], [rig.map, Answer.MAPPED])

    stop = loop.run()

    assert stop == Stop(StopReason.HALTED)
    assert rig.vcpu.found == [b"\x11\x22\x33\x44"]
    (message,) = (InterceptMessage.parse(asked) for asked in rig.decider.asked)
    assert message.message_type == MessageType.UNMAPPED_GPA
    intercept = message.memory(Architecture.X86_64)
    assert intercept is not None
    assert (intercept.gpa, intercept.vp_index, intercept.access_type) == (GPA + 8, 3, 0)


@pytest.mark.parametrize("size", range(1, 9))
@pytest.mark.parametrize("offset", [16, 17, PAGE_SIZE - 3], ids=["aligned", "unaligned", "straddling"])
@pytest.mark.parametrize(
    "copier",
    [DirectCopier(), CheckedCopier(), AnnouncedCopier()],
    ids=["direct", "checked", "announced"],
)
def test_accesses_of_every_size_are_completed(rig: Rig, size: int, offset: int, copier: Copier) -> None:
    data = bytes(range(1, size + 1))
    rig.copier = copier
    rig.map()
    loop = rig.script([MmioWrite(GPA + offset, data), MmioRead(GPA + offset, size), Interrupted()])

    loop.run()

    assert rig.get(offset, size) == data
    assert rig.vcpu.found == [data]
    assert rig.get(offset - 1, 1) == rig.get(offset + size, 1) == b"\0"


def test_a_straddling_write_intercepts_for_each_missing_page(rig: Rig) -> None:
    last = GfnRange(start=GFN + 1, end=GFN + 2)
    loop = rig.script([MmioWrite(GPA + PAGE_SIZE - 2, b"abcd")], [Answer.UNBACKED, rig.map, Answer.MAPPED])

    loop.run()

    assert rig.wanted() == [(GFN, Access.WRITE), (last.start, Access.WRITE)]
    assert rig.get(PAGE_SIZE - 2, 4) == b"\0\0cd"


def test_memory_that_goes_between_resume_and_completion_is_a_new_intercept(rig: Rig) -> None:
    """Unmapped and remapped meanwhile, it is never written through."""
    loop = rig.script([MmioWrite(GPA, b"\x11")], [rig.map, rig.unmap, Answer.MAPPED, Answer.UNBACKED])

    loop.run()

    assert rig.wanted() == [(GFN, Access.WRITE)] * 2
    assert rig.get(0, 1) == b"\0"
    assert loop.tally.forwarded == 1


def test_memory_that_is_gone_behind_its_slot_is_a_new_intercept(rig: Rig) -> None:
    """Under a userfaultfd alone the memslot may outlive the memory for a moment."""
    rig.copier = CheckedCopier()
    gone = libc.mmap(UaddrRange.of_pages(0, 2), Access.NONE, Sharing.PRIVATE)
    rig.memory.map(GfnRange(start=GFN, end=GFN + 2), gone, RW)
    loop = rig.script(
        [MmioRead(GPA, 2), MmioWrite(GPA, b"\x11")],
        [Answer.ALREADY_MAPPED, rig.unmap, Answer.UNBACKED, Answer.UNBACKED],
    )

    loop.run()

    assert rig.vcpu.found == [b"\xff\xff"]
    assert len(rig.decider.asked) == 3
    libc.munmap(gone)


def test_a_page_mapped_by_now_is_completed_without_an_intercept(rig: Rig) -> None:
    rig.map()
    loop = rig.script([MmioWrite(GPA, b"\x11")])

    loop.run()

    assert rig.get(0, 1) == b"\x11"
    assert rig.decider.asked == []


def test_a_read_only_slot_is_asked_about_writes_and_only_writes(rig: Rig) -> None:
    rig.map(Access.READ)
    loop = rig.script([MmioRead(GPA, 1), Interrupted(), MmioWrite(GPA, b"\x11")], [Answer.PERMISSION])

    loop.run()

    assert rig.wanted() == [(GFN, Access.WRITE)]
    assert rig.get(0, 1) == b"\0"


def test_retry_is_asked_again_until_it_is_decided(rig: Rig) -> None:
    answers: list[AnyAnswer] = [
        Answer.INVALIDATING,
        Answer.CONTENDED,
        Answer.KICKED,
        Answer.DRAINING,
        Answer.RESTARTED,
        LaterAnswer(Outcome.RETRY, "later"),
        Answer.NO_REGION,
    ]
    loop = rig.script([MmioRead(GPA, 4)], answers)

    stop = loop.run()

    assert stop.reason is StopReason.HALTED
    assert len(rig.decider.asked) == len(answers)
    assert rig.vcpu.found == [b"\xff" * 4]


class Pauses(threading.Event):
    """A stop flag that counts who waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def wait(self, timeout: float | None = None) -> bool:
        self.count += 1
        return super().wait(timeout)


@pytest.mark.parametrize(
    ("retry", "pauses"),
    [(LaterAnswer(Outcome.RETRY, "later"), 1), (Answer.DRAINING, 1), (Answer.CONTENDED, 0)],
)
def test_a_retry_that_may_come_at_once_is_asked_again_after_a_pause(
    rig: Rig, retry: AnyAnswer, pauses: int
) -> None:
    """Or the vCPU spins; for CONTENDED the daemon has waited already."""
    loop = rig.script([MmioRead(GPA, 4), Interrupted()], [retry, rig.map, Answer.MAPPED])
    rig.intercepts.stopping = stopping = Pauses()

    assert loop.run().reason is StopReason.HALTED
    assert stopping.count == pauses


@pytest.mark.parametrize(
    "answer", [Answer.NO_PROGRESS, Answer.HYPERVISOR_ERROR, LaterAnswer(Outcome.FAIL, "later")]
)
def test_fail_stops_with_the_reason(rig: Rig, answer: AnyAnswer) -> None:
    loop = rig.script([MmioRead(GPA, 4)], [answer])

    assert loop.run() == Stop(StopReason.FAILED, GPA, answer)
    assert rig.vcpu.found == []


@pytest.mark.parametrize(
    "loss",
    [
        ConnectionLost("the connection ended"),
        TimeoutError("the daemon did not answer"),
        WireError(71, "nonsense"),
        ProtocolViolation(71, "nonsense"),
    ],
)
def test_a_daemon_that_does_not_decide_stops_the_vcpu_and_is_reported(rig: Rig, loss: Exception) -> None:
    loop = rig.script([MmioRead(GPA, 4)], [loss])

    stop = loop.run()

    assert (stop.reason, stop.gpa) == (StopReason.DAEMON_LOST, GPA)
    assert rig.lost == [str(loss)]


def test_a_stop_while_retrying_leaves_the_exit_pending_for_the_next_run(rig: Rig) -> None:
    def stop() -> None:
        rig.loop.stop()

    loop = rig.script([MmioRead(GPA, 4), Interrupted()], [stop, Answer.KICKED, rig.map, Answer.MAPPED])

    assert loop.run().reason is StopReason.ASKED
    assert rig.vcpu.found == []
    assert loop.run().reason is StopReason.HALTED
    assert rig.vcpu.found == [bytes(4)]


def test_the_vmms_own_device_is_not_asked_about(rig: Rig) -> None:
    loop = rig.script([MmioWrite(SCRATCH + 4, b"ab"), MmioRead(SCRATCH + 4, 2)])

    loop.run()

    assert rig.vcpu.found == [b"ab"]
    assert rig.decider.asked == []


def test_ports_are_answered_by_their_devices_repetitions_included(rig: Rig) -> None:
    loop = rig.script([PortWrite(0x10, 2, b"\1\0\2\0"), PortRead(0x10, 1, 3, 0), PortRead(0x99, 2, 1, 0)])

    loop.run()

    assert rig.reports.kept == [1, 2]
    assert rig.vcpu.found == [bytes(3), b"\xff\xff"]


@pytest.mark.parametrize(
    ("exit_", "reason"),
    [(Shutdown(), StopReason.TRIPLE_FAULT), (Broken("entry failed: 0x21"), StopReason.BROKEN)],
)
def test_unrecoverable_exits_stop_the_vcpu(rig: Rig, exit_: Exit, reason: StopReason) -> None:
    assert rig.script([exit_]).run().reason is reason
