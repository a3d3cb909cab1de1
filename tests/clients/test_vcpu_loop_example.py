"""The example of a vCPU loop does what its guide says, against a daemon."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import pytest

from examples import vcpu_loop
from examples.vcpu_loop import RAM, FakeVcpu, Uart, read, run_vcpu, stop
from fakes.daemon_process import DaemonProcess
from fakes.documents import ROOT
from fakes.eventually import PATIENCE
from intercept_client import (
    Access,
    AddressSpaceKind,
    Answer,
    AnyAnswer,
    BlockingHypervisor,
    BlockingNotifier,
    BlockingOperator,
    BlockingVmm,
    BlockingVp,
    ConnectionEnded,
    EventName,
    HypervisorKind,
    LaterAnswer,
    Outcome,
    PartitionCredentials,
)

GUIDE: Final = (ROOT / "clients" / "VCPU_LOOP.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    with DaemonProcess(tmp_path_factory.mktemp("daemon")) as process:
        yield process.wait_serving()


@pytest.fixture
def vmm(daemon: DaemonProcess) -> Iterator[BlockingVmm]:
    with BlockingVmm.open(daemon.socket) as vmm:
        yield vmm


@pytest.fixture
def partition(vmm: BlockingVmm) -> PartitionCredentials:
    partition = vmm.create_partition(AddressSpaceKind.DECLARED, HypervisorKind.SOFTWARE)
    vmm.map_vma(vcpu_loop.BEHIND_RAM, 0xE0000, Access.READ)
    vmm.add_region(RAM, vcpu_loop.BEHIND_RAM, writable=False, executable=False)
    return partition


def test_the_example_prints_what_the_guide_shows(daemon: DaemonProcess) -> None:
    done = subprocess.run(
        [sys.executable, vcpu_loop.__file__, daemon.socket],
        capture_output=True, text=True, timeout=PATIENCE, check=True,
    )  # fmt: skip
    assert (
        f"```console\n$ python clients/examples/vcpu_loop.py /tmp/interceptd/vmm.sock\n{done.stdout}```"
        in GUIDE
    )


def test_a_vcpu_that_waits_at_the_daemon_stops_when_it_is_kicked(
    daemon: DaemonProcess, vmm: BlockingVmm, partition: PartitionCredentials
) -> None:
    vcpu = FakeVcpu(0, [read(RAM.start)])
    with (
        ThreadPoolExecutor(1) as thread,
        BlockingNotifier.open(daemon.socket, partition) as notifier,
        BlockingVp.open(daemon.socket, partition, vp_index=0) as vp,
        notifier.invalidation(vcpu_loop.BEHIND_RAM),
    ):
        ended = thread.submit(run_vcpu, vcpu, vp, Uart())
        stop(vmm, vcpu)
        assert ended.result(PATIENCE) == "asked to stop"
    assert vcpu.script == [read(RAM.start)]  # undecided: neither emulated nor skipped


def test_a_vcpu_whose_partition_ends_says_that_it_lost_the_daemon(
    daemon: DaemonProcess, vmm: BlockingVmm, partition: PartitionCredentials
) -> None:
    with BlockingVp.open(daemon.socket, partition, vp_index=0) as vp:
        vmm.close()
        why = run_vcpu(FakeVcpu(0, [read(RAM.start)] * 10_000), vp, Uart())
    assert why.startswith("lost the daemon: ")


class Decided:
    """A VP connection that answers by a list, and notes when it was asked."""

    def __init__(self, *answers: AnyAnswer) -> None:
        self.answers = list(answers)

    def intercept(self, message: bytes) -> AnyAnswer:
        assert len(message) == 256
        return self.answers.pop(0)


@pytest.mark.parametrize(
    "undecided", [Answer.CONTENDED, Answer.INVALIDATING, LaterAnswer(Outcome.RETRY, "x")]
)
def test_an_undecided_access_is_asked_about_again_and_never_emulated(undecided: AnyAnswer) -> None:
    vp = Decided(undecided, undecided, Answer.MAPPED)
    answer = vcpu_loop.decide(vp, read(RAM.start), threading.Event())  # type: ignore[arg-type]
    assert answer is Answer.MAPPED
    assert vp.answers == []


def test_a_vmm_whose_partition_is_lost_gets_the_daemons_reason_on_its_own_connection(
    daemon: DaemonProcess,
) -> None:
    """What the guide says about reporting why a VP was closed."""

    class Silent:
        def map(self, *_: object) -> None: ...

        def unmap(self, *_: object) -> None: ...

    with BlockingVmm.open(daemon.socket) as vmm:
        partition = vmm.create_partition(AddressSpaceKind.DECLARED, HypervisorKind.VMM)
        with BlockingOperator.open(daemon.operator_socket, timeout=PATIENCE) as operator:
            operator.subscribe([EventName.PARTITION_ENDED], partition_id=partition.partition_id)
            BlockingHypervisor.open(daemon.socket, partition, Silent(), regions=vmm.regions).close()
            operator.next_events()
        with pytest.raises(ConnectionEnded, match="the partition is lost: the hypervisor connection closed"):
            vmm.statistics()
