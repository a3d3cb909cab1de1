"""The control methods as rules of a state machine: the daemon and the plain partition get the same requests.

Owns the rules and the comparison. One caller at a time: what happens at once is the schedules'.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from fakes.raw_client import Refused
from fakes.raw_vmm import RawVmm
from fuzz.plain_partition import PlainPartition, R, Refusal, W, X

SHIFT = 12
SPACE = 12
"""Pages, and gfns, that are drawn: few, so that they meet."""
HIGH = (1 << 52) - SPACE // 2
"""The last pages of the address space: ranges from here wrap."""
WAIT_MS = 1
"""How long an intercept waits for what will not end meanwhile."""

starts = st.sampled_from([*range(SPACE)] * 4 + [HIGH, HIGH + SPACE // 2 - 1])
counts = st.sampled_from([*range(1, SPACE)] * 3 + [0, SPACE])
kinds = st.sampled_from(["mmio", "movable", "pinned", "auto"])
flags = st.booleans()
accesses = st.sampled_from([0, 1, 2])
"""As the intercept message has them: read, write, execute."""


Asked = tuple[int, int, int, str, bool, bool]
"""A region that was asked for: gfn, count, page, kind, writable, executable."""


class ControlMethods(RuleBasedStateMachine):
    """`socket` is set by who runs it: a daemon that serves there."""

    socket: str
    regions = Bundle("regions")
    begun = Bundle("begun")

    @initialize(granularity=st.sampled_from(["vma", "page"]), remap=st.sampled_from(["replace", "error"]))
    def connect(self, granularity: str, remap: str) -> None:
        self.vmm = RawVmm(
            self.socket, mmio_granularity=granularity, remap=remap, invalidate_timeout_ms=WAIT_MS
        )
        self.vp, self.notifier = self.vmm.vp(), self.vmm.notifier()
        self.plain = PlainPartition(granularity)
        self.pfn = 0
        self.map_vma(0, SPACE, readable=True, writable=True, executable=False, io=True)
        self.add_region(0, SPACE // 2, 2, "mmio", writable=True, executable=True)

    def teardown(self) -> None:
        if hasattr(self, "vmm"):
            self.vmm.close()

    # ------------------------------------------------ rules

    @rule(start=starts, count=counts, readable=flags, writable=flags, executable=flags, io=flags)
    def map_vma(
        self, start: int, count: int, *, readable: bool, writable: bool, executable: bool, io: bool
    ) -> None:
        self.pfn += 1000
        access = readable * R | writable * W | executable * X
        self.same(
            lambda: self.plain.map_vma(range(start, start + count), self.pfn, access, io=io),
            lambda: self.vmm.ask(
                "map_vma", start_uaddr=start << SHIFT, page_count=count, start_pfn=self.pfn,
                readable=readable, writable=writable, executable=executable, io=io,
            ),
        )  # fmt: skip

    @rule(vmas=st.lists(st.tuples(starts, counts, flags, flags, flags, flags), max_size=3))
    def map_vmas(self, vmas: list[tuple[int, int, bool, bool, bool, bool]]) -> None:
        plain, fields = [], []
        for start, count, readable, writable, executable, io in vmas:
            self.pfn += 1000
            access = readable * R | writable * W | executable * X
            plain.append((range(start, start + count), self.pfn, access, io))
            fields.append(
                {
                    "start_uaddr": start << SHIFT, "page_count": count, "start_pfn": self.pfn,
                    "readable": readable, "writable": writable, "executable": executable, "io": io,
                }
            )  # fmt: skip
        self.same(lambda: self.plain.map_vmas(plain), lambda: self.vmm.ask("map_vmas", vmas=fields))

    @rule(start=starts, count=counts)
    def unmap_vma(self, start: int, count: int) -> None:
        self.same(
            lambda: self.plain.unmap_vma(range(start, start + count)),
            lambda: self.vmm.ask("unmap_vma", start_uaddr=start << SHIFT, page_count=count),
        )

    @rule(start=starts, count=counts, readable=flags, writable=flags, executable=flags)
    def protect_vma(
        self, start: int, count: int, *, readable: bool, writable: bool, executable: bool
    ) -> None:
        access = readable * R | writable * W | executable * X
        self.same(
            lambda: self.plain.protect_vma(range(start, start + count), access),
            lambda: self.vmm.ask(
                "protect_vma", start_uaddr=start << SHIFT, page_count=count,
                readable=readable, writable=writable, executable=executable,
            ),
        )  # fmt: skip

    @rule(target=regions, gfn=starts, count=counts, page=starts, kind=kinds, writable=flags, executable=flags)
    def add_region(
        self, gfn: int, count: int, page: int, kind: str, *, writable: bool, executable: bool
    ) -> Asked:
        self.same(
            lambda: {
                "kind": self.plain.add_region(
                    range(gfn, gfn + count), page, kind, R | writable * W | executable * X
                )
            },
            lambda: self.vmm.ask(
                "add_region", start_gfn=gfn, page_count=count, start_uaddr=page << SHIFT,
                kind=kind, writable=writable, executable=executable,
            ),
        )  # fmt: skip
        return gfn, count, page, kind, writable, executable

    @rule(region=regions, more=st.sampled_from([0, 0, 0, 1]), aside=st.sampled_from([0, 0, 0, 1]))
    def remove_region(self, region: Asked, more: int, aside: int) -> None:
        gfn, count, page = region[0], region[1] + more, region[2] ^ aside
        self.same(
            lambda: self.plain.remove_region(range(gfn, gfn + count), page),
            lambda: self.vmm.ask("remove_region", start_gfn=gfn, page_count=count, start_uaddr=page << SHIFT),
        )

    @rule(gfn=starts, count=counts)
    def prefault(self, gfn: int, count: int) -> None:
        self.same(
            lambda: self.plain.prefault(range(gfn, gfn + count)),
            lambda: self.prefaulted(gfn, count),
        )

    def prefaulted(self, gfn: int, count: int) -> dict[str, int]:
        """In as many requests as it takes: the machine's speed decides how far one comes."""
        done, mapped = 0, 0
        while not done or done < count:
            reply = self.vmm.ask("prefault", start_gfn=gfn + done, page_count=count - done)
            done, mapped = done + reply["page_count"], mapped + reply["mapped_gfns"]
        return {"page_count": done, "mapped_gfns": mapped}

    @rule(
        target=regions,
        removed=st.lists(st.tuples(regions, st.sampled_from([0, 0, 0, 0, 0, 1])), max_size=3),
        added=st.lists(st.tuples(starts, counts, starts, kinds, flags, flags), max_size=3),
        shrunk=st.sampled_from([None, 0, 1]),
        read_only=st.sampled_from([False, False, True]),
    )
    def change_regions(
        self, removed: list[tuple[Asked, int]], added: list[Asked], shrunk: int | None, *, read_only: bool
    ) -> Any:
        """Unless `shrunk` is None, those that are removed come again, so many pages smaller, or read-only."""
        remove = [(region[0], region[1] + more, region[2]) for region, more in removed]
        if shrunk is not None:
            added = [
                (gfn, count - shrunk, page, kind, writable and not read_only, executable)
                for (gfn, count, page, kind, writable, executable), _ in removed
            ]
        self.same(
            lambda: {
                "kinds": self.plain.change_regions(
                    [(range(gfn, gfn + count), page) for gfn, count, page in remove],
                    [
                        (range(gfn, gfn + count), page, kind, R | writable * W | executable * X)
                        for gfn, count, page, kind, writable, executable in added
                    ],
                )
            },
            lambda: self.vmm.ask(
                "change_regions",
                remove=[
                    {"start_gfn": gfn, "page_count": count, "start_uaddr": page << SHIFT}
                    for gfn, count, page in remove
                ],
                add=[
                    {"start_gfn": gfn, "page_count": count, "start_uaddr": page << SHIFT,
                     "kind": kind, "writable": writable, "executable": executable}
                    for gfn, count, page, kind, writable, executable in added
                ],
            ),
        )  # fmt: skip
        self.intercept(1 << 40, 0, 1)  # whether what stays mapped is still the same mapping is not specified
        return multiple(*added)

    @rule(granularity=st.sampled_from(["vma", "page"]))
    def set_policy(self, granularity: str) -> None:
        self.plain.granularity = granularity
        assert self.vmm.ask("set_policy", mmio_granularity=granularity) is None

    @rule(start=starts, count=counts)
    def invalidate(self, start: int, count: int) -> None:
        self.notify("invalidate", range(start, start + count), self.plain.invalidate)

    @rule(target=begun, start=starts, count=counts)
    def begin(self, start: int, count: int) -> range:
        self.notify("invalidate_begin", range(start, start + count), self.plain.begin)
        return range(start, start + count)

    @rule(pages=consumes(begun))
    def end(self, pages: range) -> None:
        self.notify("invalidate_end", pages, self.plain.end)

    @rule(gfn=st.integers(0, SPACE), access=accesses, times=st.sampled_from([1, 1, 1, 1, 18]))
    def intercept(self, gfn: int, access: int, times: int) -> None:
        for _ in range(times):
            expected = list(self.plain.intercept(gfn, 1 << access))
            assert self.vp.intercept(gfn, access) == expected

    # ------------------------------------------------ what is the same then

    @invariant()
    def the_guest_reaches_the_same(self) -> None:
        if not hasattr(self, "vmm"):
            return
        for gfn in range(SPACE):
            held = self.plain.reached.get(gfn)
            expected = None
            if held is not None:
                expected = {"frame": ["host", held[0]], "pfn": held[0], "access": held[1]}
            assert self.vmm.ask("translate", gfn=gfn) == expected

    @invariant()
    def the_lists_are_the_same(self) -> None:
        """Page by page: how neighbours are joined is the daemon's affair."""
        if not hasattr(self, "vmm"):
            return
        regions = self.vmm.ask("list_regions")["regions"]
        areas = sorted(self.plain.areas, key=lambda area: area.gfn)
        assert [
            (each["start_gfn"], each["page_count"], each["start_uaddr"], each["kind"]) for each in regions
        ] == [(area.gfn, area.page_count, area.page << SHIFT, area.kind) for area in areas]
        assert [each["mapped_gfns"] for each in regions] == [
            len(self.plain.reached.keys() & set(area.gfns)) for area in areas
        ]
        assert [each["state"] == "dangling" for each in regions] == [area.dangling for area in areas]
        mapped = {
            each["start_gfn"] + n: (each["frame"][1] + n, each["access"])
            for each in self.vmm.ask("list_mappings")["mappings"]
            for n in range(each["page_count"])
        }
        assert mapped == self.plain.reached
        declared = {
            (each["start_uaddr"] >> SHIFT) + n: (each["start_pfn"] + n, each["io"])
            for each in self.vmm.ask("list_vmas")["vmas"]
            for n in range(each["page_count"])
        }
        assert declared == {page: (held.pfn, held.io) for page, held in self.plain.memory.items()}

    @invariant()
    def the_counts_are_the_same(self) -> None:
        if not hasattr(self, "vmm"):
            return
        counted = self.vmm.ask("statistics")
        movable = {gfn for area in self.plain.areas if area.kind == "movable" for gfn in area.gfns}
        assert counted["regions"] == len(self.plain.areas)
        assert counted["mapped_gfns"] == len(self.plain.reached)
        assert counted["no_access_gfns"] == len(movable - self.plain.reached.keys())
        assert counted["restarts"] == 0
        assert counted["open_invalidations"] == self.plain.opened.total()

    def notify(self, method: str, pages: range, plainly: Callable[[range], None]) -> None:
        fields = {"start_uaddr": pages.start << SHIFT, "length": len(pages) << SHIFT}
        self.same(lambda: plainly(pages), lambda: self.notifier.ask(method, fields))

    @staticmethod
    def same(plainly: Callable[[], Any], really: Callable[[], Any]) -> None:
        """Both answer the same, or refuse with the same number."""
        try:
            expected: Any = plainly()
        except Refusal as refusal:
            expected = str(refusal)
        try:
            answered: Any = really()
        except Refused as refused:
            answered = refused.refusal.name
        assert answered == expected
