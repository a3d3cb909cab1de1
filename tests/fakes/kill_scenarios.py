"""Kills that need a VMM which does what no library does, or somebody beside it.

Owns the scenarios; each raises what its VMM meets if the daemons do not survive as they should.
"""

from __future__ import annotations

import os
import select
import signal
import threading
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any, NoReturn

import pytest

from fakes.doing import Doing
from fakes.eventually import eventually
from fakes.kept_daemon import KeptDaemon
from fakes.kill_deeds import adds, announces, do, joins_a_vp, killed, partitions, touches
from fakes.live_vmm import LiveVmm
from fakes.puppet import Puppet
from fakes.raw_client import READ, RawConnection, Refused, intercept_message, pack, request
from fakes.raw_vmm import GFN, PAGE, PAGES, UADDR, WHOLE_MEMORY, RawVmm, region, vma
from fakes.spoiling_keeper import SPOILT
from fakes.surviving_vmm import FIRST_GFN, Mode, SurvivingVmm
from intercept_client import BlockingVp, ConnectionEnded, ConnectionLost, libc
from intercept_client.memory import Watch
from intercept_protocol.messages import VpSelection
from intercept_protocol.outcomes import Outcome
from interceptd.config.schema import Limits
from interceptd.recovery.returning import STRIKES

Scenario = Callable[[KeptDaemon], None]


def has_ended(connection: RawConnection) -> bool:
    """Whether the peer has closed, as far as is known by now, whatever it said before."""
    poll = select.poll()
    poll.register(connection.fileno(), select.POLLRDHUP)
    return bool(poll.poll(0))


def answer(connection: RawConnection, msgid: int) -> Any:
    """The answer to a request; one that came before may come again (T-12)."""
    while (message := connection.receive())[1] == msgid - 1:
        pass
    kind, answered, error, result = message
    assert (kind, answered, error) == (1, msgid, None), message
    return result


def is_waiting(vmm: RawVmm, vp: RawConnection) -> bool:
    """Whether an access to `GFN` waits; a VP may be sent back once, as by a kick."""
    for _ in range(2):
        vp.send(request("intercept", intercept_message(GFN, READ)))
        for _ in range(5):
            vmm.ask("statistics")
        if not vp.is_readable():
            return True
        if vp.answer()[0] != "retry":
            return False
    return False


def nothing_happens(kept: KeptDaemon) -> None:
    """Nobody is killed."""
    with SurvivingVmm(kept.socket, Mode.WATCHED_VMM) as vmm:
        do(kept, vmm, touches)


# ------------------------------------------------ requests


def no_request_is_lost(kept: KeptDaemon) -> None:
    """Of two requests the first one was received when the daemon died."""
    with RawVmm(kept.socket) as vmm:
        kept.plan(("noted", 1))
        vmm.connection.send(request("statistics", {}, 7))
        eventually(lambda: kept.reached, True)
        vmm.connection.send(request("statistics", {}, 8))
        vmm.connection.answer(7)
        vmm.connection.answer(8)


def an_intercept_is_sent_back(kept: KeptDaemon) -> None:
    with RawVmm(kept.socket) as vmm:
        vp = vmm.vp()
        kept.plan(("intercept read", 1))
        assert vp.intercept(GFN) == ["retry", "restarted"]
        assert vp.intercept(GFN) == ["forward", "no_region"]


def nothing_is_carried_out_twice(kept: KeptDaemon) -> None:
    """A begin that counted twice would never end."""
    for point in ("done", "sent", "marked"):
        with RawVmm(kept.socket) as vmm:
            vmm.add_memory()
            notifier = vmm.notifier()
            kept.plan((point, 1))
            notifier.send(request("invalidate_begin", WHOLE_MEMORY, 5))
            answer(notifier, 5)
            eventually(lambda: kept.reached, True)
            notifier.send(request("kick", {"vp_index": "all"}, 6))
            answer(notifier, 6)
            assert vmm.ask("statistics")["open_invalidations"] == 1


