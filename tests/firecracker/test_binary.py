"""The Firecracker that tests run is the one whose content is pinned, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

from firecracker import binary

MAKEFILE = binary.HERE.parents[1] / "Makefile"


def test_make_fetches_what_the_tests_look_for() -> None:
    [kept] = re.findall(r"^FIRECRACKER := (\S+)$", MAKEFILE.read_text(), re.MULTILINE)
    assert MAKEFILE.parent / kept == binary.BINARY


def test_another_program_is_not_run(tmp_path: Path) -> None:
    other = tmp_path / "firecracker"
    assert binary.why_not_run(other) == "no Firecracker: `make firecracker` fetches it"
    other.write_bytes(b"\x7fELF")
    assert (
        binary.why_not_run(other)
        == f"{other} is not Firecracker {binary.VERSION}: `make firecracker` fetches it"
    )
