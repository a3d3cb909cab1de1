"""What the cases share: the server that is checked, connections to it, and the report by statements.

Without `--socket` the reference is started, where it is installed; else the cases are skipped and say so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from conformance.guests import RawVmm
from conformance.reference import COMMAND, reference_server
from conformance.wire import PATIENCE, RawConnection

LAST = "test_drain.py"
STATEMENTS = pytest.StashKey[dict[str, list[str]]]()
"""Statement to the cases that failed, of every statement that a case checked."""


@dataclass(frozen=True, slots=True)
class Server:
    """The implementation that is checked; without `operator_socket` the operator's part of it is not."""

    socket: Path
    operator_socket: Path | None
    may_be_drained: bool


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("conformance", "an implementation of the interceptd wire")
    group.addoption("--socket", metavar="PATH", help="where it serves VMMs")
    group.addoption("--operator-socket", metavar="PATH", help="where it serves operators")
    group.addoption("--patience", type=float, metavar="SECONDS", help="how long an answer may take [20]")
    group.addoption("--drain", action="store_true", help="drain it at the end: then it is gone")
    group.addoption("--specification", metavar="FILE", help="the text that has the numbered statements")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "statement(number, ...): the statements that a case checks")
    config.stash[STATEMENTS] = {}
    RawConnection.patience = config.getoption("patience", None) or PATIENCE


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name == LAST and item.path.parent == Path(__file__).parent)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    result: Any = yield
    report = result.get_result()
    marks = list(item.iter_markers("statement"))
    if call.when == "call" or report.failed:
        for number in (number for mark in marks for number in mark.args):
            failed = item.config.stash[STATEMENTS].setdefault(number, [])
            if report.failed:
                failed.append(item.nodeid)
            report.user_properties.append(("statement", number))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    checked = config.stash[STATEMENTS]
    broken = {number: cases for number, cases in checked.items() if cases}
    if not checked:
        return
    terminalreporter.section("statements of the specification")
    terminalreporter.line(f"{len(checked) - len(broken)} of {len(checked)} that were checked hold")
    for number, cases in sorted(broken.items()):
        terminalreporter.line(f"{number} broken: {', '.join(cases)}")


@pytest.fixture(scope="session")
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    socket = request.config.getoption("socket", None)
    operator_socket = request.config.getoption("operator_socket", None)
    if socket is not None:
        may_be_drained = bool(request.config.getoption("drain", default=False))
        given = {"--socket": socket, "--operator-socket": operator_socket}
        for option, path in given.items():
            if path is not None:
                _connect_once(option, path)
        yield Server(Path(socket), operator_socket and Path(operator_socket), may_be_drained)
    elif COMMAND.exists():
        with reference_server(tmp_path_factory.mktemp("reference")) as (path, operators):
            yield Server(path, operators, may_be_drained=True)
    else:
        pytest.skip("no --socket PATH was given, and no interceptd is installed to be started")


def _connect_once(option: str, path: str) -> None:
    """Nobody there: said once, and not by every case."""
    try:
        RawConnection(path).close()
    except OSError as error:
        pytest.exit(f"{option} {path}: {error.strerror or error}", pytest.ExitCode.USAGE_ERROR)


@pytest.fixture
def connect(server: Server) -> Iterator[Callable[[], RawConnection]]:
    """Opens connections that have not said hello, and closes them at the end."""
    with ExitStack() as opened:
        yield lambda: opened.enter_context(RawConnection(server.socket))


@pytest.fixture
def vmm(server: Server) -> Iterator[RawVmm]:
    """A partition in the declared setting, on the server's own table."""
    with RawVmm(server.socket) as vmm:
        yield vmm


@pytest.fixture
def hosted(server: Server) -> Iterator[RawVmm]:
    """A partition whose hypervisor is the VMM's, and has not connected yet."""
    with RawVmm(server.socket, hypervisor="vmm") as vmm:
        yield vmm


@pytest.fixture
def operator(server: Server) -> Iterator[RawConnection]:
    if server.operator_socket is None:
        pytest.skip("no --operator-socket PATH was given")
    with RawConnection(server.operator_socket) as operator:
        operator.say_hello("operator")
        yield operator


@pytest.fixture
def listener(server: Server, operator: RawConnection) -> Iterator[RawConnection]:  # noqa: ARG001 - skips
    """A second operator, so that the first can go on asking."""
    assert server.operator_socket is not None
    with RawConnection(server.operator_socket) as listener:
        listener.say_hello("operator")
        yield listener


@pytest.fixture
def hello(connect: Callable[[], RawConnection]) -> dict[str, Any]:
    """What the server says of itself."""
    answer: dict[str, Any] = connect().say_hello("vmm")
    return answer


@pytest.fixture
def limits(hello: dict[str, Any]) -> dict[str, int]:
    stated: dict[str, int] = hello["limits"]
    return stated
