"""Every limit that `hello` states: reaching it is an error that names it, without other effects."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import pytest

from fakes.daemon_process import DaemonProcess, StartDaemon
from fakes.eventually import eventually
from fakes.raw_client import RawConnection, Refusal, intercept_message, pack, request
from fakes.raw_vmm import GFN, MODEL, PAGE, PAGES, UADDR, WHOLE_MEMORY, RawVmm, region, vma
from fakes.rude_peers import leave_slow_to_close, send_with_descriptors
from fakes.witness import Witness

CONFIG = """
[limits]
connections_without_hello = 6
connections_per_uid = 14
partitions_per_uid = 3
vmms_per_uid = 5
vps_per_partition = 2
vps_per_uid = 3
regions_per_uid = 4
mappings_per_uid = 3
vmas_per_uid = 4
unclosed_descriptors_per_uid = 3
notifiers_per_partition = 2
regions_per_partition = 2
mappings_per_partition = 2
vmas_per_partition = 3
open_invalidations_per_partition = 2
deposit_pages_per_partition = 300
operators = 2
[timeouts]
hello_ms = 3000
invalidate_ms = 200
"""


@pytest.fixture(scope="module")
def small_daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    with DaemonProcess(tmp_path_factory.mktemp("small"), config=CONFIG) as process:
        yield process.wait_serving()


@pytest.fixture
def daemon(small_daemon: DaemonProcess) -> DaemonProcess:
    return small_daemon


@pytest.fixture
def limits(witness: Witness, daemon: DaemonProcess) -> dict[str, int]:
    with RawConnection(daemon.socket) as connection:
        stated: dict[str, int] = connection.say_hello("vmm")["limits"]
    assert witness.serve() == Witness.SERVED
    return stated


@dataclass(frozen=True, slots=True)
class Scene:
    """Where a limit is reached: `vmm` has a partition, and so has the witness; what is opened is closed."""

    daemon: DaemonProcess
    vmm: RawVmm
    opened: ExitStack


def partitions(scene: Scene) -> Refusal:
    scene.opened.enter_context(RawVmm(scene.daemon.socket))  # the witness has one, `vmm` the second
    connection = scene.opened.enter_context(RawConnection(scene.daemon.socket))
    connection.say_hello("vmm")
    return connection.refusal("create_partition", MODEL)


def vmms(scene: Scene) -> Refusal:
    for _ in range(3):  # the witness and `vmm` are two
        scene.opened.enter_context(RawConnection(scene.daemon.socket)).say_hello("vmm")
    connection = scene.opened.enter_context(RawConnection(scene.daemon.socket))
    return connection.refusal("hello", {"protocol": 1, "role": "vmm"})


def vps(scene: Scene) -> Refusal:
    scene.vmm.vp(1)
    connection = scene.opened.enter_context(RawConnection(scene.daemon.socket))
    return connection.refusal("hello", {"protocol": 1, "role": "vp", "vp_index": 2, **scene.vmm.credentials})


def notifiers(scene: Scene) -> Refusal:
    scene.vmm.notifier()
    scene.vmm.notifier()
    connection = scene.opened.enter_context(RawConnection(scene.daemon.socket))
    return connection.refusal("hello", {"protocol": 1, "role": "notifier", **scene.vmm.credentials})


def connections(scene: Scene) -> Refusal:
    """The witness has 3, `vmm` one and the operator one; notifiers are in no other limit's way."""
    scene.daemon.operator()
    for _ in range(2):
        scene.vmm.notifier()
    for _ in range(3):
        scene.opened.enter_context(RawConnection(scene.daemon.socket)).say_hello("vmm")
    for _ in range(4):
        scene.opened.enter_context(RawConnection(scene.daemon.socket))
    return scene.opened.enter_context(RawConnection(scene.daemon.socket)).farewell()


def vps_of_the_uid(scene: Scene) -> Refusal:
    scene.vmm.vp(0)
    other = scene.opened.enter_context(RawVmm(scene.daemon.socket))
    other.vp(0)  # the witness has the first
    connection = scene.opened.enter_context(RawConnection(scene.daemon.socket))
    return connection.refusal("hello", {"protocol": 1, "role": "vp", "vp_index": 1, **other.credentials})


def unclosed_descriptors(scene: Scene) -> Refusal:
    vmm = scene.opened.enter_context(RawVmm(scene.daemon.socket, address_space="process")).connection
    leave_slow_to_close(vmm, scene.opened, 2)
    assert vmm.answer()["regions"] == 0
    leave_slow_to_close(vmm, scene.opened, 1)
    assert vmm.farewell().details["limit"] == "unclosed_descriptors_per_uid"
    connection = scene.opened.enter_context(RawConnection(scene.daemon.socket))
    connection.say_hello("vmm")
    return connection.refusal("create_partition", {**MODEL, "address_space": "process"})


