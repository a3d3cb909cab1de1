"""A VMM's hand-off: every form of Firecracker's is read, in any pieces; all else is refused by name."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from intercept_protocol.handoff import BYTES_LIMIT, REGIONS_LIMIT, Handoff, HandoffRegion, Refused, parse

HUGE = 2 << 20
BASE = 140469103230976
SIZE = 134217728


def text_of(*regions: dict[str, object]) -> bytes:
    return json.dumps(regions, separators=(",", ":")).encode()


def region(base: int = BASE, size: float = SIZE, offset: int = 0, /, **others: object) -> dict[str, object]:
    return {"base_host_virt_addr": base, "size": size, "offset": offset, **others}


def read(base: int = BASE, size: int = SIZE, offset: int = 0, page_size: int = 4096) -> HandoffRegion:
    return HandoffRegion(base_host_virt_addr=base, size=size, offset=offset, page_size=page_size)


def why_refused(data: bytes) -> str:
    with pytest.raises(Refused) as caught:
        parse(data)
    why = str(caught.value)
    assert why.isprintable()
    assert len(why) < 300
    return why


# ------------------------------------------------ what Firecracker sends


def test_list_of_today_literally() -> None:
    sent = (
        b'[{"base_host_virt_addr":140469103230976,"size":134217728,"offset":0,'
        b'"page_size":4096,"page_size_kib":4096}]'
    )
    assert parse(sent) == Handoff(regions=[read()])


@pytest.mark.parametrize(
    ("sizes", "page_size"),
    [
        ({}, 4096),
        ({"page_size_kib": HUGE}, HUGE),
        ({"page_size": HUGE}, HUGE),
        ({"page_size": HUGE, "page_size_kib": HUGE}, HUGE),
        ({"page_size": HUGE, "page_size_kib": 2048}, HUGE),
    ],
    ids=["1.1", "1.7", "2.0", "1.12", "a misnomer put right"],
)
def test_page_size_of_every_release(sizes: dict[str, object], page_size: int) -> None:
    base = BASE & -HUGE
    assert parse(text_of(region(base, **sizes))) == Handoff(regions=[read(base, page_size=page_size)])


def test_unknown_fields_and_any_order_are_taken() -> None:
    sent = b'[{"later":{"deep":[1.5,null,{"a":1e9}]},"offset":0,"slot":"\xc3\xa4","size":4096,' + (
        b'"base_host_virt_addr":8192}]\n'
    )
    assert parse(sent) == Handoff(regions=[read(8192, 4096)])


def test_second_region_may_lie_below_the_first_and_the_order_stays() -> None:
    handoff = parse(text_of(region(1 << 40, 0x2000), region(1 << 30, 0x1000, 0x2000)))
    assert handoff == Handoff(regions=[read(1 << 40, 0x2000), read(1 << 30, 0x1000, 0x2000)])
    assert handoff.size == 0x3000


def test_last_page_of_the_address_space_is_no_wrap() -> None:
    last = (1 << 64) - 4096
    assert parse(text_of(region(last, 4096, last))) == Handoff(regions=[read(last, 4096, last)])


# ------------------------------------------------ pieces


def test_more_bytes_are_needed_until_the_list_is_whole() -> None:
    whole = text_of(region(note="]", more=[1.5]), region(BASE + SIZE, SIZE, SIZE))
    assert [size for size in range(len(whole) + 1) if parse(whole[:size]) is not None] == [len(whole)]


# ------------------------------------------------ what others send


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b'{"type":0,"regions":[]}', "nydus's"),
        (b"DFFU" + bytes(16), "Firecracker's binary"),
        (b'\x5b\x00\x00\x00{"type":"handoff"', "Cloud Hypervisor's hand-off in JSON"),
        (b'\x0a\x00\x01\x00{"type":"handoff"', "Cloud Hypervisor's hand-off in JSON"),
        (b"\x0a\x00\x01\x00\x04\x01\x01\x00", "Cloud Hypervisor's binary"),
        (b"GET / HTTP/1.1", "47 45 54 20 2f"),
        (bytes(5), "00 00 00 00 00"),
    ],
)
def test_other_hand_offs_are_told_by_their_first_bytes(data: bytes, name: str) -> None:
    assert name in why_refused(data)
    assert name in why_refused(data[:5])
    assert all(parse(data[:size]) is None for size in range(5))


# ------------------------------------------------ what nobody may send


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"[    ]", "Expected `array` of length >= 1"),
        (text_of(*(region(i << 12, 4096, i << 12) for i in range(REGIONS_LIMIT + 1))), f"<= {REGIONS_LIMIT}"),
        (b"[1, 2]", "Expected `object`, got `int`"),
        (b'[{"size":4096}]', "missing required field `base_host_virt_addr`"),
        (text_of(region(BASE, 0)), "Expected `int` >= 1 - at `$[0].size`"),
        (text_of(region(-4096)), "Expected `int` >= 0 - at `$[0].base_host_virt_addr`"),
        (text_of(region(BASE, SIZE, -4096)), "Expected `int` >= 0 - at `$[0].offset`"),
        (text_of(region(), {**region(), "size": True}), "got `bool` - at `$[1].size`"),
        (text_of({**region(), "size": 4096.0}), "got `float` - at `$[0].size`"),
        (text_of({**region(), "size": "4096"}), "got `str` - at `$[0].size`"),
        (text_of(region(BASE, float("nan"))), "malformed: invalid character"),
        (text_of(region(page_size=None, other=float("inf"))), "malformed: invalid character"),
        (text_of(region(page_size=0)), "region 0 has neither pages of 4096 bytes"),
        (text_of(region())[:-2] + b',"size":8192}]', "a field is there twice"),
        (text_of(region())[:-2] + b',"\\u0073ize":8192}]', "a field is there twice"),
        (text_of(region())[:-2] + b',"later":{"a":1,"a":2}}]', "a field is there twice"),
        (text_of(region())[:-2] + b',"later":"\xff"}]', "codec can't decode"),
        (text_of(region()) + b"[]", "trailing characters"),
        (text_of(region()) + b"\0]", "trailing characters"),
        (b'[{"later":' + b"[" * 20000 + b"]", "too deeply nested"),
        (text_of(region(), region(BASE + SIZE, SIZE, SIZE, page_size=HUGE)), "pages of different sizes"),
        (text_of(region(page_size=65536)), "region 0 has neither pages of 4096 bytes nor of 2 MiB"),
        (text_of(region(page_size=1 << 30)), "region 0 has neither pages"),
        (text_of(region(BASE + 1)), "region 0: base_host_virt_addr is no multiple of its page size, 4096"),
        (text_of(region(BASE, 4097)), "region 0: size is no multiple"),
        (text_of(region(), region(BASE + SIZE, SIZE, SIZE + 512)), "region 1: offset is no multiple"),
        (text_of(region(0, HUGE + 4096, page_size=HUGE)), f"size is no multiple of its page size, {HUGE}"),
        (text_of(region(), region(BASE + SIZE - 4096, SIZE, SIZE)), "overlap, by their base_host_virt_addr"),
        (text_of(region(), region(BASE + SIZE, SIZE, SIZE - 4096)), "two regions overlap, by their offset"),
        (text_of(region(), region()), "two regions overlap"),
        (text_of(region((1 << 64) - 4096, 8192)), "beyond 2^64, by its base_host_virt_addr"),
        (text_of(region(1 << 64, 4096)), "beyond 2^64, by its base_host_virt_addr"),
        (text_of(region(BASE, SIZE, (1 << 64) - 4096)), "beyond 2^64, by its offset"),
        (text_of(region(BASE, SIZE, 10**400 * 4096)), "beyond 2^64, by its offset"),
        (b'[{"size":1' + b"0" * 5000 + b"}]", "Integer value out of range"),
        (b"[" + b" " * BYTES_LIMIT, f"more than {BYTES_LIMIT} bytes"),
    ],
)  # fmt: skip
def test_refusal_names_its_cause(data: bytes, why: str) -> None:
    assert why in why_refused(data)


def test_list_as_long_as_the_limit_is_taken_and_longer_is_not() -> None:
    padded = text_of(region())[:-1].ljust(BYTES_LIMIT - 1) + b"]"
    assert parse(padded) == Handoff(regions=[read()])
    assert why_refused(padded + b" ") == f"more than {BYTES_LIMIT} bytes"


# ------------------------------------------------ the image


def test_regions_are_the_whole_image_or_refused_with_both_sizes() -> None:
    handoff = Handoff(regions=[read(1 << 40, 0x2000, 0x1000), read(1 << 30, 0x1000, 0)])
    handoff.check_image(0x3000)
    for image_size in (0x2000, 0x4000):
        with pytest.raises(Refused, match=f"have {0x3000} bytes, and the image has {image_size}"):
            handoff.check_image(image_size)
    with pytest.raises(Refused, match="region 1 ends beyond the image of 12288 bytes"):
        Handoff(regions=[read(1 << 40, 0x2000), read(1 << 30, 0x1000, 0x3000)]).check_image(0x3000)


# ------------------------------------------------ any regions


@st.composite
def drawn_regions(draw: st.DrawFn) -> list[HandoffRegion]:
    """Few pages, so that regions meet; misaligned ones too."""
    return [
        HandoffRegion(
            base_host_virt_addr=draw(st.integers(0, 6)) * 4096,
            size=draw(st.integers(1, 6)) * 4096,
            offset=draw(st.integers(0, 6)) * 4096,
            page_size=draw(st.sampled_from([4096] * 9 + [HUGE])),
        )
        for _ in range(draw(st.integers(1, 3)))
    ]


def pages(regions: list[HandoffRegion], field: str) -> Iterator[int]:
    for each in regions:
        start = getattr(each, field)
        yield from range(start, start + each.size, 4096)


@given(drawn_regions())
def test_exactly_the_aligned_regions_that_share_no_page_are_taken(regions: list[HandoffRegion]) -> None:
    aligned = all(each.page_size == 4096 for each in regions)
    taken = [list(pages(regions, field)) for field in ("base_host_virt_addr", "offset")]
    good = aligned and all(len(each) == len(set(each)) for each in taken)
    sent = text_of(*({name: getattr(each, name) for name in each.__struct_fields__} for each in regions))
    if good:
        assert parse(sent) == Handoff(regions=regions)
    else:
        assert why_refused(sent)
