"""A VMM process that sends its own ends of its connections along with half a message on each, to be killed:
`python -m fakes.clinging_vmm SOCKET OPERATOR_SOCKET ADDRESS_SPACE HYPERVISOR`.

Owns getting there; then it prints its partition and waits. The holder of those ends keeps the connections
open after its death.
"""

from __future__ import annotations

import os
import signal
import socket
import sys

from fakes.raw_client import RawConnection
from fakes.raw_vmm import RawVmm


def send_with_ends(connection: RawConnection, data: bytes, ends: list[int]) -> None:
    with socket.socket(fileno=os.dup(connection.fileno())) as duplicate:
        socket.send_fds(duplicate, [data], ends)


def main(path: str, operator_path: str, address_space: str, hypervisor: str) -> None:
    with RawVmm(path, address_space=address_space, hypervisor=hypervisor) as vmm:
        silent, operator = RawConnection(path), RawConnection(operator_path)
        operator.say_hello("operator")
        connections = [vmm.connection, vmm.vp(), vmm.notifier(), operator, silent]
        if hypervisor == "vmm":
            connections.append(vmm.link())
        for connection in connections:
            send_with_ends(connection, b"\x94", [each.fileno() for each in (connection, vmm.connection)])
        print(vmm.partition_id, flush=True)
        signal.pause()


if __name__ == "__main__":
    main(*sys.argv[1:])
