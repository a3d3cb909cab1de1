"""The Firecracker that tests run is the one whose content is pinned, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from firecracker import binary

MAKEFILE = binary.HERE.parents[1] / "Makefile"


def test_make_fetches_what_the_tests_look_for() -> None:
    [kept] = re.findall(r"^FIRECRACKER := (\S+)$", MAKEFILE.read_text(), re.MULTILINE)
    assert MAKEFILE.parent / kept == binary.BINARY


def test_another_program_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "firecracker"
    monkeypatch.setattr(binary, "BINARY", other)
    monkeypatch.setattr(binary.os, "access", lambda *_: True)
    monkeypatch.setattr(binary.shutil, "which", lambda _: "/usr/bin/gcc")
    missing = binary.why_not()
    other.write_bytes(b"\x7fELF")
    assert missing is not None
    assert "make firecracker" in missing
    assert binary.why_not() == f"{other} is not Firecracker {binary.VERSION}: `make firecracker` fetches it"
