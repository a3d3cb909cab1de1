"""Descriptors that come with a request (SCM_RIGHTS): unexpected ones are closed, wrong ones refused.

That none is kept is the witness's to see: it counts the daemon's descriptors before and after.
"""

from __future__ import annotations

import os
import resource
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from fakes import before_passrights
from fakes.daemon_process import DaemonProcess
from fakes.raw_client import READ, Connect, RawConnection, Refusal, intercept_message, request
from fakes.raw_vmm import GFN, RawVmm
from fakes.rude_peers import send_slow_to_close, send_with_descriptors, slow_to_close, stopped
from fakes.silent_fuse import silent_file
from fakes.witness import Witness

MORE_THAN_ARE_ACCEPTED_MEANWHILE = 40
"""Connections: until it has acted on a signal, the daemon accepts one in each of a few rounds of its loop."""
needs_fuse = pytest.mark.skipif(
    os.geteuid() != 0 or not Path("/dev/fuse").exists(), reason="only root can mount FUSE, with /dev/fuse"
)
MOST = 253
"""SCM_MAX_FD: the kernel passes no more with one message."""
ATTACH = request("attach_memory", {})


@pytest.fixture
def daemon(older_daemon: DaemonProcess) -> DaemonProcess:
    """One whose kernel does not refuse the descriptors that these tests send."""
    return older_daemon


@pytest.fixture
def live_vmm(daemon: DaemonProcess, witness: Witness) -> Iterator[RawVmm]:  # noqa: ARG001 - it looks before and after
    """A partition that wants the descriptors of its VMM's memory."""
    with RawVmm(daemon.socket, address_space="process") as vmm:
        yield vmm


def refused(vmm: RawVmm) -> Refusal:
    _, _, error, _ = vmm.connection.receive()
    return Refusal(*error)


@pytest.mark.parametrize("count", [1, MOST])
@pytest.mark.parametrize("method", ["hello", "statistics", "attach_memory", "intercept"])
def test_unexpected_descriptors_are_closed(connect: Connect, vmm: RawVmm, method: str, count: int) -> None:
    send_with_descriptors(connect(), b"\xc1", count)
    send_with_descriptors(connect(), request("hello", {"protocol": 1, "role": "vmm"}), count)
    for connection in (vmm.connection, vmm.vp(), vmm.notifier()):
        send_with_descriptors(connection, request(method), count)
        assert connection.receive()[:2] == [1, 1]


def test_slow_to_close_descriptors_block_no_other(
    connect: Connect, vmm: RawVmm, live_vmm: RawVmm, witness: Witness
) -> None:
    """I7: receiving only the bytes closes the descriptors that came with them, inline."""
    with ExitStack() as peers:
        for connection in (connect(), vmm.connection, vmm.vp(), vmm.notifier(), live_vmm.connection):
            send_slow_to_close(connection, request("statistics"), peers)
            assert witness.serve() == Witness.SERVED


def test_slow_to_close_descriptors_block_no_other_even_if_not_received(
    connect: Connect, daemon: DaemonProcess, witness: Witness
) -> None:
    """I7: with a socket that is closed the kernel closes what was on its way there."""
    with ExitStack() as peers:
        refused_at_once = connect()
        daemon.signal(signal.SIGSTOP)
        refused_at_once.send(b"\xc1")
        send_slow_to_close(refused_at_once, b"unread", peers)
        daemon.signal(signal.SIGCONT)
        assert witness.serve() == Witness.SERVED
        assert refused_at_once.receive()[:2] == [1, 0]


@needs_fuse
def test_a_file_whose_fuse_server_answers_nothing_blocks_no_other(tmp_path: Path) -> None:
    """Whatever examines it waits, and so does each close, which not even SIGKILL ends."""
    launch, environment = before_passrights.LAUNCH, before_passrights.ENVIRONMENT
    with (
        DaemonProcess(tmp_path, launch=launch, environment=environment) as daemon,
        Witness(daemon.wait_serving().socket) as witness,
        RawVmm(daemon.socket, address_space="process") as live,
        silent_file() as file,
    ):
        live.connection.send(request("attach_memory", {"promise_begin_end": True}), [file])
        vp = witness.vp(1)
        error = None
        while error is None:
            vp.send(request("intercept", intercept_message(GFN - 1, READ)), [file])
            error = vp.receive()[2]
        assert (error[1], vp.receive_all()) == ("ENOSPC", [])
        assert witness.serve() == Witness.SERVED
        assert len(os.listdir(f"/proc/{daemon.pid}/task")) < 10
        assert not live.connection.is_readable()


