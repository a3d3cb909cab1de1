"""The keeper around programs that the test commands: what it keeps, when it starts, ends and lets go."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from itertools import count
from pathlib import Path

import pytest

from fakes.eventually import PATIENCE, eventually
from fakes.keeper_process import KeeperProcess, KeptProgram, children
from fakes.passing_manager import launch

StartKeeper = Callable[..., KeeperProcess]
Pair = tuple[socket.socket, socket.socket]
MakePair = Callable[[], Pair]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[StartKeeper]:
    """Starts keepers, each in a directory of its own."""
    with ExitStack() as ending:
        numbers = count()

        def start(**options: object) -> KeeperProcess:
            directory = tmp_path / str(next(numbers))
            directory.mkdir()
            return ending.enter_context(KeeperProcess(directory, **options))  # type: ignore[arg-type]

        yield start


@pytest.fixture
def keeper(start: StartKeeper) -> KeeperProcess:
    return start()


@pytest.fixture
def pair() -> Iterator[MakePair]:
    """Makes connections; the second end is the peer's."""
    with ExitStack() as closing:

        def pair() -> Pair:
            ours, theirs = socket.socketpair()
            theirs.settimeout(PATIENCE)
            return closing.enter_context(ours), closing.enter_context(theirs)

        yield pair


def kept(name: str, connection: socket.socket) -> tuple[str, int]:
    """As the next program says that it was passed it."""
    return name, os.fstat(connection.fileno()).st_ino


# ------------------------------------------------ what is kept


def test_a_program_that_dies_is_followed_by_one_that_gets_what_it_stored_in_order(
    keeper: KeeperProcess, pair: MakePair
) -> None:
    first = keeper.next().ready()
    (one, _), (two, _), (three, _) = pair(), pair(), pair()
    assert first.passed == []
    first.store("c1", one)
    first.store("m1", two, three, poll=False)
    first.store("c1", two)
    stored = [kept("c1", one), kept("m1", two), kept("m1", three), kept("c1", two)]
    first.kill()
    second = keeper.next()
    assert second.passed == stored
    second.store("d", three)
    second.kill()  # before it was ready
    assert keeper.next().passed == [*stored, kept("d", three)]


def test_a_program_inherits_nothing_but_what_it_was_passed(keeper: KeeperProcess, pair: MakePair) -> None:
    first = keeper.next().ready()
    alone = first.open_descriptors
    first.store("c1", *(pair()[0] for _ in range(20)))
    first.kill()
    assert keeper.next().open_descriptors == alone + 20


def test_what_is_removed_is_closed_and_not_passed(keeper: KeeperProcess, pair: MakePair) -> None:
    first = keeper.next().ready()
    (one, peer), (two, _), (three, _) = pair(), pair(), pair()
    first.store("c1", one, three)
    first.store("c2", two)
    one.close()
    first.tell("FDSTOREREMOVE=1", "FDNAME=c1")
    assert peer.recv(1) == b""
    first.kill()
    assert keeper.next().passed == [kept("c2", two)]


@pytest.mark.parametrize("alive", [True, False], ids=["serves", "is not ready"])
def test_a_connection_whose_peer_hangs_up_is_dropped_if_it_is_polled(
    alive: bool, keeper: KeeperProcess, pair: MakePair
) -> None:
    program = keeper.next().ready()
    (one, peer), (two, other) = pair(), pair()
    program.store("c1", one)
    program.store("m1", two, poll=False)
    if not alive:
        program.kill()
        program = keeper.next()
    peer.close()
    other.close()
    program.kill()
    assert keeper.next().passed == [kept("m1", two)]


def test_a_connection_that_is_shut_down_is_dropped_though_others_have_it_too(
    keeper: KeeperProcess, pair: MakePair
) -> None:
    program = keeper.next().ready()
    ours, peer = pair()
    program.store("c1", ours)
    ours.shutdown(socket.SHUT_RDWR)
    assert peer.recv(1) == b""
    program.kill()
    assert keeper.next().passed == []


def test_the_same_socket_is_kept_once_under_a_name(keeper: KeeperProcess, pair: MakePair) -> None:
    program = keeper.next().ready()
    one, _ = pair()
    program.store("c1", one, one)
    program.store("c1", one)
    program.store("c2", one)
    program.kill()
    program = keeper.next()
    assert program.names == ["c1", "c2"]
    program.tell("FDSTOREREMOVE=1", "FDNAME=c1")
    program.store("c1", one)
    program.kill()
    assert keeper.next().names == ["c2", "c1"]


