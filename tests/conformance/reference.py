"""The implementation to test if no other is named: `interceptd`, if that command is installed.

Owns starting it with limits that a test can reach, and ending it. Knows it only as a command.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from conformance.wire import PATIENCE

COMMAND: Final = Path(sys.executable).with_name("interceptd")
CONFIGURATION: Final = """
[limits]
connections_per_uid = 64
control_requests_per_second = 2000
connections_without_hello = 24
partitions_per_uid = 12
vmms_per_uid = 16
vps_per_partition = 80
notifiers_per_partition = 6
regions_per_partition = 300
mappings_per_partition = 300
vmas_per_partition = 300
open_invalidations_per_partition = 8
deposit_pages_per_partition = 400
operators = 4
[timeouts]
hello_ms = 1000
hypervisor_ms = 400
"""


@contextmanager
def reference_server(directory: Path) -> Iterator[tuple[Path, Path]]:
    """Serve in `directory` until the end of the context; yields the VMMs' and the operators' socket."""
    configuration, socket = directory / "conformance.toml", directory / "vmm.sock"
    configuration.write_text(CONFIGURATION)
    with (directory / "log").open("wb") as log:
        server = subprocess.Popen(
            [COMMAND, "serve", "--socket", socket, "--config", configuration],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={name: value for name, value in os.environ.items() if not name.startswith("INTERCEPT")},
        )
    try:
        operators = directory / "operator.sock"
        deadline = time.monotonic() + PATIENCE
        while not operators.exists():  # bound last
            assert server.poll() is None, (directory / "log").read_text()
            assert time.monotonic() < deadline, "the server did not start"
            time.sleep(0.01)
        yield socket, operators
    finally:
        server.terminate()
        try:
            server.wait(PATIENCE)
        finally:
            server.kill()
            server.wait()
