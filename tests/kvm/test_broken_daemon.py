"""A daemon that breaks the protocol, in the middle of a request of a VMM whose guest runs here."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from fakes.eventually import PATIENCE
from fakes.lying_maps import LIES, MEMORY_PAGES, RAM, ROM, TRUTHS, at, uaddrs_of
from fakes.scripted_daemon import (
    Answer,
    Ask,
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
from fakes.vcpu_rig import RW
from intercept_client import libc
from intercept_client.kvm import GuestPartition, Machine, PartitionSetting, StartState, StopReason
from intercept_client.libc import Sharing
from intercept_protocol import messages, rpc
from intercept_protocol.addresses import GfnRange, UaddrRange
from intercept_protocol.errors import ProtocolViolation, WireError
from intercept_protocol.messages import RegionKind, RequestedKind

DEVICE: Final = GfnRange.of(0x100, 1)
PARTITION: Final = messages.PartitionCredentials(partition_id=1, token=bytes(16))
BEFORE: Final[list[Step]] = [*hello(), *replies(PARTITION, None), Hear()]
"""On the `vmm` connection, up to the request to add a region, whose msgid is 4."""
MALFORMED: Final[dict[str, Step]] = {
    "a reply of another form": Answer({"kind": 7}),
    "an error of another form": Say(rpc.encode_result(4, None).replace(b"\xc0", b"\xa2no", 1)),
}


@pytest.fixture
def uaddrs() -> Iterator[UaddrRange]:
    mapped = libc.mmap(UaddrRange.of_pages(0, 1), RW, Sharing.PRIVATE)
    yield mapped
    libc.munmap(mapped)


def open_with_device(
    path: Path, machine: Machine, uaddrs: UaddrRange, lost: threading.Event
) -> GuestPartition:
    """A partition whose guest reaches `uaddrs` already: the daemon maps before it answers."""
    partition = GuestPartition.open(path, machine, PartitionSetting(), lambda _: lost.set())
    partition.memory.map(DEVICE, uaddrs, RW)
    return partition


@pytest.mark.parametrize("answer", MALFORMED.values(), ids=MALFORMED.keys())
def test_mmio_whose_add_got_a_malformed_answer_is_unmapped_when_the_daemon_is_lost(
    machine: Machine, tmp_path: Path, uaddrs: UaddrRange, answer: Step
) -> None:
    """Nobody knows whether it was added, so it counts as added."""
    end, lost = threading.Event(), threading.Event()
    scripts = [*BEFORE, answer], [*hello(), Await(end), HangUp()], hello()
    path = tmp_path / "d.sock"
    with ScriptedDaemon(path, scripts), open_with_device(path, machine, uaddrs, lost) as partition:
        with pytest.raises(ProtocolViolation):
            partition.add_region(DEVICE, uaddrs, RequestedKind.MMIO, writable=True, executable=False)
        end.set()
        assert lost.wait(PATIENCE)
        assert not partition.memory.reaches(DEVICE.start, RW)


def test_mmio_whose_adding_was_refused_is_not_counted_as_added(
    machine: Machine, tmp_path: Path, uaddrs: UaddrRange
) -> None:
    """What the guest reaches there is something else's, which a refusal does not touch."""
    end, lost = threading.Event(), threading.Event()
    refusal = Refuse(WireError(17, "overlaps"))
    scripts = [*BEFORE, refusal], [*hello(), Await(end), HangUp()], hello()
    path = tmp_path / "d.sock"
    with ScriptedDaemon(path, scripts), open_with_device(path, machine, uaddrs, lost) as partition:
        with pytest.raises(WireError, match="EEXIST"):
            partition.add_region(DEVICE, uaddrs, RequestedKind.MMIO, writable=True, executable=False)
        end.set()
        assert lost.wait(PATIENCE)
        assert partition.memory.reaches(DEVICE.start, RW)