def test_files_are_not_taken_for_the_same_by_their_inode(keeper: KeeperProcess) -> None:
    """All userfaultfds have one, and a maps file that was opened twice."""
    program = keeper.next().ready()
    with open("/proc/self/maps", "rb") as one, open("/proc/self/maps", "rb") as two:
        assert os.fstat(one.fileno()).st_ino == os.fstat(two.fileno()).st_ino
        program.tell("FDSTORE=1", "FDNAME=m1", descriptors=[one.fileno(), two.fileno()])
    program.kill()
    assert keeper.next().names == ["m1", "m1"]


def test_four_thousand_descriptors_are_passed_in_order(keeper: KeeperProcess) -> None:
    program = keeper.next().ready()
    reading, writing = os.pipe()
    stored = []
    for number in range(20):
        name = f"m{number}"
        inode = os.fstat(reading).st_ino
        program.tell("FDSTORE=1", f"FDNAME={name}", "FDPOLL=0", descriptors=[reading, writing] * 100)
        stored += [(name, inode)] * 200
    os.close(reading)
    os.close(writing)
    program.kill()
    assert keeper.next().passed == stored


def test_a_full_store_takes_all_of_a_message_or_nothing_and_says_so(
    start: StartKeeper, pair: MakePair
) -> None:
    keeper = start(before=["prlimit", "--nofile=70:70"])
    program = keeper.next().ready()
    assert program.environment["FDSTORE"] == "3"
    (one, _), (two, peer) = pair(), pair()
    program.store("c1", one)
    program.store("c2", one)
    program.store("c3", two, one)
    two.close()
    assert peer.recv(1) == b""
    program.store("c4", one)
    program.kill()
    assert keeper.next().names == ["c1", "c2", "c4"]
    assert keeper.events().count("descriptors_refused") == 1


@pytest.mark.parametrize("name", ["FDNAME=a:b", "FDNAME=", f"FDNAME={'x' * 25}", "FDNAME=a b"])
def test_a_name_that_would_spoil_the_list_of_names_is_refused(
    name: str, keeper: KeeperProcess, pair: MakePair
) -> None:
    program = keeper.next().ready()
    ours, peer = pair()
    program.tell("FDSTORE=1", name, descriptors=[ours.fileno()])
    ours.close()
    assert peer.recv(1) == b""
    program.kill()
    assert keeper.next().passed == []


def test_descriptors_that_come_with_nothing_to_store_are_closed(
    keeper: KeeperProcess, pair: MakePair
) -> None:
    """As the barrier of sd_notify_barrier(3) expects."""
    program = keeper.next().ready()
    ours, peer = pair()
    program.tell("BARRIER=1", descriptors=[ours.fileno()])
    ours.close()
    assert peer.recv(1) == b""


def test_what_is_not_our_programs_is_ignored_and_its_descriptors_are_closed(
    keeper: KeeperProcess, pair: MakePair
) -> None:
    program = keeper.next().ready()
    ours, _ = pair()
    program.store("c1", ours)
    address = f"\0{str(program.environment['NOTIFY_SOCKET'])[1:]}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as foreign:
        foreign.connect(address)
        for _ in range(2):
            (one, peer), (two, other) = pair(), pair()
            socket.send_fds(foreign, [b"FDSTORE=1\nFDNAME=c2"], [one.fileno(), two.fileno()])
            one.close()
            two.close()
            assert (peer.recv(1), other.recv(1)) == (b"", b"")
        foreign.send(b"FDSTOREREMOVE=1\nFDNAME=c1")
    program.kill()
    assert keeper.next().passed == [kept("c1", ours)]
    assert [line["pid"] for line in keeper.log() if line["event"] == "message_ignored"] == [os.getpid()]


# ------------------------------------------------ when nobody serves


def passed_at_last(keeper: KeeperProcess) -> list[str]:
    """What the first program was passed that is not killed at once."""
    while True:
        with suppress(OSError, ValueError):
            return keeper.next().names


def test_after_the_patience_all_is_let_go_and_the_next_program_starts_with_empty_hands(
    start: StartKeeper, pair: MakePair
) -> None:
    keeper = start(patience=0)
    program = keeper.next().ready()
    (one, peer), (reading, writing) = pair(), os.pipe()
    with one.dup(), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind("")
        listener.listen()
        program.store("c1", one)
        program.store("own-vmm", listener)
        program.tell("FDSTORE=1", "FDNAME=m1", "FDPOLL=0", descriptors=[writing])
        os.close(writing)
        program.kill()
        assert peer.recv(1) == b""  # though we have a duplicate
        assert os.read(reading, 1) == b""  # as a munmap returns that waited for a userfaultfd
        os.close(reading)
        keeper.wait_event("descriptors_let_go")
        assert passed_at_last(keeper) == []
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:  # a listener is closed, and no more
            assert client.connect_ex(listener.getsockname()) == 0


