"""What a fresh daemon process loads: the time to start is that of its imports."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from fakes.daemon_process import DaemonProcess
from fakes.witness import Witness

TELLING = (sys.executable, "-X", "importtime", "-m", "interceptd")
"""How to start a daemon whose log has a line for each module that it loads, whenever it does."""
LOADED = re.compile(r"^import time:[ \d]+\|[ \d]+\| *([\w.]+)$", re.MULTILINE)
COLLECTING = "import gc, interceptd.__main__; print(gc.isenabled())"


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> frozenset[str]:
    """The modules of a daemon that served a VMM."""
    with DaemonProcess(tmp_path_factory.mktemp("start"), launch=TELLING) as daemon:
        daemon.wait_serving()
        with Witness(daemon.socket) as witness:
            assert witness.serve() == Witness.SERVED
        assert daemon.stop() == 0
        return frozenset(LOADED.findall(daemon.log_text()))


@pytest.mark.parametrize(
    "module",
    [
        "h11",
        "http",
        "interceptd.metrics.endpoint",
        "prometheus_client",
        "rich.console",
    ],
)
def test_a_serving_daemon_does_not_import_unused_modules(module: str, loaded: frozenset[str]) -> None:
    assert {"interceptd.daemon", "structlog.stdlib", "trio"} <= loaded
    assert module not in loaded


def test_the_collector_that_rested_while_modules_were_loaded_runs_again() -> None:
    done = subprocess.run([sys.executable, "-c", COLLECTING], check=True, capture_output=True, text=True)
    assert done.stdout == "True\n"
