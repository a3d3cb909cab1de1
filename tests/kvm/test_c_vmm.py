"""The VMM in C: real guests on a real daemon, in a build that ends at any error that a sanitizer knows."""

from __future__ import annotations

import random
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import pytest
import trio

from fakes.daemon_process import DaemonProcess
from fakes.eventually import PATIENCE, eventually
from fakes.small_vmms import FLOATING, OURS
from intercept_client.kvm import Coverage, PartitionSetting, StopReason
from intercept_protocol.addresses import PAGE_SHIFT
from intercept_protocol.outcomes import Answer
from interceptctl.exercise.daemon_process import running_daemon
from interceptctl.guest.c_build import build_vmm, sources
from interceptctl.guest.c_vmm import CMemory, CVcpu, CVmm, CVmmFailed
from interceptctl.guest.outcome import ScenarioOutcome
from interceptctl.guest.playing import play_all
from interceptctl.guest.programs import COUNT, STORE, WATCH
from interceptctl.guest.restarts import HandedOver
from interceptctl.guest.scenarios import SCENARIOS, Kill, Scenario
from interceptctl.guest.vmm import STRANGERS, Vmm

STRICT = ("-pedantic", "-Wall", "-Wextra", "-Werror", "-pthread")
SANITIZED = ("-std=c11", *STRICT, "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
THREAD_SANITIZED = ("-std=c11", *STRICT, "-g", "-O1", "-fsanitize=thread")
WATCHED = PartitionSetting(coverage=Coverage.WATCHED)
STRANGERS_WORD = int.from_bytes(bytes([STRANGERS]) * 4, "little")
OURS_BYTES = OURS.to_bytes(4, "little")
FORWARDED_GPA = 0xFEB0_1000
"""Of the device that the VMM asks about."""
COUNTER_GPA = 0x8000
"""In RAM, behind the programs."""
FOR_EVER = 0xFFFF_FFFF
READS = 40

StartCVmm = Callable[..., CVmm]


@pytest.fixture(scope="session")
def binary(kvm: None, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: ARG001 - for its skip
    """The VMM, sanitized."""
    return built(tmp_path_factory.mktemp("c-vmm"), *SANITIZED)


def built(directory: Path, *options: str) -> Path:
    """Skips without a compiler, with the reason."""
    if shutil.which("cc") is None:
        pytest.skip("cc is missing: the VMM in C cannot be built")
    return build_vmm(directory, options)


@pytest.fixture
def start_vmm(binary: Path, daemon: DaemonProcess) -> Iterator[StartCVmm]:
    """Opens VMMs at the shared daemon, which must end well with the test."""
    with ExitStack() as vmms:

        def start(setting: PartitionSetting | None = None) -> CVmm:
            vmm = CVmm(binary, str(daemon.socket), setting or PartitionSetting())
            return vmms.enter_context(vmm)

        yield start


def watching(vmm: CVmm) -> tuple[CMemory, CVcpu]:
    """A BAR that a running guest reads from."""
    bar = vmm.add_bar(1)
    bar.write(0, OURS_BYTES)
    vcpu = vmm.add_vcpu(WATCH, esi=bar.gpa)
    vmm.start()
    vmm.reports.wait_for(OURS)
    return bar, vcpu


def run(vmm: CVmm, vcpu: CVcpu) -> StopReason:
    vmm.start()
    return vcpu.result(PATIENCE).reason


# ---------------------------------------------------------------- its parts

PLAYED_KVM = Path(__file__).parent / "c_played_kvm.c"
UNDER_TEST = ("access.c", "devices.c", "fetch.c", "gate.c", "memory.c", "vcpu.c")


def test_its_memslots_its_gate_and_its_loop_on_a_kvm_that_is_played(tmp_path: Path) -> None:
    if shutil.which("cc") is None:
        pytest.skip("cc is missing: the VMM in C cannot be built")
    parts = [source for source in sources() if source.name in UNDER_TEST]
    include, binary = f"-I{parts[0].parent}", tmp_path / "played"
    command: list[str | Path] = ["cc", *SANITIZED, include, "-o", binary, PLAYED_KVM, *parts]
    subprocess.run(command, check=True, timeout=PATIENCE)

    done = subprocess.run([binary], capture_output=True, text=True, timeout=PATIENCE, check=False)

    assert (done.returncode, done.stderr) == (0, "")
    passed = {line.removesuffix(": ok") for line in done.stdout.splitlines() if line.endswith(": ok")}
    assert passed == set(re.findall(r"CASE\((\w+)\)[,}]", PLAYED_KVM.read_text(encoding="utf-8")))


# ---------------------------------------------------------------- the guests


@pytest.mark.parametrize("compiler", [("g++", "-std=c++17", "-x", "c++"), ("gcc", "-std=c99")])
def test_it_is_in_other_languages_without_a_warning_too(compiler: Sequence[str]) -> None:
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"{compiler[0]} is not installed")
    command: list[str | Path] = [*compiler, *STRICT, "-fsyntax-only", *sources()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def play(
    binary: Path, path: str, coverage: Coverage, scenarios: Sequence[Scenario], kill: Kill
) -> list[ScenarioOutcome]:
    open_vmm = partial(CVmm, binary)
    report = play_all(path, kill, open_vmm, vmm="c", coverage=coverage, scenarios=scenarios, tell=print)
    return report.scenarios


def play_with_a_keeper(
    binary: Path, coverage: Coverage, scenarios: Sequence[Scenario]
) -> list[ScenarioOutcome]:
    """Scenarios may kill that daemon, which its keeper starts again."""

    async def with_a_daemon() -> list[ScenarioOutcome]:
        async with running_daemon() as daemon:
            kill = daemon.kill
            return await trio.to_thread.run_sync(play, binary, daemon.path, coverage, scenarios, kill)

    return trio.run(with_a_daemon)


def kill_nobody() -> None:
    raise AssertionError("the daemon is for all tests")


def failed(outcomes: list[ScenarioOutcome]) -> list[str]:
    return [f"{outcome.name}: {outcome.found}" for outcome in outcomes if not outcome.passed]


def test_it_passes_the_guests(binary: Path, daemon: DaemonProcess) -> None:
    scenarios = [scenario for scenario in SCENARIOS if not scenario.kills]
    outcomes = play(binary, str(daemon.socket), Coverage.ANNOUNCED, scenarios, kill_nobody)

    assert (len(outcomes), failed(outcomes)) == (len(scenarios), [])
    (vcpu,) = next(outcome for outcome in outcomes if outcome.name == "sweep by page").vcpus
    assert vcpu.kvm_mmio_exits == 256, "one a page, and none of the second round"
    assert len(vcpu.first_touch_us) == 257


def test_it_passes_the_guests_where_nothing_is_announced(binary: Path, daemon: DaemonProcess) -> None:
    scenarios = [scenario for scenario in SCENARIOS if scenario.name in {"sweep", "sweep by page", "unmap"}]
    outcomes = play(binary, str(daemon.socket), Coverage.WATCHED, scenarios, kill_nobody)

    assert (len(outcomes), failed(outcomes)) == (3, [])


def test_it_goes_on_over_a_restart_of_the_daemon(binary: Path) -> None:
    def restart(vmm: Vmm, kill: Kill) -> str:
        return str(HandedOver(vmm, kill, random.Random(1)).run(1))

    scenario = Scenario("one restart", "nothing stale", restart)
    (outcome,) = play_with_a_keeper(binary, Coverage.ANNOUNCED, [scenario])

    assert outcome.found.startswith("nothing stale in 1 kill")


@pytest.mark.verify
@pytest.mark.usefixtures("kvm")
@pytest.mark.parametrize("coverage", Coverage)
def test_its_threads_race_for_nothing(tmp_path: Path, coverage: Coverage) -> None:
    outcomes = play_with_a_keeper(built(tmp_path, *THREAD_SANITIZED), coverage, SCENARIOS)

    assert (len(outcomes), failed(outcomes)) == (len(SCENARIOS), [])


def test_a_device_that_it_leaves_to_the_daemon_is_reached_by_forward(start_vmm: StartCVmm) -> None:
    vmm = start_vmm()
    guest = vmm.add_vcpu(STORE, esi=FORWARDED_GPA, ebx=7)

    assert run(vmm, guest) is StopReason.HALTED

    assert vmm.reports.kept == [7]
    assert guest.tally.intercepts[Answer.NO_REGION] == 2
    assert guest.tally.forwarded == 2


def test_a_first_touch_says_what_of_it_was_the_memslot(start_vmm: StartCVmm) -> None:
    vmm = start_vmm()
    guest = vmm.add_vcpu(STORE, esi=vmm.add_bar(1).gpa, ebx=1)
    run(vmm, guest)

    touches, memslots = guest.tally.first_touches, guest.tally.memslot_times

    assert (len(touches), memslots[0]) == (2, 0), "the program's own page is not an access that is completed"
    assert 0 < memslots[1] < touches[1]


def test_increments_are_exact_while_the_host_keeps_revoking_the_page(start_vmm: StartCVmm) -> None:
    vmm = start_vmm()
    bar, times = vmm.add_bar(1), 1000
    for _ in range(2):
        vmm.add_vcpu(COUNT, esi=bar.gpa, ecx=times)
    running = vmm.start()

    while not all(vcpu.done() for vcpu in running):
        with bar.changing():
            pass

    assert [vcpu.result(PATIENCE).reason for vcpu in running] == [StopReason.HALTED] * 2
    assert bar.word(0) == 2 * times


def test_memory_that_faults_stops_the_vcpu_and_not_the_vmm(start_vmm: StartCVmm) -> None:
    vmm = start_vmm()
    bar, guest = watching(vmm)

    bar.truncate()

    stop = guest.result(PATIENCE)
    assert (stop.reason, stop.gpa, stop.answer) == (StopReason.HOST_FAULT, bar.gpa, Answer.NO_PROGRESS)


# ---------------------------------------------------------------- the dangling window


def test_without_a_notifier_the_guest_reads_a_strangers_memory(start_vmm: StartCVmm) -> None:
    """The hazard, on the announced setting with the announcement left out."""
    vmm = start_vmm()
    bar, _ = watching(vmm)

    bar.reuse()

    vmm.reports.wait_for(STRANGERS_WORD)


def test_announced_the_guest_never_reads_a_strangers_memory_and_is_forwarded(start_vmm: StartCVmm) -> None:
    vmm = start_vmm()
    bar, guest = watching(vmm)

    bar.hand_over()
    seen = vmm.reports.wait(READS)

    assert set(seen[1:]) == {FLOATING}, "but for what was on its way"
    assert vmm.reports.take_values() == {OURS, FLOATING}
    assert guest.tally.intercepts[Answer.NO_REGION] >= READS - 1


def test_announced_a_write_never_reaches_a_strangers_memory(start_vmm: StartCVmm) -> None:
    vmm = start_vmm()
    bar = vmm.add_bar(1)
    guest = vmm.add_vcpu(STORE, esi=bar.gpa, ebx=1)
    run(vmm, guest)
    bar.hand_over()
    guest.restart(esi=bar.gpa, ebx=2)

    assert run(vmm, guest) is StopReason.HALTED

    assert bar.is_full_of(STRANGERS)
    assert vmm.reports.kept == [1, FLOATING]


def test_an_announced_munmap_under_a_running_guest_floats_and_is_found_again(start_vmm: StartCVmm) -> None:
    vmm = start_vmm()
    bar, _ = watching(vmm)

    bar.unmap()
    while_gone = vmm.reports.wait(READS)
    bar.take_back()

    assert set(while_gone[1:]) == {FLOATING}
    vmm.reports.wait_for(OURS)


def test_watched_the_guest_is_cut_off_after_an_unmap_that_nobody_announced(start_vmm: StartCVmm) -> None:
    vmm = start_vmm(WATCHED)
    bar, guest = watching(vmm)

    bar.unmap_unannounced()

    vmm.reports.wait_for(FLOATING)
    eventually(lambda: guest.tally.intercepts[Answer.UNBACKED] > 0, True)
    assert vmm.lost_because is None


def test_watched_a_strangers_memory_is_out_of_reach_within_a_bounded_time(start_vmm: StartCVmm) -> None:
    vmm = start_vmm(WATCHED)
    bar = vmm.add_bar(1)
    guest = vmm.add_vcpu(STORE, esi=bar.gpa, ebx=1)
    run(vmm, guest)
    assert bar.is_reached()

    bar.reuse()
    eventually(bar.is_reached, False)
    bar.remove()
    guest.restart(esi=bar.gpa, ebx=2)
    run(vmm, guest)

    assert bar.is_full_of(STRANGERS)
    assert vmm.reports.kept == [1, FLOATING]


# ---------------------------------------------------------------- the death of the daemon


@contextmanager
def doomed(binary: Path, daemon: DaemonProcess, setting: PartitionSetting) -> Iterator[CVmm]:
    """A VMM at that daemon, which must end well all the same."""
    with CVmm(binary, str(daemon.socket), setting) as vmm:
        yield vmm


def kill_daemon(daemon: DaemonProcess, vmm: CVmm) -> None:
    daemon.signal(signal.SIGKILL)
    daemon.wait_ended()
    eventually(lambda: vmm.lost_because is None, False)


def test_mmio_goes_ram_stays_and_a_vcpu_that_needs_the_daemon_stops(
    binary: Path, own_daemon: DaemonProcess
) -> None:
    with doomed(binary, own_daemon, WATCHED) as vmm:
        bar = vmm.add_bar(1)
        bar.write(0, OURS_BYTES)
        reader = vmm.add_vcpu(WATCH, esi=bar.gpa)
        vmm.ask("add", bar.index, bar.gfn + 1)  # which leaves the first region where it is
        counter = vmm.add_vcpu(COUNT, esi=COUNTER_GPA, ecx=FOR_EVER)
        vmm.start()
        vmm.reports.wait_for(OURS)
        eventually(lambda: vmm.ram.word(COUNTER_GPA) > 0, True)

        kill_daemon(own_daemon, vmm)

        stop = reader.result(PATIENCE)
        assert (stop.reason, stop.gpa) == (StopReason.DAEMON_LOST, bar.gpa)
        assert (bar.is_reached(), vmm.ram.is_reached()) == (False, True)
        before = vmm.ram.word(COUNTER_GPA)
        eventually(lambda: vmm.ram.word(COUNTER_GPA) != before, True)
        assert not counter.done()
        bar.unmap_unannounced()  # does not hang: the userfaultfd died with the daemon


def test_without_the_daemon_the_vmm_takes_memory_from_the_guest_before_it_unmaps_it(
    binary: Path, own_daemon: DaemonProcess
) -> None:
    with doomed(binary, own_daemon, PartitionSetting()) as vmm:
        bar = vmm.add_bar(1)
        counter = vmm.add_vcpu(COUNT, esi=COUNTER_GPA, ecx=FOR_EVER)
        vmm.start()
        eventually(lambda: vmm.ram.word(COUNTER_GPA) > 0, True)

        with bar.changing():  # the daemon dies in the middle of it
            kill_daemon(own_daemon, vmm)
            bar.unmap_unannounced()
        with vmm.ram.changing():
            assert not vmm.ram.is_reached()
            vmm.ram.unmap_unannounced()

        assert counter.result(PATIENCE).reason is StopReason.DAEMON_LOST


# ---------------------------------------------------------------- the program


def test_it_reads_commands_and_prints_what_its_vcpus_did(binary: Path, daemon: DaemonProcess) -> None:
    commands = (
        "bar 0 16 movable rwx",
        "write 0 0x1000 fe06f4",  # inc byte ptr [esi]; hlt
        "bar 0x200 1 mmio rw",
        "vcpu 0x1000 esi=0x200000",
        "start",
        "wait",
        "read 1 0 1",
        "bar 0x200 1 mmio rw",
        "read 9 0 1",
        "nonsense",
    )
    done = subprocess.run(
        [binary, "-v", daemon.socket],
        input="\n".join(commands) + "\n",
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
    )

    *answers, refused, absent, unknown = done.stdout.splitlines()
    assert answers == ["ok 0", "ok", "ok 1", "ok 0", "ok", "ok", "ok 01"]
    assert refused.startswith("error EEXIST: region [0x200, 0x201) overlaps")
    assert (absent, unknown) == ("error no such BAR", "error no such command")
    printed = done.stderr.splitlines()
    assert printed[:4] == [
        "vCPU 0: HALTED",
        "  exits: MmioRead 1 Halted 1 NotEmulated 1",
        "  intercepts: resume mapped 2",
        "  completed 1, forwarded 0, replayed 0",
    ]
    assert printed[4].startswith("  first touch: median ")
    assert sum(int(line.split()[-1]) for line in printed[5:]) == 2, "of both touches, in the histogram"


def test_what_cannot_be_done_is_an_error_that_changes_nothing(binary: Path, daemon: DaemonProcess) -> None:
    commands = {
        "bar 0x200 1 mmio rw": "ok 0",
        "bar 0x201 0 mmio rw": "error a BAR has 1 to 2^40 - 1 pages",
        "bar 0x201 0x10000000001 mmio rw": "error a BAR has 1 to 2^40 - 1 pages",
        "bar 0x201 0xffffffffff mmio rw": "error Cannot allocate memory",
        "bar 0x200 2 mmio rw": "error EEXIST: region [0x200, 0x202) overlaps [0x200, 0x201)",
        "bar 0x201 1 mmio rw": "ok 1",
        "vcpu 0 eip=1": "error no such register",
        "vcpu 0": "ok 0",
        "restart 0 0 eip=1": "error no such register",
        "write 0 0 7": "error no hex",
        "write 0 0 zz": "error no hex",
        "write 0 4095 0102": "error outside",
        "read 0 0 2": "ok 0000",
        "cut 0": "ok",
        "holds 0 1": "error its memory faults",
        "unmap 1": "ok",
        "holds 1 1": "error its memory faults",
        "x" * 20_000: "error the line is too long",
        "wait" + " x" * 40: "error too many words",
        "slots": "ok 0",
    }
    done = subprocess.run(
        [binary, daemon.socket],
        input="\n".join(commands) + "\n",
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )

    assert done.stdout.splitlines() == list(commands.values())
    assert (done.returncode, done.stderr) == (0, "")


def test_an_absent_daemon_is_named(binary: Path, tmp_path: Path) -> None:
    with pytest.raises(CVmmFailed, match=rf"^{tmp_path}/none\.sock: No such file"):
        CVmm(binary, str(tmp_path / "none.sock"), PartitionSetting())


def test_a_place_beyond_a_bar_is_refused(start_vmm: StartCVmm) -> None:
    vmm = start_vmm()
    with pytest.raises(CVmmFailed, match="refused 'read': outside"):
        vmm.ram.read(16 << PAGE_SHIFT, 4)
