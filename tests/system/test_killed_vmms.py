"""A VMM that is killed in the middle leaves nothing behind: no partition, no task, no descriptor (I6)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fakes import before_passrights
from fakes.child_process import child_process
from fakes.daemon_process import DaemonProcess
from fakes.eventually import eventually
from fakes.witness import Witness

CHAOS = {"INTERCEPTD_CHAOS": "20", **before_passrights.ENVIRONMENT}
"""Spreads the work of a request over many steps, so that the kill finds it half done."""


@pytest.fixture(scope="module")
def chaotic_daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """Its kernel does not refuse the descriptors that a VMM sends in the middle of a message."""
    directory, launch = tmp_path_factory.mktemp("chaotic"), before_passrights.LAUNCH
    with DaemonProcess(directory, environment=CHAOS, launch=launch) as process:
        yield process.wait_serving()
        assert process.stop() == 0


@pytest.fixture
def daemon(chaotic_daemon: DaemonProcess) -> DaemonProcess:
    return chaotic_daemon


@pytest.mark.parametrize("_repetition", range(20))
def test_a_vmm_killed_mid_intercept_mid_begin_and_mid_unmap_leaves_nothing(
    daemon: DaemonProcess, witness: Witness, _repetition: int
) -> None:
    before = daemon.footprint()
    with child_process("fakes.doomed_vmm", daemon.socket) as said:
        assert int(said) in daemon.partition_ids()
    assert witness.serve() == Witness.SERVED
    eventually(daemon.partition_ids, [witness.partition_id])
    eventually(daemon.footprint, before)


@pytest.mark.parametrize("setting", [("declared", "vmm"), ("process", "software")])
def test_a_vmm_killed_in_the_middle_of_a_message_on_each_connection_leaves_nothing(
    daemon: DaemonProcess, witness: Witness, setting: tuple[str, str]
) -> None:
    before = daemon.footprint()
    paths = (daemon.socket, daemon.operator_socket)
    with child_process("fakes.clinging_vmm", *paths, *setting) as said:
        assert int(said) in daemon.partition_ids()
    eventually(daemon.partition_ids, [witness.partition_id])
    eventually(daemon.footprint, before)


def test_a_killed_vmms_totals_stay_in_the_daemons_statistics(daemon: DaemonProcess, witness: Witness) -> None:
    before = daemon.statistics()
    with Witness(daemon.socket) as doomed:
        doomed.serve()
    eventually(daemon.partition_ids, [witness.partition_id])
    after = daemon.statistics()
    assert after["partitions_created"] - before["partitions_created"] == 1
    assert after["invalidations"] - before["invalidations"] == 1
    assert after["intercepts"]["resume"]["mapped"] - before["intercepts"]["resume"]["mapped"] == 1
    assert after["partitions_lost"] == before["partitions_lost"]
