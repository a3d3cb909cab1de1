"""The explorer's model partition, whose ports stop at gates that a test holds.

Owns the gates. What it wires is the explorer's to know.
"""

from __future__ import annotations

from collections.abc import Mapping

from explorer import model_partition
from explorer.kept_log import KeptLog
from explorer.model_partition import RW, TIMEOUT
from explorer.pauses import Pauses
from fakes.pauses import Gates
from intercept_protocol.messages import Remap
from interceptd.hypervisor.hv_status import HvStatus

__all__ = ["RW", "TIMEOUT", "ModelPartition"]


class ModelPartition(model_partition.ModelPartition):
    def __init__(
        self,
        *,
        pauses: Pauses | None = None,
        remap: Remap = Remap.REPLACE,
        failing_calls: Mapping[int, HvStatus] | None = None,
        vma_limit: int = 1 << 20,
        partition_id: int = 1,
        log: KeptLog | None = None,
    ) -> None:
        self.gates = Gates()
        super().__init__(
            pauses=pauses or self.gates,
            remap=remap,
            failing_calls=failing_calls,
            vma_limit=vma_limit,
            partition_id=partition_id,
            log=log,
        )
