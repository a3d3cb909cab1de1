"""The wheel, alone in a fresh environment: types and behaviour are what the documents say.

Building and installing it takes some 20 s, so this is part of `make verify`. What can be seen by reading,
`tests/system/test_packaging.py` compares in `make test`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from fakes.daemon_process import DaemonProcess
from fakes.documents import HANDING_OVER, HEARING, ROOT, VMM, at, printed

PATIENCE: Final = 300
CONSUMERS: Final = {
    "vmm.py": VMM,
    "hearing.py": HEARING,
    "handing_over.py": HANDING_OVER,
    "vcpu_loop.py": (ROOT / "clients" / "examples" / "vcpu_loop.py").read_text(encoding="utf-8"),
    "others.py": """
import trio

from intercept_client import (
    Access,
    AddressSpaceKind,
    ConnectionLost,
    GfnRange,
    HypervisorKind,
    RequestedKind,
    TrioHypervisor,
    TrioNotifier,
    TrioVmm,
    UaddrRange,
    trio_memory,
)
from intercept_client.kvm import GuestPartition, Machine, PartitionSetting

GFNS = GfnRange.of(0x100, 1)
UADDRS = UaddrRange.of_bytes(0x7000_0000, 4096)


class Mapper:
    async def map(self, gfns: GfnRange, uaddrs: UaddrRange, access: Access, start_pfn: int | None) -> None:
        print(gfns, uaddrs, access, start_pfn)

    async def unmap(self, gfns: GfnRange) -> None:
        print(gfns)


async def regions(path: str) -> int:
    async with TrioVmm.open(path, name="guest") as vmm, trio.open_nursery() as nursery:
        partition = await vmm.create_partition(AddressSpaceKind.PROCESS, HypervisorKind.VMM)
        async with (
            TrioHypervisor.open(path, partition, Mapper(), regions=vmm.regions) as hypervisor,
            TrioNotifier.open(path, partition) as notifier,
        ):
            nursery.start_soon(hypervisor.serve)
            await trio_memory.munmap(notifier, UADDRS)
            return (await vmm.statistics()).regions


def back(partition: GuestPartition) -> str:
    try:
        return partition.add_region(GFNS, UADDRS, RequestedKind.MMIO, writable=True, executable=False).value
    except ConnectionLost as lost:
        return str(lost)


def play(path: str) -> None:
    with Machine.open() as machine, GuestPartition.open(path, machine, PartitionSetting()) as partition:
        back(partition)


if __name__ == "__main__":
    trio.run(regions, "vmm.sock")
""",
}


def run(*command: str | Path, cwd: Path) -> str:
    """What it prints; it must succeed. The source tree is not on its path."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"PIP_CONSTRAINT": str(ROOT / "constraints.txt"), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment that has the wheel and what it depends on, nothing else."""
    directory = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", ".", ROOT, cwd=directory)
    [wheel] = directory.glob("*.whl")
    run(sys.executable, "-m", "venv", "alone", cwd=directory)
    python = directory / "alone" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", wheel, cwd=directory)
    return python


IMPORT_ALL: Final = """
import importlib, pkgutil, sys
for package in map(importlib.import_module, sys.argv[1:]):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not module.name.endswith("__main__"):
            try:
                importlib.import_module(module.name)
            except ModuleNotFoundError as error:
                if error.name not in {"numpy", "perfetto", "plotly"}:  # the extra `report`
                    raise
"""
PACKAGES: Final = ("intercept_protocol", "interceptd", "intercept_client", "interceptctl")


@pytest.mark.verify
def test_every_module_of_the_wheel_can_be_imported(installed: Path, tmp_path: Path) -> None:
    assert run(installed, "-c", IMPORT_ALL, *PACKAGES, cwd=tmp_path) == ""


@pytest.mark.verify
def test_a_consumer_of_the_wheel_passes_a_strict_type_check(installed: Path, tmp_path: Path) -> None:
    for name, text in CONSUMERS.items():
        (tmp_path / name).write_text(text)
    checked = run(
        sys.executable, "-m", "mypy", "--strict", "--python-executable", installed, *CONSUMERS, cwd=tmp_path
    )
    assert checked == f"Success: no issues found in {len(CONSUMERS)} source files\n"


@pytest.mark.verify
@pytest.mark.parametrize("example", [VMM, HANDING_OVER], ids=["vmm", "handing over"])
def test_a_consumer_of_the_wheel_is_served_by_its_daemon(
    installed: Path, tmp_path: Path, example: str
) -> None:
    with DaemonProcess(tmp_path, launch=(str(installed), "-m", "interceptd")) as daemon:
        daemon.wait_serving()
        assert run(installed, "-c", at(example, tmp_path), cwd=tmp_path).splitlines() == printed(example)
        listed = run(
            installed.with_name("interceptctl"), "--socket", daemon.operator_socket, "ls", cwd=tmp_path
        )
    assert listed == "no partitions\n"


@pytest.mark.verify
def test_the_wheel_has_the_source_of_the_vmm_in_c(installed: Path, tmp_path: Path) -> None:
    source = "from interceptctl.guest.c_build import build_vmm; import pathlib; build_vmm(pathlib.Path())"
    run(installed, "-c", source, cwd=tmp_path)
    assert (tmp_path / "vmm").is_file()
