"""`drain`: the server ends. It runs last, and with `--socket` only if `--drain` is given."""

from __future__ import annotations

import pytest

from conformance.conftest import Server
from conformance.guests import GFN, WHOLE_MEMORY, RawVmm
from conformance.statements import needs, statement
from conformance.wire import READ, RawConnection, intercept_message, request


@statement("O-5", "O-13", "V-3")
@needs("notifier")
def test_a_drain_answers_what_is_in_flight_ends_the_partitions_and_the_server(
    server: Server, vmm: RawVmm, operator: RawConnection, listener: RawConnection
) -> None:
    if not server.may_be_drained:
        pytest.skip("it would end the server: give --drain")
    vmm.add_memory()
    vmm.notifier().ask("invalidate_begin", WHOLE_MEMORY)
    vp = vmm.vp()
    vp.send(request("intercept", intercept_message(GFN, READ)))
    vmm.ask("statistics")
    listener.ask("subscribe", {"events": ["drain_started", "intercept_answered", "partition_ended"]})
    assert operator.ask("drain", {"timeout_ms": 10_000}) is None
    assert vp.answer() == ["retry", "draining"]
    assert (vp.receive_all(), vmm.connection.receive_all(), operator.receive_all()) == ([], [], [])
    heard = [fields["event"] for _, _, (fields,) in listener.receive_all()]
    assert heard == ["drain_started", "intercept_answered", "partition_ended"]
    with pytest.raises(OSError, match=r"refused|No such file"):
        RawConnection(server.socket)
