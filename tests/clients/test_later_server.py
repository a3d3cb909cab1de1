"""All our clients against a daemon of a later version, which sends unknown values.

The statements that allow it to: T-6, V-3, E-4, O-11, H-15.
"""

from __future__ import annotations

import concurrent.futures
import errno
import json
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Final

import pytest
import trio
from click.testing import CliRunner, Result

from fakes.daemon_process import DaemonProcess
from fakes.eventually import PATIENCE, eventually
from fakes.kvm_ports import FakeSlots
from fakes.later_server import LaterServer
from fakes.later_words import LATER, LATER_NUMBER
from intercept_client import (
    BlockingHypervisor,
    BlockingNotifier,
    BlockingOperator,
    BlockingVmm,
    BlockingVp,
    TrioNotifier,
    TrioOperator,
    TrioVmm,
    TrioVp,
)
from intercept_client.kvm._guest_memory import GuestMemory
from intercept_client.kvm._hypervisor_thread import HypervisorThread
from intercept_protocol.addresses import UaddrRange
from intercept_protocol.errors import WireError
from intercept_protocol.events import AnyFact, EventName, InterceptAnswered, RegionAdded
from intercept_protocol.hv_message import build_memory_intercept
from intercept_protocol.messages import (
    AddRegion,
    AddressSpaceKind,
    Call,
    CreatePartition,
    Histograms,
    HypervisorKind,
    Kick,
    ListPartitions,
    MapVma,
    OperatorStatistics,
    RegionKind,
    RequestedKind,
    Subscribe,
)
from intercept_protocol.outcomes import Access, LaterAnswer, Outcome
from interceptctl.cli import main

GFN: Final = 0x100
UADDRS: Final = UaddrRange.of_pages(0x7000_0000, 4)
TOUCH: Final = build_memory_intercept(gpa=GFN << 12, access=Access.READ)
ELSEWHERE: Final = build_memory_intercept(gpa=0, access=Access.READ)
SOFTWARE: Final = CreatePartition(address_space=AddressSpaceKind.DECLARED, hypervisor=HypervisorKind.SOFTWARE)
VMMS_OWN: Final = CreatePartition(address_space=AddressSpaceKind.DECLARED, hypervisor=HypervisorKind.VMM)
MAP: Final = MapVma(
    start_uaddr=UADDRS.start_uaddr,
    page_count=4,
    start_pfn=0xE0000,
    readable=True,
    writable=True,
    executable=False,
    io=True,
)
ADD: Final = AddRegion(
    start_gfn=GFN,
    page_count=4,
    start_uaddr=UADDRS.start_uaddr,
    kind=RequestedKind.AUTO,
    writable=True,
    executable=False,
)
EVENTS: Final = [EventName.REGION_ADDED, EventName.VP_ATTACHED, EventName.INTERCEPT_ANSWERED]
HEARD: Final = [("region_added", LATER), ("vp_attached", ""), ("intercept_answered", f"resume {LATER}")]
C_EXAMPLE: Final = Path(__file__).parents[2] / "clients" / "c" / "example.c"


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    with DaemonProcess(tmp_path_factory.mktemp("daemon")) as process:
        yield process.wait_serving()


@pytest.fixture
def later(daemon: DaemonProcess, tmp_path: Path) -> Iterator[LaterServer]:
    """For VMMs."""
    with LaterServer(tmp_path / "vmm", daemon.socket) as server:
        yield server


@pytest.fixture
def later_operators(daemon: DaemonProcess, tmp_path: Path) -> Iterator[LaterServer]:
    """Its operator's socket; a connection ends after three events."""
    with LaterServer(tmp_path / "operator", daemon.operator_socket, last_event=3) as server:
        yield server


