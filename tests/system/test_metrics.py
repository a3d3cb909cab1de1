"""The metrics listener of a running daemon shows what was done to it."""

from __future__ import annotations

import re
import signal
import socket
import stat
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from fakes.daemon_process import DaemonProcess, StartDaemon, run_to_end
from fakes.doing import Doing
from fakes.eventually import PATIENCE, eventually
from fakes.kept_daemon import KeptDaemon
from fakes.raw_client import RawConnection
from fakes.raw_vmm import GFN, RawVmm
from fakes.rude_peers import stop_reading
from fakes.scraper import Answer, ask, scrape
from fakes.surviving_vmm import Mode, SurvivingVmm
from fakes.witness import Witness


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "metrics.sock"


@pytest.fixture
def measured(start_daemon: StartDaemon, place: Path) -> DaemonProcess:
    """A daemon that serves metrics on a Unix socket."""
    return start_daemon(config=f'metrics.listen = "unix:{place}"')


@pytest.fixture
def vmm(measured: DaemonProcess) -> Iterator[RawVmm]:
    with RawVmm(measured.socket) as vmm:
        yield vmm


def connections(place: Path) -> dict[str, float]:
    return scrape(place).by("interceptd_connections", "role")


# ------------------------------------------------ what it shows


def test_a_partition_counts_as_recovered_before_anyone_can_scrape(tmp_path: Path, place: Path) -> None:
    """Also while its VMM's hypervisor has still to answer: else it would look as if it had ended."""
    reached, answer = threading.Event(), threading.Event()

    def hold() -> None:
        reached.set()
        assert answer.wait(PATIENCE)

    with (
        KeptDaemon(tmp_path, config=f'metrics.listen = "unix:{place}"') as kept,
        SurvivingVmm(kept.wait_serving().socket, Mode.DECLARED_VMM) as vmm,
    ):
        region = vmm.add(vmm.new_region(1))
        vmm.table.meanwhile = hold
        touching = Doing(partial(vmm.touch, region))
        try:
            assert reached.wait(PATIENCE)
            kept.kill()
            kept.wait_serving()
            eventually(lambda: kept.count("metrics_served"), 2)
            seen = scrape(place)
            assert not kept.count("partition_recovered")
        finally:
            answer.set()
        touching.wait()
    assert seen.by("interceptd_recoveries_total", "result") == {"recovered": 1}


def test_a_vmm_that_was_served_is_in_the_metrics(measured: DaemonProcess, place: Path) -> None:
    with Witness(measured.socket) as witness:
        assert witness.serve() == Witness.SERVED
        seen = scrape(place)
    answers = seen.by("interceptd_intercepts_total", "reason")
    assert answers["mapped"] > 0
    durations = seen.by("interceptd_intercept_duration_seconds_count", "waited")
    assert durations == {"no": sum(answers.values())}
    for stage in ("decode", "resolve", "map"):
        assert seen.value("interceptd_intercept_stage_duration_seconds_count", stage=stage) > 0
    assert seen.value("interceptd_hypervisor_call_duration_seconds_count", call="map_gpa") > 0
    assert seen.value("interceptd_hypercalls_total", call="map") > 0


def test_an_operator_sees_whether_anybody_fetches_the_metrics(measured: DaemonProcess, place: Path) -> None:
    before = measured.statistics()["scrapes"]
    ask(place, "/healthz")
    scrape(place)
    assert (before, measured.statistics()["scrapes"]) == (0, 1)


def test_ended_partitions_are_counted_but_not_current(measured: DaemonProcess, place: Path) -> None:
    with Witness(measured.socket) as witness:
        witness.serve()
    eventually(lambda: scrape(place).value("interceptd_partitions"), 0.0)
    seen = scrape(place)
    assert seen.value("interceptd_partitions_created_total") == 1
    assert seen.value("interceptd_slat_pages", access="some") == 0
    assert seen.value("interceptd_intercept_duration_seconds_count", waited="no") > 0


def test_partitions_are_shown_by_how_their_memory_is_watched(
    measured: DaemonProcess, vmm: RawVmm, place: Path
) -> None:
    with RawVmm(measured.socket, address_space="process"):
        seen = scrape(place).by("interceptd_watched_partitions", "watch")
    assert (vmm.partition_id, seen) == (1, {"declared": 1, "unattached": 1})


def test_connections_are_shown_by_role(measured: DaemonProcess, vmm: RawVmm, place: Path) -> None:
    vmm.notifier()
    vmm.vp(0)
    vmm.vp(1)
    eventually(lambda: connections(place), {"vmm": 1.0, "vp": 2.0, "notifier": 1.0, "operator": 1.0})
    with RawConnection(measured.socket):
        eventually(lambda: connections(place).get("none", 0.0), 1.0)


def test_a_refused_connection_is_shown_by_its_error(measured: DaemonProcess, place: Path) -> None:
    with RawConnection(measured.socket) as stranger:
        stranger.send(b"GET / HTTP/1.1\r\n\r\n")
        stranger.farewell()
    refused = scrape(place).by("interceptd_connections_refused_total", "reason")
    assert refused == {"EBADMSG": 1}


