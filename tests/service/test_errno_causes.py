"""What each errno of a refusal means: those of the manual pages are classified, all others are temporary."""

from __future__ import annotations

import errno

import pytest

from interceptd.address_space.refusals import REFUSALS, Call, Cause, Permanence, cause_of

DECIDED, PASSING, GONE = Permanence.PERMANENT, Permanence.TRANSIENT, Permanence.GONE
MANUAL = {
    Call.UFFDIO_API: {errno.EFAULT: PASSING, errno.EINVAL: DECIDED, errno.EPERM: PASSING},
    Call.UFFDIO_REGISTER: {
        errno.EBUSY: PASSING,
        errno.EFAULT: PASSING,
        errno.EINVAL: DECIDED,
        errno.ENOMEM: PASSING,
        errno.EPERM: DECIDED,
        errno.ESRCH: PASSING,
    },
    Call.READ_EVENTS: {
        errno.EAGAIN: PASSING,
        errno.EFAULT: PASSING,
        errno.EINTR: PASSING,
        errno.EINVAL: PASSING,
        errno.EIO: PASSING,
        errno.ENOMEM: PASSING,
        errno.EOPNOTSUPP: DECIDED,
    },
    Call.PROCMAP_QUERY: {
        errno.E2BIG: PASSING,
        errno.EFAULT: PASSING,
        errno.EINTR: PASSING,
        errno.EINVAL: PASSING,
        errno.ENAMETOOLONG: DECIDED,
        errno.ENOENT: DECIDED,
        errno.ENOMEM: PASSING,
        errno.ENOTTY: DECIDED,
        errno.ESRCH: GONE,
    },
    Call.READ_PROC: {
        errno.EAGAIN: PASSING,
        errno.EFAULT: PASSING,
        errno.EINTR: PASSING,
        errno.EINVAL: PASSING,
        errno.EIO: PASSING,
        errno.ENOMEM: PASSING,
        errno.ESRCH: GONE,
    },
    Call.LOOK_AT: {
        errno.EACCES: DECIDED,
        errno.EFAULT: PASSING,
        errno.EINTR: PASSING,
        errno.EIO: DECIDED,
        errno.ELOOP: PASSING,
        errno.EMFILE: PASSING,
        errno.ENAMETOOLONG: DECIDED,
        errno.ENFILE: PASSING,
        errno.ENOMEM: PASSING,
        errno.ENOTCONN: DECIDED,
        errno.EPERM: DECIDED,
        errno.ESTALE: DECIDED,
    },
}
"""From the manual pages of the calls, and for PROCMAP_QUERY from do_procmap_query, fs/proc/task_mmu.c."""


@pytest.mark.parametrize("call", Call, ids=lambda call: call.name)
def test_each_errno_of_a_call_by_its_manual_page_is_decided_or_passes_as_it_is_listed(call: Call) -> None:
    found = {number: cause_of(call, OSError(number, "")).permanence for number in MANUAL[call]}
    assert found == MANUAL[call]


@pytest.mark.parametrize("call", Call, ids=lambda call: call.name)
def test_an_errno_that_no_manual_page_names_passes(call: Call) -> None:
    others = errno.errorcode.keys() - MANUAL[call].keys()
    assert {cause_of(call, OSError(number, "")).permanence for number in others} == {PASSING}


@pytest.mark.parametrize("call", Call, ids=lambda call: call.name)
def test_the_table_lists_no_errno_that_is_not_in_the_manual(call: Call) -> None:
    assert REFUSALS[call].keys() <= MANUAL[call].keys()


def test_absence_is_decided_only_if_checking_again_would_confirm_it() -> None:
    absences = {
        Cause.NO_VMA: DECIDED,
        Cause.UNATTACHED: DECIDED,
        Cause.UNANNOUNCED: DECIDED,
        Cause.NO_RECORD: PASSING,
        Cause.CHANGING: PASSING,
        Cause.SMAPS_ENDED: PASSING,
        Cause.NO_ANSWER: PASSING,
        Cause.IMAGE_ERROR: PASSING,  # whatever the errno: zeroes would be wrong for ever
        Cause.MM_GONE: GONE,
    }
    assert {absence: absence.permanence for absence in absences} == absences
    of_errnos = {cause for causes in REFUSALS.values() for cause in causes.values()}
    assert set(Cause) - of_errnos <= {*absences, Cause.OTHER}


def test_an_error_without_a_number_passes() -> None:
    assert cause_of(Call.UFFDIO_REGISTER, OSError("no number")).permanence is PASSING
