"""The start of a daemon that somebody already waits for."""

from __future__ import annotations

import errno
import os
import socket
from contextlib import closing
from pathlib import Path

import pytest
import structlog
import trio

from intercept_protocol.text import sentence
from interceptd.config.live import Settings
from interceptd.config.schema import Config
from interceptd.daemon import Daemon
from interceptd.ledger.ledger import Ledger
from interceptd.ledger.records import Served, encode
from interceptd.partition.keeping import Keeper
from interceptd.recovery.recover import Recovery
from interceptd.systemd.fd_store import FdStore
from interceptd.systemd.socket_activation import Kept, PassedSockets


async def test_rounds_are_counted_while_partitions_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else long work gives way whenever it asks whether it should: its share knows its time by the round."""
    rounds: list[int] = []

    async def wait_found(_recovery: Recovery) -> None:
        for _ in range(4):
            rounds.append(daemon.monitor.round)
            await trio.lowlevel.checkpoint()

    monkeypatch.setattr(Recovery, "wait_found", wait_found)
    left = Kept("m1", os.open(os.devnull, os.O_RDONLY))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        with closing(FdStore(str(tmp_path / "notify"))) as store:
            settings = Settings(Config(socket=str(tmp_path / "vmm.sock")))
            daemon = Daemon(settings, passed=PassedSockets(kept=(left,)), store=store)
            async with trio.open_nursery() as nursery:
                await nursery.start(daemon.run)
                nursery.cancel_scope.cancel()
    assert rounds[-1] > rounds[0]


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOMEM, "Cannot allocate memory"), TypeError("a mistake of ours")]
)
async def test_a_return_that_fails_in_any_way_fails_alone(
    error: Exception, ledger: Ledger, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In its nursery are the connections of all others."""

    def fail(_descriptor: int) -> Ledger:
        raise error

    monkeypatch.setattr(Ledger, "open", fail)
    kept = [Kept("p1", os.dup(ledger.descriptor)), Kept("c1", os.open(os.devnull, os.O_RDONLY))]
    daemon = Daemon(Settings(Config()))
    recovery = Recovery(daemon.dispatcher, daemon.partitions, Keeper(None, lambda *_: None, lambda _: None))
    with structlog.testing.capture_logs() as logs:
        recovery.start(kept, nursery)
        await recovery.wait_found()
    assert [(line["event"], line["error"]) for line in logs] == [("partition_not_recovered", sentence(error))]
    assert (daemon.partitions.recovered, daemon.partitions.not_recovered) == (0, 1)


async def test_what_a_compaction_that_was_killed_has_written_is_given_back(
    ledger: Ledger, nursery: trio.Nursery
) -> None:
    ledger.append(encode(Served(1)))
    rewriting = ledger.rewrite()
    for _ in range(100):
        rewriting.append(bytes(100_000))
    before = os.fstat(ledger.descriptor).st_blocks
    ours, theirs = socket.socketpair()
    with theirs:
        kept = [Kept("p1", os.dup(ledger.descriptor)), Kept("c1", ours.detach())]
        daemon = Daemon(Settings(Config()))
        keeper = Keeper(None, lambda *_: None, lambda _: None)
        recovery = Recovery(daemon.dispatcher, daemon.partitions, keeper)
        recovery.start(kept, nursery)
        await recovery.wait_found()
    assert os.fstat(ledger.descriptor).st_blocks < before // 20
