"""A daemon that breaks the protocol, in the middle of a request of a VMM whose guest runs here."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from fakes.eventually import PATIENCE
from fakes.scripted_daemon import (
    Answer,
    Await,
    HangUp,
    Hear,
    Refuse,
    Say,
    ScriptedDaemon,
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
from intercept_protocol.messages import RequestedKind

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