def test_slow_to_close_descriptors_that_nobody_accepted_do_not_hold_up_the_end(tmp_path: Path) -> None:
    """With its listener the kernel closes what was sent to it."""
    launch, environment = before_passrights.LAUNCH, before_passrights.ENVIRONMENT
    with (
        DaemonProcess(tmp_path, launch=launch, environment=environment) as daemon,
        ExitStack() as peers,
        stopped(daemon.wait_serving().pid),
    ):
        daemon.signal(signal.SIGTERM)
        for _ in range(MORE_THAN_ARE_ACCEPTED_MEANWHILE):
            waiting = peers.enter_context(RawConnection(daemon.socket))
            with slow_to_close(peers) as slow, socket.socket(fileno=os.dup(waiting.fileno())) as duplicate:
                socket.send_fds(duplicate, [b"unread"], [slow.fileno()])
        daemon.signal(signal.SIGCONT)
        assert daemon.wait_ended() == 0


@pytest.mark.parametrize("path", ["/dev/null", "/proc/self/status", "/proc/self/smaps", "/etc/passwd"])
def test_a_descriptor_of_something_else_than_maps_is_einval(live_vmm: RawVmm, path: str) -> None:
    send_with_descriptors(live_vmm.connection, ATTACH, 1, path)
    assert refused(live_vmm).name == "EINVAL"


@pytest.mark.parametrize(
    "name",
    [b"\xff\xfe", b"\xf0" * 255, b"a\nb\x1b[2J", "\u202e".encode()],
    ids=["no UTF-8", "long", "control", "bidi"],
)
def test_a_refusal_that_quotes_any_path_is_an_answer_in_one_harmless_line(
    live_vmm: RawVmm, tmp_path: Path, name: bytes
) -> None:
    path = tmp_path / os.fsdecode(name)
    path.touch()
    send_with_descriptors(live_vmm.connection, ATTACH, 1, str(path))
    refusal = refused(live_vmm)
    assert (refusal.name, str(tmp_path) in refusal.message) == ("EINVAL", True)
    assert refusal.message.isprintable()
    assert live_vmm.ask("statistics")["regions"] == 0


@contextmanager
def free_descriptors(daemon: DaemonProcess, count: int) -> Iterator[None]:
    """The daemon can receive no more than `count` descriptors."""
    used = {int(name) for name in os.listdir(f"/proc/{daemon.pid}/fd")}
    free = [number for number in range(len(used) + count + 1) if number not in used]
    before = resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (free[count], before[1]))
    try:
        yield
    finally:
        resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("room", [0, 1])
def test_a_handover_with_truncated_descriptors_is_refused_and_can_be_retried(
    daemon: DaemonProcess, live_vmm: RawVmm, room: int
) -> None:
    """Attached in part, its memory would be unbacked for good, without an error."""
    with free_descriptors(daemon, room):
        send_with_descriptors(live_vmm.connection, ATTACH, 2, "/proc/self/maps")
        refusal = refused(live_vmm)
    assert (refusal.name, refusal.details) == ("EMFILE", {"received": room})
    send_with_descriptors(live_vmm.connection, ATTACH, 1, "/proc/self/maps")
    assert live_vmm.connection.receive() == [1, 1, None, None]


def test_requests_that_want_no_descriptors_are_answered_though_some_are_cut_off(
    daemon: DaemonProcess, vmm: RawVmm, live_vmm: RawVmm
) -> None:
    vmm.add_memory()
    vp = vmm.vp()
    with free_descriptors(daemon, 1):
        for connection in (vmm.connection, live_vmm.connection):
            send_with_descriptors(connection, request("statistics"), 2)
            assert connection.answer()["regions"] >= 0
        send_with_descriptors(vp, request("intercept", intercept_message(GFN, READ)), 2)
        assert vp.answer() == ["resume", "mapped"]


@pytest.mark.parametrize("count", [3, MOST])
def test_too_many_descriptors_are_einval(live_vmm: RawVmm, count: int) -> None:
    send_with_descriptors(live_vmm.connection, ATTACH, count, "/proc/self/maps")
    assert refused(live_vmm).name == "EINVAL"


def test_attaching_without_a_descriptor_is_einval(live_vmm: RawVmm) -> None:
    assert live_vmm.connection.refusal("attach_memory", {}).name == "EINVAL"


def test_the_maps_of_another_process_are_einval(daemon: DaemonProcess, live_vmm: RawVmm) -> None:
    send_with_descriptors(live_vmm.connection, ATTACH, 1, f"/proc/{daemon.pid}/maps")
    assert refused(live_vmm).name == "EINVAL"


def test_half_a_request_with_descriptors_keeps_none_once_its_vmm_left(
    live_vmm: RawVmm, witness: Witness
) -> None:
    send_with_descriptors(live_vmm.connection, ATTACH[:4], MOST)
    assert witness.serve() == Witness.SERVED


def test_a_vmm_that_attaches_its_memory_again_and_again_leaves_no_descriptor(live_vmm: RawVmm) -> None:
    for _ in range(20):
        send_with_descriptors(live_vmm.connection, ATTACH, 1, "/proc/self/maps")
        assert live_vmm.connection.receive()[:2] == [1, 1]
