"""Clients of interceptd: one conversation without I/O, and shells for trio and for threads.

Owns what a VMM or an operator's tool needs to talk to the daemon; must not know how the daemon works.
Requests are the typed messages of `intercept_protocol.messages`::

    async with open_vmm(path, name="guest") as vmm:
        partition = await vmm.call(CreatePartition(...))
        async with open_vp(path, partition, vp_index=0) as vp:
            answer = await vp.intercept(message)

    with BlockingVmm.open(path, name="guest") as vmm:
        partition = vmm.call(CreatePartition(...))

The names for trio are looked up when first used, so that programs of threads do not pay for importing it.
`intercept_client.memory` changes mappings under an invalidation.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from ._blocking_clients import BlockingNotifier, BlockingOperator, BlockingVmm, BlockingVp
from ._errors import ClientMisuse, ConnectionEnded, ConnectionLost

if TYPE_CHECKING:
    from ._trio_clients import (
        NotifierClient,
        OperatorClient,
        VmmClient,
        VpClient,
        open_notifier,
        open_operator,
        open_vmm,
        open_vp,
    )

__all__ = [
    "BlockingNotifier",
    "BlockingOperator",
    "BlockingVmm",
    "BlockingVp",
    "ClientMisuse",
    "ConnectionEnded",
    "ConnectionLost",
    "NotifierClient",
    "OperatorClient",
    "VmmClient",
    "VpClient",
    "open_notifier",
    "open_operator",
    "open_vmm",
    "open_vp",
]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module("._trio_clients", __name__), name)
    return value
