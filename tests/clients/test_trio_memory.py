"""Mappings are changed within an invalidation by trio, too, and its event loop goes on meanwhile."""

from __future__ import annotations

import errno
import inspect
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import trio

from fakes.eventually import PATIENCE
from fakes.scripted_daemon import Answer, Hear, Look, Refuse, ScriptedDaemon, hello, replies
from intercept_client import (
    PAGE_SIZE,
    Access,
    PartitionCredentials,
    TrioNotifier,
    UaddrRange,
    WireError,
    libc,
    memory,
    trio_memory,
)
from intercept_client._changes import Change

PARTITION = PartitionCredentials(partition_id=7, token=bytes(16))


@pytest.fixture
def mapping() -> Iterator[UaddrRange]:
    uaddrs = libc.mmap(UaddrRange.of_pages(0, 3), Access.READ, libc.Sharing.PRIVATE)
    yield uaddrs
    libc.munmap(uaddrs)


def is_mapped(uaddrs: UaddrRange) -> bool:
    try:
        libc.madvise(uaddrs, 0)  # MADV_NORMAL: ENOMEM where nothing is mapped
    except OSError:
        return False
    return True


def changes(module: ModuleType) -> dict[str, list[str]]:
    """The functions of a module that change mappings, and the names of their parameters."""
    return {
        name: list(parameters)
        for name in module.__all__
        if inspect.isfunction(function := getattr(module, name))
        and "notifier" in (parameters := inspect.signature(function).parameters)
    }


def test_trio_and_threads_have_the_same_functions() -> None:
    assert sorted(changes(trio_memory)) == sorted(trio_memory.__all__)
    assert changes(trio_memory) == changes(memory)


async def test_munmap_unmaps_after_the_begin_is_answered_and_before_the_end_is_sent(
    socket_path: Path, mapping: UaddrRange
) -> None:
    seen: list[bool] = []
    look = Look(lambda: seen.append(is_mapped(mapping)))
    script = [*hello(), Hear(), look, Answer(), Hear(), look, Answer()]
    with ScriptedDaemon(socket_path, (script,)) as daemon:
        async with TrioNotifier.open(socket_path, PARTITION) as notifier:
            await trio_memory.munmap(notifier, mapping)

    fields = {"start_uaddr": mapping.start_uaddr, "length": mapping.length}
    assert daemon.heard[1:] == [("invalidate_begin", [fields]), ("invalidate_end", [fields])]
    assert seen == [True, False]


async def test_munmap_leaves_the_mapping_when_the_begin_is_refused(
    socket_path: Path, mapping: UaddrRange
) -> None:
    script = [*hello(), Hear(), Refuse(WireError(errno.ENOSPC, "too many"))]
    with ScriptedDaemon(socket_path, (script,)):
        async with TrioNotifier.open(socket_path, PARTITION) as notifier:
            with pytest.raises(WireError, match="ENOSPC"):
                await trio_memory.munmap(notifier, mapping)

    assert is_mapped(mapping)


async def test_mremap_announces_what_it_replaces_and_returns_where_the_mapping_is(socket_path: Path) -> None:
    both = libc.mmap(UaddrRange.of_pages(0, 2), Access.READ, libc.Sharing.PRIVATE)
    old, target = both.slice(both.start, both.start + 1), both.slice(both.start + 1, both.end)
    with ScriptedDaemon(socket_path, ([*hello(), *replies(None, None, None, None)],)) as daemon:
        async with TrioNotifier.open(socket_path, PARTITION) as notifier:
            moved = await trio_memory.mremap(notifier, old, 1, start_uaddr=target.start_uaddr)

    assert moved == target
    libc.munmap(target)
    assert daemon.methods[1:] == ["invalidate_begin"] * 2 + ["invalidate_end"] * 2


async def test_munmap_that_the_kernel_refuses_raises_its_errno_and_ends_the_invalidation(
    socket_path: Path,
) -> None:
    beyond = UaddrRange.of_bytes(1 << 63, PAGE_SIZE)
    with ScriptedDaemon(socket_path, ([*hello(), *replies(None, None)],)) as daemon:
        async with TrioNotifier.open(socket_path, PARTITION) as notifier:
            with pytest.raises(OSError, match=r"munmap \[0x8000000000000000") as caught:
                await trio_memory.munmap(notifier, beyond)

    assert caught.value.errno == errno.EINVAL
    assert daemon.methods == ["hello", "invalidate_begin", "invalidate_end"]


async def test_the_event_loop_goes_on_while_a_change_takes_its_time(
    socket_path: Path, mapping: UaddrRange
) -> None:
    begun, goes_on = threading.Event(), threading.Event()

    def slow() -> Change[bool]:
        def carry_out() -> bool:
            begun.set()
            return goes_on.wait(PATIENCE)

        return Change((mapping,), carry_out)

    async def release() -> None:
        await trio.to_thread.run_sync(begun.wait, PATIENCE)
        goes_on.set()

    with ScriptedDaemon(socket_path, ([*hello(), *replies(None, None)],)):
        async with TrioNotifier.open(socket_path, PARTITION) as notifier, trio.open_nursery() as nursery:
            nursery.start_soon(release)
            assert await trio_memory._announced(slow)(notifier)


async def test_a_change_that_is_cancelled_before_its_system_call_leaves_the_mapping_and_ends(
    socket_path: Path, mapping: UaddrRange
) -> None:
    token, scope = trio.lowlevel.current_trio_token(), trio.CancelScope()
    cancel = Look(lambda: trio.from_thread.run_sync(scope.cancel, trio_token=token))
    script = [*hello(), Hear(), cancel, Answer(), *replies(None)]
    with ScriptedDaemon(socket_path, (script,)) as daemon:
        async with TrioNotifier.open(socket_path, PARTITION) as notifier:
            with scope:
                await trio_memory.munmap(notifier, mapping)

    assert scope.cancelled_caught
    assert is_mapped(mapping)
    assert daemon.methods == ["hello", "invalidate_begin", "invalidate_end"]
