"""The log: JSON or console lines, with partition and VP, and never a token."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import resource
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fakes.daemon_process import DaemonProcess, StartDaemon
from fakes.eventually import eventually
from fakes.raw_client import RawConnection, pack
from fakes.raw_vmm import UADDR, WHOLE_MEMORY, RawVmm
from fakes.witness import Witness

BURST_BYTES = 64 * 1024
"""What a uid may log at once."""
FRAGMENT = 6
"""So many bytes of a token that a match is not by chance."""
FAILURE = """
import structlog
from interceptd.config.schema import Log
from interceptd.logs.configure import configure_logs

def serve(token):
    secret = {"token": token}
    raise RuntimeError("the cause")

configure_logs(Log(format=FORMAT))
try:
    serve(b"0123456789abcdef")
except RuntimeError:
    structlog.get_logger().exception("connection_failed")
"""


def misuse(daemon: DaemonProcess, vmm: RawVmm) -> None:
    """What makes a daemon say something about a client, with the token in every place that takes bytes."""
    vmm.map_vma(UADDR, 16)
    vmm.add_region(0x100, 16, UADDR, kind="pinned")
    vmm.notifier().ask("invalidate", WHOLE_MEMORY)
    for role, token in (("vp", bytes(16)), ("vp", vmm.token + b"!"), ("notifier", vmm.token[::-1])):
        with RawConnection(daemon.socket) as connection:
            hello = {"protocol": 1, "role": role, "partition_id": vmm.partition_id, "token": token}
            connection.refusal("hello", hello | {"x" * 70: vmm.token})
            connection.receive_all()
    credentials = [{"token": vmm.token}]
    for garbage in (
        [0, 1 << 32, "hello", credentials],
        [0, -1, vmm.token, credentials],
        [0, 1, vmm.token.hex().encode(), credentials],
        [0, 1, "hello", {"token": vmm.token}],
        [vmm.token, 1, "hello", credentials],
        [2, vmm.token, credentials],
        vmm.token,
    ):
        with RawConnection(daemon.socket) as connection:
            connection.send(pack(garbage))
            connection.farewell()
    vp = vmm.vp(3)
    vp.refusal("intercept", vmm.token)
    vp.send(pack([0, -1, "intercept", [vmm.token]]))
    vp.farewell()


@pytest.fixture(scope="module")
def misused(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[DaemonProcess, RawVmm]]:
    """A daemon that logs all it can, after all that it can log of a client."""
    config = '[log]\nlevel = "debug"\nformat = "json"'
    with DaemonProcess(tmp_path_factory.mktemp("logging"), config=config) as daemon:
        daemon.wait_serving()
        with RawVmm(daemon.socket) as vmm:
            misuse(daemon, vmm)
        assert daemon.stop() == 0
        yield daemon, vmm


def spellings(secret: bytes) -> Iterator[str]:
    """The ways in which bytes come to stand in a log."""
    yield secret.decode("latin-1")
    yield secret.hex()
    yield secret.hex(" ")
    yield repr(secret)[2:-1]
    yield repr(secret)[2:-1].replace("\\", "\\\\")
    yield str(list(secret))[1:-1]
    yield base64.b64encode(secret).decode().rstrip("=")
    yield base64.urlsafe_b64encode(secret).decode().rstrip("=")
    yield str(int.from_bytes(secret))
    yield str(int.from_bytes(secret, "little"))


def lines_about(daemon: DaemonProcess, event: str) -> list[dict[str, Any]]:
    return [line for line in daemon.log_lines() if line["event"] == event]


def test_every_line_for_machines_is_json_with_event_level_and_time(
    misused: tuple[DaemonProcess, RawVmm],
) -> None:
    daemon, _ = misused
    lines = daemon.log_lines()
    assert (len(lines) > 10, len(lines)) == (True, len(daemon.log_text().splitlines()))
    assert [line for line in lines if not {"event", "level", "timestamp"} <= line.keys()] == []


@pytest.mark.parametrize("event", ["partition_created", "pinned_region_dangling", "partition_ended"])
def test_a_line_about_a_partition_says_which(misused: tuple[DaemonProcess, RawVmm], event: str) -> None:
    daemon, vmm = misused
    assert [line["partition_id"] for line in lines_about(daemon, event)] == [vmm.partition_id]


def test_a_line_about_a_vp_names_it_and_its_partition(misused: tuple[DaemonProcess, RawVmm]) -> None:
    daemon, vmm = misused
    of_vps = [line for line in lines_about(daemon, "connection_refused") if "vp_index" in line]
    assert [(line["partition_id"], line["vp_index"]) for line in of_vps] == [(vmm.partition_id, 3)]


def test_a_refusal_says_of_whom(misused: tuple[DaemonProcess, RawVmm]) -> None:
    daemon, _ = misused
    refusals = lines_about(daemon, "hello_refused") + lines_about(daemon, "connection_refused")
    assert (len(refusals), {"pid", "uid", "error"} <= refusals[0].keys()) == (11, True)


def test_only_the_daemons_own_lines_name_no_process(misused: tuple[DaemonProcess, RawVmm]) -> None:
    daemon, _ = misused
    ours = {"pid": os.getpid(), "uid": os.getuid()}
    own = {line["event"] for line in daemon.log_lines() if not ours.items() <= line.items()}
    assert own == {"daemon_started", "drain_started", "daemon_ended"}


def test_a_flood_of_granted_requests_writes_a_burst_and_counts_the_rest(start_daemon: StartDaemon) -> None:
    daemon = start_daemon()
    asked, before = 1500, len(daemon.log_text())
    with RawVmm(daemon.socket) as vmm:
        for _ in range(asked):
            vmm.ask("set_policy", mmio_granularity="page")
    assert daemon.stop() == 0
    lines = [line for line in daemon.log_lines() if line.get("uid") == os.getuid()]
    written = [line for line in lines if line["event"] != "lines_not_logged"]
    assert 100 < len(written) < asked
    assert len(written) + sum(line.get("not_logged", 0) for line in lines) == asked + 2
    assert len(daemon.log_text()) - before < 2 * BURST_BYTES


def test_no_part_of_a_token_is_in_the_log_in_any_spelling(misused: tuple[DaemonProcess, RawVmm]) -> None:
    daemon, vmm = misused
    starts = range(len(vmm.token) - FRAGMENT + 1)
    secrets = [vmm.token, vmm.token[::-1], *(vmm.token[start : start + FRAGMENT] for start in starts)]
    text = daemon.log_text()
    assert [spelling for secret in secrets for spelling in spellings(secret) if spelling in text] == []


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_a_traceback_comes_without_the_local_variables(log_format: str) -> None:
    script = FAILURE.replace("FORMAT", repr(log_format))
    failed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ("the cause" in failed.stderr, "serve" in failed.stderr) == (True, True)
    assert ("0123456789abcdef" in failed.stderr, "secret" in failed.stderr) == (False, False)


HOSTILE = """
import logging
import structlog
from interceptd.config.schema import Log
from interceptd.logs.configure import configure_logs

