"""How a VMM that restores a snapshot hands over its guest's memory: Firecracker's list of regions, sans I/O.

Owns that list, its bounds, and the names of the hand-offs that others send. Must not know the userfaultfd
that comes with it, nor how many descriptors come: some forks send more.

The text has no length and no end of its own: it is whole once it is one JSON array.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from operator import attrgetter
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from .text import visible

BYTES_LIMIT: Final = 64 << 10
"""A region takes some 110 bytes, and Firecracker has three at most."""
REGIONS_LIMIT: Final = 256
PAGE_SIZES: Final = (4096, 2 << 20)
_ADDRESS_LIMIT: Final = 1 << 64
_SNIFFED: Final = 5
"""Bytes that tell the known hand-offs apart."""


class Refused(Exception):
    """What the VMM sent is no hand-off that can be served; the text says why, in one short line."""


class HandoffRegion(msgspec.Struct, frozen=True, kw_only=True):
    """A part of the guest's memory: `size` bytes at `base_host_virt_addr` of the VMM, whose content is at
    `offset` of the image. All four are in bytes, and the others multiples of `page_size`."""

    base_host_virt_addr: int
    size: int
    offset: int
    page_size: int


class Handoff(msgspec.Struct, frozen=True, kw_only=True):
    """`regions`, at least one, have pages of one size, and overlap neither in the VMM nor in the image; their
    order is the VMM's."""

    regions: list[HandoffRegion]

    @property
    def size(self) -> int:
        """Of all regions, in bytes."""
        return sum(region.size for region in self.regions)

    def check_image(self, image_size: int) -> None:
        """Raise `Refused` unless the regions are the whole image, of that many bytes."""
        if self.size != image_size:
            raise Refused(f"the regions have {self.size} bytes, and the image has {image_size}")
        for index, region in enumerate(self.regions):
            if region.offset + region.size > image_size:
                raise Refused(f"region {index} ends beyond the image of {image_size} bytes")


class _SentRegion(msgspec.Struct, frozen=True):
    """A region as Firecracker sends it; later versions may add fields."""

    base_host_virt_addr: Annotated[int, Meta(ge=0)]
    size: Annotated[int, Meta(ge=1)]
    offset: Annotated[int, Meta(ge=0)]
    page_size: int | None = None
    """From 1.12 on."""
    page_size_kib: int | None = None
    """From 1.7 on, and in bytes in spite of its name."""

    def read(self) -> HandoffRegion:
        size = self.page_size if self.page_size is not None else self.page_size_kib
        return HandoffRegion(
            base_host_virt_addr=self.base_host_virt_addr,
            size=self.size,
            offset=self.offset,
            page_size=size if size is not None else PAGE_SIZES[0],
        )


_DECODER: Final = msgspec.json.Decoder(
    Annotated[list[_SentRegion], Meta(min_length=1, max_length=REGIONS_LIMIT)]
)


def parse(data: bytes) -> Handoff | None:
    """The hand-off in `data`, all that was received so far; None if more bytes are needed.

    Raises `Refused`. More bytes never turn a refusal into a hand-off.
    """
    if len(data) < _SNIFFED:
        return None
    if (other := _other_dialect(data)) is not None:
        raise Refused(other)
    if len(data) > BYTES_LIMIT:
        raise Refused(f"more than {BYTES_LIMIT} bytes")
    if not data.rstrip().endswith(b"]"):
        return None
    try:
        sent = _DECODER.decode(data)
        json.loads(data.decode(), object_pairs_hook=_without_repetition, parse_int=str)
    except msgspec.DecodeError as error:
        if str(error) == "Input data was truncated":
            return None
        raise Refused(f"no list of regions: {visible(str(error))[:200]}") from None
    except RecursionError:
        raise Refused("no list of regions: too deeply nested") from None
    except ValueError as error:
        raise Refused(f"no list of regions: {visible(str(error))[:200]}") from None
    handoff = Handoff(regions=[region.read() for region in sent])
    _check(handoff.regions)
    return handoff


def _other_dialect(data: bytes) -> str | None:
    """Why this is not Firecracker's list, told by the first bytes; None if it may be that."""
    length = int.from_bytes(data[:4], "little")
    if data[4:5] == b"{" and length < 1 << 20:
        return "Cloud Hypervisor's hand-off in JSON is not supported"
    if data.startswith(b"\x0a\x00\x01\x00"):
        return "Cloud Hypervisor's binary hand-off is not supported"
    if data.startswith(b"DFFU"):
        return "Firecracker's binary hand-off is not supported"
    if data.startswith(b"{"):
        return "nydus's hand-off is not supported"
    if not data.startswith(b"["):
        return f"no known hand-off starts with the bytes {data[:_SNIFFED].hex(' ')}"
    return None


def _without_repetition(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """For `json`: which of two fields of one name is meant, nobody can say. msgspec takes the last."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("a field is there twice")
    return fields


def _check(regions: Sequence[HandoffRegion]) -> None:
    if len({region.page_size for region in regions}) > 1:
        raise Refused("its regions have pages of different sizes")
    for index, region in enumerate(regions):
        if region.page_size not in PAGE_SIZES:
            raise Refused(f"region {index} has neither pages of 4096 bytes nor of 2 MiB")
        for name in ("base_host_virt_addr", "size", "offset"):
            if getattr(region, name) % region.page_size:
                raise Refused(f"region {index}: {name} is no multiple of its page size, {region.page_size}")
    for name in ("base_host_virt_addr", "offset"):
        start = attrgetter(name)
        in_order = sorted(regions, key=start)
        if start(in_order[-1]) + in_order[-1].size > _ADDRESS_LIMIT:
            raise Refused(f"a region ends beyond 2^64, by its {name}")
        if any(start(one) + one.size > start(other) for one, other in pairwise(in_order)):
            raise Refused(f"two regions overlap, by their {name}")