@pytest.fixture
def partition_id(daemon: DaemonProcess) -> Iterator[int]:
    """A partition with a region and a VP that was answered."""
    with BlockingVmm.open(daemon.socket, name="guest") as vmm:
        partition = vmm.call(SOFTWARE)
        vmm.call(MAP)
        vmm.call(ADD)
        with BlockingVp.open(daemon.socket, partition, vp_index=0) as vp:
            vp.intercept(TOUCH)
            yield partition.partition_id


def interceptctl(server: LaterServer, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["--socket", str(server.path), *arguments])


def refusal_of_kick(error: WireError) -> tuple[int, str, bool]:
    return error.number, error.name, LATER in error.details


def test_a_blocking_vmm_lives_its_life(later: LaterServer) -> None:
    with ExitStack() as opened:
        vmm = opened.enter_context(BlockingVmm.open(later.path, name="guest"))
        partition = vmm.call(SOFTWARE)
        vmm.call(MAP)
        assert vmm.call(ADD).kind is RegionKind.MMIO
        vp = opened.enter_context(BlockingVp.open(later.path, partition, vp_index=0))
        notifier = opened.enter_context(BlockingNotifier.open(later.path, partition))
        assert vp.intercept(TOUCH) == LaterAnswer(Outcome.RESUME, LATER)
        assert vp.intercept(ELSEWHERE) == LaterAnswer(Outcome.FORWARD, LATER)
        with notifier.invalidation(UADDRS):
            assert vmm.translate(GFN) is None
        assert vmm.statistics().intercepts[LATER] == {LATER: 1}
        with pytest.raises(WireError) as refused:
            vmm.call(Kick(vp_index=7))
        assert refusal_of_kick(refused.value) == (LATER_NUMBER, "ELATER", True)
        assert vmm.hello.limits[LATER] == 7
        assert LATER in vmm.hello.features


async def test_a_trio_vmm_lives_its_life(later: LaterServer) -> None:
    async with TrioVmm.open(later.path, name="guest") as vmm:
        partition = await vmm.call(SOFTWARE)
        await vmm.call(MAP)
        assert (await vmm.call(ADD)).kind is RegionKind.MMIO
        async with (
            TrioVp.open(later.path, partition, vp_index=0) as vp,
            TrioNotifier.open(later.path, partition) as notifier,
        ):
            assert await vp.intercept(TOUCH) == LaterAnswer(Outcome.RESUME, LATER)
            async with notifier.invalidation(UADDRS):
                assert await vmm.translate(GFN) is None
            with pytest.raises(WireError) as refused:
                await vmm.call(Kick(vp_index=7))
        assert refusal_of_kick(refused.value) == (LATER_NUMBER, "ELATER", True)


def test_a_hypervisor_connection_refuses_unknown_requests_and_continues(later: LaterServer) -> None:
    slots = FakeSlots()
    with BlockingVmm.open(later.path) as vmm:
        partition = vmm.call(VMMS_OWN)
        lost: list[str] = []
        hypervisor = BlockingHypervisor.open(later.path, partition, GuestMemory(slots), regions=vmm.regions)
        with closing(HypervisorThread(hypervisor, lost.append)):
            vmm.call(MAP)
            vmm.call(ADD)
            with BlockingVp.open(later.path, partition, vp_index=0) as vp:
                assert vp.intercept(TOUCH) == LaterAnswer(Outcome.RESUME, LATER)
            assert GFN in slots.reached()
            assert lost == []
    assert {(error[0], error[1]) for error in later.unknown_refused if isinstance(error, list)} == {
        (errno.ENOSYS, "ENOSYS")
    }


@pytest.mark.parametrize("read", [ListPartitions(), OperatorStatistics()])
def test_a_blocking_operator_reads_on(
    later_operators: LaterServer, partition_id: int, read: Call[object]
) -> None:
    with BlockingOperator.open(later_operators.path) as operator:
        assert operator.call(read)
        assert operator.inspect_partition(partition_id).regions[0].kind == LATER
        assert len(operator.call(Histograms(partition_id=partition_id)).virtual_processors) == 1


