"""The metrics listener's HTTP: one request per connection, bounded in size, number and time."""

from __future__ import annotations

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import memory_stream_pair, wait_all_tasks_blocked

from interceptd.metrics.http import CONNECTIONS, DEADLINE_SECONDS, REQUEST_BYTES, Page, Responder

HEADERS = [
    b"Host: x\r\n", b"Upgrade: x\r\nConnection: Upgrade\r\n", b"Expect: 100-continue\r\n",
    b"Content-Length: 3\r\n", b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding: x\r\n",
]  # fmt: skip
REQUESTS = st.tuples(
    st.sampled_from([b"GET", b"HEAD", b"POST", b"CONNECT", b"\0"]),
    st.sampled_from(
        [b" /page ", b" http://x/page ", b" http:// ", b" /%ff ", b" * ", b" x:1 ", b" \xff ", b" "]
    ),
    st.sampled_from([b"HTTP/1.1\r\n", b"HTTP/1.0\r\n", b"HTTP/2\r\n"]),
    st.lists(st.sampled_from(HEADERS), max_size=3).map(b"".join),
    st.sampled_from([b"\r\n", b"\r\n0\r\n\r\n", b""]),
).map(b"".join)
"""What is nearly right, and what is."""
GET = b"GET /page HTTP/1.1\r\nHost: x\r\n\r\n"