def test_mmio_that_was_asked_for_twice_is_unmapped_though_the_second_was_refused(
    machine: Machine, tmp_path: Path, uaddrs: UaddrRange
) -> None:
    """The refusal is of the second request. The first one's region is there."""
    end, lost = threading.Event(), threading.Event()
    added = Answer(messages.AddRegionReply(kind=messages.RegionKind.MMIO))
    refusal = Refuse(WireError(17, "overlaps"))
    scripts = [*BEFORE, added, Hear(), refusal], [*hello(), Await(end), HangUp()], hello()
    path = tmp_path / "d.sock"
    with ScriptedDaemon(path, scripts), open_with_device(path, machine, uaddrs, lost) as partition:
        partition.add_region(DEVICE, uaddrs, RequestedKind.MMIO, writable=True, executable=False)
        with pytest.raises(WireError, match="EEXIST"):
            partition.add_region(DEVICE, uaddrs, RequestedKind.MMIO, writable=True, executable=False)
        end.set()
        assert lost.wait(PATIENCE)
        assert not partition.memory.reaches(DEVICE.start, RW)


@pytest.mark.parametrize("answer", MALFORMED.values(), ids=MALFORMED.keys())
def test_a_vcpu_can_be_stopped_though_its_kick_had_a_malformed_answer(
    machine: Machine, tmp_path: Path, answer: Step
) -> None:
    end = threading.Event()
    scripts = [*BEFORE, answer], [*hello(), Await(end), HangUp()], hello(), hello()
    path = tmp_path / "d.sock"
    with (
        ScriptedDaemon(path, scripts) as daemon,
        GuestPartition.open(path, machine, PartitionSetting()) as partition,
    ):
        vcpu = partition.add_vcpu(0, StartState(entry=0))

        vcpu.stop()

        assert vcpu.run().reason is StopReason.ASKED
        assert daemon.methods.count("kick") == 1
        end.set()


@pytest.fixture
def memory() -> Iterator[UaddrRange]:
    mapped = libc.mmap(UaddrRange.of_pages(0, MEMORY_PAGES), RW, Sharing.PRIVATE)
    yield mapped
    libc.munmap(mapped)


@pytest.mark.parametrize(("fields", "says"), LIES.values(), ids=LIES.keys())
def test_a_guest_gets_no_memory_of_its_vmm_that_is_in_no_region_whatever_the_daemon_asks(
    machine: Machine, tmp_path: Path, memory: UaddrRange, fields: dict[str, int], says: str
) -> None:
    added, asked, lied, end = (threading.Event() for _ in range(4))
    movable = messages.AddRegionReply(kind=RegionKind.MOVABLE)
    vmm: list[Step] = [*hello(), *replies(PARTITION, None, movable, movable)]
    hypervisor: list[Step] = [
        *hello(),
        Await(added), Ask("map_gpa", at(memory, fields)), Signal(lied),
        Await(asked), Ask("map_gpa", at(memory, TRUTHS["a whole region"])), Signal(end),
    ]  # fmt: skip
    path = tmp_path / "d.sock"
    with (
        ScriptedDaemon(path, (vmm, hypervisor, hello())) as daemon,
        GuestPartition.open(path, machine, PartitionSetting()) as partition,
    ):
        partition.add_region(RAM, uaddrs_of(RAM, memory), writable=True, executable=False)
        partition.add_region(ROM, uaddrs_of(ROM, memory), writable=False, executable=True)
        added.set()
        assert lied.wait(PATIENCE)
        after_the_lie = partition.memory.slots
        asked.set()
        assert end.wait(PATIENCE)
        after_the_truth = partition.memory.slots
        partition.hang_up()
    assert after_the_lie == []
    assert [(slot.gfns, slot.uaddrs) for slot in after_the_truth] == [(RAM, uaddrs_of(RAM, memory))]
    refused, carried_out = daemon.answered
    assert says in str(refused)
    assert carried_out is None
