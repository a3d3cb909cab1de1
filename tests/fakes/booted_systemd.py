"""systemd as process 1 of its own namespaces, with the units of this repository and their daemon; for root.

Owns the namespaces, their mounts and their cgroup, and leaves nothing behind: what is written in the
directories of `WRITABLE` is gone at its end. Must not know what a unit does.
"""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from fakes.eventually import PATIENCE, eventually
from fakes.keeper_process import children

REPOSITORY: Final = Path(__file__).parents[2]
UNITS: Final = REPOSITORY / "deploy" / "systemd"
SYSTEMD: Final = Path("/lib/systemd/systemd")
PLACE: Final = "/mnt"
"""Where the namespaces have what the commands need: a daemon sees no /home, /root or /tmp of the host."""
WRITABLE: Final = ("/etc", "/usr/bin", "/usr/lib/sysusers.d")
"""Directories of the host that have a writable layer of the namespaces' own."""
COMMANDS: Final = ("interceptd", "interceptctl")
USER: Final = "interceptd"
UID: Final = 64123
INSTANCES: Final = ("web", "other")
EMPTY_UNITS: Final = (
    "basic",
    "default",
    "exit",
    "poweroff",
    "reboot",
    "rescue",
    "shutdown",
    "sockets",
    "sysinit",
)
FLAGS: Final = ("--pid", "--fork", "--kill-child", "--mount", "--ipc", "--uts", "--cgroup", "--net")

INTERPRETER: Final = f"""#!/bin/sh
cd {PLACE}/repository
export LD_LIBRARY_PATH={PLACE}/python/lib PYTHONDONTWRITEBYTECODE=1
export PYTHONPATH="$PWD/clients:$PWD/protocol:$PWD/service:{PLACE}/site"
exec {PLACE}/python/bin/{Path(os.path.realpath(sys.executable)).name} -m "$(basename "$0")" "$@"
"""
MOUNTS: Final = f"""
mount -t proc proc /proc
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs {PLACE}
for directory in {" ".join(WRITABLE)}; do
  mkdir -p {PLACE}/layers$directory/upper {PLACE}/layers$directory/work
  mount -t overlay overlay $directory \
    -o lowerdir=$directory,upperdir={PLACE}/layers$directory/upper,workdir={PLACE}/layers$directory/work
done
mount --bind /dev/null /dev/console
"""
BOOT: Final = f"""
set -e
{MOUNTS}
cd {PLACE}
mkdir -p /run/systemd /run/lock python site repository log /etc/interceptd
mount --bind "$1" {PLACE}/python
mount --bind "$2" {PLACE}/site
for part in service protocol clients deploy; do  # the checkout itself may be closed to the units' user
  mkdir repository/$part
  mount --bind "$3/$part" {PLACE}/repository/$part
done
for command in {" ".join(COMMANDS)}; do
  touch /usr/bin/$command
  mount --bind "$4/bin/$command" /usr/bin/$command
done
mount --bind "$4/etc" /etc/interceptd
mount --bind "$4/log" {PLACE}/log
mount --bind "$4/lib" /usr/lib/systemd/system
mount --bind "$4/systemd" /etc/systemd
cat "$4/passwd" >> /etc/passwd
cat "$4/group" >> /etc/group
mount --bind "$5" /dev/console
for generators in /lib/systemd/system-generators /usr/lib/systemd/system-generators; do
  [ ! -d "$generators" ] || mount -t tmpfs tmpfs "$generators"
done
cd /
exec env -i container=test PATH=/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 \
  {SYSTEMD} --system --log-target=console --log-level=info --log-color=no --show-status=no
"""


@cache
def obstacle() -> str:
    """Why systemd cannot be booted here; empty if it can."""
    if os.geteuid() != 0:
        return "systemd as process 1 of its own namespaces is for root"
    if not SYSTEMD.exists():
        return f"needs {SYSTEMD}, of Debian's systemd package"
    for command in ("curl", "nsenter", "setpriv", "systemctl", "unshare"):
        if shutil.which(command) is None:
            return f"needs {command}, of Debian's curl, systemd and util-linux"
    if _cgroup() is None:
        return "no cgroup2 is mounted that this process may make a group in"
    tried = subprocess.run(
        ["unshare", *FLAGS, "sh", "-e", "-c", MOUNTS], capture_output=True, text=True, check=False
    )
    return f"no namespaces of its own: {tried.stderr.strip()}" if tried.returncode else ""


