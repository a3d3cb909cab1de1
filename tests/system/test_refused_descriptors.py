"""Where the kernel can, it refuses descriptors at the sender, on every connection that takes none (T-9)."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from fakes.daemon_process import DaemonProcess, StartDaemon
from fakes.raw_client import Connect, RawConnection, request
from fakes.raw_vmm import RawVmm
from fakes.rude_peers import send_with_descriptors
from fakes.scraper import scrape
from interceptd.connections.received_fds import SO_PASSRIGHTS


def _kernel_refuses() -> bool:
    with socket.socket(socket.AF_UNIX) as tried:
        try:
            tried.getsockopt(socket.SOL_SOCKET, SO_PASSRIGHTS)
        except OSError:
            return False
    return True


pytestmark = pytest.mark.skipif(not _kernel_refuses(), reason="needs SO_PASSRIGHTS (Linux 6.16)")


def refused(connection: RawConnection) -> bool:
    try:
        send_with_descriptors(connection, b"\x94", 1)
    except PermissionError:
        return True
    return False


def test_only_vmms_vps_and_operators_may_send_descriptors_and_only_after_their_hello(
    connect: Connect, vmm: RawVmm, daemon: DaemonProcess
) -> None:
    with RawVmm(daemon.socket, hypervisor="vmm") as other, RawConnection(daemon.operator_socket) as operator:
        operator.say_hello("operator")
        assert all(map(refused, (connect(), vmm.notifier(), other.link())))
        assert not refused(operator)
    send_with_descriptors(vmm.connection, request("statistics"), 1)
    assert vmm.connection.answer()["regions"] == 0
    assert not refused(vmm.vp())


def test_a_connection_whose_descriptors_were_refused_goes_on(vmm: RawVmm) -> None:
    notifier = vmm.notifier()
    assert refused(notifier)
    assert notifier.ask("invalidate", {"start_uaddr": 0, "length": 1 << 12}) is None


def test_the_metrics_listener_takes_none(start_daemon: StartDaemon, tmp_path: Path) -> None:
    """There the kernel would close them in the daemon's own thread."""
    place = tmp_path / "metrics.sock"
    start_daemon(config=f'metrics.listen = "unix:{place}"')
    with socket.socket(socket.AF_UNIX) as scraper:
        scraper.connect(str(place))
        with pytest.raises(PermissionError), Path(os.devnull).open("rb") as sent:
            socket.send_fds(scraper, [b"GET"], [sent.fileno()])
    assert scrape(place).value("interceptd_partitions") == 0
