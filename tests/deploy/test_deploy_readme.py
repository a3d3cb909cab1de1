"""What `deploy/README.md` says of systemd and of metrics, command by command, where systemd has booted.

`BY_HAND` does what the text asks for between the commands. What a command's comment quotes must be shown.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from fakes.booted_systemd import PLACE, BootedSystemd, obstacle
from fakes.documents import commands

pytestmark = pytest.mark.skipif(bool(obstacle()), reason=obstacle())

README: Final = "deploy/README.md"
SECTIONS: Final = (
    "Deploying interceptd",
    "systemd, one daemon per host",
    "systemd, one daemon per VM",
    "Metrics",
)
VMMS_USER: Final = "libvirt-qemu"
CONFIGURATION: Final = "/etc/interceptd/interceptd.toml"
BY_HAND: Final = {
    f"install -D -m 0644 deploy/interceptd.toml {CONFIGURATION}": (
        rf"sed -i 's/^#\?allowed_uids = .*/allowed_uids = [0, 64055]/' {CONFIGURATION}",
        f"sed -i 's,^#listen = \"unix:,listen = \"unix:,' {CONFIGURATION}",
    )
}
"""What a reader does after a command."""
FINDS_FAULT: Final = "interceptctl doctor"
"""With this machine, perhaps, and says so by its exit status."""
QUOTED: Final = re.compile(r'  # .*"(.*)"')


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[BootedSystemd]:
    """Nothing of ours is installed but the commands; a hypervisor is."""
    with BootedSystemd(tmp_path / "system", []) as machine:
        machine.run("useradd", "--uid", "64055", "--no-create-home", VMMS_USER)
        yield machine


def as_user(machine: BootedSystemd, user: str, command: str) -> str:
    """By a shell in the repository."""
    change = ("setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups")
    status = None if command == FINDS_FAULT else 0
    return machine.run(*change, "sh", "-c", f"cd {PLACE}/repository && {command}", status=status)


def test_the_commands_for_systemd_and_metrics_do_what_the_text_says(machine: BootedSystemd) -> None:
    done = 0
    for section in SECTIONS:
        for prompt, command in commands(README, section):
            shown = as_user(machine, "root" if prompt == "#" else VMMS_USER, command)
            for quoted in QUOTED.findall(command):
                assert quoted in shown, command
            for step in BY_HAND.get(command, ()):
                machine.run(*shlex.split(step))
            done += 1
    assert done > 15
    for instance in ("", "web/"):
        socket = f"/run/interceptd/{instance}vmm.sock"
        exercise = f"interceptctl exercise --memory declared --steps 20 --quiet --vmm-socket {socket}"
        served = as_user(machine, VMMS_USER, exercise)
        assert served.startswith("PASS")
