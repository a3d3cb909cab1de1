"""The handshake: hello, its limits and timeouts, and which peers may join which partition."""

from __future__ import annotations

import errno

import pytest
import trio

from fakes.raw_peer import RawPeer
from fakes.served import Guest, Served, serving
from intercept_protocol.errors import WireError
from interceptd.config.schema import Limits, Timeouts
from interceptd.connections.connection import LAST_LOOK_SECONDS
from interceptd.connections.tenants import BURST_SECONDS, REFUSAL_REQUESTS
from wire_vectors.forms import ExchangeVector, load

HELLO = {"protocol": 1, "role": "vmm"}


async def refusal(peer: RawPeer, **fields: object) -> WireError:
    """The error that answers a hello, and the end of the connection."""
    with pytest.raises(WireError) as refused:
        await peer.ask("hello", **fields)
    assert await peer.receive() is None
    return refused.value


async def test_a_silent_connection_is_closed_at_the_hello_timeout() -> None:
    async with serving(timeouts=Timeouts(hello_ms=3000)) as served:
        silent = await served.connect()
        started = trio.current_time()
        assert (await silent.last_words()).number == errno.ETIMEDOUT
        assert trio.current_time() - started == pytest.approx(3 + LAST_LOOK_SECONDS)


async def test_a_connection_that_says_half_a_hello_is_closed_at_the_hello_timeout() -> None:
    async with serving() as served:
        slow = await served.connect()
        await slow.send(b"\x94\x00")
        assert (await slow.last_words()).number == errno.ETIMEDOUT


async def test_a_connection_may_be_silent_forever_after_hello() -> None:
    async with serving() as served:
        vmm = await served.hello("vmm")
        await trio.sleep(1000)
        created = await vmm.ask("create_partition", address_space="declared", hypervisor="software")
        assert isinstance(created, dict)
        assert created["partition_id"] == 1


async def test_connections_without_hello_are_limited_and_the_others_do_not_count() -> None:
    async with serving(Limits(connections_without_hello=2)) as served:
        for _ in range(4):
            await served.hello("vmm")
        waiting = [await served.connect() for _ in range(2)]
        one_too_many = await served.connect()
        refused = await one_too_many.last_words()
        assert (refused.number, refused.details["limit"]) == (errno.EAGAIN, "connections_without_hello")
        await waiting[0].ask("hello", **HELLO)
        await served.hello("vmm")


@pytest.mark.parametrize(
    ("fields", "number"),
    [
        ({"protocol": 2, "role": "vmm"}, errno.EPROTONOSUPPORT),
        ({"role": "vmm"}, errno.EINVAL),
        ({"protocol": 1, "role": "king"}, errno.EINVAL),
        ({"protocol": 1, "role": "vmm", "crown": True}, errno.EINVAL),
        ({"protocol": 1, "role": "operator"}, errno.EACCES),
    ],
)
async def test_a_wrong_hello_is_answered_and_closes(fields: dict[str, object], number: int) -> None:
    async with serving() as served:
        assert (await refusal(await served.connect(), **fields)).number == number


async def test_a_first_request_other_than_hello_is_refused_under_msgid_0() -> None:
    async with serving() as served:
        peer = await served.connect()
        await peer.request("statistics", {})
        assert (await peer.last_words()).number == errno.EPROTO


async def test_another_role_than_operator_is_refused_at_the_operators_door() -> None:
    async with serving() as served:
        peer = await RawPeer.connect(served.config.operator_path)
        served.peers.append(peer)
        assert (await refusal(peer, **HELLO)).number == errno.EACCES


# ------------------------------------------------ joining


async def test_no_such_partition_and_a_wrong_token_are_one_error() -> None:
    async with serving() as served:
        guest = await served.guest()
        errors = [
            await refusal(
                await served.connect(), protocol=1, role="vp", vp_index=0, partition_id=number, token=token
            )
            for number, token in ((guest.partition_id, bytes(16)), (guest.partition_id + 1, guest.token))
        ]
    assert [str(error) for error in errors] == [str(errors[0])] * 2
    assert errors[0].number == errno.EACCES


async def joining(served: Served, guest: Guest, role: str, **fields: object) -> WireError:
    return await refusal(
        await served.connect(),
        protocol=1,
        role=role,
        partition_id=guest.partition_id,
        token=guest.token,
        **fields,
    )


async def test_a_vp_is_attached_once_and_again_after_it_left() -> None:
    async with serving() as served:
        guest = await served.guest()
        vp = await served.vp(guest)
        assert (await joining(served, guest, "vp", vp_index=0)).number == errno.EEXIST
        vp.close()
        await trio.testing.wait_all_tasks_blocked()
        await served.vp(guest)


