"""The limits that `hello` states. The cases of each method reach its limits."""

from __future__ import annotations

from conformance.guests import RawVmm
from conformance.statements import needs, statement

STATED = {
    "memory_mib", "message_bytes", "request_bytes", "request_values", "request_values_vmm",
    "connections_per_uid",
    "control_requests_per_second", "vps_per_uid",
    "regions_per_uid", "mappings_per_uid", "vmas_per_uid", "unclosed_descriptors_per_uid",
    "requests_in_flight_per_connection", "connections_without_hello", "hello_timeout_ms",
    "invalidate_timeout_ms", "hypervisor_timeout_ms", "vmms_per_uid", "partitions_per_uid",
    "vps_per_partition", "notifiers_per_partition", "regions_per_partition", "mappings_per_partition",
    "vmas_per_partition", "open_invalidations_per_partition", "deposit_pages_per_partition", "operators",
}  # fmt: skip


@statement("L-1")
def test_every_limit_is_stated_and_two_of_them_are_fixed(limits: dict[str, int]) -> None:
    assert limits.keys() >= STATED
    assert (limits["message_bytes"], limits["requests_in_flight_per_connection"]) == (65536, 1)


@statement("L-1")
@needs("notifier")
def test_a_partition_at_a_limit_harms_no_other(vmm: RawVmm, limits: dict[str, int]) -> None:
    notifier = vmm.notifier()
    for _ in range(limits["open_invalidations_per_partition"]):
        notifier.ask("invalidate_begin", {"start_uaddr": 0, "length": 4096})
    with RawVmm(vmm.path) as other:
        assert other.notifier().ask("invalidate_begin", {"start_uaddr": 0, "length": 4096}) is None
