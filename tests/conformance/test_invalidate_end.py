"""`invalidate_end`: of exactly a range that this connection began."""

from __future__ import annotations

import pytest

from conformance.guests import PAGE, PAGES, UADDR, WHOLE_MEMORY, RawVmm, pages
from conformance.statements import needs, statement

pytestmark = needs("notifier")


@statement("N-3")
@pytest.mark.parametrize(
    "fields", [pages(UADDR, PAGES - 1), pages(UADDR + PAGE, PAGES - 1), pages(UADDR, PAGES + 1)]
)
def test_a_range_other_than_that_of_a_begin_is_enoent(vmm: RawVmm, fields: dict[str, object]) -> None:
    notifier = vmm.notifier()
    notifier.ask("invalidate_begin", WHOLE_MEMORY)
    assert notifier.refusal("invalidate_end", fields).name == "ENOENT"
    assert vmm.ask("statistics")["open_invalidations"] == 1


@statement("N-3")
def test_the_begin_of_another_connection_is_enoent(vmm: RawVmm) -> None:
    beginning, ending = vmm.notifier(), vmm.notifier()
    beginning.ask("invalidate_begin", WHOLE_MEMORY)
    assert ending.refusal("invalidate_end", WHOLE_MEMORY).name == "ENOENT"


@statement("N-3")
def test_equal_begins_each_need_their_end(vmm: RawVmm) -> None:
    notifier = vmm.notifier()
    for _ in range(3):
        notifier.ask("invalidate_begin", WHOLE_MEMORY)
    left = []
    for _ in range(3):
        assert notifier.ask("invalidate_end", WHOLE_MEMORY) is None
        left.append(vmm.ask("statistics")["open_invalidations"])
    assert left == [2, 1, 0]
    assert notifier.refusal("invalidate_end", WHOLE_MEMORY).name == "ENOENT"
