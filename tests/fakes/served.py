"""An in-process daemon on real sockets, and the verbs of the peers that its tests need.

Owns the sockets' paths and what has to be closed. Must not know what is right.
"""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import trio

from fakes.raw_peer import RawPeer
from interceptd.config.live import Settings
from interceptd.config.schema import Config, Limits, Metrics, Timeouts
from interceptd.daemon import Daemon
from interceptd.systemd.fd_store import FdStore


@dataclass
class Guest:
    """A partition as its VMM sees it."""

    vmm: RawPeer
    partition_id: int
    token: bytes


@dataclass
class Served:
    """A daemon that runs, and everyone who connected."""

    daemon: Daemon
    config: Config
    ended: trio.Event = field(default_factory=trio.Event)
    peers: list[RawPeer] = field(default_factory=list)

    async def connect(self) -> RawPeer:
        """To the door of the VMMs."""
        peer = await RawPeer.connect(self.config.socket)
        self.peers.append(peer)
        return peer

    async def hello(self, role: str, **fields: object) -> RawPeer:
        peer = await self.connect()
        await peer.ask("hello", protocol=1, role=role, **fields)
        return peer

    async def operator(self) -> RawPeer:
        peer = await RawPeer.connect(self.config.operator_path)
        self.peers.append(peer)
        await peer.ask("hello", protocol=1, role="operator")
        return peer

    async def guest(self) -> Guest:
        vmm = await self.hello("vmm")
        created = await vmm.ask("create_partition", address_space="declared", hypervisor="software")
        assert isinstance(created, dict)
        return Guest(vmm, created["partition_id"], created["token"])

    async def vp(self, guest: Guest, vp_index: int = 0) -> RawPeer:
        return await self.hello("vp", partition_id=guest.partition_id, token=guest.token, vp_index=vp_index)

    async def notifier(self, guest: Guest) -> RawPeer:
        return await self.hello("notifier", partition_id=guest.partition_id, token=guest.token)

    async def mmio(self, guest: Guest, pfn: int = 0x7000) -> None:
        """Sixteen pages: gfns from 0x100 on, uaddrs from 0x9000000 on."""
        await guest.vmm.ask(
            "map_vma", start_uaddr=0x9000000, page_count=16, start_pfn=pfn,
            readable=True, writable=True, executable=False, io=True,
        )  # fmt: skip
        await guest.vmm.ask(
            "add_region", start_gfn=0x100, page_count=16, start_uaddr=0x9000000,
            kind="mmio", writable=True, executable=False,
        )  # fmt: skip


@asynccontextmanager
async def serving(
    limits: Limits | None = None,
    timeouts: Timeouts | None = None,
    *,
    chaos: int = 0,
    metrics: Metrics | None = None,
    check_successor: Sequence[str] = (),
    store: FdStore | None = None,
) -> AsyncIterator[Served]:
    """A daemon with its own sockets; remaining connections are closed at the end."""
    with tempfile.TemporaryDirectory() as directory:
        config = Config(
            socket=str(Path(directory) / "vmm.sock"),
            limits=limits or Limits(),
            timeouts=timeouts or Timeouts(),
            metrics=metrics or Metrics(),
        )
        served = Served(
            Daemon(Settings(config), chaos=chaos, check_successor=check_successor, store=store), config
        )

        async def run(*, task_status: trio.TaskStatus[None]) -> None:
            await served.daemon.run(task_status=task_status)
            served.ended.set()

        async with trio.open_nursery() as nursery:
            await nursery.start(run)
            try:
                yield served
            finally:
                for peer in served.peers:
                    peer.close()
                nursery.cancel_scope.cancel()
