"""What operators see of restored guests: lists, events, metrics, and what `interceptctl` says of them."""

from __future__ import annotations

import os
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from fakes.daemon_process import DaemonProcess, StartDaemon
from fakes.eventually import eventually
from fakes.guide import NIGHT, commands
from fakes.raw_client import RawConnection
from fakes.restore_asker import PAGES, Asker, numbers
from fakes.restoring_vmm import RestoringVmm
from fakes.scraper import Scrape, ask
from interceptctl.cli import main

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not Path("/dev/userfaultfd").exists(),
    reason="needs /dev/userfaultfd, which root alone may open",
)
TOLD = [
    "restore_begun", "restore_not_claimed", "restore_complete", "handoff_refused", "image_failed",
    "guest_killed", "guest_left_frozen", "partition_created", "partition_ended",
]  # fmt: skip


class Watched:
    """A daemon, an operator who receives its events, and the program that asks it for restores."""

    def __init__(self, daemon: DaemonProcess, asker: Asker, operator: RawConnection, metrics: Path) -> None:
        self.daemon = daemon
        self.asker = asker
        self._operator = operator
        self._metrics = metrics

    def hear(self, *expected: str) -> list[dict[str, Any]]:
        """The next events, which must be these."""
        heard = []
        for _ in expected:
            kind, method, (fields,) = self._operator.receive()
            assert (kind, method) == (2, "event")
            heard.append(dict(fields))
        assert [each["event"] for each in heard] == list(expected)
        return heard

    def listed(self) -> list[tuple[int, str, int]]:
        """The id, the state and the pid of each restore."""
        partitions = self.daemon.operator().ask("list_partitions")["partitions"]
        return [(each["partition_id"], each["restore"], each["pid"]) for each in partitions]

    def scrape(self) -> Scrape:
        return Scrape(ask(self._metrics, "/metrics").body)

    def type(self, *words: object) -> str:
        """What `interceptctl` says."""
        arguments = ["--socket", str(self.daemon.operator_socket), *map(str, words)]
        return CliRunner().invoke(main, arguments, catch_exceptions=False).output


@pytest.fixture
def watched(start_daemon: StartDaemon, tmp_path: Path) -> Iterator[Watched]:
    metrics = tmp_path / "metrics.sock"
    daemon = start_daemon(config=f'metrics.listen = "unix:{metrics}"\ntimeouts.drain_ms = 300\n')
    with RawConnection(daemon.socket) as connection, RawConnection(daemon.operator_socket) as operator:
        operator.say_hello("operator")
        assert operator.ask("subscribe", {"events": TOLD}) is None
        yield Watched(daemon, Asker(connection, tmp_path), operator, metrics)


def test_a_restore_is_seen_from_the_request_to_the_end(watched: Watched, tmp_path: Path) -> None:
    asker = watched.asker
    with tempfile.TemporaryFile() as prefetch:
        prefetch.write(struct.pack("<2I", 512, 16))
        prefetch.flush()
        restored = asker.restore(prefetch.fileno(), prefetch=True, around_pages=8)
    (begun,) = watched.hear("restore_begun")
    assert (begun["partition_id"], begun["image_pages"], begun["uid"]) == (restored, PAGES, os.geteuid())
    assert watched.listed() == [(restored, "waiting", 0)]
    assert f"waiting for a VMM, whose memory comes from a snapshot: {restored}\n" in watched.type("ls")
    assert "no partitions" in watched.type("top", "--once")
    assert "there is no partition to record" in watched.type("record", tmp_path / "recording")
    assert watched.scrape().value("interceptd_restores", state="waiting") == 1
    with RestoringVmm(asker.listener, [PAGES]) as vmm:
        (created,) = watched.hear("partition_created")
        assert (created["partition_id"], created["pid"]) == (restored, vmm.pid)
        assert watched.listed() == [(restored, "serving", vmm.pid)]
        eventually(lambda: asker.progress(restored)["prefetched_pages"], 16)
        assert vmm.ask("read", 3, 1) == "3"
        assert vmm.ask("give_back", 0, 2) == "given back"
        assert vmm.ask("read", 0, 1) == "0"
        eventually(lambda: asker.progress(restored)["faults"], 2)
        shown = watched.type("show", restored)
        assert f"restore: serving pid {vmm.pid}\n" in shown
        assert "8 KiB on demand, 32 KiB around, 64 KiB prefetched" in shown
        assert vmm.ask("read", 2, PAGES - 2) == numbers(2, PAGES - 2)
        (complete,) = watched.hear("restore_complete")
        assert complete["pages_in"] == PAGES
        assert watched.scrape().value("interceptd_restores", state="complete") == 1
    watched.hear("partition_ended")
    eventually(lambda: watched.scrape().value("interceptd_restores_ended_total", result="ended"), 1)
    seen = watched.scrape()
    pages = [
        seen.value("interceptd_restore_pages_total", cause=cause)
        for cause in ("demand", "around", "prefetch")
    ]
    assert (sum(pages), pages[2]) == (PAGES + 2, 16)  # two of them came again
    assert seen.value("interceptd_restore_zero_pages_total") == 2
    assert seen.value("interceptd_restore_fault_duration_seconds_count") == pages[0]
    assert seen.value("interceptd_restore_first_fault_seconds_count") == 1
    assert seen.value("interceptd_restore_quiet_seconds_count") == 1
    assert watched.listed() == []