def a_request_that_kills_daemons_ends_its_partition_alone(kept: KeptDaemon) -> None:
    with SurvivingVmm(kept.socket, Mode.DECLARED) as other, RawVmm(kept.socket) as vmm:
        region = other.add(other.new_region(2))
        is_over = threading.Event()

        def touch_all_the_time() -> None:
            while not is_over.is_set():
                other.touch(region)

        busy = Doing(touch_all_the_time)
        kept.plan(*[("carried out", 1)] * STRIKES)
        vmm.connection.send(request("map_vma", vma(0x1000, 1)))
        assert (vmm.connection.farewell().name, kept.reached) == ("EIO", True)
        is_over.set()
        busy.wait()
        killed(kept, other, touches)


def many_requests_of_a_client_survive_one_death_each(kept: KeptDaemon) -> None:
    """Strikes are counted for each request by itself."""
    with SurvivingVmm(kept.socket, Mode.DECLARED) as vmm:
        for _ in range(4):
            assert killed(kept, vmm, adds, ("carried out", 1))


def a_request_is_not_to_blame_before_it_is_carried_out(kept: KeptDaemon) -> None:
    """It was owed when three daemons died, of something else."""
    with SurvivingVmm(kept.socket, Mode.DECLARED) as vmm:
        for deed, point, again in (
            (adds, ("noted", 1), ("about to answer", 1)),
            (announces, ("noted", 1), ("joined again", 2)),
            (touches, ("intercept read", 1), ("joined again", 2)),
        ):
            assert killed(kept, vmm, deed, point, *[again] * STRIKES)


def keep_asking(vp: BlockingVp, gfn: int) -> NoReturn:
    while True:
        vp.intercept(intercept_message(gfn, READ))


def an_intercept_that_kills_daemons_ends_its_vp(kept: KeptDaemon) -> None:
    with SurvivingVmm(kept.socket, Mode.DECLARED) as vmm:
        region = vmm.add(vmm.new_region(1))
        poisoned = vmm.open_vp()
        kept.plan(*[("to be edited", 1)] * STRIKES)
        with pytest.raises(ConnectionEnded, match="EIO"):
            keep_asking(poisoned, region.gfns.start)
        del vmm.vps[1]
        assert kept.reached
        do(kept, vmm, touches)


# ------------------------------------------------ VPs and notifiers


def a_kick_is_kept(kept: KeptDaemon) -> None:
    """It came while its VP waited for nothing. After the restart it ends the next wait."""
    with RawVmm(kept.socket) as vmm:
        vmm.add_memory()
        vp, notifier = vmm.vp(), vmm.notifier()
        notifier.ask("kick", {"vp_index": 0})
        notifier.ask("invalidate_begin", WHOLE_MEMORY)
        kept.kill()
        vp.send(request("intercept", intercept_message(GFN, READ)))
        for _ in range(5):
            vmm.ask("statistics")
        assert vp.is_readable()
        assert vp.answer() == ["retry", "kicked"]


def an_open_range_stays_closed(kept: KeptDaemon) -> None:
    with RawVmm(kept.socket) as vmm:
        vmm.add_memory()
        vp, notifier = vmm.vp(), vmm.notifier()
        assert vp.intercept(GFN) == ["resume", "mapped"]
        notifier.ask("invalidate_begin", WHOLE_MEMORY)
        kept.kill()
        assert vmm.ask("translate", gfn=GFN) is None
        assert is_waiting(vmm, vp)
        notifier.ask("invalidate_end", WHOLE_MEMORY)
        assert vp.answer() == ["resume", "mapped"]


def a_vp_that_is_not_back_yet_has_its_index(kept: KeptDaemon) -> None:
    """The VMM's hypervisor is slow to undo what is in doubt. Meanwhile nobody else can be this VP, and no
    other one is welcomed. Who kicks it is not told that it does not exist."""
    with RawVmm(kept.socket, hypervisor="vmm") as vmm:
        link, notifier, vp = vmm.link(), vmm.notifier(), vmm.vp()
        vmm.map_vma(UADDR, PAGES)
        vmm.add_region(GFN, PAGES, UADDR, kind="mmio")
        vp.send(request("intercept", intercept_message(GFN, READ), 5))
        assert link.receive()[2] == "map_gpa"
        kept.kill()
        _, msgid, method, _ = link.receive()
        assert method == "unmap_gpa"
        with RawConnection(kept.socket) as another:
            hello = {"protocol": 1, "role": "vp", "vp_index": 1, **vmm.credentials}
            another.send(request("hello", hello))
            notifier.send(request("kick", {"vp_index": 0}, 5))
            for _ in range(5):
                with pytest.raises(Refused, match="EEXIST"):
                    vmm.vp()
            assert not another.is_readable()
            link.send(pack([1, msgid, None, None]))
            assert answer(vp, 5) == ["retry", "restarted"]
            assert answer(notifier, 5) is None
            another.answer()
            assert another.intercept(GFN + PAGES) == ["forward", "no_region"]


