"""What an element of a list costs, beside a request of its own: CPU time of the daemon, and time.

Owns these measurements, with declared memory and the software table. The requests are encoded before, so that
the client takes little. Can be run by itself.
"""

from __future__ import annotations

import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

from report import CONSOLE
from rich.table import Table
from running import CPU, Place, daemon_command, server

from intercept_protocol import codec, messages, rpc
from intercept_protocol.messages import AddressSpaceKind, HypervisorKind, RequestedKind

BATCH = 128
BATCHES = 4
"""In a row, and as many requests of one element as they have."""
ROUNDS = 15
START_UADDR, START_GFN, START_PFN = 0x7000_0000_0000, 0x100000, 0x100000
ANSWER_BYTES = 65536


@dataclass(frozen=True, slots=True)
class Subject:
    """`one` makes the request for the element of that number, `many` that for these elements."""

    name: str
    one: Callable[[int], messages.Call[object]]
    many: Callable[[Sequence[int]], messages.Call[object]]


def _vma(number: int) -> messages.MapVma:
    return messages.MapVma(
        start_uaddr=START_UADDR + (number << 13), page_count=1, start_pfn=START_PFN + number,
        readable=True, writable=True, executable=False, io=False,
    )  # fmt: skip


def _region(number: int, kind: RequestedKind) -> messages.AddRegion:
    return messages.AddRegion(
        start_gfn=START_GFN + 2 * number, page_count=1, start_uaddr=START_UADDR + (number << 13), kind=kind,
        writable=True, executable=False,
    )  # fmt: skip


def _adding(kind: RequestedKind) -> Subject:
    return Subject(
        f"add_region, {kind}",
        partial(_region, kind=kind),
        lambda numbers: messages.ChangeRegions(add=[_region(number, kind) for number in numbers]),
    )


SUBJECTS = (
    Subject("map_vma", _vma, lambda numbers: messages.MapVmas(vmas=[_vma(number) for number in numbers])),
    _adding(RequestedKind.MMIO),
    _adding(RequestedKind.MOVABLE),
)


def show(scratch: Path) -> None:
    """Measure and print."""
    table = Table("", "time, one by one", f"of {BATCH}", "1 /", "the daemon's CPU", f"of {BATCH}", "1 /")
    table.title, table.title_justify = "us an element, in a request of its own and in a list, one CPU", "left"
    with _on_one_cpu():
        for subject in SUBJECTS:
            cells = []
            for alone, together in zip(*_measure(scratch, subject), strict=True):
                cells += [f"{alone:.1f}", f"{together:.1f}", f"{alone / together:.1f}"]
            table.add_row(subject.name, *cells)
    CONSOLE.print(table)


def _measure(scratch: Path, subject: Subject) -> tuple[tuple[float, float], tuple[float, float]]:
    """Microseconds an element, one by one and in lists: of time, and of the daemon's CPU."""
    found: tuple[list[tuple[float, float]], list[tuple[float, float]]] = ([], [])
    path = scratch / f"{subject.name.replace(' ', '-')}.sock"
    with ExitStack() as held:
        daemon = held.enter_context(server(daemon_command(path), path, Place.ONE_CPU))
        vmm = held.enter_context(socket.socket(socket.AF_UNIX))
        vmm.connect(str(path))
        created = messages.CreatePartition(
            address_space=AddressSpaceKind.DECLARED, hypervisor=HypervisorKind.SOFTWARE
        )
        _ask(vmm, [_encoded(messages.HelloVmm()), _encoded(created)])
        elements = BATCHES * BATCH
        for number in range(ROUNDS):
            start = 2 * number * elements
            alone = [_encoded(subject.one(start + each)) for each in range(elements)]
            start += elements
            together = [
                _encoded(subject.many(range(first, first + BATCH)))
                for first in range(start, start + elements, BATCH)
            ]
            for requests, costs in zip((alone, together), found, strict=True):
                cpu, clock = _cpu_ns(daemon.pid), time.perf_counter_ns()
                _ask(vmm, requests)
                took = time.perf_counter_ns() - clock
                costs.append((took / 1e3 / elements, (_cpu_ns(daemon.pid) - cpu) / 1e3 / elements))
    first, second = ([median(figures) for figures in zip(*costs, strict=True)] for costs in found)
    return (first[0], first[1]), (second[0], second[1])


@contextmanager
def _on_one_cpu() -> Iterator[None]:
    """The client, too, so that time is that of both ends."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {CPU})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _encoded(call: messages.Call[object]) -> bytes:
    fields = codec.to_fields(call)
    if isinstance(call, messages.HelloVmm):
        fields["role"] = "vmm"
    return rpc.encode_request(1, call.METHOD, [fields])


def _ask(vmm: socket.socket, requests: Sequence[bytes]) -> None:
    receiver = rpc.Receiver({rpc.RESPONSE})
    for request in requests:
        vmm.sendall(request)
        while (answer := receiver.next_message()) is None:
            receiver.receive_data(vmm.recv(ANSWER_BYTES))
        assert isinstance(answer, rpc.Response)
        if answer.error is not None:
            raise RuntimeError(f"refused: {answer.error}")


def _cpu_ns(pid: int) -> int:
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="interceptd-batches-") as directory:
        show(Path(directory))
