"""A userfaultfd is created by system call or device; if neither works, the missing permission is named."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from fakes.eventually import PATIENCE
from fakes.puppet import ENVIRONMENT
from intercept_client import _userfaultfd as userfaultfd
from intercept_client.memory import (
    Permission,
    UserfaultfdNotPermitted,
    UserfaultfdNotSupported,
    UserfaultfdUnavailable,
    Watch,
    open_userfaultfd,
    own_memory,
)


def failing(number: int) -> Callable[[int], int]:
    def fail(flags: int) -> int:  # noqa: ARG001 - whatever is asked for
        raise OSError(number, os.strerror(number))

    return fail


def refuse(monkeypatch: pytest.MonkeyPatch, system_call: Callable[[int], int], device: int) -> None:
    monkeypatch.setattr(userfaultfd, "_system_call", system_call)
    monkeypatch.setattr(userfaultfd, "_by_device", failing(device))


def old_kernel(flags: int) -> int:
    """Linux before 5.11, where only the sysctl or a capability helps."""
    raise OSError(errno.EINVAL if flags & userfaultfd.USER_MODE_ONLY else errno.EPERM, "")


@pytest.mark.parametrize(
    ("system_call", "device", "missing"),
    [
        (failing(errno.EPERM), errno.EACCES, (Permission.SECCOMP, Permission.DEVICE_MODE)),
        (failing(errno.EPERM), errno.ENOENT, (Permission.SECCOMP,)),
        (failing(errno.EPERM), errno.EPERM, (Permission.SECCOMP, Permission.DEVICE_SECCOMP)),
        (failing(errno.ENOSYS), errno.EACCES, (Permission.SECCOMP, Permission.DEVICE_MODE)),
        (old_kernel, errno.ENOENT, (Permission.SYSCTL,)),
        (old_kernel, errno.EACCES, (Permission.SYSCTL, Permission.DEVICE_MODE)),
    ],
)
def test_a_refusal_names_each_permission_that_is_missing(
    monkeypatch: pytest.MonkeyPatch,
    system_call: Callable[[int], int],
    device: int,
    missing: tuple[Permission, ...],
) -> None:
    refuse(monkeypatch, system_call, device)
    monkeypatch.setattr(userfaultfd, "USERFAULTFD_SYSCTL", "/proc/self/maps")  # a kernel that has it
    with pytest.raises(UserfaultfdNotPermitted) as refused:
        open_userfaultfd()
    assert refused.value.missing == missing
    assert all(permission.value in str(refused.value) for permission in missing)


def test_a_kernel_without_it_is_not_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, failing(errno.ENOSYS), errno.ENOENT)
    monkeypatch.setattr(userfaultfd, "USERFAULTFD_SYSCTL", "/proc/no such file")
    with pytest.raises(UserfaultfdNotSupported, match="built without it") as refused:
        open_userfaultfd()
    assert refused.value.errno == errno.ENOSYS


@pytest.mark.parametrize(
    ("system_call", "device", "passing"),
    [
        (errno.EMFILE, errno.EMFILE, errno.EMFILE),
        (errno.ENFILE, errno.ENOENT, errno.ENFILE),
        (errno.ENOMEM, errno.EACCES, errno.ENOMEM),
        (errno.EPERM, errno.EMFILE, errno.EMFILE),
    ],
)
@pytest.mark.parametrize("watch", [Watch.REQUIRED, Watch.IF_POSSIBLE])
def test_without_a_descriptor_or_memory_for_one_memory_is_not_handed_over_unwatched(
    monkeypatch: pytest.MonkeyPatch, system_call: int, device: int, passing: int, watch: Watch
) -> None:
    """It passes, where guest memory that is not watched would be unbacked for good."""
    refuse(monkeypatch, failing(system_call), device)
    with pytest.raises(OSError, match=os.strerror(passing)) as refused, own_memory(watch):
        pass
    assert not isinstance(refused.value, UserfaultfdUnavailable)


def test_an_old_kernel_is_asked_without_user_mode_only(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def old_privileged(flags: int) -> int:
        asked.append(flags & userfaultfd.USER_MODE_ONLY)
        if flags & userfaultfd.USER_MODE_ONLY:
            raise OSError(errno.EINVAL, "")
        return 77

    refuse(monkeypatch, old_privileged, errno.ENOENT)
    assert open_userfaultfd() == 77
    assert asked == [userfaultfd.USER_MODE_ONLY, 0]


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOSYS])
def test_under_a_real_seccomp_filter_the_error_names_it_or_the_device_is_used(number: int) -> None:
    """In a child, because a filter cannot be removed. Only users who may open the device can use it."""
    ended = subprocess.run(
        [sys.executable, "-m", "fakes.under_seccomp", str(number)],
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
    )
    device = (
        "opened" if os.access(userfaultfd.USERFAULTFD_DEVICE, os.R_OK | os.W_OK) else "SECCOMP DEVICE_MODE"
    )
    assert ended.stdout.strip() == device