def a_refused_peer_sees_the_end(kept: KeptDaemon) -> None:
    """Although the keeper has a duplicate of its connection."""
    with RawVmm(kept.socket) as vmm:
        vp = vmm.vp()
        vp.send(b"\xc1")
        assert vp.receive()[1] == 0
        vmm.ask("statistics")
        assert has_ended(vp)


def a_new_vp_is_welcomed_once_it_is_kept(kept: KeptDaemon) -> None:
    with SurvivingVmm(kept.socket, Mode.DECLARED) as vmm:
        assert killed(kept, vmm, joins_a_vp, ("sent", 1))


def framing_is_kept(kept: KeptDaemon) -> None:
    with SurvivingVmm(kept.socket, Mode.DECLARED) as vmm:
        assert killed(kept, vmm, adds, ("marked", 1))


# ------------------------------------------------ what the guest reaches


def a_map_in_doubt_is_undone(kept: KeptDaemon) -> None:
    """The VMM carries out a map, and answers, when the daemon that asked is dead. The memory goes before the
    guest touches it again: it must not reach it."""
    with SurvivingVmm(kept.socket, Mode.WATCHED_VMM) as vmm:
        region = vmm.add(vmm.new_region(2))

        def kill_once() -> None:
            vmm.table.meanwhile = lambda: None
            kept.kill()

        vmm.table.meanwhile = kill_once
        asked = vmm.vps[0].intercept(intercept_message(region.gfns.start, READ))
        assert asked.outcome is Outcome.RETRY
        vmm.check()
        vmm.unmap(region.uaddrs)
        vmm.check_reaches_nothing_of(region.uaddrs)
        vmm.check()


def reaches_nothing_that_went_at(kept: KeptDaemon, point: str) -> None:
    """A munmap has returned. The first access after it is not served from what was there."""
    with SurvivingVmm(kept.socket, Mode.WATCHED) as vmm:
        region = vmm.add(vmm.new_region(1))
        vmm.touch(region)
        kept.plan((point, 1))
        Doing(partial(libc.munmap, region.uaddrs)).wait()
        eventually(lambda: kept.reached, True)
        assert vmm.ask(region.gfns.start) == ("forward", "unbacked")
        vmm.check()


def what_was_read_has_gone(kept: KeptDaemon) -> None:
    """The event was read, and is not in the log."""
    reaches_nothing_that_went_at(kept, "event read")


def what_was_recorded_has_gone(kept: KeptDaemon) -> None:
    """The event is in the log alone."""
    reaches_nothing_that_went_at(kept, "event forgotten")


# ------------------------------------------------ while no daemon runs


def peers_leave_while_it_is_down(kept: KeptDaemon) -> None:
    """A VP, a notifier that has begun, and a whole VMM with its link and its memory."""
    with SurvivingVmm(kept.socket, Mode.DECLARED_VMM) as vmm:
        region = vmm.add(vmm.new_region(2))
        vmm.touch(region)
        vmm.open_vp()
        with SurvivingVmm(kept.socket, Mode.WATCHED_VMM) as leaving:
            leaving.touch(leaving.add(leaving.new_region(2)))
            notifier = vmm.open_notifier()
            notifier.invalidation(region.uaddrs).__enter__()
            with kept.down():
                vmm.vps.pop(1).close()
                notifier.close()
                leaving.vmm.close()
        vmm.touch(region)
        vmm.check()
        vmm.open_vp()
        vmm.check()
        eventually(lambda: partitions(kept), 1)


def its_vmm_dies_while_it_is_down(kept: KeptDaemon) -> None:
    """A process, with a munmap that waits for a daemon."""
    with SurvivingVmm(kept.socket, Mode.WATCHED_VMM) as other, Puppet() as vmm:
        vmm.do(LiveVmm.connect, kept.socket)
        vmm.do(LiveVmm.attach, Watch.REQUIRED, promise=False)
        uaddrs = vmm.do(LiveVmm.map, 2)
        vmm.do(LiveVmm.add_region, FIRST_GFN, uaddrs)
        vmm.do(LiveVmm.fault, FIRST_GFN)
        with kept.down():
            vmm.start(LiveVmm.munmap, uaddrs)
            eventually(lambda: "userfaultfd" in vmm.waits_in_the_kernel(), True)
            vmm.kill()
            vmm.wait_ended()
        eventually(lambda: partitions(kept), 1)
        do(kept, other, touches)


