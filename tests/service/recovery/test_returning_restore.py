"""A restore of which something was lost does not come back: its VMM meets the policy that was asked for."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Final, cast

import pytest
import structlog
import trio

from fakes.eventually import PATIENCE
from fakes.fake_kernel import FakeImage, FakeKernel, FakeWorkers
from fakes.others import Others
from fakes.restored_guest import RestoredGuest
from fakes.used_up_time import time_used_up_every
from intercept_protocol.errors import WireError
from intercept_protocol.messages import RestoreProgress, RestoreState
from interceptd.address_space.image import ImagePart
from interceptd.config.live import Settings
from interceptd.config.schema import Config
from interceptd.connections.peer import Peer
from interceptd.connections.socket_cookie import cookie_of
from interceptd.daemon import Daemon
from interceptd.ledger.ledger import Ledger
from interceptd.ledger.records import HandedOff, Removed, Restoring, encode
from interceptd.partition.keeping import Keeper
from interceptd.partition.partition import Partition
from interceptd.partition.restored_guest import Ending
from interceptd.recovery.recover import Recovery
from interceptd.recovery.returning_restore import bring_back
from interceptd.systemd.fd_store import FdStore
from interceptd.systemd.socket_activation import Kept

from .states import folded

CONNECTS: Final = """
import signal, socket, sys
connection = socket.socket(socket.AF_UNIX)
connection.connect(sys.argv[1])
signal.pause()
"""
MANY: Final = 256
TURNS: Final = 8
OURSELVES: Final = Peer(os.getpid(), os.geteuid(), os.getegid())


class Vmm:
    """A process that has connected. Killed at the end."""

    def __init__(self, directory: Path) -> None:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(directory / "listener"))
            listener.listen()
            self.process = subprocess.Popen([sys.executable, "-c", CONNECTS, directory / "listener"])
            self.connection = listener.accept()[0]


@pytest.fixture
def vmm(tmp_path: Path) -> Iterator[Vmm]:
    vmm = Vmm(tmp_path)
    yield vmm
    vmm.connection.close()
    vmm.process.kill()
    vmm.process.wait()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FdStore]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.setblocking(False)
        store = FdStore(str(tmp_path / "notify"))
        yield store
        store.close()


class Return:
    """What is left of a restore, and its return."""

    def __init__(self, ledger: Ledger, store: FdStore) -> None:
        self.kept = [Kept("p7", os.dup(ledger.descriptor))]
        self._ledger = ledger
        self._store = store

    def record(self, vmm: Vmm | None, **options: object) -> None:
        self._ledger.append(encode(Restoring(os.geteuid(), 3, "a starter", 16, dict(options), None)))
        if vmm is not None:
            regions = [(0x10000, 16 << 12, 0, 4096)]
            self._ledger.append(encode(HandedOff(cookie_of(vmm.connection), regions)))
            self.kept.append(Kept("c7", os.dup(vmm.connection.fileno())))

    async def __call__(self, nursery: trio.Nursery) -> tuple[Daemon, list[str]]:
        """The daemon, and what it has logged."""
        daemon = Daemon(Settings(Config()))
        keeper = Keeper(self._store, lambda *_: None, lambda _: None)
        recovery = Recovery(daemon.dispatcher, daemon.partitions, keeper)
        with structlog.testing.capture_logs() as logs, trio.move_on_after(30):
            recovery.start(self.kept, nursery)
            await recovery.wait_found()
        return daemon, [line["event"] for line in logs]


@pytest.fixture
def left(ledger: Ledger, store: FdStore) -> Return:
    return Return(ledger, store)


async def progress(daemon: Daemon) -> tuple[str, str]:
    figures = await daemon.dispatcher.restores.progress(RestoreProgress(partition_id=3), OURSELVES)
    return figures.state, figures.error


async def test_a_vmm_is_killed_whose_image_was_lost_if_that_was_asked_for(
    left: Return, vmm: Vmm, nursery: trio.Nursery
) -> None:
    left.record(vmm, on_image_error="kill")
    daemon, logged = await left(nursery)
    assert vmm.process.wait(PATIENCE) == -signal.SIGKILL
    assert logged == ["guest_killed", "partition_not_recovered"]
    why = "killed: its image and its VMM's memory were not kept"
    assert await progress(daemon) == (RestoreState.ENDED, why)
    assert daemon.partitions.not_recovered == 1
    assert daemon.dispatcher.restores.endings == {Ending.KILLED: 1}


async def test_a_vmm_stays_frozen_whose_image_was_lost(left: Return, vmm: Vmm, nursery: trio.Nursery) -> None:
    left.record(vmm)
    daemon, logged = await left(nursery)
    assert logged == ["guest_left_frozen", "partition_not_recovered"]
    assert daemon.dispatcher.restores.endings == {Ending.LEFT_FROZEN: 1}
    assert vmm.process.poll() is None


async def test_a_vmm_that_has_ended_meanwhile_is_nobodys_fault(
    left: Return, vmm: Vmm, nursery: trio.Nursery
) -> None:
    left.record(vmm, on_image_error="kill")
    vmm.process.kill()
    vmm.process.wait()
    daemon, logged = await left(nursery)
    assert logged == ["partition_not_continued"]
    assert await progress(daemon) == (RestoreState.ENDED, "")


async def test_one_that_waited_and_was_kept_in_part_has_ended(left: Return, nursery: trio.Nursery) -> None:
    left.record(None)
    daemon, logged = await left(nursery)
    assert logged == ["partition_not_recovered"]
    why = "its image and its listening socket were not kept"
    assert await progress(daemon) == (RestoreState.ENDED, why)


async def test_what_was_not_recorded_was_not_asked_for(
    left: Return, nursery: trio.Nursery, tmp_path: Path
) -> None:
    """Its starter asks again, with the same listener: that goes on to listen."""
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as vmm:
        listener.bind(str(tmp_path / "listener"))
        listener.listen()
        left.kept += [Kept("l7", os.dup(listener.fileno())), Kept("i7", os.open(os.devnull, os.O_RDONLY))]
        daemon, logged = await left(nursery)
        vmm.connect(str(tmp_path / "listener"))
    assert logged == ["partition_not_continued"]
    with pytest.raises(WireError, match="no restore 3"):
        await progress(daemon)


async def test_much_that_was_given_back_comes_back_in_turns(nursery: trio.Nursery) -> None:
    others = Others(nursery)
    layout = [ImagePart(MANY, 3 * MANY, 0)]
    guest = RestoredGuest(FakeKernel(), FakeImage(2 * MANY), layout, workers=FakeWorkers())
    parts = SimpleNamespace(
        regions=guest.manager, memory=guest.memory, table=guest.hypervisor.table, notifier=guest.notifier
    )
    fold = folded([Removed(page, page + 1) for page in range(MANY, 3 * MANY, 2)])
    event = memoryview(bytearray(32))
    with time_used_up_every(MANY // TURNS):
        await bring_back(cast(Partition, parts), guest.regions, fold, event)
    assert others.turns >= TURNS - 2
    assert guest.memory.removed_pages == MANY