def test_a_guest_that_waits_for_its_image_is_named_with_the_reason(watched: Watched) -> None:
    asker = watched.asker
    content = asker.image.read_bytes()
    restored = asker.restore(around_pages=1)
    with RestoringVmm(asker.listener, [PAGES]) as vmm:
        os.truncate(asker.image, 0)
        vmm.say("read", 500, 1)
        *_, failed = watched.hear("restore_begun", "partition_created", "image_failed")
        assert "the image ends before page" in failed["error"]
        eventually(lambda: asker.progress(restored)["oldest_fault_ms"] > 0, True)
        program, *words = commands("A restored VM stalls", NIGHT)[0].split()
        assert program == "interceptctl"
        line = watched.type(*words).splitlines()[1].split()
        assert (line[1], line[2], line[6]) == (str(vmm.pid), str(restored), "1")
        shown = watched.type("show", restored)
        assert f"restore: serving pid {vmm.pid}: the image cannot be read: " in " ".join(shown.split())
        assert "a fault has waited for" in shown
        assert "the image of its snapshot could not be read" in " ".join(shown.split())
        seen = watched.scrape()
        assert seen.value("interceptd_restore_oldest_fault_seconds") > 0
        assert seen.value("interceptd_restore_image_errors_total") > 0
        asker.image.write_bytes(content)
        assert vmm.hear() == "500"
        eventually(lambda: asker.progress(restored)["oldest_fault_ms"], 0)


def test_a_restore_that_nobody_claims_is_told_and_counted(watched: Watched) -> None:
    watched.asker.restore(connect_timeout_ms=1)
    _, ended = watched.hear("restore_begun", "restore_not_claimed")
    assert "no VMM has handed over its memory within 0.001 s" in ended["error"]
    eventually(lambda: watched.scrape().value("interceptd_restores_ended_total", result="not_claimed"), 1)


def test_a_vmm_that_is_killed_is_told_and_counted(watched: Watched) -> None:
    restored = watched.asker.restore(on_image_error="kill")
    with RestoringVmm(watched.asker.listener, [PAGES]) as vmm:
        os.truncate(watched.asker.image, 0)
        assert vmm.ask("read", 0, 1) == ""
        *_, killed = watched.hear("restore_begun", "partition_created", "image_failed", "guest_killed")
        assert (killed["partition_id"], "image" in killed["error"]) == (restored, True)
    eventually(lambda: watched.scrape().value("interceptd_restores_ended_total", result="killed"), 1)


def test_a_guest_that_is_left_frozen_is_told(watched: Watched) -> None:
    restored = watched.asker.restore()
    with RestoringVmm(watched.asker.listener, [PAGES]):
        watched.hear("restore_begun", "partition_created")
        os.truncate(watched.asker.image, 0)
        watched.daemon.operator().ask("drain", {"timeout_ms": 60_000})
        *_, frozen = watched.hear("image_failed", "partition_ended", "guest_left_frozen")
        assert (frozen["partition_id"], frozen["error"]) == (
            restored,
            "the daemon ended before all pages were in",
        )
