"""A session disturbed at any of its messages: the witness is served during and after it.

Nothing of the session is left: the `witness` fixture looks at tasks, connections, partitions and descriptors.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Final

import pytest

from fakes import scripted_session
from fakes.daemon_process import DaemonProcess
from fakes.eventually import PATIENCE
from fakes.puppet import TESTS
from fakes.scripted_session import MESSAGES, TOLD, Session, Spoil, Spoilt
from fakes.witness import Witness

EVERY_MESSAGE: Final = [
    (hypervisor, nth) for hypervisor, count in MESSAGES.items() for nth in range(1, count + 1)
]
LEAVING: Final = [
    scripted_session.close_in_the_middle,
    scripted_session.close_before_the_answer,
]


@pytest.fixture(scope="module")
def spoilt_daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    with DaemonProcess(tmp_path_factory.mktemp("spoilt")) as process:
        yield process.wait_serving()
        assert process.stop() == 0


@pytest.fixture
def daemon(spoilt_daemon: DaemonProcess) -> DaemonProcess:
    return spoilt_daemon


@pytest.mark.usefixtures("witness")  # which waits until all of it is gone: the next one counts from there
@pytest.mark.parametrize("hypervisor", MESSAGES)
def test_an_undisturbed_session_takes_the_expected_number_of_messages(
    daemon: DaemonProcess, witness: Witness, hypervisor: str
) -> None:
    with Session(daemon.socket, hypervisor, 0, scripted_session.die) as session:
        assert (session.play(), session.messages) == (TOLD, MESSAGES[hypervisor])
    assert witness.serve() == Witness.SERVED


@pytest.mark.parametrize("leave", LEAVING)
@pytest.mark.parametrize(("hypervisor", "nth"), EVERY_MESSAGE)
def test_a_connection_that_closes_at_any_message_leaves_nothing(
    daemon: DaemonProcess, witness: Witness, hypervisor: str, nth: int, leave: Spoil
) -> None:
    with Session(daemon.socket, hypervisor, nth, leave) as session:
        with pytest.raises(Spoilt):
            session.play()
        assert witness.serve() == Witness.SERVED


@pytest.mark.parametrize(("hypervisor", "nth"), EVERY_MESSAGE)
def test_a_connection_that_stalls_at_any_message_delays_no_other(
    daemon: DaemonProcess, witness: Witness, hypervisor: str, nth: int
) -> None:
    with Session(daemon.socket, hypervisor, nth, scripted_session.stall) as session:
        with pytest.raises(Spoilt):
            session.play()
        assert [witness.serve() for _ in range(3)] == [Witness.SERVED] * 3


@pytest.mark.parametrize("hypervisor", MESSAGES)
def test_messages_that_all_dribble_in_are_answered_like_any_others(
    daemon: DaemonProcess, witness: Witness, hypervisor: str
) -> None:
    with Session(daemon.socket, hypervisor, None, scripted_session.dribble) as session:
        assert session.play() == TOLD
    assert witness.serve() == Witness.SERVED


@pytest.mark.parametrize(
    ("hypervisor", "nth"),
    [
        pytest.param(hypervisor, nth, marks=[pytest.mark.verify] if hypervisor == "vmm" else [])
        for hypervisor, nth in EVERY_MESSAGE
    ],
)
def test_a_vmm_that_is_killed_at_any_message_leaves_nothing(
    daemon: DaemonProcess, witness: Witness, hypervisor: str, nth: int
) -> None:
    command = [sys.executable, "-m", "fakes.scripted_session", str(daemon.socket), hypervisor, str(nth)]
    killed = subprocess.run(command, cwd=TESTS, stdin=subprocess.DEVNULL, timeout=PATIENCE, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert witness.serve() == Witness.SERVED
