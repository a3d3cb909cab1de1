"""A notifier's requests: about memory that has changed, and about memory that will.

Owns building each request and taking the result out of its reply, once for both shells: `_blocking_clients`
and `_trio_clients` make methods of these functions, so their names, parameters and docstrings agree. Must not
do I/O.
"""

from __future__ import annotations

from intercept_protocol import messages
from intercept_protocol.addresses import UaddrRange

from ._exchange import Exchange, call_exchange


def invalidate(uaddrs: UaddrRange) -> Exchange[None]:
    """Report that the memory at `uaddrs` has changed already: a begin and an end in one.

    When this returns, the guest does not reach what was there. Use `invalidation` for a change to come.
    """
    return call_exchange(messages.Invalidate(start_uaddr=uaddrs.start_uaddr, length=uaddrs.length))


def invalidation(uaddrs: UaddrRange) -> tuple[Exchange[None], Exchange[None]]:
    """The begin and the end of one invalidation."""
    start_uaddr, length = uaddrs.start_uaddr, uaddrs.length
    return (
        call_exchange(messages.InvalidateBegin(start_uaddr=start_uaddr, length=length)),
        call_exchange(messages.InvalidateEnd(start_uaddr=start_uaddr, length=length)),
    )
