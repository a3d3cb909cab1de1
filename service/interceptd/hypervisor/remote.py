"""The VMM's own hypervisor: map and unmap are requests over the VMM's hypervisor connection.

Owns the requests in flight, their deadlines, and a mirror of the mappings that the VMM has confirmed. Must
not know why something is mapped. The VMM answers in order. A map without an answer by its deadline is undone.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import trio

from intercept_protocol import codec, messages, rpc
from intercept_protocol.addresses import PAGE_SHIFT, GfnRange
from intercept_protocol.errors import ProtocolViolation, WireError
from intercept_protocol.messages import HypervisorCall
from interceptd.connections.connection import LAST_LOOK_SECONDS, Connection, ConnectionGone
from interceptd.errors import PartitionLost
from interceptd.hypervisor import HypervisorCounters, HypervisorError, named
from interceptd.hypervisor.slat import SoftwareSlat
from interceptd.ledger.journal import Journal
from interceptd.ledger.records import Changing, Settled
from interceptd.pages.mapping import HOST_BACKING, Mapping

_QUOTED = 200
"""Characters of the VMM's error message that are passed on: it may have sent 64 KiB, and an answer that
quotes it must fit into a message."""


class Undecided(HypervisorError):
    """It is not known which pieces the VMM has done, or will do."""


class TimedOut(Undecided):
    """No answer by the deadline: the VMM may still carry out the request."""


@dataclass(slots=True, eq=False)
class _Request:
    """One request in flight; `error` is the VMM's, valid once it is `answered`. The result is ignored."""

    answered: trio.Event = field(default_factory=trio.Event)
    error: WireError | None = None


def refusal(call: HypervisorCall, error: WireError) -> HypervisorError:
    """The VMM's error as it is passed on: its number, a message that fits into an answer, and how many pieces
    were done (Y-14)."""
    message = f"{call.METHOD}: {error.message:.{_QUOTED}}"
    if isinstance(call, messages.MapGpa | messages.UnmapGpa):
        return HypervisorError(error.number, message)
    done = error.details.get("done")
    if type(done) is int and 0 <= done < len(call.pieces):
        return HypervisorError(error.number, message, done=done)
    return Undecided(error.number, message)


