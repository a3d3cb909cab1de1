"""Requests that do not wait for the answers before them: two threads on a connection, and floods."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Any

import pytest

from fakes.daemon_process import DaemonProcess, StartDaemon
from fakes.eventually import eventually
from fakes.raw_client import RawConnection, request
from fakes.raw_vmm import RawVmm
from fakes.rude_peers import unread_bytes
from fakes.witness import Witness
from intercept_client import AddressSpaceKind, BlockingVmm, HypervisorKind

CALLS = 10_000
AHEAD = 1000
"""Requests of one thread that are not answered yet: more than a socket takes."""


@pytest.fixture
def daemon(start_daemon: StartDaemon) -> DaemonProcess:
    """One that no pace holds up."""
    return start_daemon(config="limits.control_requests_per_second = 1000000")


@pytest.fixture
def vmm(daemon: DaemonProcess) -> Iterator[RawVmm]:
    with RawVmm(daemon.socket) as vmm:
        yield vmm


class Caller:
    """A thread's calls; `send` makes them all, however many are answered."""

    def __init__(self, connection: socket.socket, msgids: range, sending: threading.Lock) -> None:
        self.answered = threading.Semaphore(AHEAD)
        self._connection = connection
        self._msgids = msgids
        self._sending = sending

    def send(self) -> None:
        for msgid in self._msgids:
            self.answered.acquire()
            with self._sending:
                self._connection.sendall(request("translate", {"gfn": msgid}, msgid))


def test_of_two_threads_on_a_connection_each_has_all_of_its_answers(vmm: RawVmm) -> None:
    answers: list[list[Any]] = []
    with socket.socket(fileno=os.dup(vmm.connection.fileno())) as duplicate, ThreadPoolExecutor(2) as threads:
        duplicate.settimeout(RawConnection.patience)
        sending = threading.Lock()
        ranges = (range(1, CALLS + 1), range(CALLS + 1, 2 * CALLS + 1))
        callers = [Caller(duplicate, msgids, sending) for msgids in ranges]
        sent = [threads.submit(caller.send) for caller in callers]
        for _ in range(2 * CALLS):
            answers.append(vmm.connection.receive())
            callers[answers[-1][1] > CALLS].answered.release()
        for done in sent:
            done.result()
    msgids = [msgid for _, msgid, _, _ in answers]
    assert [[msgid for msgid in msgids if msgid in each] for each in ranges] == [
        list(each) for each in ranges
    ]
    assert {tuple(rest) for _, _, *rest in answers} == {(None, None)}


def test_threads_share_a_client(daemon: DaemonProcess) -> None:
    with BlockingVmm.open(daemon.socket) as vmm, ThreadPoolExecutor(2) as threads:
        vmm.create_partition(AddressSpaceKind.DECLARED, HypervisorKind.SOFTWARE)
        found = threads.map(lambda _: [vmm.translate(gfn) for gfn in range(500)], range(2))
        assert list(chain(*found)) == [None] * 1000


def test_a_peer_that_never_reads_starves_nobody_and_makes_the_daemon_keep_nothing(
    daemon: DaemonProcess, vmm: RawVmm
) -> None:
    """Its requests stay in its own socket buffer."""
    with Witness(daemon.socket) as witness, socket.socket(fileno=os.dup(vmm.connection.fileno())) as flooding:
        flooding.setblocking(False)
        flood = request("statistics", {}) * 2000

        def blocked() -> bool:
            try:
                while flooding.send(flood[: 1 << 16]):
                    pass
            except BlockingIOError:
                return unread_bytes(vmm.connection) == before
            raise AssertionError

        before = -1

        def stands_still() -> bool:
            nonlocal before
            still = blocked()
            before = unread_bytes(vmm.connection)
            return still and before > 0 and witness.serve() == Witness.SERVED

        eventually(stands_still, True)
        assert witness.serve() == Witness.SERVED


def test_an_operator_that_pipelines_has_its_answers_between_events(daemon: DaemonProcess) -> None:
    with RawConnection(daemon.operator_socket) as operator:
        operator.say_hello("operator")
        operator.send(
            request("subscribe", {"events": ["partition_created"]}, 1)
            + b"".join(request("statistics", {}, msgid) for msgid in range(2, 50))
        )
        with RawVmm(daemon.socket):
            messages = [operator.receive() for _ in range(50)]
    assert [message[1] for message in messages if message[0] == 1] == list(range(1, 50))
    assert [message[1] for message in messages if message[0] == 2] == ["event"]
