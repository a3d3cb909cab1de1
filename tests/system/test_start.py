"""What a fresh daemon process loads: the time to start is that of its imports."""

from __future__ import annotations

import subprocess
import sys

LOADED = "import gc, sys, interceptd.__main__; print(gc.isenabled(), *sys.modules)"


def _loaded() -> tuple[str, set[str]]:
    done = subprocess.run([sys.executable, "-c", LOADED], check=True, capture_output=True, text=True)
    collecting, *modules = done.stdout.split()
    return collecting, set(modules)


def test_the_process_loads_neither_metrics_nor_rich_before_it_is_asked_for_them() -> None:
    _, modules = _loaded()
    assert "interceptd.daemon" in modules
    assert not modules & {"interceptd.metrics.endpoint", "prometheus_client", "h11", "http", "rich"}


def test_the_collector_that_rested_while_modules_were_loaded_runs_again() -> None:
    collecting, _ = _loaded()
    assert collecting == "True"