def test_a_blocking_operator_hears_the_events_that_it_knows(
    daemon: DaemonProcess, later_operators: LaterServer
) -> None:
    with BlockingOperator.open(later_operators.path) as operator:
        operator.call(Subscribe(events=EVENTS))
        happen(daemon)
        facts: list[AnyFact] = []
        while len(facts) < len(EVENTS):
            facts += [event.fact for event in operator.next_events()]
    assert worded(facts) == HEARD


async def test_a_trio_operator_hears_the_events_that_it_knows(
    daemon: DaemonProcess, later_operators: LaterServer
) -> None:
    async with TrioOperator.open(later_operators.path) as operator:
        await operator.call(Subscribe(events=EVENTS))
        await trio.to_thread.run_sync(happen, daemon)
        facts: list[AnyFact] = []
        while len(facts) < len(EVENTS):
            facts += [event.fact for event in await operator.next_events()]
    assert worded(facts) == HEARD


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("ls", "guest"),
        ("ls --json", LATER),
        ("show {}", LATER),
        ("show {} --json", LATER),
        ("stats", LATER),
        ("policy show {}", f"mmio_granularity is {LATER}\n"),
        ("policy show {} --json", LATER),
        ("top --once --interval 0.1", "guest"),
        ("top --once --interval 0.1 --vps", "guest"),
        ("top --once --interval 0.1 --json", LATER),
        ("doctor", "answers, up"),
    ],
)
def test_interceptctl_shows_unknown_values_unchanged(
    later_operators: LaterServer, partition_id: int, command: str, words: str
) -> None:
    shown = interceptctl(later_operators, *command.format(partition_id).split())
    assert words in shown.output
    assert shown.exit_code == 0 or command == "doctor"


def test_interceptctl_watch_prints_the_events_that_it_knows(
    daemon: DaemonProcess, later_operators: LaterServer
) -> None:
    names = [argument for name in EVENTS for argument in ("--event", name.value)]
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        watching = pool.submit(interceptctl, later_operators, "watch", "--json", *names)
        eventually(lambda: "subscribe" in later_operators.answered, True)
        happen(daemon)
        lines = watching.result(PATIENCE).stdout.splitlines()
    assert [json.loads(line)["event"] for line in lines] == EVENTS


def test_the_c_client_lives_its_life(later: LaterServer, tmp_path: Path) -> None:
    if (gcc := shutil.which("gcc")) is None:
        pytest.skip("gcc is missing: the C client cannot be built")
    subprocess.run([gcc, "-o", tmp_path / "example", C_EXAMPLE], check=True, timeout=PATIENCE)
    lived = subprocess.run(
        [tmp_path / "example", later.path], check=True, capture_output=True, text=True, timeout=PATIENCE
    )
    assert lived.stdout.splitlines() == [
        f"gfn 0xf0000: resume {LATER}",
        f"gfn 0xf0001: resume {LATER}",
        f"gfn 0xf0002: forward {LATER}",
        f"gfn 0xf0040: forward {LATER}",
        f"gfn 0xf0000: forward {LATER}",
        "refused: EEXIST: region [0xf0000, 0xf0040) overlaps [0xf0000, 0xf0040)",
    ]


def happen(daemon: DaemonProcess) -> None:
    """Three events, in this order: a region is added, a VP attaches and is answered."""
    with BlockingVmm.open(daemon.socket) as vmm:
        partition = vmm.call(SOFTWARE)
        vmm.call(MAP)
        vmm.call(ADD)
        with BlockingVp.open(daemon.socket, partition, vp_index=0) as vp:
            vp.intercept(TOUCH)


def worded(facts: Sequence[AnyFact]) -> list[tuple[str, str]]:
    """Each event's name, and the words in it that are not known."""
    return [(fact.event_name, _word(fact)) for fact in facts]


def _word(fact: AnyFact) -> str:
    match fact:
        case RegionAdded():
            return fact.kind
        case InterceptAnswered():
            return f"{fact.outcome} {fact.reason}"
    return ""