def test_every_refusal_is_exported_before_it_happens(measured: DaemonProcess, place: Path) -> None:
    """So that the first one is an increase."""
    assert measured.pid
    seen = scrape(place)
    for reason in ("EACCES", "EAGAIN", "ENOSPC", "EPROTONOSUPPORT", "ETIMEDOUT", "left"):
        assert seen.value("interceptd_connections_refused_total", reason=reason) == 0


def test_the_listener_counts_its_own_requests(measured: DaemonProcess, place: Path) -> None:
    assert measured.pid
    ask(place, "/")
    ask(place, "/healthz")
    assert scrape(place).by("interceptd_metrics_requests_total", "result") == {"404": 1, "200": 1}


def test_the_process_is_shown_as_prometheus_clients_do(measured: DaemonProcess, place: Path) -> None:
    seen = scrape(place)
    assert seen.value("process_open_fds") == pytest.approx(measured.footprint().descriptors, abs=4)
    assert seen.value("process_resident_memory_bytes") > 0
    assert (
        seen.value("interceptd_build_info", **seen.families["interceptd_build_info"].samples[0].labels) == 1
    )


def test_clients_add_no_series(measured: DaemonProcess, place: Path) -> None:
    """Names, ids and VPs are the clients' to choose: none of them is a label."""

    def series() -> int:
        shown = ask(place, "/metrics").body  # a busy machine adds a series to interceptd_long_steps_total
        return len(re.findall(r"^interceptd_(?!long_steps)\w+\{?", shown, re.MULTILINE))

    scrape(place)  # which adds the one for requests like it
    before = series()
    with ExitStack() as guests:
        for number in range(20):
            guests.enter_context(RawVmm(measured.socket)).vp(number)
        assert scrape(place).value("interceptd_partitions") == 20
        assert series() == before


# ------------------------------------------------ where


def test_without_metrics_listen_no_socket_listens(start_daemon: StartDaemon, tmp_path: Path) -> None:
    daemon = start_daemon()
    assert sorted(path.name for path in tmp_path.glob("*.sock")) == ["operator.sock", "vmm.sock"]
    assert "metrics_served" not in daemon.log_text()
    assert "scrapes" not in daemon.statistics()


def test_the_socket_has_its_mode_and_goes_with_the_daemon(start_daemon: StartDaemon, place: Path) -> None:
    daemon = start_daemon(config=f'[metrics]\nlisten = "unix:{place}"\nsocket_mode = 0o600')
    assert stat.S_IMODE(place.stat().st_mode) == 0o600
    assert daemon.stop() == 0
    assert not place.exists()


def test_a_port_serves_too_and_the_log_says_which(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(config='metrics.listen = "127.0.0.1:0"')
    found = re.search(r'"listen": "127\.0\.0\.1:(\d+)", "local": true', daemon.log_text())
    assert found is not None
    assert ask(("127.0.0.1", int(found[1])), "/healthz") == Answer(
        200, "text/plain; charset=utf-8", "serving\n"
    )


def test_a_port_that_is_taken_is_an_error_that_names_it(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        ended = run_to_end("--socket", f"{tmp_path}/vmm.sock", "--metrics-listen", f"127.0.0.1:{port}")
    assert (ended.returncode, ended.stderr) == (1, f"Error: 127.0.0.1:{port}: Address already in use\n")


def test_an_invalid_listen_address_is_an_error_that_names_the_flag(tmp_path: Path) -> None:
    ended = run_to_end("--socket", f"{tmp_path}/vmm.sock", "--metrics-listen", "localhost:9477")
    assert ended.returncode == 1
    assert (
        "--metrics-listen: metrics.listen: expected unix:/PATH, or an IP address and a port" in ended.stderr
    )


# ------------------------------------------------ requests of any client


def test_a_daemon_that_drains_says_so_until_its_end(start_daemon: StartDaemon, place: Path) -> None:
    daemon = start_daemon(config=f'timeouts.drain_ms = 600000\nmetrics.listen = "unix:{place}"')
    with RawVmm(daemon.socket) as vmm:
        vmm.add_region(GFN, 1, 0)
        stop_reading(daemon, vmm.vp(), GFN)
        daemon.signal(signal.SIGTERM)
        eventually(lambda: ask(place, "/healthz")[::2], (503, "draining\n"))
        assert scrape(place).value("interceptd_draining") == 1
    assert daemon.wait_ended() == 0


def test_silent_scrapers_block_no_other(measured: DaemonProcess, place: Path) -> None:
    with ExitStack() as silent, Witness(measured.socket) as witness:
        for _ in range(100):
            silent.enter_context(socket.socket(socket.AF_UNIX)).connect(str(place))
        assert witness.serve() == Witness.SERVED
    eventually(lambda: ask(place, "/healthz").status, 200)
