"""An operator's `restart`: refused where nothing is kept, or where no successor could go on."""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from fakes.raw_peer import RawPeer
from fakes.served import Served, serving
from intercept_protocol import rpc
from intercept_protocol.errors import WireError
from interceptd.config.live import Settings
from interceptd.config.schema import Config
from interceptd.daemon import Daemon
from interceptd.successor import CHECK_SECONDS, check_command, require_successor
from interceptd.systemd.fd_store import FdStore
from interceptd.vital import EX_TEMPFAIL

SUCCEEDS = (sys.executable, "-c", "")


@contextmanager
def manager() -> Iterator[FdStore]:
    """A store whose manager never reads."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind("")  # in the abstract namespace, unix(7)
        with closing(FdStore(listening.getsockname().decode())) as store:
            yield store


@pytest.fixture
def store() -> Iterator[FdStore]:
    with manager() as store:
        yield store


def failing(program: str) -> tuple[str, ...]:
    return (sys.executable, "-c", program)


@asynccontextmanager
async def kept(command: tuple[str, ...]) -> AsyncIterator[tuple[Served, RawPeer]]:
    """A daemon with a keeper, and an operator."""
    with manager() as store:
        async with serving(check_successor=command, store=store) as served:
            yield served, await served.operator()


async def refusal(operator: RawPeer) -> WireError:
    with pytest.raises(WireError) as caught:
        await operator.ask("restart")
    return caught.value


async def features(served: Served) -> object:
    operator = await RawPeer.connect(served.config.operator_path)
    served.peers.append(operator)
    reply = await operator.ask("hello", protocol=1, role="operator")
    assert isinstance(reply, dict)
    return reply["features"]["kept"]


async def test_without_a_keeper_hello_says_so_and_a_restart_is_refused() -> None:
    async with serving(check_successor=SUCCEEDS) as served:
        operator = await served.operator()

        assert await features(served) is False
        assert (await refusal(operator)).name == "EOPNOTSUPP"
        assert await operator.ask("statistics") is not None


async def test_with_a_keeper_hello_says_so() -> None:
    async with kept(SUCCEEDS) as (served, _):
        assert await features(served) is True


async def test_a_successor_that_could_not_go_on_is_refused_with_its_last_line() -> None:
    program = "import sys; print('a key'); sys.exit('a line\\nError: limits.vps: unknown key')"
    async with kept(failing(program)) as (_, operator):
        refused = await refusal(operator)

        assert refused.name == "EINVAL"
        assert refused.message.endswith("could not go on: limits.vps: unknown key")
        assert await operator.ask("statistics") is not None


async def test_the_answer_is_on_its_way_before_the_daemon_exits(monkeypatch: pytest.MonkeyPatch) -> None:
    exits, exited = [], trio.Event()
    async with kept(SUCCEEDS) as (_, operator):

        def exit_(status: int) -> None:
            exits.append((status, operator.has_bytes))
            exited.set()

        monkeypatch.setattr("os._exit", exit_)
        msgid = await operator.request("restart")
        await exited.wait()

        assert exits == [(EX_TEMPFAIL, True)]
        assert await operator.receive() == rpc.Response(msgid, None, None)


async def test_a_drain_that_begins_during_the_check_is_not_cut_off(tmp_path: Path, store: FdStore) -> None:
    started, go_on = tmp_path / "started", tmp_path / "go_on"
    for pipe in (started, go_on):
        os.mkfifo(pipe)
    program = f"open({str(started)!r}, 'w').close(); open({str(go_on)!r}).close()"
    daemon = Daemon(Settings(Config()), check_successor=failing(program), store=store)

    async def drain() -> None:
        await trio.to_thread.run_sync(started.read_bytes, abandon_on_cancel=True)
        daemon.drain()
        await trio.to_thread.run_sync(go_on.write_bytes, b"", abandon_on_cancel=True)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(drain)
        with pytest.raises(WireError) as caught:
            await daemon.restart()

    assert caught.value.number == errno.ESHUTDOWN


async def test_a_check_that_does_not_end_is_killed_and_given_up(
    mock_clock: MockClock, tmp_path: Path
) -> None:
    started = tmp_path / "started"
    os.mkfifo(started)
    program = f"import signal; open({str(started)!r}, 'w').close(); signal.pause()"

    async def wait_out() -> None:
        await trio.to_thread.run_sync(started.read_bytes, abandon_on_cancel=True)
        mock_clock.jump(CHECK_SECONDS)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait_out)
        with pytest.raises(WireError, match=r"EINVAL: .* no answer within 30 s"):
            await require_successor(failing(program))


async def test_a_check_that_cannot_be_started_is_refused() -> None:
    with pytest.raises(WireError, match=r"EINVAL: .* /no/such/program: No such file or directory"):
        await require_successor(["/no/such/program"])


async def test_a_check_that_says_nothing_is_named_by_its_exit_status() -> None:
    with pytest.raises(WireError, match=r"EINVAL: .* exit status 7"):
        await require_successor(failing("raise SystemExit(7)"))


def test_the_check_gets_the_arguments_of_the_daemon() -> None:
    command = check_command(["--set", "limits.operators=8"])

    assert command[1:4] == ("-m", "interceptd", "check-config")
    assert command[-2:] == ("--set", "limits.operators=8")
