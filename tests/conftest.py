"""For every test: no verdict depends on the speed of the machine or on the environment."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from fakes import before_passrights
from fakes.daemon_process import DaemonProcess
from interceptctl.private_environment import private_environment

settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

for _name in os.environ.keys() - private_environment().keys():
    del os.environ[_name]
os.environ.pop("PYTHONUNBUFFERED", None)  # with it, a failed write of the output goes unnoticed


@pytest.fixture(scope="session")
def older_daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """As on Linux before 6.16: peers can send descriptors on every connection."""
    directory = tmp_path_factory.mktemp("older")
    launch, environment = before_passrights.LAUNCH, before_passrights.ENVIRONMENT
    with DaemonProcess(directory, launch=launch, environment=environment) as process:
        yield process.wait_serving()
        assert process.stop() == 0
