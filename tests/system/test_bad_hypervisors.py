"""A VMM that fails to map or unmap as requested loses its partition, with a log line, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from fakes.daemon_process import DaemonProcess
from fakes.eventually import eventually
from fakes.raw_client import READ, RawConnection, intercept_message, pack, request
from fakes.raw_vmm import GFN, PAGES, UADDR, WHOLE_MEMORY, RawVmm, region
from fakes.witness import Witness

REFUSAL = [12, "ENOMEM", "no slot is free", {}]
CONFIG = "timeouts.hypervisor_ms = 1000"


@pytest.fixture(scope="module")
def impatient_daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    with DaemonProcess(tmp_path_factory.mktemp("impatient"), config=CONFIG) as process:
        yield process.wait_serving()
        assert process.stop() == 0


@pytest.fixture
def daemon(impatient_daemon: DaemonProcess) -> DaemonProcess:
    return impatient_daemon


@dataclass(frozen=True, slots=True)
class Guest:
    """A partition whose hypervisor is the VMM's, with a region that nothing is mapped of yet."""

    vmm: RawVmm
    link: RawConnection
    notifier: RawConnection
    vp: RawConnection

    def fault(self) -> None:
        self.vp.send(request("intercept", intercept_message(GFN, READ)))

    def asked(self) -> tuple[int, str, dict[str, Any]]:
        """What the daemon wants of the VMM: msgid, method and fields."""
        kind, msgid, method, (fields,) = self.link.receive()
        assert kind == 0
        return msgid, method, fields

    def answer(self, error: object = None) -> str:
        """Answer the next request; returns its method."""
        msgid, method, _ = self.asked()
        self.link.send(pack([1, msgid, error, None]))
        return method

    def map(self) -> None:
        self.fault()
        assert (self.answer(), self.vp.answer()) == ("map_gpa", ["resume", "mapped"])


@pytest.fixture
def guest(daemon: DaemonProcess, witness: Witness) -> Iterator[Guest]:  # noqa: ARG001 - it looks before and after
    with RawVmm(daemon.socket, hypervisor="vmm") as vmm, RawConnection(daemon.socket) as link:
        link.say_hello("hypervisor", **vmm.credentials)
        vmm.map_vma(UADDR, PAGES)
        vmm.add_region(GFN, PAGES, UADDR, kind="mmio")
        yield Guest(vmm, link, vmm.notifier(), vmm.vp())


def is_lost(daemon: DaemonProcess, guest: Guest) -> bool:
    """Whether the VMM was told so, all its connections closed, and the loss counted."""
    farewell = guest.vmm.connection.farewell()
    guest.vp.receive_all()
    guest.notifier.receive_all()
    eventually(lambda: guest.vmm.partition_id in daemon.partition_ids(), False)
    return (farewell.name, "the partition is lost" in farewell.message) == ("EIO", True)


def test_a_map_that_the_vmm_refuses_fails_the_intercept_and_leaves_nothing(guest: Guest) -> None:
    guest.fault()
    assert (guest.answer(REFUSAL), guest.vp.answer()) == ("map_gpa", ["fail", "hypervisor_error"])
    guest.map()


@pytest.mark.parametrize(
    "error",
    [
        "no slot is free",
        False,
        {},
        [-12, "ENOMEM", "m", {}],
        [0, "OK", "m", {}],
        [12, "ENOMEM", "x" * 65_000, {}],
    ],
    ids=["text", "false", "a map", "a negated errno", "errno 0", "64 KiB"],
)
def test_a_map_that_is_refused_in_any_form_fails_the_intercept_and_leaves_nothing(
    guest: Guest, error: object
) -> None:
    guest.fault()
    assert (guest.answer(error), guest.vp.answer()) == ("map_gpa", ["fail", "hypervisor_error"])
    guest.map()


@pytest.mark.parametrize("error", ["busy", [5, "EIO", "x" * 65_000, {}]], ids=["text", "64 KiB"])
def test_an_unmap_that_is_refused_in_any_form_loses_the_partition_whose_vmm_can_read_why(
    daemon: DaemonProcess, guest: Guest, error: object
) -> None:
    guest.map()
    guest.notifier.send(request("invalidate", WHOLE_MEMORY))
    assert guest.answer(error) == "unmap_gpa"
    farewell = guest.vmm.connection.farewell()
    assert (farewell.name, len(farewell.message) < 1000) == ("EIO", True)
    eventually(lambda: guest.vmm.partition_id in daemon.partition_ids(), False)


