"""What a kernel's userfaultfd must offer: what is missing is named when memory is attached, not met later."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

import pytest

from fakes.closers import closer
from fakes.eventually import eventually
from fakes.userfaultfd_kernel import (
    ALL,
    EVENT_UNMAP,
    IOCTLS,
    PAGEFAULT_FLAG_WP,
    REGISTER,
    WP_HUGETLBFS_SHMEM,
    UserfaultfdKernel,
)
from intercept_client.memory import open_userfaultfd
from intercept_protocol.errors import WireError
from interceptd.address_space import Undecided
from interceptd.address_space.descriptors import attach
from interceptd.address_space.userfaultfd import Userfaultfd, missing
from interceptd.connections.peer import Peer

OURS = Peer(os.getpid(), 0, 0)


@pytest.fixture
def handed_over() -> Iterator[list[int]]:
    """Our maps and a userfaultfd; the receiver must close them."""
    descriptors = [os.open("/proc/self/maps", os.O_RDONLY), open_userfaultfd()]
    yield descriptors
    eventually(lambda: [it for it in descriptors if os.path.exists(f"/proc/self/fd/{it}")], [])


@pytest.mark.parametrize(
    ("features", "ioctls", "lacking"),
    [
        (ALL, IOCTLS, []),
        ((1 << 64) - 1, IOCTLS, []),
        (ALL & ~EVENT_UNMAP, IOCTLS, ["UFFD_FEATURE_EVENT_UNMAP"]),
        (ALL & ~PAGEFAULT_FLAG_WP, IOCTLS, ["UFFD_FEATURE_PAGEFAULT_FLAG_WP"]),
        (ALL & ~WP_HUGETLBFS_SHMEM, IOCTLS, ["UFFD_FEATURE_WP_HUGETLBFS_SHMEM"]),
        (EVENT_UNMAP, IOCTLS, ["UFFD_FEATURE_PAGEFAULT_FLAG_WP", "UFFD_FEATURE_WP_HUGETLBFS_SHMEM"]),
        (ALL, IOCTLS & ~REGISTER, ["UFFDIO_REGISTER"]),
        (
            0,
            0,
            [
                "UFFD_FEATURE_EVENT_UNMAP",
                "UFFD_FEATURE_PAGEFAULT_FLAG_WP",
                "UFFD_FEATURE_WP_HUGETLBFS_SHMEM",
                "UFFDIO_REGISTER",
            ],
        ),
    ],
)
def test_a_feature_that_the_kernel_lacks_is_named(features: int, ioctls: int, lacking: list[str]) -> None:
    assert missing(features, ioctls) == lacking


@pytest.mark.parametrize(
    ("features", "name"),
    [
        (ALL & ~EVENT_UNMAP, "UFFD_FEATURE_EVENT_UNMAP"),
        (ALL & ~PAGEFAULT_FLAG_WP, "UFFD_FEATURE_PAGEFAULT_FLAG_WP"),
        (ALL & ~WP_HUGETLBFS_SHMEM, "UFFD_FEATURE_WP_HUGETLBFS_SHMEM"),
    ],
)
def test_a_userfaultfd_of_a_kernel_that_lacks_a_feature_is_einval_that_names_it_and_closed(
    handed_over: list[int], monkeypatch: pytest.MonkeyPatch, features: int, name: str
) -> None:
    """Otherwise the guest's memory would be unbacked for good, without an error."""
    monkeypatch.setattr("interceptd.address_space.userfaultfd.fcntl.ioctl", UserfaultfdKernel(features))
    with pytest.raises(WireError, match=f"lacks {name}: do not hand one over") as refused:
        attach(handed_over, 2, OURS, promised=False, closer=closer())
    assert refused.value.number == errno.EINVAL


def test_an_initialised_userfaultfd_and_a_missing_feature_are_distinguished(
    handed_over: list[int],
) -> None:
    """The kernel has one errno for both."""
    Userfaultfd(handed_over[1])
    with pytest.raises(WireError, match="is already initialised"):
        attach(handed_over, 2, OURS, promised=False, closer=closer())


@pytest.mark.parametrize("number", [errno.ENOMEM, errno.EPERM])
def test_a_userfaultfd_that_cannot_be_queried_is_undecided_and_closed(
    handed_over: list[int], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(
        "interceptd.address_space.userfaultfd.fcntl.ioctl", UserfaultfdKernel(refusing=number)
    )
    with pytest.raises(Undecided) as undecided:
        attach(handed_over, 2, OURS, promised=False, closer=closer())
    assert undecided.value.number == errno.EAGAIN


def test_a_userfaultfd_of_this_kernel_is_ready_to_watch_with() -> None:
    """Where it is not, no test with a userfaultfd can pass, and this one says why."""
    userfaultfd = Userfaultfd(open_userfaultfd())
    assert userfaultfd.read_events() == []
    userfaultfd.close()