class RemoteHypervisor:
    """See `Hypervisor`. `deadline` returns the timeout of a request, in seconds, and is called for each."""

    def __init__(self, deadline: Callable[[], float], journal: Journal | None = None) -> None:
        self._deadline = deadline
        self._journal = journal
        self.claimed = False
        """Whether a hypervisor connection was accepted."""
        self.takes_lists = False
        """Whether its VMM said so in its hello (H-17)."""
        self._connection: Connection | None = None
        self._is_served = trio.Event()
        self._in_flight: dict[int, _Request] = {}
        self._late: deque[int] = deque()
        self._first_msgid = self._msgid = 0 if journal is None else journal.ledger.last_msgid
        """What the predecessor asked is answered with its msgids: from those after the first, it is ours."""
        self.table = SoftwareSlat(journal)
        """The mirror."""
        self._map_calls = 0
        self._unmap_calls = 0

    async def wait_connected(self) -> None:
        """Block until the connection is served."""
        await self._is_served.wait()

    @property
    def connected(self) -> bool:
        return self._connection is not None

    async def serve(self, connection: Connection) -> None:
        """Process the VMM's answers, which `connection` must expect, until it closes. Raises
        `ProtocolViolation`, `ConnectionGone`."""
        self._connection = connection
        self._is_served.set()
        try:
            while (response := await connection.receive_response()) is not None:
                self._complete(response)
        finally:
            self._connection = None
            for request in self._in_flight.values():
                request.error = WireError(errno.ENOTCONN, "the hypervisor connection closed", done=0)
                request.answered.set()

    may_block = True

    @property
    def pieces_per_call(self) -> int:
        return messages.PIECES_LIMIT if self.takes_lists else 1

    async def map_gpas(self, mappings: Sequence[Mapping]) -> None:
        """See `Hypervisor.map_gpas`. If it is not known what was mapped, as after a timeout, everything is
        unmapped before the error is raised."""
        if self._journal is not None:
            self._journal.append(Changing([(mapping.start, mapping.end) for mapping in mappings]))
        try:
            await self._map(mappings)
        except HypervisorError:
            self._settled()
            raise
        self._settled()

    async def _map(self, mappings: Sequence[Mapping]) -> None:
        self._map_calls += 1
        pieces = [_map_gpa(mapping) for mapping in mappings]
        try:
            await self._request(pieces[0] if len(pieces) == 1 else messages.MapGpas(pieces=pieces))
        except Undecided:
            gfns = [mapping.gfns for mapping in mappings]
            try:
                await self._unmap(gfns)
            except HypervisorError as error:
                raise PartitionLost(f"a late map of {named(gfns)} could not be undone: {error}") from error
            raise
        except HypervisorError as error:
            self._mapped(mappings[: error.done])
            raise
        self._mapped(mappings)

    async def unmap_gpas(self, ranges: Sequence[GfnRange]) -> None:
        """See `Hypervisor.unmap_gpas`."""
        if self._journal is not None:
            self._journal.append(Changing([(gfns.start, gfns.end) for gfns in ranges]))
        await self._unmap(ranges)
        self._settled()

    async def _unmap(self, ranges: Sequence[GfnRange]) -> None:
        self._unmap_calls += 1
        pieces = [messages.UnmapGpa(start_gfn=gfns.start, page_count=gfns.page_count) for gfns in ranges]
        try:
            await self._request(pieces[0] if len(pieces) == 1 else messages.UnmapGpas(pieces=pieces))
        except HypervisorError as error:
            self._unmapped(ranges[: error.done])
            raise
        self._unmapped(ranges)

    def _settled(self) -> None:
        """Record that the outcome of what was recorded as `Changing` is recorded. A successor that finds only
        that unmaps it, since the VMM may or may not have carried it out."""
        if self._journal is not None:
            self._journal.append(Settled())

    def _mapped(self, mappings: Sequence[Mapping]) -> None:
        for mapping in mappings:
            if not self.table.insert(mapping):  # as a rule there was nothing
                self.table.replace(mapping)

    def _unmapped(self, ranges: Sequence[GfnRange]) -> None:
        for gfns in ranges:
            self.table.clear(gfns)

    def translate(self, gfn: int) -> Mapping | None:
        """See `Hypervisor.translate`: by the mappings that the VMM has confirmed."""
        entry = self.table.entry(gfn)
        return entry if entry is not None and entry.access else None

    async def discard(self) -> None:
        await self.table.discard()

    def counters(self) -> HypervisorCounters:
        return HypervisorCounters(
            mapped_gfns=self.table.gfn_count - self.table.no_access_gfns,
            no_access_gfns=self.table.no_access_gfns,
            slat_extents=len(self.table),
            map_calls=self._map_calls,
            unmap_calls=self._unmap_calls,
        )

    async def _request(self, call: HypervisorCall) -> None:
        if self._connection is None:
            raise HypervisorError(errno.ENOTCONN, f"{call.METHOD}: no hypervisor connection")
        self._msgid = self._msgid % (rpc.MSGID_LIMIT - 1) + 1  # 0 is not used for requests
        if self._journal is not None:
            self._journal.ledger.last_msgid = self._msgid
        msgid = self._msgid
        data = rpc.encode_request(msgid, call.METHOD, [codec.to_fields(call)])
        try:
            rest = self._connection.send_now(data)
            if self._is_next and self._connection.take_soon(rpc.encode_result(msgid, None)):
                return
            error = await self._answer_to(call, msgid, rest)
        except ConnectionGone as gone:
            raise HypervisorError(errno.ENOTCONN, f"{call.METHOD}: {gone}") from None
        if error is not None:
            raise refusal(call, error)

    async def _answer_to(self, call: HypervisorCall, msgid: int, rest: bytes) -> WireError | None:
        """Send the `rest` of a request, and wait for the answer that `serve` receives; returns its error.
        Raises `TimedOut`, `ConnectionGone`."""
        assert self._connection is not None, "a part was sent to it"
        request = self._in_flight[msgid] = _Request()
        deadline = self._deadline()
        try:
            with _shielded_for(deadline):
                if rest:
                    await self._connection.send(rest)
                await request.answered.wait()
            if not request.answered.is_set():
                with _shielded_for(LAST_LOOK_SECONDS):
                    await request.answered.wait()
            if not request.answered.is_set():
                self._late.append(msgid)
                raise TimedOut(errno.ETIMEDOUT, f"{call.METHOD}: no answer within {deadline} s")
        finally:
            del self._in_flight[msgid]
        return request.error

    @property
    def _is_next(self) -> bool:
        """Whether the next answer must be the one to the request that is not in flight yet."""
        return not self._in_flight and not self._late

    def _complete(self, response: rpc.Response) -> None:
        request = self._in_flight.get(response.msgid)
        if self._late and response.msgid == self._late[0]:
            self._late.popleft()
            return
        if request is None and self._is_predecessors(response.msgid):
            return
        if request is None or request.answered.is_set():
            raise ProtocolViolation(errno.EPROTO, f"no request {response.msgid} waits for an answer")
        if self._late:  # the VMM may still carry out the late request, after the one that undoes it
            raise ProtocolViolation(errno.EPROTO, f"request {self._late[0]} must be answered first")
        if response.error is not None:
            request.error = WireError.from_any(response.error)
        request.answered.set()

    def _is_predecessors(self, msgid: int) -> bool:
        """Whether it is none of the msgids that were given out since the start."""
        if not self._first_msgid:
            return False
        ours = (self._msgid - self._first_msgid) % (rpc.MSGID_LIMIT - 1)
        return not 0 < (msgid - self._first_msgid) % (rpc.MSGID_LIMIT - 1) <= ours


def _shielded_for(seconds: float) -> trio.CancelScope:
    return trio.CancelScope(deadline=trio.current_time() + seconds, shield=True)


def _map_gpa(mapping: Mapping) -> messages.MapGpa:
    frame = mapping.frame
    return messages.MapGpa(
        start_gfn=mapping.start,
        page_count=mapping.end - mapping.start,
        start_uaddr=mapping.start_uaddr_page << PAGE_SHIFT,
        start_pfn=frame.page if frame is not None and frame.backing == HOST_BACKING else None,
        access=int(mapping.access),
    )
