"""Notifications to the service manager: READY, WATCHDOG and STOPPING on its socket, in that order."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import trio

from fakes.daemon_process import DaemonProcess, StartDaemon
from fakes.eventually import PATIENCE
from interceptd.ledger.ledger_format import LEDGER_FORMAT
from interceptd.systemd.notify import LEDGER_FORMAT_FACT, ServiceManager


class FakeManager:
    """The other end of $NOTIFY_SOCKET; `name` is as in the environment."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.settimeout(PATIENCE)
        self.socket.bind(f"\0{name[1:]}" if name.startswith("@") else name)

    def hear(self) -> dict[str, str]:
        """The next datagram."""
        return dict(line.split("=", 1) for line in self.socket.recv(4096).decode().splitlines())

    def hear_of(self, fact: str) -> dict[str, str]:
        """The next datagram that states `fact`."""
        while fact not in (heard := self.hear()):
            pass
        return heard


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[FakeManager]:
    name = str(tmp_path / "notify") if request.param == "path" else f"@interceptd-test-{os.getpid()}"
    manager = FakeManager(name)
    with manager.socket:
        yield manager


def test_a_manager_sees_ready_then_watchdog_then_stopping(
    start_daemon: StartDaemon, manager: FakeManager
) -> None:
    daemon = start_daemon(environment={"NOTIFY_SOCKET": manager.name, "WATCHDOG_USEC": "50000"})
    ready, *fed = [manager.hear() for _ in range(4)]
    daemon.signal(signal.SIGTERM)
    stopping = manager.hear_of("STOPPING")

    assert ready == {"READY": "1", "STATUS": "serving 0 partitions, 0 VPs"}
    assert fed == [{"WATCHDOG": "1", "STATUS": "serving 0 partitions, 0 VPs"}] * 3
    assert stopping == {
        "STOPPING": "1",
        "EXTEND_TIMEOUT_USEC": "10000000",
        "STATUS": "draining 0 partitions, 0 VPs",
    }
    assert daemon.wait_ended() == 0


def test_a_manager_that_hears_ready_can_connect(tmp_path: Path) -> None:
    manager = FakeManager(str(tmp_path / "notify"))
    with manager.socket, DaemonProcess(tmp_path, environment={"NOTIFY_SOCKET": manager.name}) as daemon:
        assert "READY" in manager.hear()
        assert daemon.statistics()["partitions"] == 0


def test_a_manager_that_keeps_descriptors_hears_which_ledgers_a_successor_has_to_read(
    start_daemon: StartDaemon, tmp_path: Path
) -> None:
    manager = FakeManager(str(tmp_path / "notify"))
    with manager.socket:
        start_daemon(environment={"NOTIFY_SOCKET": manager.name, "INTERCEPTD_KEEP": "yes"})
        assert manager.hear_of("READY")[LEDGER_FORMAT_FACT] == str(LEDGER_FORMAT)


def test_a_watchdog_that_is_meant_for_another_process_is_not_fed(
    start_daemon: StartDaemon, tmp_path: Path
) -> None:
    manager = FakeManager(str(tmp_path / "notify"))
    environment = {"NOTIFY_SOCKET": manager.name, "WATCHDOG_USEC": "1000", "WATCHDOG_PID": "1"}
    with manager.socket:
        daemon = start_daemon(environment=environment)
        assert daemon.stop() == 0
        assert ["READY" in manager.hear(), "STOPPING" in manager.hear()] == [True, True]


def test_a_manager_that_is_not_there_is_logged_once_and_the_daemon_serves(
    start_daemon: StartDaemon, tmp_path: Path
) -> None:
    daemon = start_daemon(environment={"NOTIFY_SOCKET": str(tmp_path / "gone"), "WATCHDOG_USEC": "2000"})
    assert daemon.stop() == 0
    assert daemon.events().count("service_manager_not_told") == 1


async def test_a_manager_that_does_not_read_is_waited_for_a_second_only(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    manager = FakeManager(str(tmp_path / "notify"))
    with manager.socket, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.setblocking(False)
        with suppress(BlockingIOError):  # when its queue is full
            while other.sendto(b"X=1", manager.name):
                pass
        await ServiceManager(manager.name).ready("serving")
        assert trio.current_time() == pytest.approx(1.0)
        assert autojump_clock.rate == 0


async def test_an_address_of_unknown_form_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    relative = FakeManager("notify")
    with relative.socket:
        manager = ServiceManager.from_environment({"NOTIFY_SOCKET": "notify"}, os.getpid())
        await manager.ready("serving")
        relative.socket.setblocking(False)
        with pytest.raises(BlockingIOError):
            relative.hear()


async def test_a_manager_that_does_not_watch_is_not_fed() -> None:
    manager = ServiceManager.from_environment({"WATCHDOG_USEC": "0"}, os.getpid())
    with trio.move_on_after(1000) as waited:
        await manager.feed_watchdog(lambda: "returns at once")
    assert not waited.cancelled_caught
