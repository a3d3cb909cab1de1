"""A daemon that may open few descriptors: VMMs are refused at once; operators and scrapers still get in."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import pytest

from fakes.daemon_process import DaemonProcess
from fakes.eventually import eventually
from fakes.raw_client import RawConnection, Refusal, request
from fakes.raw_vmm import GFN, MODEL, RawVmm
from fakes.rude_peers import send_with_descriptors
from fakes.scraper import ask, scrape
from fakes.witness import Witness

LIMIT: Final = 64
LAUNCH: Final = (
    "/bin/sh", "-c", f'ulimit -n {LIMIT} && exec "$0" "$@"', sys.executable, "-m", "interceptd"
)  # fmt: skip
PROCESS: Final = {"address_space": "process", "hypervisor": "vmm"}


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    config = f'metrics.listen = "unix:{tmp_path / "metrics.sock"}"'
    with DaemonProcess(tmp_path, config=config, launch=LAUNCH) as process:
        yield process.wait_serving()


@pytest.fixture
def kept_daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    """Under a keeper, which may open more."""
    launch = (sys.executable, "-m", "interceptd", "keep", "--")
    with DaemonProcess(tmp_path, config="timeouts.hello_ms = 600000", launch=launch) as process:
        process.wait_serving()
        [started] = lines(process, "daemon_process_started")
        resource.prlimit(started["pid"], resource.RLIMIT_NOFILE, (LIMIT, LIMIT))
        yield process
        process.stop()


@pytest.fixture
def opened() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


def newcomer(daemon: DaemonProcess, opened: ExitStack) -> RawConnection | Refusal:
    """A VMM that connects now, or why it may not. A refusal comes instead of the welcome."""
    connection = opened.enter_context(RawConnection(daemon.socket))
    connection.send(request("hello", {"protocol": 1, "role": "vmm"}))
    _, msgid, error, _ = connection.receive()
    return connection if error is None else Refusal(*error) if msgid == 0 else pytest.fail(str(error))


def fill(daemon: DaemonProcess, opened: ExitStack) -> tuple[list[RawConnection], Refusal]:
    """Connect until one is refused."""
    welcome = []
    while isinstance(answer := newcomer(daemon, opened), RawConnection):
        welcome.append(answer)
    return welcome, answer


def lines(daemon: DaemonProcess, event: str) -> list[dict[str, Any]]:
    return [line for line in daemon.log_lines() if line["event"] == event]


def test_vmms_beyond_what_is_left_are_refused_at_once_and_the_others_go_on(
    daemon: DaemonProcess, opened: ExitStack
) -> None:
    metrics = daemon.socket.with_name("metrics.sock")
    with Witness(daemon.socket) as witness:
        welcome, refusal = fill(daemon, opened)
        assert (refusal.name, refusal.details) == ("EMFILE", {})
        assert all(isinstance(newcomer(daemon, opened), Refusal) for _ in range(LIMIT))
        assert witness.serve() == Witness.SERVED
        operators = [opened.enter_context(RawConnection(daemon.operator_socket)) for _ in range(3)]
        assert [operator.say_hello("operator")["protocol"] for operator in operators] == [1, 1, 1]
        refused = scrape(metrics).value("interceptd_connections_refused_total", reason="EMFILE")
        assert refused == LIMIT + 1
        [line] = lines(daemon, "descriptors_run_out")
        assert (line["most_connections_uid"], line["not_warned"]) == (os.getuid(), 0)
        assert line["most_connections"] > len(welcome)
        welcome[0].close()
        eventually(lambda: isinstance(newcomer(daemon, opened), RawConnection), True)


def test_a_partition_that_exists_may_take_some_of_the_reserve_but_not_all(
    daemon: DaemonProcess, opened: ExitStack
) -> None:
    """Its VMM hands over what is no memory: EINVAL, once it was received."""
    vmm = opened.enter_context(RawVmm(daemon.socket, address_space="process"))
    late = opened.enter_context(RawConnection(daemon.socket))
    late.say_hello("vmm")
    fill(daemon, opened)
    assert late.refusal("create_partition", PROCESS).name == "EMFILE"
    assert late.ask("create_partition", MODEL)["partition_id"] == 2
    assert attach(vmm, 3).name == "EINVAL"
    refusal = attach(vmm, 12)
    assert refusal.name == "EMFILE"
    assert 9 <= refusal.details["received"] <= 12, "the first three may not be closed yet"
    assert daemon.statistics()["partitions"] == 2


def attach(vmm: RawVmm, count: int) -> Refusal:
    """`attach_memory` with so many descriptors of /dev/null."""
    send_with_descriptors(vmm.connection, request("attach_memory", {}), count)
    _, _, error, _ = vmm.connection.receive()
    return Refusal(*error)


def test_when_even_operators_find_no_descriptor_the_log_says_so_once_and_partitions_go_on(
    daemon: DaemonProcess, opened: ExitStack
) -> None:
    with Witness(daemon.socket) as witness, witness.vp(1) as vp:
        for _ in range(2 * LIMIT):
            opened.enter_context(RawConnection(daemon.operator_socket))
        daemon.wait_event("connection_not_accepted")
        opened.enter_context(RawConnection(daemon.socket))  # and VMMs wait, too
        assert witness.serve() == Witness.SERVED
        assert vp.intercept(GFN)[0] == "resume"
        opened.close()
        assert witness.vp(2).intercept(GFN)[0] == "resume"
    [line] = lines(daemon, "connection_not_accepted")
    assert (line["error"], line["most_connections_uid"]) == ("EMFILE: Too many open files", os.getuid())
    assert ask(daemon.socket.with_name("metrics.sock"), "/healthz").status == 200


def test_a_ledger_takes_nothing_of_the_reserve(kept_daemon: DaemonProcess, opened: ExitStack) -> None:
    """Its VMM is welcome, and would not survive a restart."""
    connections = [opened.enter_context(RawConnection(kept_daemon.socket)) for _ in range(LIMIT)]

    def settled() -> int:
        seen = kept_daemon.statistics()
        counted: int = seen["connections_without_hello"] + seen["connections_refused"]
        return counted

    eventually(settled, LIMIT)
    waiting = [connection for connection in connections if not connection.is_readable()]
    kept = {connection.say_hello("vmm")["features"]["kept"] for connection in waiting}
    assert kept == {False}
    assert "partition_not_kept" in kept_daemon.events()
    with RawConnection(kept_daemon.operator_socket) as operator:
        assert operator.say_hello("operator")["features"]["kept"]
