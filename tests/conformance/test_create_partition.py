"""`create_partition`: a partition and its token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from conformance.conftest import Server
from conformance.guests import GFN, MODEL, RawVmm
from conformance.statements import needs, statement
from conformance.wire import READ, RawConnection, Refusal, Refused, arm64_message

Connect = Callable[[], RawConnection]


def refusals(server: Server, opened: ExitStack, partitions: int) -> Iterator[Refusal]:
    """The refusal that this many partitions at once meet; the server may have others."""
    for _ in range(partitions):
        try:
            opened.enter_context(RawVmm(server.socket))
        except Refused as refused:
            yield refused.refusal


@statement("P-1")
@pytest.mark.parametrize("method", ["statistics", "kick", "translate", "remove_region"])
def test_a_method_before_the_partition_is_enoent(connect: Connect, method: str) -> None:
    fields = {
        "kick": {"vp_index": "all"},
        "translate": {"gfn": 0},
        "remove_region": {"start_gfn": 0, "page_count": 1, "start_uaddr": 0},
    }
    connection = connect()
    connection.say_hello("vmm")
    assert connection.refusal(method, fields.get(method)).name == "ENOENT"
    assert connection.ask("create_partition", MODEL)["partition_id"] > 0


@statement("P-1")
def test_the_fields_of_a_method_before_the_partition_are_checked_first(connect: Connect) -> None:
    connection = connect()
    connection.say_hello("vmm")
    assert connection.refusal("translate").details.get("field") == "gfn"


@statement("P-3", "E-1")
def test_an_unknown_method_and_one_of_another_role_are_enosys_that_lists_this_roles(vmm: RawVmm) -> None:
    for method in ("no_such_method", "invalidate_begin", "intercept", "map_gpa", "drain"):
        refusal = vmm.connection.refusal(method)
        assert (refusal.number, refusal.name) == (38, "ENOSYS")
        assert "add_region" in refusal.details["methods"]
        assert method not in refusal.details["methods"]


@statement("P-2")
@needs("notifier")
def test_the_end_of_the_connection_ends_the_partitions_other_connections(vmm: RawVmm) -> None:
    notifier, vp = vmm.notifier(), vmm.vp()
    vmm.connection.close()
    assert [notifier.receive_all(), vp.receive_all()] == [[], []]


@statement("P-5")
def test_a_second_partition_is_eexist(vmm: RawVmm) -> None:
    assert vmm.connection.refusal("create_partition", MODEL).name == "EEXIST"


@statement("P-5", "L-1")
def test_one_partition_too_many_is_enospc_that_names_the_limit(
    server: Server, limits: dict[str, int]
) -> None:
    if limits["partitions_per_uid"] > 600:
        pytest.skip(f"limits.partitions_per_uid is {limits['partitions_per_uid']}: set it lower")
    with ExitStack() as opened:
        refusal = next(refusals(server, opened, limits["partitions_per_uid"] + 1))
    assert (refusal.name, refusal.details.get("limit")) == ("ENOSPC", "partitions_per_uid")


@statement("P-5")
def test_more_deposited_pages_than_the_limit_are_enospc_and_none_is_created(
    connect: Connect, limits: dict[str, int]
) -> None:
    limit = limits["deposit_pages_per_partition"]
    connection = connect()
    connection.say_hello("vmm")
    refusal = connection.refusal("create_partition", {**MODEL, "deposit_pages": limit + 1})
    assert (refusal.name, refusal.details.get("limit")) == ("ENOSPC", "deposit_pages_per_partition")
    assert connection.ask("create_partition", {**MODEL, "deposit_pages": limit})["partition_id"] > 0


@statement("P-21")
def test_ids_and_tokens_are_given_once(server: Server) -> None:
    given = []
    for _ in range(3):
        with RawVmm(server.socket) as vmm:
            given.append((vmm.partition_id, vmm.token))
    assert (len({number for number, _ in given}), len({token for _, token in given})) == (3, 3)
    assert {len(token) for _, token in given} == {16}


@statement("P-3", "E-2")
@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"address_space": "declared"}, "hypervisor"),
        ({"hypervisor": "software"}, "address_space"),
        ({**MODEL, "address_space": "virtual"}, "address_space"),
        ({**MODEL, "architecture": "riscv"}, "architecture"),
        ({**MODEL, "mmio_granularity": "huge"}, "mmio_granularity"),
        ({**MODEL, "remap": 1}, "remap"),
        ({**MODEL, "deposit_pages": 1 << 32}, "deposit_pages"),
        ({**MODEL, "deposit_pages": -1}, "deposit_pages"),
        ({**MODEL, "invalidate_timeout_ms": 0}, "invalidate_timeout_ms"),
        ({**MODEL, "name": "x"}, "name"),
    ],
)
def test_a_wrong_field_is_einval_that_names_it(
    connect: Connect, fields: dict[str, object], field: str
) -> None:
    connection = connect()
    connection.say_hello("vmm")
    refusal = connection.refusal("create_partition", fields)
    assert (refusal.name, refusal.details.get("field")) == ("EINVAL", field)
    assert connection.ask("create_partition", MODEL)["partition_id"] > 0


@statement("M-1", "M-2")
def test_the_architecture_says_where_the_gpa_stands(server: Server) -> None:
    with RawVmm(server.socket, architecture="arm64") as vmm:
        vmm.add_memory()
        assert vmm.vp().ask("intercept", arm64_message(GFN + 1, READ)) == ["resume", "mapped"]
