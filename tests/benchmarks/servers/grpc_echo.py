"""What grpc.aio costs on a Unix socket, without protobuf: bytes in, bytes out.

`python grpc_echo.py SOCKET`.
"""

from __future__ import annotations

import asyncio
import sys

import grpc
from answering import look_up


async def intercept(message: bytes, context: grpc.aio.ServicerContext) -> bytes:  # noqa: ARG001 - gRPC's signature
    return " ".join(look_up(message)).encode()


async def main() -> None:
    server = grpc.aio.server()
    handler = grpc.unary_unary_rpc_method_handler(intercept)
    server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler("interceptd", {"intercept": handler})]
    )
    server.add_insecure_port(f"unix:{sys.argv[1]}")
    await server.start()
    await server.wait_for_termination()


asyncio.run(main())
