"""I7: no client input affects another partition, stops the daemon or makes it grow."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs
from trio.testing import MockClock, wait_all_tasks_blocked

from fakes.raw_peer import RawPeer
from fakes.served import Guest, Served, serving
from intercept_protocol import rpc
from intercept_protocol.outcomes import Answer

fields = st.dictionaries(
    st.sampled_from(["start_gfn", "page_count", "start_uaddr", "length", "kind", "vp_index", "role"]),
    st.integers(0, 2**64 - 1)
    | st.sampled_from(["all", "pinned", "auto", None, True])
    | st.binary(max_size=9),
)
methods = st.sampled_from(
    [
        *["hello", "create_partition", "add_region", "remove_region", "unmap_vma", "kick", "translate"],
        *["intercept", "invalidate_begin", "invalidate_end", "invalidate", "statistics", "set_policy"],
    ]
)
messages = st.builds(
    lambda msgid, method, params: rpc.encode_request(msgid, method, [params]),
    st.integers(0, 2**32 - 1),
    methods,
    fields,
)
Join = Callable[[Served, Guest], Awaitable[RawPeer]]
sent = st.lists(messages | st.binary(min_size=1, max_size=300), min_size=1, max_size=6)


async def as_anyone(served: Served, _: Guest) -> RawPeer:
    return await served.connect()


async def as_vmm(_: Served, guest: Guest) -> RawPeer:
    return guest.vmm


async def as_vp(served: Served, guest: Guest) -> RawPeer:
    return await served.vp(guest)


async def as_notifier(served: Served, guest: Guest) -> RawPeer:
    return await served.notifier(guest)


@pytest.mark.parametrize("joined", [as_anyone, as_vmm, as_vp, as_notifier])
@given(drawn=sent)
@settings(max_examples=30)
def test_i7_whatever_one_sends_another_partition_is_served_as_before(
    joined: Join, drawn: list[bytes]
) -> None:
    async def main() -> None:
        async with serving() as served:
            rude_guest, guest = await served.guest(), await served.guest()
            await served.mmio(guest)
            vp = await served.vp(guest)
            await vp.intercept(0x100)
            rude = await joined(served, rude_guest)
            for data in drawn:
                rude.try_send(data)
                await wait_all_tasks_blocked()
            assert await vp.intercept(0x10F) is Answer.ALREADY_MAPPED
            assert await guest.vmm.ask("translate", gfn=0x100) is not None
            rude.close()
            rude_guest.vmm.close()
            await wait_all_tasks_blocked()
            assert [each.partition_id for each in served.daemon.partitions] == [guest.partition_id]

    with capture_logs() as logs:
        trio.run(main, clock=MockClock(autojump_threshold=0))
    assert [entry for entry in logs if entry["event"] == "connection_failed"] == []
