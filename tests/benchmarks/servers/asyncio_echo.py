"""What asyncio costs, or uvloop, at their fastest: a protocol, no streams.

`python asyncio_echo.py [--uvloop] SOCKET`.
"""

from __future__ import annotations

import asyncio
import sys
from typing import cast

from answering import answer


class Serving(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)  # uvloop's is none by its class

    def data_received(self, data: bytes) -> None:
        self._transport.write(answer(data))


async def main() -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_unix_server(Serving, sys.argv[-1], backlog=1024)
    await server.serve_forever()


if "--uvloop" in sys.argv:
    import uvloop

    uvloop.run(main())
else:
    asyncio.run(main())
