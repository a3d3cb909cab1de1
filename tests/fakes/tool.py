"""What a daemon shows the operator's tool, and how tests run the tool.

Owns the views. Must not know what of them is printed.
"""

from __future__ import annotations

import errno
from pathlib import Path

import msgspec
from click.testing import CliRunner, Result

from fakes.scripted_daemon import ScriptedDaemon, Step, hello
from intercept_protocol.messages import (
    Architecture,
    DaemonStatistics,
    MmioGranularity,
    PartitionInspection,
    PartitionStatistics,
    PartitionSummary,
    RegionKind,
    RegionView,
    VpView,
)
from interceptctl.cli import main

LATENCY = (97, 0, 1, 3, *[0] * 20)
WAITED = (0, 0, 1, 1, *[0] * 20)
"""Two of 101; of the others 97 took less than 2 us, and two up to 16 us."""
ANSWERED = [
    ["answered", "at", "once", "p50", "<=", "2us,", "p99", "<=", "16us"],
    ["waited", "p50", "<=", "8us,", "p99", "<=", "16us"],
]


def summary(partition_id: int, name: str = "guest") -> PartitionSummary:
    return PartitionSummary(
        partition_id=partition_id,
        name=name,
        uid=1000,
        pid=4242,
        address_space="declared",
        hypervisor="software",
        vps=2,
        regions=300,
        mapped_gfns=262144,
        intercepts=1_234_567,
        invalidations=5,
        age_ms=3_725_000,
        latency=LATENCY,
        latency_waited=WAITED,
        watch="declared",
    )


STATISTICS = PartitionStatistics(
    regions=300,
    vmas=4,
    vps=2,
    open_invalidations=1,
    mapped_gfns=262144,
    no_access_gfns=512,
    slat_extents=12,
    map_calls=516,
    unmap_calls=3,
    deposits=2,
    invalidations=5,
    stale_attempts=1,
    intercepts={"resume": {"mapped": 516, "already_mapped": 7}, "forward": {"no_region": 11}},
    latency=LATENCY,
    latency_waited=WAITED,
)
INSPECTION = PartitionInspection(
    summary=summary(7),
    architecture=Architecture.X86_64,
    mmio_granularity=MmioGranularity.VMA,
    statistics=STATISTICS,
    regions=[
        RegionView(
            start_gfn=0x10_0000,
            page_count=0x4_0000,
            start_uaddr=0x7FFF_1234_5000,
            kind=RegionKind.MOVABLE,
            state="populating",
            writable=True,
            executable=False,
            mapped_gfns=262144,
        )
    ],
    virtual_processors=[VpView(vp_index=1, state="waiting", intercepts=99)],
)
DAEMON = DaemonStatistics(
    uptime_ms=1000,
    partitions=1,
    vps=2,
    connections=4,
    connections_without_hello=0,
    tasks=9,
    partitions_created=3,
    partitions_lost=0,
    connections_refused=1,
    intercepts={"resume": {"mapped": 516}},
    invalidations=5,
)
HUGE = 2**64 - 1


def run(path: Path, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["--socket", str(path), *arguments])


def run_against(path: Path, steps: list[Step], *arguments: str) -> tuple[Result, ScriptedDaemon]:
    with ScriptedDaemon(path, ([*hello(), *steps],)) as daemon:
        return run(path, *arguments), daemon


SILENT = msgspec.structs.replace(
    INSPECTION,
    summary=msgspec.structs.replace(
        summary(7), pid=0, address_space="process", hypervisor="vmm", watch="none", mapped_gfns=0
    ),
    statistics=msgspec.structs.replace(STATISTICS, unresolved={"unannounced": 1234, "no_answer": 7}),
    notifiers=0,
    hypervisor_connected=False,
    userfaultfd_errno=errno.EPERM,
)
"""Live, and nothing is mapped."""
