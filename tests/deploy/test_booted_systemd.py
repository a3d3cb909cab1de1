"""The units under a real systemd, which is process 1 of its own namespaces: what outlives a daemon, and when
everything is let go."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from fakes.booted_systemd import INTERPRETER, UNITS, BootedSystemd, obstacle
from fakes.eventually import PATIENCE, eventually
from fakes.live_attacks import MADV_POPULATE_READ
from fakes.live_vmm import LiveVmm
from fakes.puppet import Puppet
from fakes.scraper import Scrape
from fakes.surviving_vmm import Mode, SurvivingVmm
from fakes.witness import Witness
from intercept_client import ConnectionLost, libc
from intercept_client.memory import Watch
from intercept_protocol.outcomes import Access

pytestmark = pytest.mark.skipif(bool(obstacle()), reason=obstacle())

SERVICE, SOCKET, TEMPLATE = "interceptd.service", "interceptd.socket", "interceptd@.service"
WEB, OTHER = "interceptd@web.service", "interceptd@other.service"
METRICS = ("interceptd-metrics.socket", "interceptd-metrics.service")
CONTROL = "interceptctl"
CONFIG = "allowed_uids = [0]\n"
NOT_VALID = "no_such_key = 1\n"
SCRAPED = CONFIG + 'metrics.listen = "unix:/run/interceptd/metrics.sock"\n'
CHANGED = ["limits.operators: 32 -> 64"]
STARTS = 25
"""More than a usual start limit allows."""
RESTARTS = (
    ("systemctl", "restart", SERVICE),
    ("systemctl", "kill", "--signal=KILL", "--kill-who=main", SERVICE),
    (CONTROL, "restart"),
)
"""The ways in which a daemon is followed by another."""
KEEP = (UNITS / "interceptd-keep.conf").read_text()
HANGS = "#!/bin/sh\ntrap 'exit 75' TERM\nsleep infinity & wait\n"
"""In its start; a daemon makes way when it gets a SIGTERM."""


@pytest.fixture
def system(tmp_path: Path) -> Iterator[BootedSystemd]:
    """With the sockets of the one daemon open; nothing else runs."""
    units = [SERVICE, SOCKET, TEMPLATE, *METRICS]
    with BootedSystemd(tmp_path / "system", units, config=CONFIG) as system:
        system.systemctl("start", SOCKET)
        yield system


def vmm_socket(system: BootedSystemd, instance: str = "") -> Path:
    return system.root / "run/interceptd" / instance / "vmm.sock"


def scrape(system: BootedSystemd, path: str, status: int | None = 0) -> str:
    """By the port of the loopback."""
    return system.run("curl", "--silent", f"http://127.0.0.1:9477/{path}", status=status)


def kinds(names: list[str]) -> list[str]:
    """Of what is passed, without the keys of connections."""
    return sorted({name if "-" in name or name in ("vmm", "operator") else name[0] for name in names})


def succeed(system: BootedSystemd, vmm: SurvivingVmm, command: Sequence[str], unit: str = SERVICE) -> None:
    """After the command another daemon has the partition, with all that it had."""
    before, restarts = system.main_pid(unit), vmm.vmm.statistics().restarts
    system.run(*command)
    vmm.touch(vmm.add(vmm.new_region(3)))
    vmm.check()
    assert vmm.vmm.statistics().restarts == restarts + 1
    assert system.main_pid(unit) not in (0, before)


def is_let_go(vmm: SurvivingVmm) -> bool:
    """Whether its connections end; waits for a daemon that answers."""
    try:
        vmm.vmm.statistics()
    except ConnectionLost:
        return True
    return False


def test_a_partition_outlives_each_end_of_a_daemon_that_is_followed_by_another(system: BootedSystemd) -> None:
    with SurvivingVmm(vmm_socket(system), Mode.WATCHED) as vmm:
        vmm.touch(vmm.add(vmm.new_region(3)))
        operator = (system.root / "run/interceptd/operator.sock").stat()
        for command in RESTARTS:
            succeed(system, vmm, command)
        assert kinds(system.passed(SERVICE)) == ["c", "d", "m", "own-operator", "p", "vmm"]
        assert (system.root / "run/interceptd/operator.sock").stat().st_ino == operator.st_ino


def test_the_first_vmm_starts_the_daemon_and_a_file_that_is_not_valid_fails_its_reload(
    system: BootedSystemd,
) -> None:
    assert system.main_pid(SERVICE) == 0
    with SurvivingVmm(vmm_socket(system), Mode.DECLARED) as vmm:
        daemon = system.main_pid(SERVICE)
        assert daemon
        system.configure(CONFIG + "limits.operators = 64\n")
        system.systemctl("reload", SERVICE)
        eventually(lambda: [line["changed"] for line in system.log("configuration_reloaded")], [CHANGED])
        system.configure(NOT_VALID)
        system.systemctl("reload", SERVICE, status=1)
        assert "no_such_key: unknown key" in system.log_text()
        vmm.check()
        assert len(system.log("configuration_reloaded")) == 1
        assert (system.show(SERVICE, "ActiveState"), system.main_pid(SERVICE)) == ("active", daemon)


def test_a_restart_with_a_wrong_configuration_loses_nothing_and_goes_on_once_it_is_repaired(
    system: BootedSystemd,
) -> None:
    with SurvivingVmm(vmm_socket(system), Mode.DECLARED) as vmm:
        daemon = system.main_pid(SERVICE)
        system.configure(NOT_VALID)
        assert "no_such_key: unknown key" in system.run(CONTROL, "restart", status=1)
        assert system.main_pid(SERVICE) == daemon  # an operator's restart checks first
        system.systemctl("restart", SERVICE, status=1)
        system.configure(CONFIG)
        vmm.check()  # waits for it
        assert vmm.vmm.statistics().restarts == 1
        with Witness(vmm_socket(system)) as witness:
            assert witness.serve() == Witness.SERVED


def test_the_port_for_metrics_is_forwarded_to_the_daemon_by_a_service_that_is_active(
    system: BootedSystemd,
) -> None:
    system.configure(SCRAPED)
    port, proxy = METRICS
    system.systemctl("start", port)
    assert scrape(system, "healthz", status=None) == ""  # no daemon runs, and a scrape starts none
    assert system.show(SERVICE, "ActiveState") == "inactive"
    with SurvivingVmm(vmm_socket(system), Mode.DECLARED):
        system.systemctl("restart", SERVICE)
        assert scrape(system, "healthz") == "serving\n"
        page = Scrape(scrape(system, "metrics"))
    assert page.by("interceptd_recoveries_total", "result") == {"recovered": 1}
    assert (system.show(proxy, "ActiveState"), system.show(proxy, "SubState")) == ("active", "running")


@pytest.mark.verify
def test_the_exercise_finds_nothing_wrong_while_daemons_and_systemd_itself_are_exchanged(
    system: BootedSystemd,
) -> None:
    """Under load: fake guests of live memory, who judge every answer."""
    system.systemctl("start", SERVICE)
    exercise = ["exercise", "--vmm-socket", "/run/interceptd/vmm.sock", "--seconds", "20", "--quiet"]
    with system.running(CONTROL, *exercise) as exercising:
        eventually(lambda: bool(system.log("partition_created")), True)
        starts = 1
        for command in (*RESTARTS, ("systemctl", "daemon-reexec"), *RESTARTS):
            system.run(*command)
            starts += command in RESTARTS
            eventually(lambda: len(system.log("daemon_started")), starts)
        assert exercising.poll() is None  # the restarts were under load
        said, _ = exercising.communicate(timeout=PATIENCE)
        assert exercising.returncode == 0, said
    assert len(system.log("partition_recovered")) == 2 * len(RESTARTS)
    assert not system.log("partition_not_recovered")


@pytest.mark.verify
def test_a_stop_lets_everything_go_and_the_next_vmm_starts_the_daemon_again(system: BootedSystemd) -> None:
    with SurvivingVmm(vmm_socket(system), Mode.DECLARED_VMM) as vmm:
        system.systemctl("stop", SERVICE)
        assert is_let_go(vmm)
        assert (system.show(SERVICE, "ActiveState"), system.show(SERVICE, "Result")) == (
            "inactive",
            "success",
        )
    with Witness(vmm_socket(system)) as witness:
        assert witness.serve() == Witness.SERVED


@pytest.mark.verify
def test_a_drain_ends_the_daemon_which_is_not_started_before_a_vmm_comes(system: BootedSystemd) -> None:
    with SurvivingVmm(vmm_socket(system), Mode.WATCHED_VMM) as vmm:
        vmm.touch(vmm.add(vmm.new_region(3)))
        system.run(CONTROL, "drain", "--timeout", "5")
        system.wait_state(SERVICE, "inactive")
        assert is_let_go(vmm)
        assert not vmm.table.pages  # unmapped in order
    assert [system.show(SERVICE, name) for name in ("Result", "ExecMainStatus", "NRestarts")] == [
        "success",
        "0",
        "0",
    ]
    assert system.show(SOCKET, "ActiveState") == "active"
    with Witness(vmm_socket(system)) as witness:
        assert witness.serve() == Witness.SERVED


@pytest.mark.verify
def test_no_number_of_failed_starts_lets_anything_go(system: BootedSystemd) -> None:
    system.override(SERVICE, "[Service]\nExecStopPost=\n")  # no pause between them
    with SurvivingVmm(vmm_socket(system), Mode.DECLARED) as vmm:
        system.configure(NOT_VALID)
        system.systemctl("restart", SERVICE, status=1)
        eventually(lambda: int(system.show(SERVICE, "NRestarts")) >= STARTS, True)
        assert system.show(SOCKET, "ActiveState") == "active"
        system.configure(CONFIG)
        vmm.check()
        assert vmm.vmm.statistics().restarts == 1


@pytest.mark.verify
def test_a_daemon_that_is_not_installed_for_a_while_is_waited_for(system: BootedSystemd) -> None:
    with SurvivingVmm(vmm_socket(system), Mode.DECLARED) as vmm:
        system.run("chmod", "0", "/usr/bin/interceptd")
        system.systemctl("restart", SERVICE, status=1)
        eventually(lambda: int(system.show(SERVICE, "NRestarts")) > 0, True)
        system.run("chmod", "0755", "/usr/bin/interceptd")
        vmm.check()
        assert vmm.vmm.statistics().restarts == 1


@pytest.mark.verify
def test_with_a_keeper_of_its_own_a_restart_with_a_wrong_configuration_keeps_the_vmms_socket(
    system: BootedSystemd,
) -> None:
    system.override(SERVICE, KEEP)
    system.systemctl("start", SERVICE)
    system.configure(NOT_VALID)
    system.systemctl("restart", SERVICE, status=1)
    eventually(lambda: int(system.show(SERVICE, "NRestarts")) > 0, True)
    assert system.show(SOCKET, "ActiveState") == "active"
    system.configure(CONFIG)
    with Witness(vmm_socket(system)) as witness:
        assert witness.serve() == Witness.SERVED


@pytest.mark.verify
def test_a_stop_lets_go_of_what_waits_for_a_daemon_that_cannot_start(system: BootedSystemd) -> None:
    with SurvivingVmm(vmm_socket(system), Mode.DECLARED) as vmm:
        system.configure(NOT_VALID)
        system.systemctl("restart", SERVICE, status=1)
        system.systemctl("stop", SERVICE)
        assert is_let_go(vmm)  # waits for it
    system.configure(CONFIG)
    with Witness(vmm_socket(system)) as witness:
        assert witness.serve() == Witness.SERVED


@pytest.mark.verify
def test_a_daemon_that_hangs_at_its_start_lets_everything_go_and_the_next_vmm_starts_another(
    system: BootedSystemd,
) -> None:
    system.override(SERVICE, "[Service]\nTimeoutStartSec=2s\n")
    with SurvivingVmm(vmm_socket(system), Mode.DECLARED) as vmm:
        system.replace_daemon(HANGS)
        system.systemctl("kill", "--signal=KILL", SERVICE)
        assert is_let_go(vmm)  # waits for it
    system.wait_state(SERVICE, "failed")
    assert (system.show(SERVICE, "Result"), system.show(SERVICE, "NRestarts")) == ("timeout", "1")
    system.replace_daemon(INTERPRETER)
    with Witness(vmm_socket(system)) as witness:
        assert witness.serve() == Witness.SERVED


def test_a_daemon_whose_loop_hangs_is_killed_and_followed(system: BootedSystemd) -> None:
    system.override(SERVICE, "[Service]\nWatchdogSec=4s\nTimeoutAbortSec=1s\n")
    with SurvivingVmm(vmm_socket(system), Mode.DECLARED) as vmm:
        succeed(system, vmm, ("systemctl", "kill", "--signal=STOP", "--kill-who=main", SERVICE))
    eventually(lambda: "Watchdog timeout" in system.said, True)


@pytest.mark.verify
def test_what_the_store_has_no_room_for_is_logged(system: BootedSystemd) -> None:
    system.override(SERVICE, "[Service]\nFileDescriptorStoreMax=4\nEnvironment=FDSTORE=4\n")
    with SurvivingVmm(vmm_socket(system), Mode.DECLARED) as vmm:
        vmm.check()
    (not_kept,) = system.log("partition_not_kept")
    assert not_kept["reason"]
    assert "Cannot store more fds" not in system.said  # the daemon counts, and asks for no more


@pytest.mark.verify
def test_the_sockets_of_an_instance_outlive_its_daemon_and_no_other_instance_reaches_them(
    system: BootedSystemd,
) -> None:
    system.systemctl("start", WEB, OTHER)
    with SurvivingVmm(vmm_socket(system, "web"), Mode.WATCHED) as vmm:
        socket = vmm_socket(system, "web").stat()
        for command in (("restart", WEB), ("kill", "--signal=KILL", "--kill-who=main", WEB)):
            succeed(system, vmm, ("systemctl", *command), WEB)
        assert vmm_socket(system, "web").stat().st_ino == socket.st_ino
        assert kinds(system.passed(WEB)) == ["c", "d", "m", "own-operator", "own-vmm", "p"]
        seen = system.run("nsenter", "--mount", f"--target={system.main_pid(OTHER)}", "ls", "/run/interceptd")
        assert seen.split() == ["other"]


@pytest.mark.verify
def test_with_a_keeper_of_its_own_a_partition_outlives_the_daemon_and_a_stop_drains(
    system: BootedSystemd,
) -> None:
    system.override(SERVICE, KEEP)
    with SurvivingVmm(vmm_socket(system), Mode.WATCHED) as vmm:
        vmm.touch(vmm.add(vmm.new_region(3)))
        (daemon,) = children_in(system, system.main_pid(SERVICE))
        for end in (("kill", "-KILL", daemon), (CONTROL, "restart")):
            system.run(*end)
            vmm.check()
        assert vmm.vmm.statistics().restarts == 2
        system.systemctl("stop", SERVICE)
        assert is_let_go(vmm)
    assert system.log("daemon_ended")
    assert system.show(SERVICE, "Result") == "success"


@pytest.mark.verify
def test_with_a_keeper_of_its_own_no_vmm_that_holds_its_mmap_lock_keeps_process_1_waiting(
    system: BootedSystemd,
) -> None:
    system.override(SERVICE, KEEP)
    with Puppet() as vmm:
        vmm.do(LiveVmm.connect, vmm_socket(system))
        vmm.do(LiveVmm.attach, Watch.REQUIRED, promise=False)
        holding = vmm.start(hold_the_mmap_lock)
        eventually(lambda: page_table_kib(vmm.pid) > 1024, True)
        system.systemctl("stop", "--no-block", SERVICE)
        eventually(lambda: len(system.log("daemon_ended")), 1)  # but for closing what the VMM handed over
        assert system.show(SERVICE, "ActiveState") == "deactivating"
        with pytest.raises(TimeoutError):
            holding.result(patience=0.001)  # it still held the lock when process 1 answered


def children_in(system: BootedSystemd, pid: int) -> list[str]:
    return system.run("cat", f"/proc/{pid}/task/{pid}/children").split()


def hold_the_mmap_lock(vmm: LiveVmm) -> None:
    """For some ten seconds, unless the process is killed."""
    memory = vmm.map(1 << 26, access=Access.READ)
    libc.madvise(memory, mmap.MADV_NOHUGEPAGE)
    libc.madvise(memory, MADV_POPULATE_READ)


def page_table_kib(pid: int) -> int:
    """Read without the lock."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmPTE")).split()[1])