def test_a_map_that_the_vmm_does_not_answer_is_undone_and_fails_the_intercept(
    guest: Guest, witness: Witness
) -> None:
    guest.fault()
    late, _, mapped = guest.asked()
    assert witness.serve() == Witness.SERVED
    undone, method, unmapped = guest.asked()
    assert (method, unmapped["start_gfn"], unmapped["page_count"]) == ("unmap_gpa", GFN, mapped["page_count"])
    guest.link.send(pack([1, late, None, None]) + pack([1, undone, None, None]))
    assert guest.vp.answer() == ["fail", "hypervisor_error"]
    guest.map()


def test_an_answer_out_of_order_loses_the_partition(daemon: DaemonProcess, guest: Guest) -> None:
    """The late map that was passed over may still be carried out, after the unmap that was to undo it."""
    guest.fault()
    guest.asked()
    undone, method, _ = guest.asked()
    assert method == "unmap_gpa"
    guest.link.send(pack([1, undone, None, None]))
    assert guest.link.farewell().name == "EPROTO"
    assert is_lost(daemon, guest)


def test_an_unmap_that_the_vmm_refuses_loses_the_partition(daemon: DaemonProcess, guest: Guest) -> None:
    guest.map()
    guest.notifier.send(request("invalidate", WHOLE_MEMORY))
    assert guest.answer(REFUSAL) == "unmap_gpa"
    assert is_lost(daemon, guest)


def test_i4_a_vp_that_waits_when_the_partition_is_lost_has_its_answer(
    daemon: DaemonProcess, guest: Guest
) -> None:
    guest.map()
    guest.notifier.send(request("invalidate", WHOLE_MEMORY))
    msgid, _, _ = guest.asked()
    guest.fault()
    eventually(lambda: daemon.vp_states(guest.vmm.partition_id), ["waiting"])
    guest.link.send(pack([1, msgid, REFUSAL, None]))
    assert guest.vp.answer() == ["fail", "hypervisor_error"]
    assert is_lost(daemon, guest)


def test_an_unmap_that_the_vmm_does_not_answer_loses_the_partition(
    daemon: DaemonProcess, guest: Guest, witness: Witness
) -> None:
    guest.map()
    guest.notifier.send(request("invalidate", WHOLE_MEMORY))
    _, method, _ = guest.asked()
    assert (method, witness.serve()) == ("unmap_gpa", Witness.SERVED)
    assert is_lost(daemon, guest)


@pytest.mark.parametrize(
    ("misbehave", "errno_name"),
    [
        (lambda link: link.send(b"\xc1"), "EBADMSG"),
        (lambda link: link.send(request("map_gpa", {})), "EBADMSG"),
        (lambda link: link.send(pack([1, 77, None, None])), "EPROTO"),
        (lambda link: link.send(b"\x94\x01\x01\xc6\x7f\xff\xff\xff"), "EMSGSIZE"),
    ],
    ids=["garbage", "a request", "an answer to nothing", "an answer over 64 KiB"],
)
def test_a_hypervisor_that_violates_the_protocol_gets_an_error_and_loses_the_partition(
    daemon: DaemonProcess, guest: Guest, misbehave: Callable[[RawConnection], None], errno_name: str
) -> None:
    guest.map()
    misbehave(guest.link)
    assert guest.link.farewell().name == errno_name
    assert is_lost(daemon, guest)


def test_a_hypervisor_that_leaves_before_its_vmm_loses_the_partition(
    daemon: DaemonProcess, guest: Guest
) -> None:
    lost = daemon.statistics()["partitions_lost"]
    guest.map()
    guest.link.close()
    assert is_lost(daemon, guest)
    assert daemon.statistics()["partitions_lost"] == lost + 1


def test_a_vmm_that_leaves_with_its_hypervisor_loses_nothing(daemon: DaemonProcess, guest: Guest) -> None:
    lost = daemon.statistics()["partitions_lost"]
    guest.map()
    guest.link.close()
    guest.vmm.close()
    eventually(lambda: guest.vmm.partition_id in daemon.partition_ids(), False)
    assert daemon.statistics()["partitions_lost"] == lost


def test_a_region_before_the_hypervisor_is_enotconn_and_not_added(
    daemon: DaemonProcess, witness: Witness
) -> None:
    with RawVmm(daemon.socket, hypervisor="vmm") as vmm:
        assert vmm.connection.refusal("add_region", region(GFN, PAGES, UADDR)).name == "ENOTCONN"
        assert vmm.ask("statistics")["regions"] == 0
        assert witness.serve() == Witness.SERVED


def test_a_second_hypervisor_is_eexist(daemon: DaemonProcess, guest: Guest) -> None:
    with RawConnection(daemon.socket) as second:
        refusal = second.refusal("hello", {"protocol": 1, "role": "hypervisor", **guest.vmm.credentials})
    assert refusal.name == "EEXIST"
    guest.map()
