"""The hypervisor connection for threads: does in the guest's page tables what the daemon asks.

Owns the socket and serving it; must not know how a guest is mapped. Serving takes no lock of the client
library, so it goes on whatever the VMM's other threads hold or wait for (K-1).
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType
from typing import Protocol, Self, runtime_checkable

from intercept_protocol.addresses import GfnRange, UaddrRange
from intercept_protocol.errors import WireError
from intercept_protocol.messages import PartitionCredentials
from intercept_protocol.outcomes import Access
from intercept_protocol.text import sentence

from ._blocking_connection import (
    connect,
    open_despite_restart,
    opening_deadline,
    remaining_until,
)
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


class GuestMapper(Protocol):
    """How a VMM's hypervisor maps and unmaps: two callbacks, called one at a time by the thread in `serve`.

    Raising `WireError` refuses the request. A refused `map` must leave everything as it was; a refused
    `unmap` ends the partition. Any other exception ends the connection, and so the partition. Neither may
    wait for the daemon, nor for anybody who waits for it.
    """

    def map(self, gfns: GfnRange, uaddrs: UaddrRange, access: Access, start_pfn: int | None) -> None:
        """Let the guest reach `uaddrs` at `gfns` with exactly these rights, whatever it reached there before.

        Without rights: nothing. `start_pfn` is the first host page, in a partition whose address space is
        declared; otherwise None, and the kernel resolves `uaddrs`. Only for what a region of this VMM covers.
        """

    def unmap(self, gfns: GfnRange) -> None:
        """Let the guest reach nothing at `gfns`; return when no access to what was there is under way."""


@runtime_checkable
class ListMapper(GuestMapper, Protocol):
    """A mapper that does several pieces at once for less than one after the other, for example because it
    stops the vCPUs once.

    Either does the pieces in order. A refusal says how many it did: raise `refused_after(done, refusal)`.
    """

    def map_list(self, pieces: Sequence[MapRequest]) -> None:
        """`map` each. The piece that is refused must leave everything as it was."""

    def unmap_list(self, ranges: Sequence[GfnRange]) -> None:
        """`unmap` each."""


class BlockingHypervisor:
    """Lets the daemon map and unmap in this VMM's hypervisor, for threads.

    For a partition that was created with `HypervisorKind.VMM`; open it before the first region is added, and
    run `serve` in a thread of its own. While the partition lives, closing this ends the partition.
    """

    def __init__(self, sock: socket.socket, session: HypervisorSession, mapper: GuestMapper) -> None:
        """Use `open`."""
        self._socket = sock
        self._session = session
        self._mapper = mapper
        self._is_serving = False
        self._is_closed = False

    @classmethod
    def open(
        cls,
        path: StrPath,
        partition: PartitionCredentials,
        mapper: GuestMapper,
        *,
        regions: OwnRegions,
        open_timeout: float = OPEN_SECONDS,
    ) -> Self:
        """Connect as the hypervisor of `partition`: within `open_timeout` seconds, the welcome included.

        `regions` are those of the `BlockingVmm` that created the partition. What they do not cover is never
        mapped: the request is refused, and logged as an error of the logger `intercept_client`.

        Raises an `OSError` that names the path, `WireError` if the daemon refuses, `TimeoutError`,
        `ConnectionLost` and `ProtocolViolation`.
        """
        deadline = opening_deadline(None, open_timeout)

        def attempt() -> tuple[socket.socket, HypervisorSession]:
            session = HypervisorSession(partition, regions)
            sock = connect(path, deadline)
            try:
                unsent = session.hello()
                while not session.welcomed:
                    sock.settimeout(remaining_until(deadline))
                    session.receive_data(_exchange(sock, unsent))
                    unsent = b""
                sock.settimeout(None)
            except BaseException:
                sock.close()
                raise
            return sock, session

        return cls(*open_despite_restart(attempt, deadline), mapper)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        self.close()

    def serve(self) -> str:
        """Do what the daemon asks, until the connection has ended; returns why it ended.

        The daemon closes it once the partition has ended and everything is unmapped. Raises what the mapper
        raises, unless that is a `WireError`. Call it once.
        """
        self._is_serving = True
        try:
            while True:
                while (request := self._session.next_request()) is not None:
                    self._session.answer(_carry_out(self._mapper, request))
                self._session.receive_data(_exchange(self._socket, self._session.data_to_send()))
        except FATAL as end:
            return CLOSED_HERE if self._is_closed else str(end)
        finally:
            self._socket.close()

    def close(self) -> None:
        """Close at once, also while another thread is in `serve`, which then returns. May be repeated."""
        self._is_closed = True
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        if not self._is_serving:
            self._socket.close()

    def fileno(self) -> int:
        """The socket's descriptor, which is readable when the daemon asks for something, or is gone."""
        return self._socket.fileno()


def _exchange(sock: socket.socket, data: bytes) -> bytes:
    """Send all of `data`, and wait for what the daemon sends next."""
    try:
        with suppress(BrokenPipeError, ConnectionResetError):  # its last words may still be readable
            if data:
                sock.sendall(data)
        return sock.recv(RECEIVE_BYTES)
    except TimeoutError:
        raise TimeoutError("the daemon did not answer in time") from None
    except OSError as error:
        raise ConnectionLost(f"the connection failed: {sentence(error)}") from error


def _carry_out(mapper: GuestMapper, request: Request) -> WireError | None:
    """Do as the daemon asks; returns the refusal, if it is refused."""
    if len(request) > 1 and isinstance(mapper, ListMapper):
        return _carry_out_together(mapper, request)
    for done, piece in enumerate(request):
        try:
            match piece:
                case MapRequest(gfns, uaddrs, access, start_pfn):
                    mapper.map(gfns, uaddrs, access, start_pfn)
                case UnmapRequest(gfns):
                    mapper.unmap(gfns)
        except WireError as refusal:
            return refused_after(done, refusal)
    return None


def _carry_out_together(mapper: ListMapper, request: Request) -> WireError | None:
    maps = [piece for piece in request if isinstance(piece, MapRequest)]
    try:
        if maps:
            mapper.map_list(maps)
        else:
            mapper.unmap_list([piece.gfns for piece in request])
    except WireError as refusal:
        return refusal
    return None