def regions_of_the_uid(scene: Scene) -> Refusal:
    other = scene.opened.enter_context(RawVmm(scene.daemon.socket))
    scene.vmm.add_region(0, 1, UADDR)  # the witness has the first
    scene.vmm.add_region(1, 1, UADDR)
    other.add_region(0, 1, UADDR)
    return other.connection.refusal("add_region", region(1, 1, UADDR))


def regions(scene: Scene) -> Refusal:
    scene.vmm.add_region(0, 1, UADDR)
    scene.vmm.add_region(1, 1, UADDR)
    return scene.vmm.connection.refusal("add_region", region(2, 1, UADDR))


def vmas(scene: Scene) -> Refusal:
    for page in range(3):
        scene.vmm.map_vma(UADDR + page * PAGE, 1)
    return scene.vmm.connection.refusal("map_vma", vma(UADDR + 3 * PAGE, 1))


def vmas_of_the_uid(scene: Scene) -> Refusal:
    other = scene.opened.enter_context(RawVmm(scene.daemon.socket))
    scene.vmm.map_vma(UADDR, 1)  # the witness has the first
    for page in range(2):
        other.map_vma(UADDR + page * PAGE, 1)
    return other.connection.refusal("map_vma", vma(UADDR + 2 * PAGE, 1))


def open_invalidations(scene: Scene) -> Refusal:
    one, other = scene.vmm.notifier(), scene.vmm.notifier()
    one.ask("invalidate_begin", WHOLE_MEMORY)
    other.ask("invalidate_begin", WHOLE_MEMORY)
    return one.refusal("invalidate_begin", WHOLE_MEMORY)


def deposit_pages(scene: Scene) -> Refusal:
    scene.vmm.close()
    connection = scene.opened.enter_context(RawConnection(scene.daemon.socket))
    connection.say_hello("vmm")
    return connection.refusal("create_partition", MODEL | {"deposit_pages": 301})


def operators(scene: Scene) -> Refusal:
    scene.daemon.operator()
    scene.opened.enter_context(RawConnection(scene.daemon.operator_socket)).say_hello("operator")
    connection = scene.opened.enter_context(RawConnection(scene.daemon.operator_socket))
    return connection.refusal("hello", {"protocol": 1, "role": "operator"})


REACHED: dict[str, tuple[Callable[[Scene], Refusal], str]] = {
    "partitions_per_uid": (partitions, "ENOSPC"),
    "vmms_per_uid": (vmms, "ENOSPC"),
    "connections_per_uid": (connections, "ENOSPC"),
    "vps_per_uid": (vps_of_the_uid, "ENOSPC"),
    "regions_per_uid": (regions_of_the_uid, "ENOSPC"),
    "vmas_per_uid": (vmas_of_the_uid, "ENOSPC"),
    "unclosed_descriptors_per_uid": (unclosed_descriptors, "ENOSPC"),
    "vps_per_partition": (vps, "EINVAL"),
    "notifiers_per_partition": (notifiers, "ENOSPC"),
    "regions_per_partition": (regions, "ENOSPC"),
    "vmas_per_partition": (vmas, "ENOSPC"),
    "open_invalidations_per_partition": (open_invalidations, "ENOSPC"),
    "deposit_pages_per_partition": (deposit_pages, "ENOSPC"),
    "operators": (operators, "ENOSPC"),
}


@pytest.mark.parametrize("limit", REACHED)
def test_a_limit_that_is_reached_is_an_error_that_names_it(
    daemon: DaemonProcess, vmm: RawVmm, limits: dict[str, int], limit: str
) -> None:
    reach, errno_name = REACHED[limit]
    with ExitStack() as opened:
        refusal = reach(Scene(daemon, vmm, opened))
    assert (refusal.name, refusal.details["limit"]) == (errno_name, limit)
    assert str(limits[limit]) in refusal.message


def test_a_cut_beyond_the_limit_of_vmas_changes_nothing(vmm: RawVmm) -> None:
    vmm.map_vma(UADDR, PAGES)
    vmm.map_vma(UADDR + PAGES * PAGE, 1)
    refusal = vmm.connection.refusal(
        "protect_vma",
        {
            "start_uaddr": UADDR + PAGE,
            "page_count": 1,
            "readable": True,
            "writable": False,
            "executable": False,
        },
    )
    assert (refusal.name, refusal.details) == ("ENOSPC", {"limit": "vmas_per_partition"})
    assert vmm.ask("statistics")["vmas"] == 2
    vmm.add_region(GFN, PAGES, UADDR)
    assert vmm.vp().intercept(GFN + 1, access=1) == ["resume", "mapped"]


