"""Carries out the verbs of a VMM and its threads, and records each in the truth as it is answered.

Owns what each verb makes true, and when. Must not know who goes next.
"""

from __future__ import annotations

import trio

from . import script
from .judge import Judge
from .script import Verb
from .system_under_test import Subject


class Verbs:
    """`kicked_at` is when each VP was kicked last, `out` is set by each VP that has no intercept to come."""

    def __init__(self, subject: Subject, judge: Judge, vps: int) -> None:
        self.kicked_at: dict[int, float] = {}
        self.out = [trio.Event() for _ in range(vps)]
        self._subject = subject
        self._judge = judge

    async def carry_out(self, verb: Verb) -> None:
        """Until it is answered. Raises `WireError` where it is refused."""
        truth, subject = self._judge.truth, self._subject
        match verb:
            case script.MapVma():
                await subject.map_vma(verb)
                truth.mapped(verb.pages, verb.pfn, verb.access)
            case script.LendVp(vp, memory):
                subject.lend_vp(vp, memory)
            case script.UnmapVma(pages):
                with truth.motion(pages), _Announcing(self._judge):
                    await subject.unmap_vma(pages)
                    truth.unmapped(pages)
            case script.ProtectVma(pages, access):
                with truth.motion(pages), _Announcing(self._judge):
                    await subject.protect_vma(verb)
                    truth.protected(pages, access)
            case script.AddRegion() | script.RemoveRegion() | script.ChangeRegions():
                await self._edit_regions(verb)
            case script.Begin(pages):
                with truth.motion(pages), _Announcing(self._judge):
                    await subject.begin(pages)
                    truth.closed(pages)
            case script.MapFixed(pages, pfn):
                subject.map_fixed(verb)
                truth.unmapped(pages)
                truth.mapped(pages, pfn, script.RW)
            case script.End(pages):
                truth.opened(pages)
                subject.end(pages)
            case script.Invalidate(pages):
                with truth.motion(pages), _Announcing(self._judge):
                    await subject.invalidate(pages)
            case script.Kick(vp):
                self.kicked_at[vp] = trio.current_time()
                subject.kick(vp)
            case script.AwaitVp(vp):
                await self.out[vp].wait()
            case script.Die():
                raise AssertionError("the dead do nothing")

    async def _edit_regions(
        self, verb: script.AddRegion | script.RemoveRegion | script.ChangeRegions
    ) -> None:
        truth, subject = self._judge.truth, self._subject
        match verb:
            case script.AddRegion(bar):
                with truth.doubt(bar):
                    await subject.add_region(bar)
                    truth.added(bar)
            case script.RemoveRegion(bar):
                with truth.doubt(bar):
                    await subject.remove_region(bar)
                    truth.removed(bar)
            case script.ChangeRegions(remove, add):
                with truth.change(remove, add):
                    await subject.change_regions(remove, add)


class _Announcing:
    """From a verb that announces an invalidation to its answer."""

    __slots__ = ("_judge",)

    def __init__(self, judge: Judge) -> None:
        self._judge = judge

    def __enter__(self) -> None:
        self._judge.announced(self)

    def __exit__(self, *_: object) -> None:
        self._judge.acknowledged(self)
