"""`kick`: the VMM makes a waiting vCPU return."""

from __future__ import annotations

import pytest

from conformance.guests import GFN, UADDR, WHOLE_MEMORY, RawVmm
from conformance.hosts import Host
from conformance.statements import needs, statement
from conformance.wire import READ, intercept_message, request

WAITING = request("intercept", intercept_message(GFN, READ))


@pytest.fixture
def vmm(vmm: RawVmm) -> RawVmm:
    """A VMM whose memory is being invalidated, without an end."""
    vmm.add_memory()
    vmm.notifier().ask("invalidate_begin", WHOLE_MEMORY)
    return vmm


@statement("P-16")
@needs("notifier")
@pytest.mark.parametrize("whom", [2, "all"])
def test_the_intercept_that_waits_or_is_about_to_is_kicked(vmm: RawVmm, whom: object) -> None:
    vp = vmm.vp(2)
    vp.send(WAITING)
    assert vmm.ask("kick", vp_index=whom) is None
    assert vp.answer() == ["retry", "kicked"]


@statement("P-16")
@needs("notifier")
def test_a_notifier_kicks_too(vmm: RawVmm) -> None:
    vp, notifier = vmm.vp(2), vmm.notifier()
    vp.send(WAITING)
    assert notifier.ask("kick", {"vp_index": 2}) is None
    assert vp.answer() == ["retry", "kicked"]
    assert notifier.refusal("kick", {"vp_index": 9}).name == "ENOENT"


@statement("P-16", "T-19")
@needs("hypervisor", "notifier")
def test_a_kick_of_a_notifier_does_not_wait_for_the_vmms_request(hosted: RawVmm) -> None:
    host = Host(hosted)
    host.map()
    hosted.connection.send(request("unmap_vma", {"start_uaddr": UADDR, "page_count": 1}))
    msgid, _, _ = host.asked()
    host.fault()
    assert hosted.notifier().ask("kick", {"vp_index": 0}) is None
    assert host.vp.answer() == ["retry", "kicked"]
    host.answer(msgid)
    assert hosted.connection.answer() is None


@statement("P-16")
@needs("notifier")
def test_a_kick_while_idle_is_kept_once(vmm: RawVmm) -> None:
    vp = vmm.vp(2)
    for _ in range(3):
        vmm.ask("kick", vp_index=2)
    assert vp.intercept(GFN) == ["retry", "kicked"]
    vp.send(WAITING)
    assert vmm.ask("kick", vp_index="all") is None
    assert vp.answer() == ["retry", "kicked"]


@statement("P-16")
@needs("notifier")
def test_a_kick_does_not_change_answers_given_without_waiting(vmm: RawVmm) -> None:
    vp = vmm.vp(2)
    vmm.ask("kick", vp_index=2)
    assert vp.intercept(0) == ["forward", "no_region"]
    assert vp.intercept(GFN) == ["retry", "kicked"]


@statement("P-16")
@needs("notifier")
def test_a_vp_that_is_not_attached_is_enoent_and_all_always_succeeds(vmm: RawVmm) -> None:
    assert vmm.connection.refusal("kick", {"vp_index": 9}).name == "ENOENT"
    assert vmm.ask("kick", vp_index="all") is None


@statement("P-3", "E-2")
@needs("notifier")
@pytest.mark.parametrize("whom", ["some", 1 << 32, -1, None, True])
def test_any_other_target_is_einval(vmm: RawVmm, whom: object) -> None:
    refusal = vmm.connection.refusal("kick", {"vp_index": whom})
    assert (refusal.name, refusal.details.get("field")) == ("EINVAL", "vp_index")
