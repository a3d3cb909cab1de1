"""What the cases share: the server under test, connections to it, and which cases run.

Without `--socket` the suite starts the reference if installed; otherwise it skips the cases with a reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from conformance.exchange import PROFILES, RUNNING, NotImplementedYet, NotOffered
from conformance.guests import RawVmm
from conformance.reference import COMMAND, reference_server
from conformance.report import MISSING, StatementReport, in_few_lines, reason_not_run
from conformance.selection import needs_of, require_cases, select
from conformance.statements import SPECIFICATION, numbered
from conformance.wire import PATIENCE, RawConnection

TEXTS = pytest.StashKey[Mapping[str, str]]()
"""The statements of the specification, number to text."""
REPORT = pytest.StashKey[StatementReport]()


@dataclass(frozen=True, slots=True)
class Server:
    """The implementation under test; without `operator_socket` its operator part is not tested."""

    socket: Path
    operator_socket: Path | None
    may_be_drained: bool


class Stated(dict[str, int]):
    """The limits of a hello's answer."""

    def __missing__(self, limit: str) -> int:
        raise NotOffered(f"the answer to hello does not state limits.{limit}")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("conformance", "an implementation of the interceptd wire")
    group.addoption("--socket", metavar="PATH", help="where the server accepts VMMs")
    group.addoption("--operator-socket", metavar="PATH", help="where it accepts operators")
    group.addoption("--profile", action="append", choices=PROFILES, help="only cases that need no other part")
    group.addoption("--statement", action="append", metavar="NUMBER", help="only the cases of this statement")
    group.addoption("--patience", type=float, metavar="SECONDS", help="how long to wait for an answer [20]")
    group.addoption("--drain", action="store_true", help="drain the server at the end, which ends it")
    group.addoption("--specification", metavar="FILE", help="the text with the numbered statements")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "statement(number, ...): the statements that a case checks")
    config.addinivalue_line("markers", "needs(profile, ...): the parts of a server that a case needs")
    config.stash[TEXTS] = _specification(config)
    wanted = config.getoption("statement", None) or []
    require_cases(wanted)
    config.stash[REPORT] = StatementReport(config.stash[TEXTS], wanted)
    config.pluginmanager.register(config.stash[REPORT])
    RawConnection.patience = config.getoption("patience", None) or PATIENCE


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.stash[REPORT].left_out = select(config, items)


def pytest_runtest_setup(item: pytest.Item) -> None:
    RUNNING.begin(needs_of(item))


def pytest_runtest_logfinish() -> None:
    RUNNING.begin(None)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    result: Any = yield
    report: pytest.TestReport = result.get_result()
    if call.excinfo is None or not report.failed:
        return
    if (reason := reason_not_run(call.excinfo.value)) is not None:
        report.outcome = "skipped"
        report.longrepr = str(item.path), item.location[1] or 0, reason
        if isinstance(call.excinfo.value, NotImplementedYet):
            report.user_properties.append((MISSING, reason))
    elif item.config.getoption("tbstyle") == "auto":
        report.longrepr = in_few_lines(item, call, item.config.stash[TEXTS])


def _specification(config: pytest.Config) -> dict[str, str]:
    path = Path(config.getoption("specification", None) or SPECIFICATION)
    return numbered(path.read_text(encoding="utf-8")) if path.is_file() else {}


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
        pytest.skip("no --socket PATH was given, and interceptd is not installed")


def _connect_once(option: str, path: str) -> None:
    """If no server listens, say so once rather than in every case."""
    try:
        RawConnection(path).close()
    except OSError as error:
        pytest.exit(f"{option} {path}: {error.strerror or error}", pytest.ExitCode.USAGE_ERROR)


@pytest.fixture
def connect(server: Server) -> Iterator[Callable[[], RawConnection]]:
    """Opens connections without a hello, and closes them at the end."""
    with ExitStack() as opened:
        yield lambda: opened.enter_context(RawConnection(server.socket))


@pytest.fixture
def vmm(server: Server) -> Iterator[RawVmm]:
    """A partition on declared memory and the server's own table."""
    with RawVmm(server.socket) as vmm:
        yield vmm


@pytest.fixture
def hosted(server: Server) -> Iterator[RawVmm]:
    """A partition whose hypervisor is the VMM, which has not connected it yet."""
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
    """A second operator, so that the first can go on sending requests."""
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
    stated = hello.get("limits")
    return Stated(stated if isinstance(stated, dict) else {})
