"""The page for authors in Rust: its lines and its example, word for word."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from fakes.c_programs import HEADERS
from fakes.daemon_process import DaemonProcess
from fakes.eventually import PATIENCE


@pytest.mark.verify
def test_the_example_in_rust_makes_an_intercept(tmp_path: Path) -> None:
    if missing := [tool for tool in ("bindgen", "cc", "rustc") if shutil.which(tool) is None]:
        pytest.skip(f"not installed: {', '.join(missing)}")
    page = (HEADERS / "RUST.md").read_text()
    [header], [lines], [example] = (
        re.findall(rf"^```{language}\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
        for language in ("c", "sh", "rust")
    )
    (tmp_path / "intercept.c").write_text(header)
    (tmp_path / "main.rs").write_text(example)
    build = f"set -e\nHEADERS={HEADERS}\n{lines}"
    subprocess.run(["sh", "-c", build], cwd=tmp_path, check=True, timeout=PATIENCE)
    with DaemonProcess(tmp_path) as daemon:
        daemon.wait_serving()
        ran = subprocess.run(
            [tmp_path / "main", daemon.socket], check=True, capture_output=True, text=True, timeout=PATIENCE
        )
    assert ran.stdout == "forward: true no_region\n"
