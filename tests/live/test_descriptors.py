"""What a VMM may hand over; anything else is refused with its reason, and nothing leaks."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from fakes import live_handovers as handovers
from fakes import private_mounts
from fakes.daemon_process import DaemonProcess
from fakes.eventually import eventually
from fakes.live_vmm import GFN, LiveVmm
from fakes.outside import descriptor_count
from fakes.puppet import Puppet, StartVmm, VmmFailed
from intercept_client.memory import Watch
from intercept_protocol.outcomes import Answer

WrongHandover = Callable[[LiveVmm], None]
needs_root = pytest.mark.skipif(
    os.geteuid() != 0, reason="only root may mount a procfs or open maps to write"
)


@pytest.fixture
def daemon(older_daemon: DaemonProcess) -> DaemonProcess:
    """One whose kernel does not refuse the descriptors that these tests send."""
    return older_daemon


def settled_count(daemon: DaemonProcess, connections: int) -> int:
    """The daemon's descriptors, once only this test's connections are left, and its operator's."""
    eventually(lambda: daemon.statistics()["connections"], connections + 1)
    return descriptor_count(daemon.pid)


def handed_over(pid: int) -> list[str]:
    """Which descriptors a process has of maps files and userfaultfds."""
    found = []
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            found.append(str(descriptor.readlink()))
    return [link for link in found if link.endswith(("maps", "[userfaultfd]"))]


def refusal(vmm: Puppet, hand_over: WrongHandover) -> VmmFailed:
    with pytest.raises(VmmFailed) as refused:
        vmm.do(hand_over)
    return refused.value


@pytest.mark.parametrize(
    ("hand_over", "said"),
    [
        (handovers.nothing, "the first is missing"),
        (handovers.smaps_alone, "the first is missing"),
        (handovers.a_file, "not the file /"),
        (handovers.a_directory, "not the directory /"),
        (handovers.a_socket, "not the socket socket:"),
        (handovers.a_pipe, "not the pipe pipe:"),
        (handovers.a_device, "not the device /dev/null"),
        (handovers.an_epoll, "not anon_inode:[eventpoll]"),
        (handovers.another_proc_file, "status"),
        (handovers.a_file_with_a_maps_files_name, "not the file /"),
        (handovers.maps_twice, "one /proc/self/maps, not two"),
        (handovers.four_descriptors, "not 4 descriptors"),
        (handovers.as_many_as_a_message_brings, "not 253 descriptors"),
        (handovers.maps_of_another_process, "belongs to another process"),
        (handovers.an_initialised_userfaultfd, "is already initialised"),
        (handovers.a_userfaultfd_of_a_child, "belongs to the process that created it"),
        (handovers.a_userfaultfd_of_a_child_that_is_dead, "belongs to the process that created it"),
        (handovers.maps_by_path_alone, "/maps opened with O_PATH"),
        (handovers.smaps_by_path_alone, "/smaps opened with O_PATH"),
        (handovers.a_userfaultfd_by_path_alone, "not anon_inode:[userfaultfd] opened with O_PATH"),
    ],
)
def test_a_wrong_handover_is_einval_that_says_what_was_received_and_leaks_nothing(
    daemon: DaemonProcess, unattached: Puppet, hand_over: WrongHandover, said: str
) -> None:
    before = settled_count(daemon, connections=2)
    refused = refusal(unattached, hand_over)
    assert (refused.kind, refused.number, said in refused.text) == ("WireError", 22, True), refused.text
    eventually(lambda: descriptor_count(daemon.pid), before)
    unattached.do(LiveVmm.attach, Watch.REQUIRED, promise=False)


@needs_root
def test_maps_that_were_opened_for_writing_alone_are_einval(unattached: Puppet) -> None:
    refused = refusal(unattached, handovers.maps_for_writing_alone)
    assert (refused.number, "opened write-only" in refused.text) == (22, True)


@pytest.mark.parametrize("hand_over", [handovers.maps_of_this_thread, handovers.maps_by_a_threads_id])
def test_a_processs_own_maps_by_any_of_its_threads_are_taken(
    unattached: Puppet, hand_over: Callable[[LiveVmm], None]
) -> None:
    unattached.do(hand_over)
    assert serves(unattached)


def test_after_the_thread_that_opened_smaps_ends_kind_auto_is_einval_and_the_rest_works(
    unattached: Puppet,
) -> None:
    """The kernel reads nothing more from its file, though the process lives."""
    unattached.do(handovers.maps_by_a_threads_id)
    memory = unattached.do(LiveVmm.map_memfd, 4)
    with pytest.raises(VmmFailed, match=r"EINVAL: kind auto: .* the thread that opened it has ended"):
        unattached.do(LiveVmm.add_region, GFN, memory.uaddrs, "auto")
    assert serves(unattached)


def test_a_fault_after_the_thread_that_opened_smaps_has_ended_is_retry_and_the_vp_goes_on(
    unattached: Puppet,
) -> None:
    memory = unattached.do(LiveVmm.map_memfd, 4)
    assert unattached.do(handovers.lose_the_thread_of_smaps, memory.uaddrs) is Answer.CONTENDED
    assert serves(unattached, GFN + 16)


