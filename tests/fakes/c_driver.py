"""The driver of the C client: one call, and the request that it makes.

Owns what daemons answer. Must not know which call is made.
"""

from __future__ import annotations

from pathlib import Path

import msgpack

from fakes.answering_peer import AnsweringPeer
from fakes.c_programs import CPrograms, run

TOKEN = b"fifteen letters\0"
RESUMED = [1, 1, None, ["resume", "mapped"]]
STATISTICS = {
    "regions": 1, "vmas": 2, "vps": 3, "open_invalidations": 4, "mapped_gfns": 5, "no_access_gfns": 6,
    "slat_extents": 7, "restarts": 8, "map_calls": 9, "unmap_calls": 10, "deposits": 11, "invalidations": 12,
    "stale_attempts": 13, "split_large_pages": 2**64 - 1, "latency": list(range(24)),
    "latency_waited": [9] * 24,
    "intercepts": {"resume": {"mapped": 3, "later": 1}, "later": {}, "retry": {"kicked": 2}},
}  # fmt: skip
REGION = {
    "start_gfn": 1, "page_count": 2, "start_uaddr": 4096, "kind": "later", "state": "live", "writable": True,
    "executable": False, "mapped_gfns": 7,
}  # fmt: skip
VMA = {
    "start_uaddr": 4096, "page_count": 2, "start_pfn": 9, "readable": True, "writable": False,
    "executable": True, "io": True,
}  # fmt: skip
MAPPING = {"frame": ["anonymous", 8], "start_gfn": 1, "page_count": 2, "start_uaddr": 4096, "access": 5}


def asked(
    programs: CPrograms, socket_path: Path, *verb: object, answer: object = RESUMED
) -> tuple[str, object]:
    """What the driver printed of one call, and the request that it made."""
    with AnsweringPeer(socket_path, [msgpack.packb(answer)]) as peer:
        [printed] = run(programs / "c_driver", socket_path, *verb)
    return printed, peer.requests[0]
