"""A guest with a daemon of a later version: unknown reasons do not stop it."""

from __future__ import annotations

from pathlib import Path

from fakes.daemon_process import DaemonProcess
from fakes.later_server import LaterServer
from fakes.later_words import LATER
from fakes.small_vmms import run
from intercept_client.kvm import PartitionSetting, StopReason
from intercept_protocol.addresses import PAGE_SIZE
from intercept_protocol.outcomes import LaterAnswer, Outcome
from interceptctl.guest.programs import SWEEP
from interceptctl.guest.small_vmm import SmallVmm


def test_a_guest_sweeps_a_bar_whose_touches_are_answered_for_an_unknown_reason(
    daemon: DaemonProcess, tmp_path: Path
) -> None:
    with (
        LaterServer(tmp_path / "later", daemon.socket) as later,
        SmallVmm(later.path, PartitionSetting()) as vmm,
    ):
        bar = vmm.add_bar(4)
        guest = vmm.add_vcpu(SWEEP, esi=bar.gpa, ecx=4, ebx=1)
        stop = run(guest)
        assert [bar.word(page * PAGE_SIZE) for page in range(4)] == [1] * 4
    assert stop.reason is StopReason.HALTED
    assert guest.tally.intercepts == {LaterAnswer(Outcome.RESUME, LATER): 2}, "and one for the program itself"