@needs_root
@pytest.mark.parametrize("mount", [private_mounts.nowhere, private_mounts.at, private_mounts.unmounted_from])
def test_a_processs_own_maps_are_taken_wherever_their_procfs_is_mounted(
    unattached: Puppet, tmp_path: Path, mount: private_mounts.Mount
) -> None:
    unattached.do(handovers.maps_of_a_procfs, mount, tmp_path)
    assert serves(unattached)


@needs_root
def test_maps_whose_link_names_no_process_are_accepted_if_they_are_the_vmms(
    unattached: Puppet, tmp_path: Path
) -> None:
    others, own = tmp_path / "others", tmp_path / "own"
    others.mkdir()
    own.mkdir()
    refused = refusal(unattached, partial(handovers.anothers_maps_bound_to, place=others))
    assert (refused.number, "belongs to another process" in refused.text) == (22, True)
    unattached.do(handovers.own_maps_bound_to, own)
    assert serves(unattached)


def serves(vmm: Puppet, gfn: int = GFN) -> bool:
    """Whether a fault is answered from the VMM's memory, which was promised."""
    memory = vmm.do(LiveVmm.map_memfd, 4)
    vmm.do(LiveVmm.add_region, gfn, memory.uaddrs)
    return vmm.do(LiveVmm.fault, gfn) is Answer.MAPPED


def test_the_maps_of_another_process_that_is_dead_are_einval(
    daemon: DaemonProcess, unattached: Puppet
) -> None:
    before = settled_count(daemon, connections=2)
    assert refusal(unattached, handovers.maps_of_a_dead_process).number == 22
    eventually(lambda: descriptor_count(daemon.pid), before)


def test_own_maps_from_before_an_exec_are_einval_and_end_nothing(
    daemon: DaemonProcess, start_vmm: StartVmm
) -> None:
    vmm = start_vmm(launch=(sys.executable, "-m", "fakes.stale_maps"))
    partition_id = vmm.do(LiveVmm.connect, daemon.socket)
    refused = refusal(vmm, handovers.maps_from_before_the_exec)
    assert (refused.number, "exited or called exec" in refused.text) == (22, True)
    vmm.do(LiveVmm.attach, Watch.REQUIRED, promise=False)
    assert partition_id in daemon.partition_ids()
    memory = vmm.do(LiveVmm.map_memfd, 4)
    vmm.do(LiveVmm.add_region, GFN, memory.uaddrs)
    assert vmm.do(LiveVmm.fault, GFN) is Answer.MAPPED


def test_a_second_handover_is_eexist_and_leaks_nothing(daemon: DaemonProcess, watched: Puppet) -> None:
    before = settled_count(daemon, connections=2)
    with pytest.raises(VmmFailed) as refused:
        watched.do(LiveVmm.attach, Watch.REQUIRED, promise=False)
    assert refused.value.number == 17
    eventually(lambda: descriptor_count(daemon.pid), before)


@pytest.mark.parametrize("count", [1, 253])
@pytest.mark.parametrize("send", [handovers.to_statistics, handovers.to_intercept, handovers.to_invalidate])
def test_descriptors_on_a_method_that_takes_none_are_closed_and_it_is_answered(
    daemon: DaemonProcess, watched: Puppet, send: Callable[[LiveVmm, int], object], count: int
) -> None:
    watched.do(LiveVmm.fault, GFN)
    before = settled_count(daemon, connections=3)
    watched.do(send, count)
    eventually(lambda: descriptor_count(daemon.pid), before)


def test_descriptors_before_the_hello_are_closed(daemon: DaemonProcess, watched: Puppet) -> None:
    before = settled_count(daemon, connections=2)
    watched.do(handovers.to_hello, 253)
    eventually(lambda: descriptor_count(daemon.pid), before)


def test_descriptors_that_were_handed_over_are_closed_when_the_partition_ends(
    daemon: DaemonProcess, start_vmm: StartVmm
) -> None:
    eventually(lambda: handed_over(daemon.pid), [])  # those of earlier tests' partitions
    vmm = start_vmm()
    vmm.do(LiveVmm.connect, daemon.socket)
    vmm.do(LiveVmm.attach, Watch.REQUIRED, promise=False)
    assert len(handed_over(daemon.pid)) == 3
    vmm.leave()
    eventually(lambda: handed_over(daemon.pid), [])


def test_faults_before_the_handover_are_unbacked(unattached: Puppet) -> None:
    memory = unattached.do(LiveVmm.map_memfd, 4)
    unattached.do(LiveVmm.add_region, GFN, memory.uaddrs)
    assert unattached.do(LiveVmm.fault, GFN) is Answer.UNBACKED
    unattached.do(LiveVmm.attach, Watch.REQUIRED, promise=False)
    assert unattached.do(LiveVmm.fault, GFN) is Answer.MAPPED
