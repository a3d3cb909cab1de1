"""The hypervisor connection for trio: does in the guest's page tables what the daemon asks.

Owns the socket and serving it; must not know how a guest is mapped.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Protocol, Self

import trio

from intercept_protocol.addresses import GfnRange, UaddrRange
from intercept_protocol.errors import WireError
from intercept_protocol.messages import PartitionCredentials
from intercept_protocol.outcomes import Access
from intercept_protocol.text import sentence

from ._connecting import OPEN_SECONDS, StrPath
from ._errors import FATAL, ConnectionLost
from ._hypervisor_session import (
    CLOSED_HERE,
    RECEIVE_BYTES,
    HypervisorSession,
    MapRequest,
    Request,
    UnmapRequest,
    refused_after,
)
from ._own_regions import OwnRegions
from ._trio_connection import connect, open_despite_restart


class AsyncGuestMapper(Protocol):
    """`GuestMapper` for trio: two callbacks, called one at a time by the task in `serve`.

    Raising `WireError` refuses the request. A refused `map` must leave everything as it was; a refused
    `unmap` ends the partition. Any other exception ends the connection, and so the partition. Neither may
    wait for the daemon, nor for anybody who waits for it. What blocks belongs into `trio.to_thread.run_sync`.
    """

    async def map(self, gfns: GfnRange, uaddrs: UaddrRange, access: Access, start_pfn: int | None) -> None:
        """Let the guest reach `uaddrs` at `gfns` with exactly these rights, whatever it reached there before.

        Without rights: nothing. `start_pfn` is the first host page, in a partition whose address space is
        declared; otherwise None, and the kernel resolves `uaddrs`. Only for what a region of this VMM covers.
        """

    async def unmap(self, gfns: GfnRange) -> None:
        """Let the guest reach nothing at `gfns`; return when no access to what was there is under way."""


class TrioHypervisor:
    """Lets the daemon map and unmap in this VMM's hypervisor, for trio.

    For a partition that was created with `HypervisorKind.VMM`; open it before the first region is added, and
    run `serve` in a task of its own. While the partition lives, closing this ends the partition.
    """

    def __init__(
        self, sock: trio.socket.SocketType, session: HypervisorSession, mapper: AsyncGuestMapper
    ) -> None:
        """Use `open`."""
        self._socket = sock
        self._session = session
        self._mapper = mapper
        self._is_closed = False

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        path: StrPath,
        partition: PartitionCredentials,
        mapper: AsyncGuestMapper,
        *,
        regions: OwnRegions,
        open_timeout: float = OPEN_SECONDS,
    ) -> AsyncIterator[Self]:
        """Connect as the hypervisor of `partition`, for the length of an `async with` block. To
        connect and be welcomed may take `open_timeout` seconds.

        `regions` are those of the `TrioVmm` that created the partition. What they do not cover is never
        mapped: the request is refused, and logged as an error of the logger `intercept_client`.

        Raises an `OSError` that names the path, `WireError` if the daemon refuses, `TimeoutError`,
        `ConnectionLost` and `ProtocolViolation`.
        """

        async def attempt() -> tuple[trio.socket.SocketType, HypervisorSession]:
            session = HypervisorSession(partition, regions)
            sock = await connect(path)
            try:
                unsent = session.hello()
                while not session.welcomed:
                    session.receive_data(await _exchange(sock, unsent))
                    unsent = b""
            except BaseException:
                sock.close()
                raise
            return sock, session

        hypervisor = cls(*await open_despite_restart(attempt, open_timeout), mapper)
        try:
            yield hypervisor
        finally:
            hypervisor.close()

    async def serve(self) -> str:
        """Do what the daemon asks, until the connection has ended; returns why it ended.

        The daemon closes it once the partition has ended and everything is unmapped. Raises what the mapper
        raises, unless that is a `WireError`. Call it once.
        """
        try:
            while True:
                while (request := self._session.next_request()) is not None:
                    self._session.answer(await _carry_out(self._mapper, request))
                self._session.receive_data(await _exchange(self._socket, self._session.data_to_send()))
        except FATAL as end:
            return CLOSED_HERE if self._is_closed else str(end)
        finally:
            self.close()

    def close(self) -> None:
        """Close at once, also while another task is in `serve`, which then returns. May be repeated."""
        self._is_closed = True
        self._socket.close()

    def fileno(self) -> int:
        """The socket's descriptor, which is readable when the daemon asks for something, or is gone."""
        return self._socket.fileno()


async def _exchange(sock: trio.socket.SocketType, data: bytes) -> bytes:
    """Send all of `data`, and wait for what the daemon sends next."""
    try:
        with suppress(BrokenPipeError, ConnectionResetError):  # its last words may still be readable
            while data:
                data = data[await sock.send(data) :]
        return await sock.recv(RECEIVE_BYTES)
    except OSError as error:
        raise ConnectionLost(f"the connection failed: {sentence(error)}") from error
    except trio.ClosedResourceError:
        raise ConnectionLost(CLOSED_HERE) from None


async def _carry_out(mapper: AsyncGuestMapper, request: Request) -> WireError | None:
    """Do as the daemon asks; returns the refusal, if it is refused."""
    for done, piece in enumerate(request):
        try:
            match piece:
                case MapRequest(gfns, uaddrs, access, start_pfn):
                    await mapper.map(gfns, uaddrs, access, start_pfn)
                case UnmapRequest(gfns):
                    await mapper.unmap(gfns)
        except WireError as refusal:
            return refused_after(done, refusal)
    return None
