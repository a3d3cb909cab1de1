"""A partition whose service manager keeps descriptors, and one that a predecessor had."""

from __future__ import annotations

import socket
from contextlib import closing

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from fakes.model_partition import ModelPartition
from fakes.raw_peer import RawPeer
from fakes.running import Running
from fakes.served import serving
from intercept_protocol import rpc
from interceptd.config.schema import Limits
from interceptd.connections.connection import Connection
from interceptd.connections.hangup_watch import HangupWatch
from interceptd.connections.tenants import Tenants
from interceptd.ledger.records import Joined, Left, decode
from interceptd.partition.keeping import Hello
from interceptd.sessions.attach import virtual_processor
from interceptd.systemd.fd_store import FdStore


async def test_who_joins_and_leaves_is_recorded_and_an_end_leaves_nothing_to_go_on_with() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind("")  # in the abstract namespace, unix(7)
        with closing(FdStore(manager.getsockname().decode())) as store:
            async with serving(store=store) as served:
                guest = await served.guest()
                (partition,) = served.daemon.partitions
                assert partition.keeping is not None
                ledger = partition.keeping.ledger
                vp = await served.vp(guest, 3)
                vp.close()
                await wait_all_tasks_blocked()
                records = [decode(frame) for frame, _ in ledger.frames()]
                joined = [each for each in records if isinstance(each, Joined)]
                assert [(each.role, each.vp_index) for each in joined] == [("vp", 3)]
                assert records[-1] == Left(joined[0].inbox)
                guest.vmm.close()
                await served.daemon.partitions.wait_empty()
                assert partition.keeping.journal.is_void


async def test_one_that_comes_back_welcomes_nobody_before_it_is_back(nursery: trio.Nursery) -> None:
    model = ModelPartition()
    model.partition.returns(2)
    life = Running(nursery, model.partition.run, trio.sleep_forever)
    await wait_all_tasks_blocked()
    ours, theirs = socket.socketpair()
    connection, peer = Connection(ours, Tenants(Limits), HangupWatch()), RawPeer.of(theirs)
    began = trio.Event()

    async def begin() -> None:
        began.set()

    vp = virtual_processor(model.partition, 0, connection)
    welcome = rpc.encode_result(1, None)
    model.partition.start_vp(vp, connection, welcome, Hello("vp", 1), before=begin)
    await wait_all_tasks_blocked()
    with pytest.raises(BlockingIOError):
        theirs.recv(1, socket.MSG_PEEK)
    assert not began.is_set()
    model.partition.is_back()
    assert await peer.response() == rpc.Response(1, None, None)
    await began.wait()
    assert model.partition.statistics().restarts == 2
    peer.close()
    await wait_all_tasks_blocked()
    await life.cancel()