async def test_a_vp_index_beyond_the_limit_is_einval_and_names_it() -> None:
    async with serving(Limits(vps_per_partition=2)) as served:
        guest = await served.guest()
        await served.vp(guest, 1)
        refused = await joining(served, guest, "vp", vp_index=2)
        assert (refused.number, refused.details["limit"]) == (errno.EINVAL, "vps_per_partition")


async def test_notifiers_beyond_the_limit_are_enospc_until_one_leaves() -> None:
    async with serving(Limits(notifiers_per_partition=1)) as served:
        guest = await served.guest()
        notifier = await served.notifier(guest)
        refused = await joining(served, guest, "notifier")
        assert (refused.number, refused.details["limit"]) == (errno.ENOSPC, "notifiers_per_partition")
        notifier.close()
        await trio.testing.wait_all_tasks_blocked()
        await served.notifier(guest)


async def test_a_hypervisor_connection_of_a_partition_with_another_hypervisor_is_einval() -> None:
    async with serving() as served:
        assert (await joining(served, await served.guest(), "hypervisor")).number == errno.EINVAL


async def test_partitions_of_a_uid_beyond_the_limit_are_enospc_and_the_connection_continues() -> None:
    async with serving(Limits(partitions_per_uid=1)) as served:
        guest = await served.guest()
        vmm = await served.hello("vmm")
        with pytest.raises(WireError, match="ENOSPC"):
            await vmm.ask("create_partition", address_space="declared", hypervisor="software")
        guest.vmm.close()
        await trio.testing.wait_all_tasks_blocked()
        await vmm.ask("create_partition", address_space="declared", hypervisor="software")


async def test_operators_beyond_the_limit_are_enospc() -> None:
    async with serving(Limits(operators=1)) as served:
        await served.operator()
        with pytest.raises(WireError, match="ENOSPC"):
            await served.operator()


async def test_a_call_before_create_partition_is_enoent_and_a_second_create_is_eexist() -> None:
    async with serving() as served:
        vmm = await served.hello("vmm")
        with pytest.raises(WireError, match="ENOENT"):
            await vmm.ask("statistics")
        create = {"address_space": "declared", "hypervisor": "software"}
        await vmm.ask("create_partition", **create)
        with pytest.raises(WireError, match="EEXIST"):
            await vmm.ask("create_partition", **create)


async def test_hello_states_limits_timeouts_and_features() -> None:
    async with serving(Limits(operators=7), Timeouts(hello_ms=1234), chaos=3) as served:
        reply = await (await served.connect()).ask("hello", **HELLO)
    assert isinstance(reply, dict)
    assert (reply["limits"]["operators"], reply["limits"]["hello_timeout_ms"]) == (7, 1234)
    assert reply["features"]["chaos"] == 3


async def test_the_hello_of_the_published_vectors_is_a_daemons_with_its_defaults() -> None:
    """But for the version, which moves; without chaos, because this daemon adds no delays (H-15)."""
    published = {vector.name: vector.result for vector in load("methods.json", ExchangeVector)
                 if (vector.role, vector.method) == ("vmm", "hello")}["plain"]  # fmt: skip
    async with serving(Limits(), Timeouts()) as served:
        reply = await (await served.connect()).ask("hello", **HELLO)
    assert isinstance(reply, dict)
    assert isinstance(published, dict)
    assert published | {"version": reply["version"]} == reply


async def test_every_connection_is_counted_in_whatever_role_until_it_is_gone() -> None:
    async with serving() as served:
        vmm, operator = await served.hello("vmm"), await served.operator()
        created = await vmm.ask("create_partition", address_space="declared", hypervisor="vmm")
        assert isinstance(created, dict)
        hello = {"partition_id": created["partition_id"], "token": created["token"]}
        link = await served.hello("hypervisor", **hello)
        await served.hello("vp", vp_index=0, **hello)
        await served.hello("notifier", **hello)
        await served.connect()
        await trio.testing.wait_all_tasks_blocked()
        assert await counted(operator) == 6
        link.close()  # and with it the partition
        vmm.close()
        await trio.sleep(1)
        assert await counted(operator) == 2


async def counted(operator: RawPeer) -> object:
    statistics = await operator.ask("statistics")
    assert isinstance(statistics, dict)
    return statistics["connections"]


@pytest.mark.parametrize("fields", [{"role": "king"}, {"role": "vp", "partition_id": 9, "vp_index": 0}])
async def test_a_connection_that_is_refused_wherever_counts_five_beside_its_hello(
    fields: dict[str, object],
) -> None:
    rate, times = 10, 20
    async with serving(Limits(control_requests_per_second=rate)) as served:
        for _ in range(times):
            await refusal(await served.connect(), protocol=1, token=bytes(16), **fields)
        began = BURST_SECONDS - 1 / rate
        assert trio.current_time() == pytest.approx((6 * times - REFUSAL_REQUESTS) / rate - began, abs=0.2)
