"""How much memory the guide, the units and the DaemonSet speak of is what the daemon counts with."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from fakes.guide import GUIDE
from interceptd.memory_budget import SHARE, Cost

DEPLOY: Final = Path(__file__).parents[2] / "deploy"
TEXT: Final = GUIDE.read_text()
MIB: Final = 1 << 20
[BASE_MIB] = map(int, re.findall(r"^\| the daemon, at its start; [^|]*\| (\d+) MiB;", TEXT, re.MULTILINE))
A_VM: Final = Cost.CONNECTION + Cost.VMM + Cost.PARTITION
A_VP: Final = Cost.CONNECTION + Cost.VP
BUDGET_PART: Final = 3 / 4
ALERT_PART: Final = 0.7
HOSTS: Final = {
    (int(vms.replace(",", "")), int(vps), int(regions), int(pieces.replace(",", ""))): int(mib)
    for vms, vps, regions, pieces, mib in re.findall(
        r"^\| \*\*([\d,]+) VMs\*\* of (\d+) VPs, each with (\d+) regions and ([\d,]+) mapped pieces"
        r" \| \*\*(\d+) MiB\*\*",
        TEXT,
        re.MULTILINE,
    )
}
"""The guide's examples: how many of what, and how much that takes."""


def held_mib(vms: int, vps: int, regions: int, pieces: int) -> float:
    return vms * (A_VM + vps * A_VP + regions * Cost.REGION + pieces * Cost.MAPPING) / MIB


def unit_mib(name: str) -> int:
    [(number, unit)] = re.findall(
        r"^MemoryMax=(\d+)([MG])$", (DEPLOY / "systemd" / name).read_text(), re.MULTILINE
    )
    return int(number) * {"M": 1, "G": 1024}[unit]


def daemon_set() -> tuple[int, dict[str, Any]]:
    """Its limit, in MiB, and its configuration."""
    documents = list(yaml.safe_load_all((DEPLOY / "kubernetes" / "daemonset.yaml").read_text()))
    by_kind = {document["kind"]: document for document in documents}
    [container] = by_kind["DaemonSet"]["spec"]["template"]["spec"]["containers"]
    [gib] = re.findall(r"^(\d+)Gi$", container["resources"]["limits"]["memory"])
    return int(gib) * 1024, tomllib.loads(by_kind["ConfigMap"]["data"]["interceptd.toml"])


def test_the_guides_costs_are_those_that_the_daemon_counts_with() -> None:
    piece = max(Cost.REGION, Cost.MAPPING)
    rows = {
        "a VMM with a partition": f"{A_VM >> 10} KiB",
        "a VP, a notifier": f"{A_VP >> 10} KiB, {Cost.CONNECTION >> 10} KiB",
        "1,000 regions, or 1,000 pieces that the guest has mapped": f"{1000 * piece / MIB:.0f} MiB",
        "1,000 declared VMAs": f"{1000 * Cost.VMA / MIB:.1f} MiB",
        "1,000 VMAs of live memory that it remembers": f"{1000 * Cost.CACHED_VMA / MIB:.1f} MiB",
        "1,000 invalidations between begin and end": f"{1000 * Cost.OPEN_INVALIDATION / MIB:.1f} MiB",
    }
    assert dict(re.findall(r"^\| ([^|]+) \| (\d[^|]*[MK]iB) \|", TEXT, re.MULTILINE)).items() >= rows.items()


def test_the_guides_examples_add_up() -> None:
    assert len(HOSTS) == 2
    for host, mib in HOSTS.items():
        assert mib == pytest.approx(BASE_MIB + held_mib(*host), abs=10)


def test_the_unit_of_a_host_has_room_for_the_largest_example_of_one_uid_and_no_alert() -> None:
    budget = unit_mib("interceptd.service") * BUDGET_PART
    held = max(held_mib(*host) for host in HOSTS)
    assert held <= SHARE / (SHARE + 1) * (budget - BASE_MIB)
    assert BASE_MIB + held < ALERT_PART * budget


def test_the_guide_states_the_limits_of_the_units_and_of_the_daemon_set() -> None:
    limit, _ = daemon_set()
    stated = f"The unit allows {unit_mib('interceptd.service')} MiB, that of one VM "
    stated += f"{unit_mib('interceptd@.service')}, the DaemonSet {limit}."
    assert stated in " ".join(TEXT.split())


def test_the_daemon_set_takes_its_budget_from_its_limit() -> None:
    """A number in its configuration would not follow the limit, and beyond it the kernel kills."""
    limit, configuration = daemon_set()
    assert "memory_mib" not in configuration.get("limits", {})
    assert limit * BUDGET_PART > 2 * BASE_MIB
