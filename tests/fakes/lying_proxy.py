"""A server that is right but for one lie: the real one behind a proxy that falsifies some of what passes.

Owns the relay and the lies: `python -m fakes.lying_proxy LIE UPSTREAM LISTEN`. Bytes go on as they come; only
a message that comes whole, and that a lie is about, is made anew. Through a proxy no descriptor comes, so it
says that it serves declared memory only.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress
from typing import Any, Final

import msgpack
import trio

Fields = dict[str, Any]
Error = list[Any] | None


class Lie:
    """Nothing but the truth."""

    def asked(self, method: str, fields: Fields) -> Fields:
        """The fields that the server is asked with instead."""
        del method
        return fields

    def told(self, method: str, fields: Fields, error: Error, result: Any) -> tuple[Error, Any]:
        """The error and the result that the client is told instead; `method` is "" if it is not known."""
        del method, fields
        return error, result


class HastyAcknowledgement(Lie):
    """Acknowledges invalidations at once and takes nothing away: it keeps book of them somewhere else."""

    ELSEWHERE: Final = 1 << 61

    def asked(self, method: str, fields: Fields) -> Fields:
        start = fields.get("start_uaddr")
        if method.startswith("invalidate") and isinstance(start, int) and start < self.ELSEWHERE:
            return fields | {"start_uaddr": start + self.ELSEWHERE}
        return fields


class ForwardForRetry(Lie):
    """What is merely busy is the VMM's to emulate: the posted patch's answer, which loses a write."""

    def told(self, method: str, fields: Fields, error: Error, result: Any) -> tuple[Error, Any]:
        del fields
        if method == "intercept" and error is None and result[0] == "retry":
            return None, ["forward", "unbacked"]
        return error, result


class OpenDoor(Lie):
    """Lets anybody join a partition that is there: the token is not looked at."""

    def __init__(self) -> None:
        self._tokens: dict[int, bytes] = {}

    def asked(self, method: str, fields: Fields) -> Fields:
        token = self._tokens.get(fields.get("partition_id", 0))
        match fields.get("token"):
            case bytes(said) if method == "hello" and token is not None and len(said) == len(token):
                return fields | {"token": token}
        return fields

    def told(self, method: str, fields: Fields, error: Error, result: Any) -> tuple[Error, Any]:
        del fields
        if method == "create_partition" and error is None:
            self._tokens[result["partition_id"]] = result["token"]
        return error, result


class NamelessField(Lie):
    """Says that something is wrong with a request, and not what."""

    def told(self, method: str, fields: Fields, error: Error, result: Any) -> tuple[Error, Any]:
        del method, fields
        if error is None:
            return None, result
        *rest, details = error
        return [*rest, {key: value for key, value in details.items() if key != "field"}], result


class OverlappingRegions(Lie):
    """Says that it took a region over another one."""

    def told(self, method: str, fields: Fields, error: Error, result: Any) -> tuple[Error, Any]:
        if method == "add_region" and error is not None and error[1] == "EEXIST":
            return None, {"kind": fields["kind"]}
        return error, result


LIES: Final[Mapping[str, Callable[[], Lie]]] = {
    "nothing-but-the-truth": Lie,
    "hasty-acknowledgement": HastyAcknowledgement,
    "forward-for-retry": ForwardForRetry,
    "open-door": OpenDoor,
    "nameless-field": NamelessField,
    "overlapping-regions": OverlappingRegions,
}


class Relay:
    """A client's connection, and the one to the server that stands behind it."""

    def __init__(self, lie: Lie, client: trio.SocketStream, server: trio.SocketStream) -> None:
        self._lie = lie
        self._client = client
        self._server = server
        self._asked: dict[int, tuple[str, Fields]] = {}

    async def run(self) -> None:
        """Until the server closes, which it does when the client has; its last words still arrive."""
        async with self._client, self._server, trio.open_nursery() as nursery:
            nursery.start_soon(self._towards_the_server)
            async for data in _arriving(self._server):
                with suppress(trio.BrokenResourceError):  # the client left and does not want to know
                    await self._client.send_all(_anew(data, self._told))
            nursery.cancel_scope.cancel()

    async def _towards_the_server(self) -> None:
        with suppress(trio.BrokenResourceError):  # it closed: what it said before is on its way
            async for data in _arriving(self._client):
                await self._server.send_all(_anew(data, self._asking))
            await self._server.send_eof()

    def _asking(self, message: object) -> object:
        match message:
            case [0, int(msgid), str(method), [dict(fields)]]:
                self._asked[msgid] = method, fields
                return [0, msgid, method, [self._lie.asked(method, fields)]]
            case [0, int(msgid), str(method), *_]:
                self._asked[msgid] = method, {}
        return message

    def _told(self, message: object) -> object:
        match message:
            case [1, int(msgid), (list() | None) as error, result]:
                method, fields = self._asked.get(msgid, ("", {}))
                if method == "hello" and isinstance(result, dict):
                    result["features"]["address_spaces"] = ["declared"]
                return [1, msgid, *self._lie.told(method, fields, error, result)]
        return message


async def _arriving(stream: trio.SocketStream) -> AsyncIterator[bytes]:
    """What a peer sends; one that resets has closed."""
    with suppress(trio.BrokenResourceError):
        while data := await stream.receive_some():
            yield data


def _anew(data: bytes, change: Callable[[object], object]) -> bytes:
    """The bytes that go on. What is not one whole message, or is not changed, goes on as it came."""
    try:
        message = msgpack.unpackb(data)
        changed = change(msgpack.unpackb(data))
    except (ValueError, msgpack.UnpackException, TypeError, RecursionError):
        return data
    packed: bytes = msgpack.packb(changed)
    return data if changed == message else packed


async def serve(name: str, upstream: str, listen: str) -> None:
    """Relay every connection to `listen` until killed."""
    lie = LIES[name]()
    listener = trio.socket.socket(trio.socket.AF_UNIX)
    await listener.bind(listen)
    listener.listen(1024)

    async def relay(client: trio.SocketStream) -> None:
        await Relay(lie, client, await trio.open_unix_socket(upstream)).run()

    await trio.serve_listeners(relay, [trio.SocketListener(listener)])


if __name__ == "__main__":
    _, name, upstream, listen = sys.argv
    trio.run(serve, name, upstream, listen)