def test_a_mapping_too_many_fails_its_intercept_and_harms_no_other(vmm: RawVmm) -> None:
    vmm.map_vma(UADDR, PAGES)
    vmm.add_region(GFN, PAGES, UADDR, "mmio")
    vmm.ask("set_policy", mmio_granularity="page")
    vp = vmm.vp()
    answers = [vp.intercept(GFN + page) for page in (0, 2, 4)]
    assert answers == [["resume", "mapped"], ["resume", "mapped"], ["fail", "hypervisor_error"]]
    assert vp.intercept(GFN + 1) == ["fail", "hypervisor_error"]
    assert vp.intercept(GFN + 2) == ["resume", "already_mapped"]
    assert vmm.ask("statistics")["mapped_gfns"] == 2


def test_the_mappings_of_a_uid_are_limited_over_all_its_partitions(
    daemon: DaemonProcess, witness: Witness, vmm: RawVmm
) -> None:
    """The witness has one."""
    assert witness.serve() == Witness.SERVED
    with RawVmm(daemon.socket) as other:
        vps = []
        for each in (vmm, other):
            each.map_vma(UADDR, PAGES)
            each.add_region(GFN, PAGES, UADDR, "mmio")
            each.ask("set_policy", mmio_granularity="page")
            vps.append(each.vp())
        answers = [vp.intercept(GFN + page) for page in (0, 2) for vp in vps]
    assert answers == [["resume", "mapped"]] * 2 + [["fail", "hypervisor_error"]] * 2
    eventually(lambda: vps[0].intercept(GFN + 4), ["resume", "mapped"])


def test_a_partition_that_ended_makes_room_for_another(
    daemon: DaemonProcess, witness: Witness, vmm: RawVmm
) -> None:
    with RawVmm(daemon.socket):
        pass
    eventually(daemon.partition_ids, [witness.partition_id, vmm.partition_id])
    with RawVmm(daemon.socket) as another:
        assert another.ask("statistics")["regions"] == 0


def test_deposits_end_at_the_limit_and_the_region_is_not_added(vmm: RawVmm) -> None:
    refusal = vmm.connection.refusal("add_region", region(0, 301 * 512, UADDR))
    assert (refusal.name, vmm.ask("statistics")["regions"]) == ("ENOMEM", 0)
    vmm.add_region(0, 256 * 512, UADDR)


def test_connections_without_hello_over_the_limit_are_eagain_at_once(
    daemon: DaemonProcess, limits: dict[str, int], witness: Witness
) -> None:
    with ExitStack() as opened:
        for _ in range(limits["connections_without_hello"]):
            opened.enter_context(RawConnection(daemon.socket))
        refusal = opened.enter_context(RawConnection(daemon.socket)).farewell()
        assert (refusal.name, refusal.details) == ("EAGAIN", {"limit": "connections_without_hello"})
        assert witness.serve() == Witness.SERVED


@pytest.mark.parametrize("said", [b"", request("hello")[:-1]], ids=["nothing", "most of it"])
def test_a_hello_that_does_not_come_in_time_is_etimedout(
    daemon: DaemonProcess, limits: dict[str, int], said: bytes
) -> None:
    with RawConnection(daemon.socket) as connection:
        connection.send(said)
        refusal = connection.farewell()
    assert (refusal.name, str(limits["hello_timeout_ms"]) in refusal.message) == ("ETIMEDOUT", True)


@pytest.mark.parametrize("timeout_ms", [None, 100], ids=["default", "of the partition"])
def test_a_wait_for_an_invalidation_ends_with_retry(
    daemon: DaemonProcess, witness: Witness, timeout_ms: int | None
) -> None:
    with RawVmm(daemon.socket, invalidate_timeout_ms=timeout_ms) as vmm:
        vmm.add_memory()
        vmm.notifier().ask("invalidate_begin", WHOLE_MEMORY)
        vp = vmm.vp()
        vp.send(request("intercept", intercept_message(GFN, 0)))
        assert witness.serve() == Witness.SERVED
        assert vp.answer() == ["retry", "invalidating"]


def test_message_bytes_and_requests_in_flight_are_errors_that_say_how_many(
    daemon: DaemonProcess, limits: dict[str, int]
) -> None:
    with RawConnection(daemon.socket) as long, RawConnection(daemon.socket) as hasty:
        long.send(pack([0, 1, "hello", [bytes(limits["message_bytes"])]]))
        vp = {"role": "vp", "partition_id": 1, "token": bytes(16), "vp_index": 0}
        hasty.send(request("hello", {"protocol": 1, **vp}) * 2)
        assert [long.farewell().name, hasty.farewell().name] == ["EMSGSIZE", "EPROTO"]


