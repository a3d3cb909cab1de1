"""podman with runc in namespaces of their own, and the image built from the Containerfile; for root.

Owns the namespaces, their mounts, cgroups and storage, which is memory, and leaves nothing behind. A
registry's base image cannot be pulled everywhere: Debian's Python takes its name, made once per machine in a
cache directory. Must not know what a container does.
"""

from __future__ import annotations

import fcntl
import json
import os
import resource
import shutil
import subprocess
import tempfile
from functools import cache, partial
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from fakes.eventually import PATIENCE, eventually
from fakes.keeper_process import children

REPOSITORY: Final = Path(__file__).parents[2]
IMAGE: Final = "localhost/interceptd:0.1.0"
BUILD: Final = (
    "build",
    "--format",
    "docker",
    "-f",
    "deploy/container/Containerfile",
    "-t",
    "interceptd:0.1.0",
    ".",
)
BASE: Final = "docker.io/library/python:3.12-slim"
"""What the Containerfile names; ours has the Python of Debian's `SUITE`."""
SUITE: Final = "bookworm"
PACKAGES: Final = {
    "podman": "podman",
    "runc": "runc",
    "slirp4netns": "slirp4netns",
    "catatonit": "catatonit",
    "debootstrap": "debootstrap",
    "ip": "iproute2",
    "nsenter": "util-linux",
    "unshare": "util-linux",
    "setpriv": "util-linux",
}
"""Commands by the Debian package that has them."""
FLAGS: Final = ("--pid", "--fork", "--kill-child", "--mount", "--ipc", "--uts", "--cgroup", "--net")
BUILD_SECONDS: Final = 900.0

MOUNTS: Final = """
resolv=$(readlink -f /etc/resolv.conf) && servers=$(cat "$resolv")
mount -t proc proc /proc
for place in /run /var/lib /dev/shm /sys/fs/cgroup; do mount -t tmpfs -o mode=0755 tmpfs $place; done
[ -e "$resolv" ] || { mkdir -p "$(dirname "$resolv")" && echo "$servers" > "$resolv"; }  # it was in /run
for hierarchy in $(grep -v '^0:' /proc/self/cgroup | cut -d: -f2); do
  place=/sys/fs/cgroup/${hierarchy#name=}
  mkdir -p "$place"
  case $hierarchy in name=*) options=none,$hierarchy ;; *) options=$hierarchy ;; esac
  mount -t cgroup -o "$options" cgroup "$place"
done
ip link set lo up
"""
ENTER: Final = """
for group in $CGROUPS; do echo $$ > "$group/cgroup.procs"; done
exec setpriv --pdeathsig KILL unshare "$@"
"""
WRAPPER: Final = """#!/bin/sh
export CONTAINERS_CONF={directory}/containers.conf CONTAINERS_STORAGE_CONF={directory}/storage.conf
net=--net
[ "$1" != build ] || net= # which installs packages
exec nsenter --target={pid} --mount --pid --ipc --uts --cgroup $net --wd="$PWD" {podman} "$@"
"""
CONFIGURATION: Final = """
[containers]
default_ulimits = ["nofile={files}:{files}", "nproc=4096:4096"]  # others would raise ours
log_driver = "k8s-file"
netns = "host"
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
[engine.runtimes]
runc = ["{runc}"]
"""
STORAGE: Final = """
[storage]
driver = "overlay"
runroot = "/run/containers/storage"
graphroot = "/var/lib/containers/storage"
"""


@cache
def obstacle() -> str:
    """Why no container can be run here; empty if it can."""
    if os.geteuid() != 0:
        return "podman in namespaces of its own is for root"
    lacking = sorted({package for command, package in PACKAGES.items() if shutil.which(command) is None})
    if lacking:
        return f"needs Debian's {', '.join(lacking)}"
    if not any("memory" in name for name in _hierarchies()):
        return "needs the cgroups of version 1, memory among them"
    tried = subprocess.run(
        ["unshare", *FLAGS, "sh", "-e", "-c", MOUNTS], capture_output=True, text=True, check=False
    )
    return f"no namespaces of its own: {tried.stderr.strip()}" if tried.returncode else ""


def _hierarchies() -> dict[str, Path]:
    """The cgroups of version 1 that this process is in: the directory of each, by the controllers' names."""
    mounts = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    found = {}
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, names, own = line.split(":", 2)
        for fields in mounts if names else ():
            kind, _, options = fields[fields.index("-") + 1 :]
            if kind == "cgroup" and set(names.split(",")) <= set(options.split(",")):
                found[names] = Path(fields[4], own.removeprefix(fields[3]).lstrip("/"))
    return found


class NoBase(Exception):
    """There is no base image, and none can be made; the text says why."""