def _cgroup() -> Path | None:
    """The cgroup2 that this process is in, as a directory."""
    mounts = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    own = next(
        (line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::")),
        None,
    )
    for fields in mounts if own is not None else ():
        if "cgroup2" in fields[fields.index("-") :]:
            place = Path(fields[4], str(own).removeprefix(fields[3]).lstrip("/"))
            if os.access(place, os.W_OK):
                return place
    return None


class BootedSystemd:
    """Boots in `directory`, which is to be empty; `with` ends it, in any state.

    `units` are installed, with the user and the configuration that they need. Without any, nothing is."""

    def __init__(self, directory: Path, units: Sequence[str], *, config: str = "") -> None:
        self._directory = directory
        self._prepare(units)
        if units:
            self.configure(config)
        parent = _cgroup()
        assert parent is not None
        self._cgroup = parent / f"interceptd-test-{os.getpid()}-{directory.name}"
        self._cgroup.mkdir()
        self._said: list[str] = []
        self._terminal, console = pty.openpty()
        self._reader = threading.Thread(target=self._read_console)
        self._reader.start()
        site = sysconfig.get_path("purelib")
        boot = [
            "sh",
            "-c",
            BOOT,
            "boot",
            sys.base_prefix,
            site,
            str(REPOSITORY),
            str(directory),
            os.ttyname(console),
        ]
        enter = 'echo $$ > "$0/cgroup.procs" && exec setpriv --pdeathsig KILL unshare "$@"'
        self._unshare = subprocess.Popen(
            ["sh", "-c", enter, str(self._cgroup), *FLAGS, *boot],
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=console,
        )
        os.close(console)

    def __enter__(self) -> Self:
        try:
            eventually(lambda: self._unshare.poll() is not None or bool(children(self._unshare.pid)), True)
            (self.pid,) = children(self._unshare.pid)
            self.root = Path(f"/proc/{self.pid}/root")
            """Its file system, as it is reached from outside."""
            eventually(lambda: self._unshare.poll() is not None or self._is_up(), True)
            assert self._unshare.poll() is None
        except BaseException as error:
            self.close()
            error.add_note(self.said)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        if error is not None:
            error.add_note(self.said)
            error.add_note(self.log_text())

    def close(self) -> None:
        self._unshare.kill()  # and with it, by --kill-child, its process 1, and so everything
        self._unshare.wait(PATIENCE)
        eventually(lambda: "populated 0" in (self._cgroup / "cgroup.events").read_text(), True)
        for group, _, _ in os.walk(self._cgroup, topdown=False):
            os.rmdir(group)
        self._reader.join(PATIENCE)
        os.close(self._terminal)

    # ------------------------------------------------ commands

    def configure(self, config: str) -> None:
        """Write the file of each daemon."""
        for name in ("interceptd", *INSTANCES):
            (self._directory / "etc" / f"{name}.toml").write_text(config)

    def replace_daemon(self, script: str) -> None:
        """What starts in place of the next one."""
        (self._directory / "bin" / "interceptd").write_text(script)

    def override(self, unit: str, text: str) -> None:
        """A drop-in of an administrator's."""
        folder = self._directory / "systemd/system" / f"{unit}.d"
        folder.mkdir()
        (folder / "override.conf").write_text(text)
        self.systemctl("daemon-reload")

    def run(self, *command: str, status: int | None = 0) -> str:
        """Run a command in the namespaces and return its output; any exit status does with `status` None."""
        ended = subprocess.run(
            self._entered(command),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        assert status in (None, ended.returncode), (command, ended)
        return ended.stdout + ended.stderr

    @contextmanager
    def running(self, *command: str) -> Iterator[subprocess.Popen[str]]:
        """A command that runs meanwhile in the namespaces, with its output in one pipe."""
        with subprocess.Popen(
            self._entered(command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            try:
                yield process
            finally:
                process.kill()

    def systemctl(self, *arguments: str, status: int | None = 0) -> str:
        return self.run("systemctl", *arguments, status=status)

    def show(self, unit: str, name: str) -> str:
        return self.systemctl("show", "--value", f"--property={name}", unit).strip()

    def main_pid(self, unit: str) -> int:
        """In the namespace; 0 if there is none."""
        return int(self.show(unit, "MainPID"))

    def passed(self, unit: str) -> list[str]:
        """The names of the descriptors that its main process was started with."""
        environment = self.run("cat", f"/proc/{self.main_pid(unit)}/environ").split("\0")
        named = [each.partition("=")[2] for each in environment if each.startswith("LISTEN_FDNAMES=")]
        return [name for names in named for name in names.split(":")]

    # ------------------------------------------------ what can be seen

    @property
    def said(self) -> str:
        """What systemd has logged."""
        return "".join(self._said).replace("\r", "")

    def log_text(self) -> str:
        return (self._directory / "log" / "log").read_text()

    def log(self, event: str) -> list[dict[str, Any]]:
        """What the services have logged under that name."""
        lines = [json.loads(line) for line in self.log_text().splitlines() if line.startswith("{")]
        return [line for line in lines if line["event"] == event]

    def wait_state(self, unit: str, state: str) -> None:
        eventually(lambda: self.show(unit, "ActiveState"), state)

    # ------------------------------------------------ helpers

    def _entered(self, command: Sequence[str]) -> Sequence[str]:
        return ["nsenter", f"--target={self.pid}", "--all", *command]

    def _is_up(self) -> bool:
        answers = (self.root / "run/systemd/private").exists()
        return answers and self.systemctl("is-system-running", status=None).strip() in ("running", "degraded")

    def _prepare(self, units: Sequence[str]) -> None:
        directory = self._directory
        for name in ("bin", "etc", "lib", "log", "systemd/system/service.d"):
            (directory / name).mkdir(parents=True)
        for name in COMMANDS:
            (directory / "bin" / name).write_text(INTERPRETER)
            (directory / "bin" / name).chmod(0o755)
        for name in EMPTY_UNITS:
            (directory / "lib" / f"{name}.target").write_text("[Unit]\nDefaultDependencies=no\n")
        for name in units:
            shutil.copy(UNITS / name, directory / "systemd/system")
        output = f"append:{PLACE}/log/log"
        (directory / "systemd/system/service.d/log.conf").write_text(
            f"[Service]\nStandardOutput={output}\nStandardError={output}\n"
        )
        (directory / "log" / "log").touch()
        for name, line in (
            ("passwd", f"{USER}:x:{UID}:{UID}::/:/bin/false\n"),
            ("group", f"{USER}:x:{UID}:\n"),
        ):
            (directory / name).write_text(line if units else "")

    def _read_console(self) -> None:
        """Until every process has closed it."""
        with suppress(OSError):
            while data := os.read(self._terminal, 4096):
                self._said.append(data.decode(errors="replace"))
