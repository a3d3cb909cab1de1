"""What an element of a list costs, beside a request of its own: CPU time of the daemon, and of both ends on one CPU.

Owns these measurements. The client sends bytes that were encoded before, so that the daemon's part shows. Can be
run by itself.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import msgpack
from report import CONSOLE
from rich.table import Table
from running import Place, daemon_command, server

from conformance.wire import RawConnection

