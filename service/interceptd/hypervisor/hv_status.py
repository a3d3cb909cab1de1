"""Status codes of the Microsoft hypervisor and the errno that the mshv driver makes of each.

Source: Linux include/hyperv/hvgdk_mini.h (HV_STATUS_*) and drivers/hv (hv_result_to_errno).
"""

from __future__ import annotations

import errno
from enum import IntEnum


class HvStatus(IntEnum):
    SUCCESS = 0x0
    INVALID_HYPERCALL_CODE = 0x2
    INVALID_HYPERCALL_INPUT = 0x3
    INVALID_ALIGNMENT = 0x4
    INVALID_PARAMETER = 0x5
    ACCESS_DENIED = 0x6
    INVALID_PARTITION_STATE = 0x7
    OPERATION_DENIED = 0x8
    INSUFFICIENT_MEMORY = 0xB
    INVALID_PARTITION_ID = 0xD
    INVALID_VP_INDEX = 0xE
    NO_RESOURCES = 0x1D
    OPERATION_FAILED = 0x71
    INSUFFICIENT_ROOT_MEMORY = 0x73
    INSUFFICIENT_CONTIGUOUS_MEMORY = 0x75
    TIME_OUT = 0x78
    INSUFFICIENT_CONTIGUOUS_ROOT_MEMORY = 0x83

    @property
    def errno(self) -> int:
        match self:
            case HvStatus.SUCCESS:
                return 0
            case (
                HvStatus.INVALID_HYPERCALL_CODE
                | HvStatus.INVALID_HYPERCALL_INPUT
                | HvStatus.INVALID_PARAMETER
                | HvStatus.INVALID_PARTITION_ID
                | HvStatus.INVALID_VP_INDEX
            ):
                return errno.EINVAL
            case (
                HvStatus.INSUFFICIENT_MEMORY
                | HvStatus.INSUFFICIENT_ROOT_MEMORY
                | HvStatus.INSUFFICIENT_CONTIGUOUS_MEMORY
                | HvStatus.INSUFFICIENT_CONTIGUOUS_ROOT_MEMORY
            ):
                return errno.ENOMEM
            case _:
                return errno.EIO
