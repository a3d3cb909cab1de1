"""What blocking Python costs, a thread a connection. `python python_echo.py SOCKET`."""

from __future__ import annotations

import socket
import sys
import threading

from answering import RECEIVE_BYTES, answer


def serve(peer: socket.socket) -> None:
    with peer:
        while data := peer.recv(RECEIVE_BYTES):
            peer.send(answer(data))


with socket.socket(socket.AF_UNIX) as listener:
    listener.bind(sys.argv[1])
    listener.listen(1024)
    while True:
        accepted, _ = listener.accept()
        threading.Thread(target=serve, args=[accepted], daemon=True).start()