# ------------------------------------------------ how it ends


def test_a_program_that_drained_ends_the_keeper(keeper: KeeperProcess, pair: MakePair) -> None:
    program = keeper.next().ready()
    ours, peer = pair()
    program.store("c1", ours)
    ours.close()
    program.exit(0)
    assert (keeper.wait_ended(), peer.recv(1)) == (0, b"")


@pytest.mark.parametrize("status", [1, 2, 75])
def test_a_program_that_never_became_ready_ends_the_keeper_with_its_status(
    status: int, keeper: KeeperProcess
) -> None:
    keeper.next().exit(status)
    assert keeper.wait_ended() == status


def test_a_first_program_that_is_killed_ends_the_keeper_as_a_shell_would(keeper: KeeperProcess) -> None:
    keeper.next().kill()
    assert keeper.wait_ended() == 128 + signal.SIGKILL


@pytest.mark.parametrize("status", [1, 70, 75, 130])
def test_a_program_that_was_ready_is_started_again_whatever_its_status(
    status: int, keeper: KeeperProcess
) -> None:
    first = keeper.next().ready()
    first.exit(status)
    second = keeper.next()
    assert (second.arguments, second.pid == first.pid) == (["serve", "--set", "a=1"], False)
    second.exit(1)  # not ready: but the first one was
    keeper.next()


def test_no_zombie_is_left(keeper: KeeperProcess) -> None:
    for _ in range(3):
        keeper.next().ready().kill()
    program = keeper.next()
    assert keeper.children() == [program.pid]


UNSHARE = ["unshare", "--pid", "--fork", "--kill-child"]


@pytest.mark.skipif(
    subprocess.run([*UNSHARE, "true"], capture_output=True, check=False).returncode != 0,
    reason="needs to make a pid namespace",
)
def test_as_the_first_process_of_a_container_it_reaps_orphans(start: StartKeeper) -> None:
    unshare = start(before=UNSHARE)
    program = unshare.next().ready()
    (keeper,) = unshare.children()
    program.leave_an_orphan()
    program.exit(75)
    program = unshare.next()
    eventually(lambda: children(keeper), [program.pid])


def test_a_keeper_that_is_killed_leaves_its_program_running_and_with_that_all_ends(
    keeper: KeeperProcess, pair: MakePair
) -> None:
    program = keeper.next().ready()
    ours, peer = pair()
    program.store("c1", ours)
    keeper.kill()
    assert program.passed == []  # it still obeys
    ours.close()
    program.kill()
    assert peer.recv(1) == b""


# ------------------------------------------------ signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_end_drains_and_a_second_one_is_passed_on_too(number: int, keeper: KeeperProcess) -> None:
    program = keeper.next().ready()
    for _ in range(2):
        keeper.signal(number)
        assert program.wait_signal() == signal.SIGINT
    program.exit(130)
    assert keeper.wait_ended() == 130


def test_a_signal_that_the_parent_has_blocked_reaches_it(start: StartKeeper) -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        keeper = start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    program = keeper.next().ready()
    keeper.signal(signal.SIGTERM)
    assert program.wait_signal() == signal.SIGINT


def test_a_program_that_is_killed_while_it_drains_is_not_started_again(keeper: KeeperProcess) -> None:
    program = keeper.next().ready()
    keeper.signal(signal.SIGTERM)
    assert program.wait_signal() == signal.SIGINT
    program.kill()
    assert keeper.wait_ended() == 128 + signal.SIGKILL


def test_a_program_that_takes_over_drains_once_it_is_ready(keeper: KeeperProcess, pair: MakePair) -> None:
    """Before, SIGINT would kill it, and what it was to drain."""
    program = keeper.next().ready()
    program.store("c1", pair()[0])
    program.kill()
    program = keeper.next()
    keeper.signal(signal.SIGHUP)
    keeper.signal(signal.SIGTERM)
    assert program.names == ["c1"]
    program.ready()
    assert {program.wait_signal(), program.wait_signal()} == {signal.SIGHUP, signal.SIGINT}
    program.exit(0)
    assert keeper.wait_ended() == 0


def test_a_reload_is_passed_on(keeper: KeeperProcess) -> None:
    program = keeper.next().ready()
    keeper.signal(signal.SIGHUP)
    assert program.wait_signal() == signal.SIGHUP


def test_a_program_is_out_of_reach_of_the_terminals_signals(keeper: KeeperProcess) -> None:
    program = keeper.next()
    assert program.group == program.pid


# ------------------------------------------------ a planned restart