text = "\\x1b[2J\\u202e\\udcff\\n"
configure_logs(Log(format=FORMAT))
log = structlog.get_logger()
log.warning("told", blank_free=text, listed=[text], mapped={"key": (text,)}, number=7)
logging.getLogger("library").warning("%s", text)
try:
    raise RuntimeError(text)
except RuntimeError:
    log.exception("failed")
"""


@pytest.mark.parametrize(("log_format", "lines"), [("json", 3), ("console", 2)])
def test_text_from_outside_stays_in_its_line_and_harmless_to_terminals(log_format: str, lines: int) -> None:
    """Names, paths and errors of peers, in every place where a value can stand."""
    script = HOSTILE.replace("FORMAT", repr(log_format))
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True).stderr.decode()
    rows = told.splitlines()
    assert all(row.isprintable() for row in rows)
    assert [row for row in rows[:lines] if "x1b[2J" not in row or "udcff" not in row] == []


def test_console_lines_are_plain_text_without_a_terminal(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(config='log.format = "console"')
    with Witness(daemon.socket) as witness:
        assert witness.serve() == Witness.SERVED
    assert daemon.stop() == 0
    first, *_ = daemon.log_text().splitlines()
    assert ("daemon_started" in first, f"socket={daemon.socket}" in first) == (True, True)
    assert "\x1b" not in daemon.log_text()


@pytest.mark.parametrize(("level", "events"), [("warning", []), ("info", ["daemon_started"])])
def test_lines_below_the_level_are_left_out(start_daemon: StartDaemon, level: str, events: list[str]) -> None:
    assert start_daemon(config=f'log.level = "{level}"').events() == events


def refuse_often(daemon: DaemonProcess, times: int) -> None:
    """Make the daemon say something, so many times."""
    for _ in range(times):
        with RawConnection(daemon.socket) as connection:
            connection.send(b"G")
            assert connection.farewell().name == "EBADMSG"


def test_an_unread_log_blocks_no_peer_and_its_next_line_counts_the_lost_lines(
    tmp_path: Path,
) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    with DaemonProcess(tmp_path, log=fifo) as daemon, open(reader, "rb", buffering=0) as pipe:
        daemon.wait_serving()
        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, 4096)
        with Witness(daemon.socket) as witness:
            refuse_often(daemon, 60)
            assert witness.serve() == Witness.SERVED
            pipe.read(1 << 20)
            refuse_often(daemon, 1)
            eventually(lambda: select.select([pipe], [], [], 0)[0], [pipe])
            line, *_ = pipe.read(1 << 20).splitlines()
        assert json.loads(line)["lines_dropped"] > 10


def test_a_full_disk_affects_no_peer_and_the_log_resumes_with_whole_lines(
    start_daemon: StartDaemon,
) -> None:
    daemon = start_daemon()
    room = len(daemon.log_text()) + 700
    resource.prlimit(daemon.pid, resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
    with Witness(daemon.socket) as witness:
        refuse_often(daemon, 30)
        assert (witness.serve(), len(daemon.log_text())) == (Witness.SERVED, room)
        resource.prlimit(daemon.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        refuse_often(daemon, 2)
    lines = daemon.log_text().splitlines()
    (torn,) = (number for number, line in enumerate(lines) if not line.endswith("}"))
    first, second, *_ = (json.loads(line) for line in lines[torn + 1 :])
    assert (first["lines_dropped"] > 20, "lines_dropped" in second) == (True, False)


def test_an_unwritable_log_affects_no_peer(tmp_path: Path) -> None:
    with DaemonProcess(tmp_path, log=Path("/dev/full")) as daemon:
        daemon.wait_serving()
        with Witness(daemon.socket) as witness:
            assert witness.serve() == Witness.SERVED
        assert daemon.stop() == 0
