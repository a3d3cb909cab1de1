"""`restore` against a daemon process: real sockets, real VMMs with real userfaultfds.

That nothing is left behind is the witness's to see: it counts tasks, partitions and descriptors before and
after. What the guest reads is checked page by page: the image's content, or zeroes once it was given back.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import struct
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from fakes import as_user
from fakes.daemon_process import DaemonProcess, StartDaemon
from fakes.eventually import eventually
from fakes.huge_pages import HUGE, reserved
from fakes.other_user import as_uid
from fakes.puppet import ENVIRONMENT
from fakes.raw_client import Connect, RawConnection
from fakes.restore_asker import PAGES, Asker, listening, numbers
from fakes.restoring_vmm import PAGE, RestoringVmm, new_userfaultfd
from fakes.silent_fuse import silent_file
from fakes.witness import Witness
from intercept_protocol.trace import RECORD, RECORD_SIZE, RECORDS_AT_LEAST, RING_HEADER, Kind

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not Path("/dev/userfaultfd").exists(),
    reason="needs /dev/userfaultfd, which root alone may open",
)
needs_fuse = pytest.mark.skipif(not Path("/dev/fuse").exists(), reason="needs /dev/fuse")
STRANGER: Final = 12345
ALLOWED: Final = f"socket_mode = 0o666\nallowed_uids = [0, {STRANGER}]\n"


@pytest.fixture
def asker(connect: Connect, tmp_path: Path) -> Asker:
    return Asker(connect(), tmp_path)


@pytest.fixture
def watcher(daemon: DaemonProcess, witness: Witness) -> Iterator[RawConnection]:  # noqa: ARG001 - it looks before and after
    """An operator who receives the events of failed restores."""
    with RawConnection(daemon.operator_socket) as operator:
        operator.say_hello("operator")
        operator.ask("subscribe", {"events": ["handoff_refused", "image_failed"]})
        yield operator
        operator.leave()


# ------------------------------------------------ serving


def test_each_page_is_the_images_or_zero_once_it_was_given_back(asker: Asker) -> None:
    restored = asker.restore()
    assert asker.progress(restored)["state"] == "waiting"
    with RestoringVmm(asker.listener, [PAGES - 100, 100]) as vmm:
        assert vmm.ask("read", 5, 3) == numbers(5, 3)
        assert vmm.ask("give_back", 600, 10) == "given back"  # of which none was in
        assert vmm.ask("give_back", 4, 2) == "given back"
        serving = asker.progress(restored)
        assert (serving["state"], serving["pid"], serving["removed_pages"]) == ("serving", vmm.pid, 12)
        assert vmm.ask("read", 0, 10) == "0 1 2 3 0 0 6 7 8 9"
        assert vmm.ask("read", 598, 14) == "598 599" + 10 * " 0" + " 610 611"
        assert vmm.ask("read", 612, PAGES - 612) == numbers(612, PAGES - 612)
        assert vmm.ask("read", 10, 588) == numbers(10, 588)
        complete = asker.wait_state(restored, "complete")
        counts = [complete[f"{name}_pages"] for name in ("demand", "around", "prefetched")]
        assert (complete["pages_in"], complete["zero_pages"], complete["error"]) == (PAGES, 12, "")
        assert sum(counts) == PAGES + 2  # pages 4 and 5 were in before they were given back
        assert complete["first_fault_ms"] <= complete["quiet_ms"] <= complete["age_ms"]
    ended = asker.wait_state(restored, "ended")
    assert (ended["pages_in"], ended["error"]) == (PAGES, "")


def test_a_guest_outlives_who_asked_and_its_hand_off_connection(
    asker: Asker, connect: Connect, daemon: DaemonProcess
) -> None:
    """Firecracker up to 1.11 closes it at once."""
    restored = asker.restore()
    asker.connection.leave()
    with RestoringVmm(asker.listener, [PAGES]) as vmm:
        assert vmm.ask("close") == "closed"
        assert vmm.ask("read", 0, 2) == "0 1"
        asker.connection = connect()
        asker.connection.say_hello("vmm")
        assert asker.progress(restored)["state"] == "serving"
        assert daemon.partition_ids()[-1] == restored


def test_two_vmms_from_one_image(asker: Asker) -> None:
    first = asker.restore()
    with RestoringVmm(asker.listener, [PAGES]) as one:
        second = asker.restore()
        with RestoringVmm(asker.listener, [PAGES]) as other:
            assert one.ask("give_back", 0, PAGES) == "given back"
            assert other.ask("read", 0, PAGES) == numbers(0, PAGES)
            assert one.ask("read", 0, PAGES) == " ".join("0" * PAGES)
            assert asker.progress(first)["pid"] == one.pid
            assert asker.progress(second)["pid"] == other.pid


def test_pages_of_the_list_come_in_untouched(asker: Asker) -> None:
    with tempfile.TemporaryFile() as prefetch:
        prefetch.write(struct.pack("<4I", 200, 100, 0, 10))
        prefetch.flush()
        restored = asker.restore(prefetch.fileno(), prefetch=True, around_pages=1)
    with RestoringVmm(asker.listener, [PAGES]) as vmm:
        eventually(lambda: asker.progress(restored)["prefetched_pages"], 110)
        assert vmm.ask("read", 199, 102) == numbers(199, 102)
        done = asker.progress(restored)
        assert (done["demand_pages"], done["around_pages"], done["pages_in"]) == (2, 0, 112)


def test_huge_pages(asker: Asker) -> None:
    with reserved(2) as possible:
        if not possible:
            pytest.skip("no huge pages of 2 MiB are to be had")
        restored = asker.restore()
        with RestoringVmm(asker.listener, [PAGES], page_size=HUGE * PAGE) as vmm:
            assert vmm.ask("read", 3, 2) == "3 4"
            assert vmm.ask("give_back", 0, HUGE) == "given back"
            assert vmm.ask("read", HUGE - 1, 2) == f"0 {HUGE}"
            assert asker.progress(restored)["pages_in"] == PAGES
            vmm.kill()
            asker.wait_state(restored, "ended")


def test_a_trace_records_each_fault(asker: Asker) -> None:
    size = RING_HEADER + RECORDS_AT_LEAST * RECORD_SIZE
    with closing_fd(os.memfd_create("ring", os.MFD_ALLOW_SEALING)) as ring:
        os.posix_fallocate(ring, 0, size)
        fcntl.fcntl(ring, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        asker.restore(ring, trace=True)
        with RestoringVmm(asker.listener, [PAGES]) as vmm:
            assert vmm.ask("read", 77, 1) == "77"
            eventually(lambda: recorded_gfns(ring), [77])


def recorded_gfns(ring: int) -> list[int]:
    """Of the intercepts in a ring."""
    records = os.pread(ring, RECORDS_AT_LEAST * RECORD_SIZE, RING_HEADER)
    return [record[4] for record in RECORD.iter_unpack(records) if record[1] == Kind.INTERCEPT]


@contextmanager
def closing_fd(descriptor: int) -> Iterator[int]:
    try:
        yield descriptor
    finally:
        os.close(descriptor)


# ------------------------------------------------ what is asked


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ("image", "it is not a regular file"),
        ("image", "it was not opened for reading"),
        ("image", "it has 5 bytes"),
        ("image", "it has 0 bytes"),
        ("listener", "it is no socket"),
        ("listener", "it does not listen"),
        ("listener", "it is no Unix stream socket"),
        ("prefetch", "it has 7 bytes"),
        ("prefetch", "1 pages from page 1024 on are not within the image of 1024 pages"),
        ("prefetch", "0 pages from page 3 on"),
        ("trace", "not fit for a ring"),
    ],
)
def test_a_descriptor_that_is_something_else_is_named(asker: Asker, field: str, said: str) -> None:
    with listening(asker.listener) as listener, asker.image.open("rb") as image:
        found: dict[str, int] = {"image": image.fileno(), "listener": listener.fileno()}
        options = {field: True} if field in {"prefetch", "trace"} else {}
        with wrong(said) as descriptor:
            found[field] = descriptor
            refusal = asker.refusal(*found.values(), **options)
    assert (refusal.name, refusal.details["field"]) == ("EINVAL", field)
    assert said in refusal.message


@contextmanager
def wrong(said: str) -> Iterator[int]:
    """A descriptor of which that is said."""
    with tempfile.NamedTemporaryFile() as file, socket.socket(socket.AF_UNIX) as idle:
        contents = {
            "it has 5 bytes": b"short", "it has 7 bytes": b"7 bytes",
            "1 pages from page 1024 on are not within the image of 1024 pages": struct.pack("<2I", 1024, 1),
            "0 pages from page 3 on": struct.pack("<2I", 3, 0),
        }  # fmt: skip
        file.write(contents.get(said, b""))
        file.flush()
        match said:
            case "it is not a regular file":
                yield idle.fileno()
            case "it was not opened for reading":
                with open(file.name, "wb") as writing:
                    writing.write(bytes(PAGE))
                    writing.flush()
                    yield writing.fileno()
            case "it does not listen":
                yield idle.fileno()
            case "it is no Unix stream socket":
                with socket.socket(socket.AF_INET) as internet:
                    internet.listen()
                    yield internet.fileno()
            case _:
                yield file.fileno()


@pytest.mark.parametrize("count", [0, 1, 3, 6])
def test_another_number_of_descriptors_is_refused(asker: Asker, count: int) -> None:
    with asker.image.open("rb") as image:
        refusal = asker.refusal(*[image.fileno()] * count)
    assert (refusal.name, refusal.message) == (
        "EINVAL",
        f"restore takes 2 descriptors (image, listener), not {count}",
    )


@needs_fuse
def test_an_image_that_does_not_answer_is_given_up_and_blocks_no_other(
    start_daemon: StartDaemon, tmp_path: Path
) -> None:
    daemon = start_daemon(config="[timeouts]\ninvalidate_ms = 50\n")
    with (
        Witness(daemon.socket) as witness,
        RawConnection(daemon.socket) as connection,
        silent_file() as silent,
        listening(tmp_path / "uffd.sock") as listener,
    ):
        asker = Asker(connection, tmp_path)
        assert asker.refusal(silent, listener.fileno()).name == "ETIMEDOUT"
        assert witness.serve() == Witness.SERVED
        with asker.image.open("rb") as image:
            asker.ask(image.fileno(), listener.fileno())


def test_one_listener_serves_one_restore(asker: Asker) -> None:
    with listening(asker.listener) as listener, asker.image.open("rb") as image:
        restored = asker.ask(image.fileno(), listener.fileno())["partition_id"]
        refusal = asker.refusal(image.fileno(), listener.fileno())
        assert (refusal.name, refusal.details) == ("EBUSY", {"field": "listener"})
        with RestoringVmm(asker.listener, [PAGES]):
            asker.wait_state(restored, "serving")
            with socket.socket(socket.AF_UNIX) as late, pytest.raises(ConnectionRefusedError):
                late.connect(str(asker.listener))


def test_create_partition_makes_no_restored_guest(asker: Asker) -> None:
    for fields, field in (
        ({"address_space": "image", "hypervisor": "software"}, "address_space"),
        ({"address_space": "declared", "hypervisor": "userfaultfd"}, "hypervisor"),
    ):
        refusal = asker.connection.refusal("create_partition", fields)
        assert (refusal.name, refusal.details["field"]) == ("EINVAL", field)


def test_who_has_a_partition_asks_for_no_restore(asker: Asker) -> None:
    asker.connection.ask("create_partition", {"address_space": "declared", "hypervisor": "software"})
    for method, fields in (("restore", {}), ("restore_progress", {"partition_id": 1})):
        assert asker.connection.refusal(method, fields).name == "EEXIST"


@pytest.mark.parametrize("limit", ["partitions_per_uid = 1", "vmms_per_uid = 2"])
def test_a_restore_counts_as_a_partition_and_a_vmm_of_its_uid(
    start_daemon: StartDaemon, tmp_path: Path, limit: str
) -> None:
    daemon = start_daemon(config=f"[limits]\n{limit}\n")
    with RawConnection(daemon.socket) as connection:
        asker = Asker(connection, tmp_path)
        for _ in range(2):  # one after the other
            asker.wait_state(asker.restore(connect_timeout_ms=1), "ended")
        asker.restore()
        with listening(tmp_path / "other.sock") as listener, asker.image.open("rb") as image:
            refusal = asker.refusal(image.fileno(), listener.fileno())
        assert (refusal.name, refusal.details) == ("ENOSPC", {"limit": limit.split(maxsplit=1)[0]})


def progress_of(path: Path, partition_id: int) -> str:
    with RawConnection(path) as connection:
        connection.say_hello("vmm")
        return connection.refusal("restore_progress", {"partition_id": partition_id}).name


def test_a_restore_of_another_uid_is_like_one_that_is_none(start_daemon: StartDaemon, tmp_path: Path) -> None:
    daemon = start_daemon(config=ALLOWED)
    tmp_path.chmod(0o755)
    for parent in tmp_path.parents[:3]:
        parent.chmod(0o755)
    with RawConnection(daemon.socket) as connection:
        asker = Asker(connection, tmp_path)
        restored = asker.restore()
        assert as_uid(STRANGER, progress_of, daemon.socket, restored) == "ENOENT"
        assert asker.connection.refusal("restore_progress", {"partition_id": restored + 1}).name == "ENOENT"
        asker.progress(restored)


def test_the_last_64_ended_restores_are_remembered(asker: Asker) -> None:
    ids = [asker.restore(connect_timeout_ms=1) for _ in range(65)]
    asker.wait_state(ids[-1], "ended")
    assert "no VMM has handed over its memory within 0.001 s" in asker.wait_state(ids[1], "ended")["error"]
    assert asker.connection.refusal("restore_progress", {"partition_id": ids[0]}).name == "ENOENT"


def test_a_daemon_without_privileges_serves_and_does_not_promise_to_kill() -> None:
    command = (*as_user.launch(STRANGER), sys.executable, "-m", "interceptd")
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        directory.chmod(0o777)
        with (
            DaemonProcess(directory, config=ALLOWED, launch=command, environment=ENVIRONMENT) as daemon,
            RawConnection(daemon.wait_serving().socket) as connection,
        ):
            asker = Asker(connection, directory)
            with listening(asker.listener) as listener, asker.image.open("rb") as image:
                refusal = asker.refusal(image.fileno(), listener.fileno(), on_image_error="kill")
            assert (refusal.name, refusal.details) == ("EPERM", {"field": "on_image_error"})
            restored = asker.restore()
            with RestoringVmm(asker.listener, [PAGES]) as vmm:
                assert vmm.ask("read", 0, PAGES) == numbers(0, PAGES)
                asker.wait_state(restored, "complete")


# ------------------------------------------------ hand-offs


def whole(**changes: object) -> bytes:
    region = {"base_host_virt_addr": 1 << 40, "size": PAGES * PAGE, "offset": 0, "page_size": PAGE}
    return json.dumps([region | changes]).encode()


HANDOFFS: Final = {
    "no list of regions": b"[{}, {}]",
    "Cloud Hypervisor's hand-off in JSON is not supported": b'\x10\0\0\0{"type":"handoff"',
    "the connection closed before the hand-off was whole": whole()[:-1],
    "no descriptor came with it": whole(),
    "the regions have 4096 bytes, and the image has 4194304": whole(size=PAGE),
    "the descriptor is no userfaultfd": whole(),
    "the userfaultfd is not initialised": whole(),
    "the userfaultfd does not report removed pages": whole(),
    "region 0 is no memory of the VMM that can be filled": whole(),
}


@pytest.mark.parametrize("said", HANDOFFS)
def test_a_wrong_hand_off_is_refused_and_another_awaited(
    asker: Asker, watcher: RawConnection, said: str
) -> None:
    restored = asker.restore()
    descriptors = []
    if said.startswith("the descriptor"):
        descriptors = [os.open("/dev/null", os.O_RDONLY), os.open("/dev/null", os.O_RDONLY)]
    elif said.startswith("the userfaultfd"):
        descriptors = [new_userfaultfd(None if "initialised" in said else 0)]
    elif said.startswith("region"):
        descriptors = [new_userfaultfd(8)]
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(str(asker.listener))
        socket.send_fds(peer, [HANDOFFS[said]], descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        if "closed" in said:
            peer.shutdown(socket.SHUT_WR)
        assert peer.recv(1) == b""
    asker.wait_error(restored, said)
    [event] = watcher.receive()[2]
    assert (event["event"], event["partition_id"]) == ("handoff_refused", restored)
    assert said in event["error"]
    with RestoringVmm(asker.listener, [PAGES]) as vmm:
        assert vmm.ask("read", 1, 1) == "1"
        assert asker.progress(restored)["error"] == ""


def hand_over_nothing(path: Path) -> bytes:
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(str(path))
        return peer.recv(1)


def test_a_peer_of_another_uid_is_refused(asker: Asker) -> None:
    restored = asker.restore()
    asker.listener.chmod(0o666)
    for parent in list(asker.listener.parents)[:4]:
        parent.chmod(0o755)
    assert as_uid(STRANGER, hand_over_nothing, asker.listener) == b""
    asker.wait_error(restored, f"uid {STRANGER} is not who asked, uid 0")
    with RestoringVmm(asker.listener, [PAGES]):
        asker.wait_state(restored, "serving")


def test_without_a_vmm_a_restore_ends_and_its_socket_refuses(asker: Asker) -> None:
    with listening(asker.listener) as listener, asker.image.open("rb") as image:
        restored = asker.ask(image.fileno(), listener.fileno(), connect_timeout_ms=1)["partition_id"]
        asker.wait_state(restored, "ended")
        with socket.socket(socket.AF_UNIX) as late, pytest.raises(ConnectionRefusedError):
            late.connect(str(asker.listener))


# ------------------------------------------------ when something fails


def test_a_guest_waits_for_an_image_that_fails(asker: Asker, watcher: RawConnection) -> None:
    content = asker.image.read_bytes()
    restored = asker.restore(around_pages=1)
    with RestoringVmm(asker.listener, [PAGES]) as vmm:
        assert vmm.ask("read", 0, 1) == "0"
        os.truncate(asker.image, 100 * PAGE)
        vmm.say("read", 500, 2)
        [event] = watcher.receive()[2]
        assert (event["event"], event["partition_id"]) == ("image_failed", restored)
        asker.wait_error(restored, "the image cannot be read: the image ends before page")
        asker.image.write_bytes(content)
        assert vmm.hear() == "500 501"
        eventually(lambda: asker.progress(restored)["error"], "")  # a guest goes on before its fault is over
        assert asker.progress(restored)["image_errors"] > 0


def test_a_vmm_is_killed_if_its_image_fails_and_that_was_asked_for(asker: Asker) -> None:
    restored = asker.restore(on_image_error="kill")
    with RestoringVmm(asker.listener, [PAGES]) as vmm:
        os.truncate(asker.image, 0)
        assert vmm.ask("read", 500, 2) == ""
        assert vmm.wait() == -signal.SIGKILL
        assert "killed: the image cannot be read" in asker.wait_state(restored, "ended")["error"]


def test_a_daemon_that_drains_brings_in_what_is_missing(start_daemon: StartDaemon, tmp_path: Path) -> None:
    daemon = start_daemon()
    with RawConnection(daemon.socket) as connection:
        asker = Asker(connection, tmp_path)
        asker.restore()
        with RestoringVmm(asker.listener, [PAGES]) as vmm:
            assert vmm.ask("read", 0, 1) == "0"
            assert vmm.ask("give_back", 700, 1) == "given back"
            waiting = asker.restore()
            assert daemon.stop() == 0
            assert vmm.ask("read", 0, 700) == numbers(0, 700)
            assert vmm.ask("read", 700, 2) == "0 701"
            events = daemon.events()
    assert (waiting, events.count("restore_not_claimed"), events.count("restore_complete")) == (2, 1, 1)


@pytest.mark.parametrize(("policy", "event"), [("hold", "guest_left_frozen"), ("kill", "guest_killed")])
def test_a_guest_that_a_daemon_cannot_finish_is_held_or_killed(
    start_daemon: StartDaemon, tmp_path: Path, policy: str, event: str
) -> None:
    daemon = start_daemon(config="[timeouts]\ndrain_ms = 200\n")
    with RawConnection(daemon.socket) as connection:
        asker = Asker(connection, tmp_path)
        restored = asker.restore(on_image_error=policy)
        with RestoringVmm(asker.listener, [PAGES]) as vmm:
            asker.wait_state(restored, "serving")
            os.truncate(asker.image, 0)
            assert daemon.stop() == 0
            if policy == "kill":
                assert vmm.wait() == -signal.SIGKILL
            assert event in daemon.events()
