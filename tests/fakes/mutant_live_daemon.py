"""A mutant daemon: the real command with one safeguard of live memory removed, for tests that must detect it.

Owns the mutants. Comparison is off, or it would revoke what they leave mapped. The first argument names the
mutant, the rest go to `interceptd`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Final

import trio

from fakes.mutant_daemon import without_staleness_check
from intercept_protocol.addresses import UaddrRange
from interceptd.address_space import Unresolved, process
from interceptd.address_space.attachment import Attachment
from interceptd.address_space.comparison import Comparison
from interceptd.address_space.refusals import Cause
from interceptd.address_space.userfaultfd import Userfaultfd
from interceptd.cli import main
from interceptd.memory.region_manager import RegionManager

SERVED_LATER_SECONDS: Final = 0.005


def without_second_registration() -> None:
    """A range that was registered once counts as watched forever, even after other memory replaced it."""
    register, registered = Userfaultfd.register, set[UaddrRange]()

    def register_once(self: Userfaultfd, uaddrs: UaddrRange) -> None:
        if uaddrs not in registered:
            register(self, uaddrs)
            registered.add(uaddrs)

    Userfaultfd.register = register_once  # type: ignore[method-assign]


def without_second_look() -> None:
    """What was found before registration is used without looking again."""

    def look(
        attachment: Attachment, page: int, window: UaddrRange, region: UaddrRange
    ) -> process.Found | Unresolved:
        vma = attachment.maps.vma_at(page)
        assert attachment.userfaultfd is not None
        if vma is None:
            return Unresolved(Cause.NO_VMA)
        refusal = process._register(attachment.userfaultfd, process._overlap(vma, region))
        return refusal or process.Found(vma, process._overlap(vma, window), watched=True)

    process._lookup = look


def without_comparison() -> None:
    """Nothing finds stale mappings later."""

    async def nothing(self: Comparison) -> None:  # noqa: ARG001 - a method
        await trio.lowlevel.checkpoint()

    Comparison.round = nothing  # type: ignore[method-assign]
    Comparison.catch_up = nothing  # type: ignore[method-assign]


def slow_to_serve() -> None:
    """No safeguard is removed: notifications are served a little later, as on a busy machine."""
    serve_pending = RegionManager.serve_pending

    async def serve_later(self: RegionManager) -> None:
        await trio.sleep(SERVED_LATER_SECONDS)
        await serve_pending(self)

    RegionManager.serve_pending = serve_later  # type: ignore[method-assign]


MUTANTS: Final[Mapping[str, Callable[[], None]]] = {
    "without-second-registration": without_second_registration,
    "without-second-look": without_second_look,
    "without-staleness-check": without_staleness_check,
    "slow-to-serve": slow_to_serve,
}


def launch(what: str) -> tuple[str, ...]:
    """The command of a mutant; run with `puppet.ENVIRONMENT`."""
    return sys.executable, "-m", "fakes.mutant_live_daemon", what


if __name__ == "__main__":
    MUTANTS[sys.argv.pop(1)]()
    without_comparison()
    main()