def restarting(keeper: KeeperProcess, *facts: str) -> tuple[KeptProgram, KeptProgram]:
    """The program that serves, and the check of its successor."""
    program = keeper.next()
    program.tell("READY=1", *facts)
    keeper.signal(signal.SIGUSR1)
    return program, keeper.next()


def test_a_restart_asks_the_next_version_first(keeper: KeeperProcess) -> None:
    program, check = restarting(keeper, "X_INTERCEPTD_LEDGER_FORMAT=3")
    assert check.arguments == ["check-config", "--ledger-format", "3", "--set", "a=1"]
    check.exit(0)
    assert program.wait_signal() == signal.SIGTERM
    program.exit(75)
    assert keeper.next().arguments[0] == "serve"


def test_a_next_version_that_refuses_changes_nothing(keeper: KeeperProcess) -> None:
    program, check = restarting(keeper)
    assert check.arguments == ["check-config", "--set", "a=1"]
    check.exit(1)
    keeper.wait_event("restart_refused")
    keeper.signal(signal.SIGHUP)
    assert program.wait_signal() == signal.SIGHUP  # the first signal that it gets


def test_a_program_that_took_over_meanwhile_is_not_restarted(keeper: KeeperProcess) -> None:
    program, check = restarting(keeper)
    program.kill()
    program = keeper.next().ready()
    check.exit(0)
    eventually(keeper.children, [program.pid])
    keeper.signal(signal.SIGHUP)
    assert program.wait_signal() == signal.SIGHUP


def test_a_program_that_is_not_ready_is_not_restarted(keeper: KeeperProcess) -> None:
    program = keeper.next()
    keeper.signal(signal.SIGUSR1)
    keeper.wait_event("restart_refused")
    assert keeper.children() == [program.pid]


# ------------------------------------------------ under a manager of its own


def test_what_concerns_the_keeper_too_is_forwarded_to_its_own_manager(
    start: StartKeeper, tmp_path: Path, pair: MakePair
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as outer:
        outer.settimeout(PATIENCE)
        outer.bind(str(tmp_path / "outer"))
        program = start(environment={"NOTIFY_SOCKET": str(tmp_path / "outer")}).next()
        assert program.environment["NOTIFY_SOCKET"] != str(tmp_path / "outer")
        program.store("c1", pair()[0])
        program.tell("READY=1", "STATUS=serves", "MAINPID=1", "X_INTERCEPTD_LEDGER_FORMAT=1")
        program.tell("WATCHDOG=1")
        assert [outer.recv(4096), outer.recv(4096)] == [b"READY=1\nSTATUS=serves", b"WATCHDOG=1"]


def test_a_manager_that_is_gone_holds_up_nothing(start: StartKeeper, tmp_path: Path) -> None:
    keeper = start(environment={"NOTIFY_SOCKET": str(tmp_path / "gone")})
    keeper.next().ready().kill()
    assert keeper.next().arguments[0] == "serve"


def test_the_keepers_watchdog_is_its_programs(start: StartKeeper) -> None:
    shell = ["sh", "-c", 'WATCHDOG_USEC=1000 WATCHDOG_PID=$$ exec "$@"', "sh"]
    ours = start(before=shell).next()
    assert ours.environment["WATCHDOG_PID"] == str(ours.pid)
    another = start(environment={"WATCHDOG_USEC": "1000", "WATCHDOG_PID": "1"}).next()
    assert (another.environment["WATCHDOG_PID"], another.environment["WATCHDOG_USEC"]) == (None, None)


def test_sockets_of_a_manager_are_passed_to_every_program_and_never_let_go(
    start: StartKeeper, tmp_path: Path, pair: MakePair
) -> None:
    keeper = start(patience=0, before=launch(vmm=tmp_path / "vmm.sock")[:-3])
    program = keeper.next().ready()
    assert program.names == ["vmm"]
    program.store("c1", pair()[0])
    program.kill()
    assert passed_at_last(keeper) == ["vmm"]
    keeper.wait_event("descriptors_let_go")


def test_a_program_hears_what_it_may_store(keeper: KeeperProcess) -> None:
    environment = keeper.next().environment
    assert (environment["INTERCEPTD_KEEP"], environment["FDSTORE"]) == ("yes", "4096")
    assert str(environment["NOTIFY_SOCKET"]).startswith("@")


def test_its_log_is_one_json_object_a_line(keeper: KeeperProcess) -> None:
    program = keeper.next().ready()
    program.kill()
    keeper.next()
    assert [json.dumps(line["event"]) for line in keeper.log()] == [
        '"daemon_process_started"',
        '"daemon_process_ended"',
        '"daemon_process_started"',
    ]
    assert (keeper.log()[1]["how"], keeper.log()[1]["level"]) == ("SIGKILL", "warning")
