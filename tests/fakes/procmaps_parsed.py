"""Maps files as on kernels before 6.11, which have no PROCMAP_QUERY."""

from __future__ import annotations

import errno

from interceptd.address_space.live_vma import LiveVma
from interceptd.address_space.procmaps import ProcMaps


def asking_by_parsing(maps: ProcMaps) -> ProcMaps:
    """Have it find the query missing, as it does there at the first question."""

    def no_such_ioctl(_: int) -> LiveVma | None:
        raise OSError(errno.ENOTTY, "Inappropriate ioctl for device")

    maps._query = no_such_ioctl  # type: ignore[method-assign, assignment]
    return maps
