"""The process that a `LiveVmm` lives in: verbs come over a socket, their results go back.

Owns the loop. A verb that may block runs in a thread of its own. Ends when the other side closes.
"""

from __future__ import annotations

import os
import pickle
import socket
import sys
import threading

from fakes.live_vmm import LiveVmm
from fakes.puppet import MESSAGE_BYTES, Failed, Order, Report
from intercept_protocol.errors import WireError


def serve(control: socket.socket) -> None:
    vmm = LiveVmm()
    control.send(pickle.dumps(os.getpid()))
    obey_all(control, vmm)


def obey_all(control: socket.socket, vmm: LiveVmm) -> None:
    while data := control.recv(MESSAGE_BYTES):
        order: Order = pickle.loads(data)
        if order.apart:
            threading.Thread(target=obey, args=(control, vmm, order), daemon=True).start()
        else:
            obey(control, vmm, order)


def obey(control: socket.socket, vmm: LiveVmm, order: Order) -> None:
    try:
        result: object = order.verb(vmm, *order.arguments, **order.options)
    except Exception as error:  # the other side judges
        number = error.number if isinstance(error, WireError) else getattr(error, "errno", None)
        result = Failed(type(error).__name__, number, str(error))
    control.send(pickle.dumps(Report(order.number, result)))
    vmm.do_afterwards(control.fileno())


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
    os._exit(0)  # whatever its threads are doing