def base_image() -> Path:
    """The archive of a root file system with Python; takes a minute the first time. Raises `NoBase`."""
    cache_directory = Path(os.environ.get("XDG_CACHE_HOME") or tempfile.gettempdir()) / "interceptd-tests"
    cache_directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    if cache_directory.stat().st_uid != os.geteuid():
        raise NoBase(f"{cache_directory} is another user's")
    archive = cache_directory / f"python-{SUITE}.tar"
    with (cache_directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not archive.exists():
            with tempfile.TemporaryDirectory(dir=cache_directory) as directory:
                _make_base(Path(directory, "root"), part := Path(directory, "base.tar"))
                part.rename(archive)
    return archive


def _make_base(root: Path, archive: Path) -> None:
    """With this machine's certificates and package index, as a base image of its owner's would have them."""
    packages = "--include=python3,python3-venv,ca-certificates"
    made = subprocess.run(
        ["unshare", "--mount", "debootstrap", "--variant=minbase", packages, SUITE, str(root)],
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode:
        raise NoBase(f"debootstrap: {(made.stdout + made.stderr).strip().splitlines()[-1]}")
    (root / "usr/bin/python").symlink_to("python3")
    for name in ("etc/ssl/certs/ca-certificates.crt", "etc/pip.conf"):
        if Path("/", name).exists():
            shutil.copy(Path("/", name), root / name)
    subprocess.run(["tar", "-C", str(root), "-cf", str(archive), "."], check=True)


class ContainerHost:
    """Keeps its files in `directory`, which is to be empty; `with` ends every container, in any state."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        name = f"interceptd-test-{os.getpid()}"
        self.cgroups = [place / name for place in _hierarchies().values()]
        for group in self.cgroups:
            group.mkdir()
            for each in ("cpuset.cpus", "cpuset.mems"):  # empty in a new group, which takes no process so
                if (group / each).exists():
                    (group / each).write_text((group.parent / each).read_text())
        self._unshare = subprocess.Popen(
            ["sh", "-e", "-c", ENTER, "sh", *FLAGS, "sh", "-e", "-c", f"{MOUNTS}exec catatonit -P"],
            env={**os.environ, "CGROUPS": " ".join(map(str, self.cgroups))},
            stdin=subprocess.DEVNULL,
        )

    def __enter__(self) -> Self:
        try:
            eventually(lambda: self._unshare.poll() is not None or self._is_up(), True)
            assert self._unshare.poll() is None
            [self._pid] = children(self._unshare.pid)
            self._write_commands()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is not None:
                error.add_note(self.logs())
        finally:
            self.close()

    def close(self) -> None:
        self._unshare.kill()  # and with it, by --kill-child, the first process, and so everything
        self._unshare.wait(PATIENCE)
        for group in self.cgroups:
            eventually(partial(_is_removed, group), True)
        shutil.rmtree(self._directory)

    # ------------------------------------------------ commands

    def build(self) -> None:
        """Make the image as the guide does. Raises `NoBase`."""
        self.podman("import", str(base_image()), BASE, patience=BUILD_SECONDS)
        self.podman(*BUILD, patience=BUILD_SECONDS)

    def podman(self, *arguments: str, status: int | None = 0, patience: float = PATIENCE) -> str:
        """Run it in the repository and return its output; any exit status does with `status` None."""
        ended = subprocess.run(
            [str(self.commands / "podman"), *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=patience,
            check=False,
            cwd=REPOSITORY,
        )
        assert status in (None, ended.returncode), (arguments, ended)
        return ended.stdout

    @property
    def commands(self) -> Path:
        """The directory of a `podman` that runs here."""
        return self._directory / "bin"

    def enter(self, *command: str) -> list[str]:
        """The command, run beside the containers, on their network."""
        return ["nsenter", f"--target={self._pid}", "--all", *command]

    def volume(self, name: str) -> Path:
        """The directory that a named volume is, as it is reached from outside."""
        place = self.podman("volume", "inspect", "--format={{.Mountpoint}}", name).strip()
        return Path(f"/proc/{self._pid}/root{place}")

    def daemon_pid(self, container: str) -> str:
        """Of the keeper's child, as the container sees it."""
        rows = self.podman("top", container, "pid", "ppid", "args").splitlines()[1:]
        [pid] = [row.split()[0] for row in rows if row.split()[1] == "1" and " serve" in row]
        return pid

    def log(self, container: str, event: str) -> list[dict[str, Any]]:
        """What its processes have logged under that name."""
        lines = [line for line in self._said(container).splitlines() if line.startswith("{")]
        return [line for line in map(json.loads, lines) if line["event"] == event]

    def logs(self) -> str:
        """What every container has said."""
        names = self.podman("ps", "--all", "--format={{.Names}}", status=None).split()
        return "\n".join(f"{name}: {self._said(name)}" for name in names)

    # ------------------------------------------------ helpers

    def _said(self, container: str) -> str:
        command = [str(self.commands / "podman"), "logs", container]
        return subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        ).stdout

    def _is_up(self) -> bool:
        return any(
            Path(f"/proc/{pid}/comm").read_text() == "catatonit\n" for pid in children(self._unshare.pid)
        )

    def _write_commands(self) -> None:
        self.commands.mkdir()
        _, files = resource.getrlimit(resource.RLIMIT_NOFILE)
        commands = {name: shutil.which(name) for name in ("podman", "runc")}
        facts = {"directory": self._directory, "files": files, "pid": self._pid, **commands}
        written = {"containers.conf": CONFIGURATION, "storage.conf": STORAGE, "bin/podman": WRAPPER}
        for name, text in written.items():
            (self._directory / name).write_text(text.format(**facts))
        (self.commands / "podman").chmod(0o755)


def _is_removed(group: Path) -> bool:
    """Remove a cgroup with those in it; False while a process that was killed is still leaving."""
    try:
        for each, _, _ in os.walk(group, topdown=False):
            os.rmdir(each)
    except OSError:
        return False
    return True
