"""The file of a snapshot's memory: what of it can be had at once, and what a worker reads."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from intercept_protocol.addresses import PAGE_SIZE
from interceptd.address_space import image_file
from interceptd.address_space.image_file import KEPT_BYTES, Image
from interceptd.config.schema import Limits
from interceptd.connections.closer import Closer
from interceptd.connections.tenants import Tenants

PAGES = 16


@pytest.fixture
def closer() -> Closer:
    limits = Limits()
    return Tenants(lambda: limits).of(0).closer


def filled(descriptor: int) -> int:
    for page in range(PAGES):
        os.write(descriptor, bytes([page + 1]) * PAGE_SIZE)
    os.fsync(descriptor)
    return descriptor


def on_disk(directory: Path) -> int:
    descriptor = filled(os.open(directory / "image", os.O_RDWR | os.O_CREAT, 0o600))
    if not image_file._knows_nowait(descriptor):
        pytest.skip("the file system of the temporary directory does not know RWF_NOWAIT")
    return descriptor


def in_memory() -> int:
    return filled(os.memfd_create("image"))


@pytest.fixture
def open_image(closer: Closer) -> Iterator[Callable[[int], Image]]:
    images: list[Image] = []

    def open_it(descriptor: int) -> Image:
        images.append(Image(descriptor, closer))
        return images[-1]

    yield open_it
    for image in images:
        os.close(image.fileno())


OpenImage = Callable[[int], Image]


def firsts(image: Image, page: int, count: int) -> list[int] | None:
    """The first byte of each of the pages that are at hand."""
    address = image.read_nowait(page, count)
    return None if address is None else list(ctypes.string_at(address, count * PAGE_SIZE)[::PAGE_SIZE])


def test_what_is_in_the_page_cache_can_be_had_at_once(open_image: OpenImage, tmp_path: Path) -> None:
    image = open_image(on_disk(tmp_path))
    assert image.pages == PAGES
    assert firsts(image, 3, 4) == [4, 5, 6, 7]
    assert firsts(image, 5, 1) == [6]
    assert firsts(image, 0, PAGES) == list(range(1, PAGES + 1))


def test_two_images_do_not_take_each_others_bytes(open_image: OpenImage) -> None:
    one = open_image(in_memory())
    other = open_image(os.memfd_create("other"))
    os.write(other.fileno(), b"\xee" * 4 * PAGE_SIZE)
    assert one.resident(0, 4) == other.resident(0, 4) == 4
    assert firsts(one, 0, 4) == [1, 2, 3, 4]
    assert firsts(other, 0, 4) == [0xEE] * 4


def test_what_is_not_there_is_not_waited_for_until_a_worker_has_read_it(
    open_image: OpenImage, tmp_path: Path
) -> None:
    image = open_image(on_disk(tmp_path))
    os.posix_fadvise(image.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    assert firsts(image, 2, 2) is None
    image.keep(image.read(2, 2))
    assert firsts(image, 2, 2) == [3, 4]


def test_a_device_is_not_in_memory_where_its_name_is(
    open_image: OpenImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a device on /dev, which is a tmpfs, as block devices are."""
    descriptor = os.open("/dev/zero", os.O_RDONLY)
    monkeypatch.setattr(image_file, "_IN_MEMORY", frozenset({image_file._file_system(descriptor)}))
    flags: set[int] = set()

    def read(_descriptor: int, _buffers: list[memoryview], _offset: int, how: int) -> int:
        flags.add(how)
        return 0

    monkeypatch.setattr(os, "preadv", read)
    open_image(descriptor).resident(0, 1)
    assert flags == {os.RWF_NOWAIT}


def test_a_file_system_in_memory_is_never_waited_for(open_image: OpenImage) -> None:
    image = open_image(in_memory())
    assert firsts(image, 0, PAGES) == list(range(1, PAGES + 1))
    assert image.kept_limit == 0


def test_where_the_page_cache_cannot_be_asked_what_was_read_is_kept_for_a_while(
    open_image: OpenImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_file, "_IN_MEMORY", frozenset())
    image = open_image(in_memory())
    assert firsts(image, 2, 2) is None
    image.keep(image.read(2, 4))
    assert firsts(image, 3, 3) == [4, 5, 6]
    assert firsts(image, 3, 4) is None
    most = KEPT_BYTES // PAGE_SIZE // PAGES
    for _ in range(most):
        image.keep(image.read(0, PAGES))
    assert image._kept is not None
    assert len(image._kept) == most


def test_bytes_apart_outlive_the_next_read(open_image: OpenImage) -> None:
    image = open_image(in_memory())
    apart = image.read_apart(1, 2)
    assert apart is not None
    assert firsts(image, 8, 2) == [9, 10]
    assert list(ctypes.string_at(apart.address, 2 * PAGE_SIZE)[::PAGE_SIZE]) == [2, 3]


def test_a_file_that_has_become_shorter_is_an_error_and_never_zeroes(open_image: OpenImage) -> None:
    image = open_image(in_memory())
    os.truncate(image.fileno(), 4 * PAGE_SIZE)
    assert firsts(image, 2, 4) is None
    assert image.resident(2, 4) == 2
    with pytest.raises(OSError, match="ends before page") as caught:
        image.read(2, 4)
    assert caught.value.errno == errno.EIO
