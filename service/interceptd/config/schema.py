"""The schema of the configuration: every key with its type, unit and default.

Owns the keys; must not know who uses them, nor where the values come from (`sources`).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from intercept_protocol._frames import MESSAGE_LIMIT, REQUEST_VALUES, REQUEST_VALUES_VMM, SHORT_REQUESTS
from interceptd.config.system_memory import default_memory_mib
from interceptd.connections.listen_address import ListenAddress
from interceptd.connections.peer import overflow_uid

Count = Annotated[int, Meta(ge=1, le=1 << 32)]
Milliseconds = Annotated[int, Meta(ge=1, le=3_600_000)]
Uid = Annotated[int, Meta(ge=0, le=2**32 - 2)]
Gid = Uid


class _Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class Limits(_Table, frozen=True, kw_only=True):
    """How much a client may ask for. `hello` states each limit, and the error at a limit names it.

    The defaults fit a host all of whose VMMs have one uid.
    """

    memory_mib: Count = msgspec.field(default_factory=default_memory_mib)
    """Of the daemon, by its own estimate."""
    connections_without_hello: Count = 512
    connections_per_uid: Count = 32_768
    """In any state, on both sockets."""
    control_requests_per_second: Count = 10_000
    """Per uid, over all of its connections; intercepts do not count. The daemon delays the excess."""
    partitions_per_uid: Count = 1024
    vmms_per_uid: Count = 2048
    """VMM connections, with or without a partition."""
    vps_per_uid: Count = 16_384
    regions_per_uid: Count = 1 << 20
    mappings_per_uid: Count = 1 << 20
    """In all partitions, like `mappings_per_partition`."""
    vmas_per_uid: Count = 1 << 20
    """Declared VMAs, in all partitions, and pieces that restored guests have given back."""
    unclosed_descriptors_per_uid: Count = 512
    """Sent by its clients and not closed yet; a thread that an abandoned question blocks counts as two."""
    vps_per_partition: Annotated[int, Meta(ge=1, le=256)] = 256
    notifiers_per_partition: Count = 64
    regions_per_partition: Count = 1 << 20
    mappings_per_partition: Count = 1 << 20
    """Contiguous pieces in which a partition is mapped."""
    vmas_per_partition: Count = 1 << 20
    open_invalidations_per_partition: Count = 1024
    deposit_pages_per_partition: Count = 1 << 20
    operators: Count = 32

    def stated(self) -> dict[str, int]:
        """The limits that `hello` states, including those that are not configurable."""
        stated: dict[str, int] = msgspec.to_builtins(self)
        return stated | {
            "message_bytes": MESSAGE_LIMIT,
            SHORT_REQUESTS.bytes_name: SHORT_REQUESTS.bytes,
            REQUEST_VALUES.name: REQUEST_VALUES.values,
            REQUEST_VALUES_VMM.name: REQUEST_VALUES_VMM.values,
            "requests_in_flight_per_connection": 1,
        }


class Timeouts(_Table, frozen=True, kw_only=True):
    """Bounds on waiting, in milliseconds."""

    hello_ms: Milliseconds = 5_000
    invalidate_ms: Milliseconds = 5_000
    """How long an intercept waits for an invalidation or a map to end; a partition may override it."""
    hypervisor_ms: Milliseconds = 5_000
    """How long a VMM may take to answer a map or unmap request."""
    drain_ms: Milliseconds = 5_000
    """From SIGTERM, or the end of a partition, until what is still in flight is cancelled."""


class Log(_Table, frozen=True, kw_only=True):
    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "console", "json", "journal"] = "auto"
    """`auto` is journal where standard error goes to the systemd journal, console on a terminal, and json
    otherwise."""


class Metrics(_Table, frozen=True, kw_only=True):
    """For Prometheus, over HTTP."""

    listen: ListenAddress | None = None
    """Default: no metrics."""
    socket_mode: Annotated[int, Meta(ge=0, le=0o777)] = 0o660


class Config(_Table, frozen=True, kw_only=True):
    socket: str = "/run/interceptd/vmm.sock"
    operator_socket: str | None = None
    """Default: operator.sock beside `socket`."""
    socket_mode: Annotated[int, Meta(ge=0, le=0o777)] = 0o660
    socket_group: str | None = None
    """Group of `socket`, by name or number. Default: the daemon's."""
    allowed_uids: list[Uid] | None = None
    """Which uids may connect. Default: root and the daemon's uid. If the latter is the overflow uid, which in
    a user namespace stands for every uid that it does not map, it must be listed."""
    allowed_gids: list[Gid] = []
    """Groups whose members, primary or supplementary, may connect too; except the overflow uid."""
    limits: Limits = msgspec.field(default_factory=Limits)
    timeouts: Timeouts = Timeouts()
    log: Log = Log()
    metrics: Metrics = Metrics()

    @property
    def operator_path(self) -> str:
        return self.operator_socket or str(Path(self.socket).with_name("operator.sock"))

    @property
    def uids(self) -> frozenset[int]:
        if self.allowed_uids is not None:
            return frozenset(self.allowed_uids)
        return frozenset({0, os.geteuid()} - {overflow_uid()})