def values(count: int) -> bytes:
    """A request of that many values: itself, its four, a map, its two pairs, and the rest in an array."""
    return pack([0, 1, "hello", [{"protocol": 1, "role": [0] * (count - 10)}]])


def test_a_request_of_as_many_values_as_it_may_hold_is_looked_at_and_one_more_is_emsgsize(
    daemon: DaemonProcess, limits: dict[str, int]
) -> None:
    with RawConnection(daemon.socket) as full, RawConnection(daemon.socket) as over:
        full.send(values(limits["request_values"]))
        over.send(values(limits["request_values"] + 1))
        assert full.farewell(msgid=1).name == "EINVAL"
        refusal = over.farewell()
    assert (refusal.name, refusal.details) == ("EMSGSIZE", {"limit": "request_values"})


@pytest.mark.parametrize("role", ["vp", "notifier"])
def test_a_request_that_joins_may_have_as_many_bytes_as_hello_says(
    daemon: DaemonProcess, witness: Witness, limits: dict[str, int], role: str
) -> None:
    with RawVmm(daemon.socket) as vmm:
        joined = vmm.vp() if role == "vp" else vmm.notifier()
        blob = bytes(limits["request_bytes"] - len(request("x", {"x": bytes(256)})) + 256)
        assert joined.refusal("x", {"x": blob}).name in ("ENOSYS", "EINVAL")
        joined.send(request("x", {"x": blob + b"\0"}))
        refusal = joined.farewell()
    assert (refusal.name, refusal.details) == ("EMSGSIZE", {"limit": "request_bytes"})
    assert witness.serve() == Witness.SERVED


def test_a_vmm_may_send_as_many_values_as_it_is_told_and_one_more_is_the_end_of_its_connection_alone(
    daemon: DaemonProcess, witness: Witness, limits: dict[str, int]
) -> None:
    spare = limits["request_values_vmm"] - 8  # the request, its four, the map, the key and the list
    with RawVmm(daemon.socket) as vmm:
        assert vmm.connection.refusal("map_vmas", {"vmas": [0] * spare}).name == "EINVAL"
        vmm.connection.send(request("map_vmas", {"vmas": [0] * (spare + 1)}))
        refusal = vmm.connection.farewell()
    assert (refusal.name, refusal.details) == ("EMSGSIZE", {"limit": "request_values_vmm"})
    assert witness.serve() == Witness.SERVED


def test_requests_over_the_pace_are_all_answered(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(config="limits.control_requests_per_second = 40")
    with Witness(daemon.socket) as witness:
        began = time.monotonic()
        answers = [witness.ask("set_policy") for _ in range(30)]
        assert (answers, time.monotonic() - began > 0.25) == ([None] * 30, True)
        assert witness.serve() == Witness.SERVED


def test_every_limit_that_hello_states_is_reached_by_a_test(limits: dict[str, int]) -> None:
    others = {
        "connections_without_hello", "hello_timeout_ms", "invalidate_timeout_ms",
        "message_bytes", "request_bytes", "request_values", "request_values_vmm",
        "requests_in_flight_per_connection",
        "control_requests_per_second",  # no error: tests/service/test_tenants.py, and below
        "hypervisor_timeout_ms",  # by the bad hypervisors
        "memory_mib",  # tests/system/test_memory_budget.py
        "mappings_per_partition", "mappings_per_uid",  # an answer to an intercept, below
    }  # fmt: skip
    assert set(limits) == others | set(REACHED)


def test_memory_is_not_attached_while_too_many_descriptors_are_unclosed(start_daemon: StartDaemon) -> None:
    """An attachment brings more, so that its connection ends; a VMM without one goes on."""
    daemon = start_daemon(config="limits.unclosed_descriptors_per_uid = 1")
    with ExitStack() as opened:
        first, second, third = (
            opened.enter_context(RawVmm(daemon.socket, address_space="process")).connection for _ in range(3)
        )
        leave_slow_to_close(first, opened, 1)
        assert first.farewell().details["limit"] == "unclosed_descriptors_per_uid"
        send_with_descriptors(second, request("attach_memory", {}), 1, "/proc/self/maps")
        assert second.farewell().details["limit"] == "unclosed_descriptors_per_uid"
        refusal = third.refusal("attach_memory", {})
        assert (refusal.name, refusal.details) == ("ENOSPC", {"limit": "unclosed_descriptors_per_uid"})
        assert third.ask("statistics")["regions"] == 0
