"""The load generator in Python: for gRPC, which C does not reach, and for machines without gcc.

`python python_load.py [-v VPS] [-t SECONDS] SCENARIO SOCKET`, with the scenarios echo, already_mapped,
no_region and grpc. Prints what load.c prints. The client's own cost is in every figure.
"""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from statistics import median, quantiles

import click
from declared import add_backed_region, create_partition

from intercept_client import BlockingVmm, BlockingVp
from intercept_protocol import rpc
from intercept_protocol.hv_message import build_memory_intercept
from intercept_protocol.outcomes import Access

FIRST_GFN, PAGES, ROTATION = 0x100, 512, 8
Ask = Callable[[bytes], object]


@contextmanager
def echo(path: str, vps: int) -> Iterator[list[Ask]]:
    with ExitStack() as held:
        peers = [held.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(vps)]
        for peer in peers:
            peer.connect(path)

        def asking(peer: socket.socket) -> Ask:
            def ask(message: bytes) -> bytes:
                peer.send(rpc.encode_request(5, "intercept", [message]))
                return peer.recv(4096)

            return ask

        yield [asking(peer) for peer in peers]


@contextmanager
def interceptd(path: str, vps: int, *, with_region: bool) -> Iterator[list[Ask]]:
    with ExitStack() as held:
        vmm = held.enter_context(BlockingVmm.open(path, name="python_load"))
        partition = create_partition(vmm)
        if with_region:
            add_backed_region(vmm, FIRST_GFN, PAGES)
        clients = [held.enter_context(BlockingVp.open(path, partition, vp_index=i)) for i in range(vps)]
        yield [client.intercept for client in clients]


@contextmanager
def grpc_calls(path: str, vps: int) -> Iterator[list[Ask]]:
    import grpc  # noqa: PLC0415 - of the bench extra, and of this scenario alone

    with ExitStack() as held:
        own_pool = [("grpc.use_local_subchannel_pool", 1)]  # a connection each, as everywhere else
        channels = [held.enter_context(grpc.insecure_channel(f"unix:{path}", own_pool)) for _ in range(vps)]
        for channel in channels:
            grpc.channel_ready_future(channel).result(10)
        yield [channel.unary_unary("/interceptd/intercept") for channel in channels]


def run(ask: Ask, start: threading.Barrier, seconds: float, latencies: list[float]) -> None:
    messages = [
        build_memory_intercept(gpa=(FIRST_GFN + i) << 12, access=Access.READ) for i in range(ROTATION)
    ]
    start.wait()
    stop_at = time.perf_counter() + seconds
    now = 0.0
    while now < stop_at:
        asked = time.perf_counter()
        ask(messages[len(latencies) % ROTATION])
        now = time.perf_counter()
        latencies.append((now - asked) * 1e6)


@click.command()
@click.option("-v", "vps", default=1)
@click.option("-t", "seconds", default=0.5)
@click.argument("scenario", type=click.Choice(["echo", "already_mapped", "no_region", "grpc"]))
@click.argument("path")
def main(vps: int, seconds: float, scenario: str, path: str) -> None:
    match scenario:
        case "echo":
            asking = echo(path, vps)
        case "grpc":
            asking = grpc_calls(path, vps)
        case _:
            asking = interceptd(path, vps, with_region=scenario == "already_mapped")
    latencies: list[list[float]] = [[] for _ in range(vps)]
    with asking as asks:
        start = threading.Barrier(vps)
        threads = [
            threading.Thread(target=run, args=[ask, start, seconds, own])
            for ask, own in zip(asks, latencies, strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    every = sorted(latency for own in latencies for latency in own)
    counts = [len(own) for own in latencies]
    json.dump(
        {
            "rate": len(every) / seconds,
            "p50": median(every),
            "p99": quantiles(every, n=100)[-1],
            "max": every[-1],
            "fairness": max(counts) / median(counts),
            "setup_us": 0,
        },
        sys.stdout,
    )


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main()