def its_hypervisor_leaves_while_it_is_down(kept: KeptDaemon) -> None:
    """Then nobody can take anything from the guest: that partition is lost, and no other."""
    with SurvivingVmm(kept.socket, Mode.DECLARED) as other:
        with RawVmm(kept.socket, hypervisor="vmm") as vmm:
            link = vmm.link()
            with kept.down():
                link.close()
            assert vmm.connection.farewell().name == "EIO"
        do(kept, other, touches)


def requests_that_came_meanwhile_are_answered(kept: KeptDaemon) -> None:
    """Also hellos: the listener outlives the daemon."""
    with SurvivingVmm(kept.socket, Mode.WATCHED_VMM) as vmm:
        region = vmm.add(vmm.new_region(2))
        vmm.touch(region)
        gone = vmm.add(vmm.new_region(2))
        vmm.touch(gone)
        with kept.down():
            doings = [
                Doing(lambda: vmm.ask(region.gfns.start)),
                Doing(lambda: vmm.vmm.translate(region.gfns.start)),
                Doing(lambda: vmm.notifier.invalidate(region.uaddrs)),
                Doing(
                    lambda: SurvivingVmm(kept.socket, Mode.DECLARED).__enter__().__exit__(None, None, None)
                ),
                Doing(lambda: libc.munmap(gone.uaddrs)),
            ]
        for doing in doings:
            doing.wait()
        vmm.check_reaches_nothing_of(gone.uaddrs)
        vmm.touch(region)
        vmm.check()


# ------------------------------------------------ planned restarts, and ends


def restarts_as_planned(kept: KeptDaemon) -> None:
    """By the keeper's SIGUSR1, and by a SIGTERM to the daemon: it rests."""
    with SurvivingVmm(kept.socket, Mode.WATCHED_VMM) as vmm:
        region = vmm.add(vmm.new_region(2))
        vmm.touch(region)
        kept.signal(signal.SIGUSR1)
        kept.wait_event("daemon_process_ended")
        vmm.check()
        kept.signal_daemon(signal.SIGTERM)
        kept.wait_event("daemon_process_ended", 2)
        vmm.touch(region)
        vmm.check()
        assert (vmm.vmm.statistics().restarts, kept.count("daemon_rests")) == (2, 2)


def a_long_request_survives_any_number_of_restarts(kept: KeptDaemon) -> None:
    """Daemons that rest have not died of it. The VMM's hypervisor is slow to map what the request adds."""
    with RawVmm(kept.socket, hypervisor="vmm") as vmm:
        link = vmm.link()
        vmm.connection.send(request("add_region", region(GFN, PAGES, UADDR, kind="movable"), 5))
        for _ in range(STRIKES + 1):
            assert link.receive()[2] == "map_gpa"
            kept.signal_daemon(signal.SIGTERM)
            _, msgid, method, _ = link.receive()
            assert method == "unmap_gpa"
            link.send(pack([1, msgid, None, None]))
        _, msgid, _, _ = link.receive()
        link.send(pack([1, msgid, None, None]))
        assert answer(vmm.connection, 5) == {"kind": "movable"}


def its_keeper_dies(kept: KeptDaemon) -> None:
    """The daemon goes on, and says that it is not kept any more. Its own death is the end, as without one."""
    with SurvivingVmm(kept.socket, Mode.WATCHED) as vmm:
        region = vmm.add(vmm.new_region(2))
        vmm.touch(region)
        assert vmm.vmm.hello.features["kept"] is True
        daemon = kept.kill_keeper()
        vmm.open_vp()
        with SurvivingVmm(kept.socket, Mode.DECLARED) as other:
            other.touch(other.add(other.new_region(1)))
            assert other.notifier.hello.features["kept"] is False
        vmm.touch(region)
        vmm.check()
        os.kill(daemon, signal.SIGKILL)
        Doing(lambda: libc.munmap(region.uaddrs)).wait()
        assert raises_loss(vmm)


