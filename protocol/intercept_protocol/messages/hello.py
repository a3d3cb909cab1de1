"""The first request of a connection, by role.

Owns the hellos and their reply; must not know what the connection is for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import msgspec

from .base import U32, U64, AfterRestart, Call, Name, Token

PROTOCOL_VERSION = 1


class HelloReply(msgspec.Struct, frozen=True, kw_only=True):
    """What the daemon says about itself: its name and version, its limits, and the features that it has."""

    protocol: int
    server: str
    version: str
    limits: dict[str, int]
    features: dict[str, object]


class _Hello(Call[HelloReply], frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="role"):
    METHOD: ClassVar[str] = "hello"
    REPLY: ClassVar[object] = HelloReply
    RESTART: ClassVar[AfterRestart] = "repeatable"

    protocol: U64 = PROTOCOL_VERSION


class HelloVmm(_Hello, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="vmm"):
    name: Name = ""


class HelloVp(_Hello, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="vp"):
    partition_id: U64
    vp_index: U32
    token: Token


class HelloNotifier(_Hello, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="notifier"):
    partition_id: U64
    token: Token


class HelloHypervisor(_Hello, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="hypervisor"):
    partition_id: U64
    token: Token
    lists: bool = False
    """Whether the VMM answers `map_gpas` and `unmap_gpas`."""


class HelloOperator(_Hello, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="operator"):
    pass


Hello = HelloVmm | HelloVp | HelloNotifier | HelloHypervisor | HelloOperator
PartitionHello = HelloVp | HelloNotifier | HelloHypervisor
"""The hellos that attach to an existing partition."""
HELLOS: Mapping[str, type[Hello]] = {
    "vmm": HelloVmm,
    "vp": HelloVp,
    "notifier": HelloNotifier,
    "hypervisor": HelloHypervisor,
    "operator": HelloOperator,
}
"""By role."""
