"""What the tests of containers leave behind: nothing."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest

from fakes.container_host import ContainerHost, obstacle
from fakes.eventually import PATIENCE

pytestmark = [pytest.mark.verify, pytest.mark.skipif(bool(obstacle()), reason=obstacle())]


class HostFailed(Exception):
    """By a test."""


def fail_while_a_process_sleeps(directory: Path) -> None:
    with ContainerHost(directory) as host:
        sleeper = subprocess.Popen(
            host.enter("sh", "-c", "echo asleep && exec sleep infinity"), stdout=subprocess.PIPE
        )
        assert sleeper.stdout is not None
        assert sleeper.stdout.read(7) == b"asleep\n"
        assert [group for group in host.cgroups if group.exists()] == host.cgroups != []
        raise HostFailed(sleeper, host.cgroups)


def test_nothing_is_left_of_a_host_whose_test_fails(tmp_path: Path) -> None:
    directory = tmp_path / "host"
    directory.mkdir()
    with pytest.raises(HostFailed) as failed:
        fail_while_a_process_sleeps(directory)
    sleeper, groups = failed.value.args
    with sleeper:
        assert sleeper.wait(PATIENCE) == -signal.SIGKILL
    assert [group for group in groups if group.exists()] == []
    assert str(directory) not in Path("/proc/self/mountinfo").read_text()
    assert list(tmp_path.iterdir()) == []