def no_successor_can_start(kept: KeptDaemon) -> None:
    """After the patience all VMMs see the end, and a munmap that waited returns. Once a daemon starts again,
    VMMs can begin anew."""
    with SurvivingVmm(kept.socket, Mode.WATCHED) as vmm:
        region = vmm.add(vmm.new_region(2))
        vmm.touch(region)
        config = kept.config.read_text()
        kept.config.write_text("this is none")
        kept.kill()
        Doing(lambda: libc.munmap(region.uaddrs)).wait()
        assert raises_loss(vmm)
    kept.config.write_text(config)
    kept.wait_event("daemon_started", 2)
    with SurvivingVmm(kept.socket, Mode.WATCHED) as vmm:
        vmm.touch(vmm.add(vmm.new_region(2)))
        vmm.check()


def raises_loss(vmm: SurvivingVmm) -> bool:
    """Whether each of its connections has ended."""
    for use in (vmm.vmm.statistics, lambda: vmm.ask(0), lambda: vmm.notifier.kick(VpSelection.ALL)):
        try:
            use()
        except ConnectionLost:
            continue
        return False
    return True


def limits_are_lower_for_the_successor(kept: KeptDaemon) -> None:
    """Of everything there is more than there may be. It stays."""
    with RawVmm(kept.socket) as first, RawVmm(kept.socket) as vmm:
        vmm.add_memory()
        vmm.map_vma(elsewhere := UADDR + (1 << 30), 1)
        vmm.add_region(GFN + PAGES, 1, elsewhere)
        vps, notifiers = [vmm.vp(index) for index in range(2)], [vmm.notifier() for _ in range(2)]
        assert [vp.intercept(GFN + PAGES * vp_index)[0] for vp_index, vp in enumerate(vps)] == ["resume"] * 2
        for notifier in notifiers:
            notifier.ask("invalidate_begin", {"start_uaddr": UADDR + (2 << 30), "length": PAGE})
        before = vmm.ask("statistics")
        lowered = (field for field in Limits.__struct_fields__ if field != "control_requests_per_second")
        kept.config.write_text("\n".join(["[limits]", *(f"{field} = 1" for field in lowered)]))
        kept.kill()
        after = vmm.ask("statistics")
        for what in ("regions", "vmas", "vps", "open_invalidations", "mapped_gfns", "slat_extents"):
            assert after[what] == before[what] >= 2, what
        assert first.ask("statistics")["restarts"] == 1
        assert vmm.ask("translate", gfn=GFN) is not None


def a_second_keeper_is_refused(kept: KeptDaemon) -> None:
    """It finds the socket in use, and lets the first one's daemons alone."""
    with SurvivingVmm(kept.socket, Mode.DECLARED) as vmm:
        with kept.another() as second:
            assert second.wait_ended() == 1
        killed(kept, vmm, touches, ("edited", 1))


def what_is_spoilt_ends_alone(kept: KeptDaemon) -> None:
    """Of a `fakes.spoiling_keeper`: a ledger that makes no sense ends its VMM, with a reason in the log. So
    does what no ledger knows, and all others go on."""
    with ExitStack() as opened:
        whole = opened.enter_context(SurvivingVmm(kept.socket, Mode.WATCHED_VMM))
        region = whole.add(whole.new_region(2))
        whole.touch(region)
        spoilt = [
            opened.enter_context(SurvivingVmm(kept.socket, Mode.WATCHED)) for _ in range(len(SPOILT) + 1)
        ]
        regions = [vmm.add(vmm.new_region(2)) for vmm in spoilt]
        for vmm, each in zip(spoilt, regions, strict=True):
            vmm.touch(each)
        kept.kill()
        for vmm, each in zip(spoilt, regions, strict=True):
            assert raises_loss(vmm)
            Doing(partial(libc.munmap, each.uaddrs)).wait()
        whole.touch(region)
        whole.check()
        assert kept.count("partition_not_recovered") == len(SPOILT) + 2
        assert kept.count("passed_descriptor_not_used") == 2
        with SurvivingVmm(kept.socket, Mode.DECLARED) as other:
            do(kept, other, touches)
        kept.kill()  # nothing of it is kept any more
        whole.check()
        assert kept.count("partition_not_recovered") == len(SPOILT) + 2