class Server:
    """A responder with one page, whose renderer can be made to fail or to block."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self.fails = False
        self.ready = trio.Event()
        self.ready.set()
        self.responder = Responder({"/page": self._page})

    async def _page(self) -> Page:
        await self.ready.wait()
        if self.fails:
            raise RuntimeError("by order of the test")
        return Page(200, b"here\n")

    def connect(self) -> trio.abc.Stream:
        ours, theirs = memory_stream_pair()

        async def serve() -> None:
            await self.responder.serve(ours)
            await ours.aclose()

        self._nursery.start_soon(serve)
        return theirs

    async def ask(self, request: bytes) -> bytes:
        """Everything that is answered until the end of the connection."""
        stream = self.connect()
        await stream.send_all(request)
        return await read_all(stream)


async def read_all(stream: trio.abc.Stream) -> bytes:
    return b"".join([part async for part in stream])


@pytest.fixture
def server(nursery: trio.Nursery) -> Server:
    return Server(nursery)


def status(answer: bytes) -> bytes:
    return answer.partition(b" ")[2][:3]


async def test_get_of_a_page_is_answered_and_closed(server: Server) -> None:
    answer = await server.ask(GET)
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert answer.endswith(b"\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhere\n")
    assert server.responder.requests == {"200": 1}


async def test_a_request_that_comes_byte_by_byte_is_answered_like_any(server: Server) -> None:
    stream = server.connect()
    for byte in GET:
        await stream.send_all(bytes([byte]))
    assert status(await read_all(stream)) == b"200"


async def test_head_is_answered_without_the_page(server: Server) -> None:
    answer = await server.ask(GET.replace(b"GET", b"HEAD"))
    assert (status(answer), answer[-4:]) == (b"200", b"\r\n\r\n")
    assert b"Content-Length: 5\r\n" in answer


@pytest.mark.parametrize(
    ("request_bytes", "expected"),
    [
        (GET.replace(b"/page", b"/page?x=1"), b"200"),
        (GET.replace(b"/page", b"/%70a%67e"), b"200"),
        (GET.replace(b"/page", b"http://127.0.0.1:9477/page"), b"200"),
        (GET.replace(b"/page", b"HTTPS://[::1]/page?x=http://y/"), b"200"),
        (GET.replace(b"GET /page", b"HEAD http://x/page"), b"200"),
        (GET.replace(b"/page", b"/other"), b"404"),
        (GET.replace(b"/page", b"//page"), b"404"),
        (GET.replace(b"/page", b"/x/http://x/page"), b"404"),
        (GET.replace(b"/page", b"http://x"), b"404"),
        (GET.replace(b"/page", b"http://page?/page"), b"404"),
        (GET.replace(b"/page", b"http:///page"), b"400"),
        (GET.replace(b"/page", b"http:/page"), b"400"),
        (GET.replace(b"/page", b"ftp://x/page"), b"400"),
        (GET.replace(b"/page", b"page"), b"400"),
        (GET.replace(b"/page", b"*"), b"400"),
        (GET.replace(b"/page", b"%2Fpage"), b"400"),
        (GET.replace(b"GET /page", b"OPTIONS *"), b"405"),
        (GET.replace(b"GET /page", b"CONNECT x:1"), b"405"),
        (GET.replace(b"GET", b"POST"), b"405"),
        (b"GET /page HTTP/1.1\r\n\r\n", b"400"),
        (b"\x94\x00\x01\xa5hello\x91\x80\r\n\r\n", b"400"),
        (b"GET /page HTTP/1.1\r\nHost: x\r\nX: " + b"x" * REQUEST_BYTES, b"431"),
    ],
)
async def test_request_is_answered_by_its_status(
    server: Server, request_bytes: bytes, expected: bytes
) -> None:
    assert status(await server.ask(request_bytes)) == expected
    assert server.responder.requests == {expected.decode(): 1}


async def test_a_refused_method_gets_the_allowed_ones(server: Server) -> None:
    assert b"\r\nAllow: GET, HEAD\r\n" in await server.ask(GET.replace(b"GET", b"PUT"))


async def test_a_body_that_arrives_after_its_answer_does_not_break_the_connection(server: Server) -> None:
    """A reset would take the answer along."""
    stream = server.connect()
    await stream.send_all(
        GET.replace(b"GET", b"POST").replace(b"x\r\n", b"x\r\nContent-Length: 9\r\n") + b"body"
    )
    assert status(await read_all(stream)) == b"405"
    assert server.responder.requests == {}
    await stream.send_all(b" rest")
    await stream.aclose()
    await wait_all_tasks_blocked()
    assert server.responder.requests == {"405": 1}


async def test_a_page_that_fails_ends_its_own_connection_alone(server: Server) -> None:
    server.fails = True
    assert await server.ask(GET) == b""
    server.fails = False
    assert status(await server.ask(GET)) == b"200"
    assert server.responder.requests == {"failed": 1, "200": 1}


@given(st.one_of(st.binary(), REQUESTS))
def test_no_bytes_make_the_responder_fail(sent: bytes) -> None:
    async def main() -> Responder:
        async with trio.open_nursery() as nursery:
            server = Server(nursery)
            stream = server.connect()
            await stream.send_all(sent)
            await stream.send_eof()  # type: ignore[attr-defined]
            await read_all(stream)
            return server.responder

    assert trio.run(main).requests.keys() <= {"200", "400", "404", "405", "431", "501", "gone"}


async def test_a_peer_that_leaves_is_counted_without_other_effect(server: Server) -> None:
    stream = server.connect()
    await stream.send_all(GET[:10])
    await stream.aclose()
    await wait_all_tasks_blocked()
    assert (server.responder.requests, status(await server.ask(GET))) == ({"gone": 1, "200": 1}, b"200")


@pytest.mark.usefixtures("autojump_clock")
async def test_a_request_that_is_not_complete_in_time_is_dropped(server: Server) -> None:
    began = trio.current_time()
    assert await server.ask(GET[:10]) == b""
    assert trio.current_time() - began == DEADLINE_SECONDS
    assert server.responder.requests == {"timeout": 1}


async def test_one_connection_too_many_is_closed_at_once_and_those_before_are_served(server: Server) -> None:
    server.ready = trio.Event()
    waiting = [server.connect() for _ in range(CONNECTIONS)]
    for stream in waiting:
        await stream.send_all(GET)
    await wait_all_tasks_blocked()
    assert await read_all(server.connect()) == b""
    server.ready.set()
    assert [status(await read_all(stream)) for stream in waiting] == [b"200"] * CONNECTIONS
    assert server.responder.requests == {"200": CONNECTIONS, "refused": 1}
    assert status(await server.ask(GET)) == b"200"
