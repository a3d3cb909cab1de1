"""The guest programs are what their source says."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from fakes.guest_region_race import PROBE
from interceptctl.guest.programs import PROGRAMS as SHIPPED
from interceptctl.guest.programs import Program
from interceptctl.guest.vmm import PROGRAM_BYTES

PROGRAMS = (*SHIPPED, PROBE)
needs_assembler = pytest.mark.skipif(
    not (shutil.which("as") and shutil.which("objcopy")), reason="there is no assembler here to check with"
)


@needs_assembler
@pytest.mark.parametrize("program", PROGRAMS, ids=[program.name for program in PROGRAMS])
def test_the_source_assembles_to_the_bytes(program: Program, tmp_path: Path) -> None:
    source, assembled, code = (tmp_path / name for name in ("source.s", "assembled.o", "code"))
    source.write_text(f".intel_syntax noprefix\n.code32\n{program.source}")
    subprocess.run(["as", "--32", "-o", assembled, source], check=True)
    subprocess.run(["objcopy", "-O", "binary", "-j", ".text", assembled, code], check=True)

    assert code.read_bytes().hex() == program.code.hex()


@pytest.mark.parametrize("program", PROGRAMS, ids=[program.name for program in PROGRAMS])
def test_every_program_fits_its_place(program: Program) -> None:
    assert 0 < len(program.code) <= PROGRAM_BYTES
