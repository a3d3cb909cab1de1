"""Examples of every answer to `intercept`, and of errors."""

from __future__ import annotations

import errno

from intercept_protocol import rpc
from intercept_protocol.errors import WireError
from intercept_protocol.outcomes import Answer
from wire_vectors.forms import ResponseVector

MSGID = 7


def responses() -> list[ResponseVector]:
    errors = [
        WireError(
            errno.EEXIST, "region [0x100, 0x200) overlaps [0x180, 0x280)", start_gfn=0x180, page_count=0x100
        ),
        WireError(errno.EAGAIN, "kind auto: smaps does not show the VMA, which is there"),
        WireError(errno.ENOENT, "no region starts at gfn 0x100", start_gfn=0x100),
        WireError(errno.EINVAL, "translate: gfn: is missing", field="gfn"),
        WireError(errno.ENOSPC, "a partition may have 64 regions", limit="regions_per_partition"),
        WireError(errno.EACCES, "no such partition, or not its token"),
        WireError(errno.ENOSPC, "no memslot is free", done=3),
        WireError(errno.EOPNOTSUPP, "no keeper would start this daemon again"),
    ]
    return [_answer(answer) for answer in Answer] + [_error(error) for error in errors]


def _answer(answer: Answer) -> ResponseVector:
    result = [str(answer.outcome), answer.reason]
    return ResponseVector(MSGID, rpc.encode_result(MSGID, result).hex(), result=result)


def _error(error: WireError) -> ResponseVector:
    return ResponseVector(MSGID, rpc.encode_error(MSGID, error).hex(), error=error.to_wire())
