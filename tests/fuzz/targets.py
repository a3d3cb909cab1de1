"""What bytes from outside can come to, a function each: it returns, or raises what must not be.

Owns the statements that hold for any bytes: which errors there may be, and that two ways to read the same
bytes agree. Must not know where the bytes come from: a fuzzer, or the corpus.
"""

from __future__ import annotations

import errno
import json
import os
import re
import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

import msgpack

from fakes.procmaps_parsed import asking_by_parsing
from intercept_protocol import codec, messages, rpc
from intercept_protocol import working_set as working_sets
from intercept_protocol._frames import MESSAGE_LIMIT, FrameScanner
from intercept_protocol._intercept_codec import InterceptCodec, encode_answer
from intercept_protocol.addresses import PAGE_LIMIT, PAGE_SHIFT
from intercept_protocol.errors import EncodedError, ProtocolViolation, WireError
from intercept_protocol.handoff import PAGE_SIZES, Handoff, Refused, parse
from intercept_protocol.hv_message import MESSAGE_SIZE, InterceptMessage, MessageType, memory_access
from intercept_protocol.messages import Architecture
from intercept_protocol.outcomes import Access, Answer
from intercept_protocol.recording import Chunk, RecordingError, RecordingReader
from interceptd.address_space.procmaps import ProcMaps
from interceptd.address_space.smaps import parse_records
from interceptd.address_space.userfaultfd import parse_events
from interceptd.config.sources import ConfigError, load_config
from interceptd.hypervisor.remote import refusal

KEPT = Path(__file__).with_name("corpus")
"""A directory a target: inputs that reach what others do not, and those that once broke it."""
ERROR_BYTES = 4096
"""The maximum length of our error messages, including quotations: far below the limit of a message."""
METHODS: tuple[Mapping[str, type], ...] = (
    messages.VMM_METHODS,
    messages.NOTIFIER_METHODS,
    messages.HYPERVISOR_METHODS,
    messages.OPERATOR_METHODS,
)
_ASKED: tuple[messages.HypervisorCall, ...] = (
    messages.UnmapGpa(start_gfn=0, page_count=1),
    messages.UnmapGpas(pieces=[messages.UnmapGpa(start_gfn=gfn, page_count=1) for gfn in (0, 2)]),
)
_KINDS = {rpc.REQUEST, rpc.RESPONSE, rpc.NOTIFICATION}


def frames(data: bytes) -> None:
    """The scan ends where msgpack ends, or refuses; in one piece, byte by byte, and in steps alike."""
    whole = _scanned([data])
    assert whole == _scanned(data[:size] for size in range(len(data) + 1))
    if whole != "refused":
        unpacker = msgpack.Unpacker(max_buffer_size=len(data) or 1, strict_map_key=False)
        unpacker.feed(data)
        try:
            unpacker.skip()
            end: int | None = unpacker.tell()
        except msgpack.OutOfData:
            end = None
        assert whole == end, (whole, end)
        if end is not None:
            assert _read_in_steps(data) == end


def receiver(data: bytes) -> None:
    """The messages are the same however the bytes are cut, with the short cut of small requests or not."""
    for accepts in ({rpc.REQUEST}, {rpc.RESPONSE}, _KINDS):
        at_once = list(_received(accepts, [data]))
        byte_by_byte = list(_received(accepts, [data[i : i + 1] for i in range(len(data))]))
        assert repr(at_once) == repr(byte_by_byte)  # as it is written, because one NaN is not another
        followed = list(_received(accepts, [data + b"\x94"]))
        assert repr(at_once[:-1]) == repr(followed[: len(at_once) - 1])
        for message in at_once:
            if isinstance(message, rpc.Request):
                assert rpc.encode_request(*message)
            if isinstance(message, rpc.Response):
                for asked in _ASKED:
                    passed_on = refusal(asked, WireError.from_any(message.error))
                    assert 0 < passed_on.number < 4096
                    assert 0 <= passed_on.done <= 1
                    assert _fits(WireError(passed_on.number, str(passed_on)))


def intercept(data: bytes) -> None:
    """What the hot path takes, the general decoder takes for the same; and it takes what libraries write."""
    general = next(_received({rpc.REQUEST}, [data]), None)
    for architecture in Architecture:
        call = InterceptCodec(architecture).match(data)
        match general:
            case (msgid, messages.INTERCEPT_METHOD, [bytes(message)]) if len(message) == MESSAGE_SIZE:
                shortest = rpc.encode_request(*general) == data
                assert (call is not None) == shortest, "taken in its shortest form, and in no other"
                if call is not None:
                    assert call == (msgpack.packb(msgid), memory_access(message, architecture))
                    for answer in Answer:
                        sent = encode_answer(call[0], answer)
                        assert msgpack.unpackb(sent) == [rpc.RESPONSE, msgid, None, list(answer.value)]
            case _:
                assert call is None, "the general decoder finds no intercept there"


def hv_message(data: bytes) -> None:
    """The one read of the hot path finds what the full parser finds, and a message survives it."""
    for architecture in Architecture:
        if len(data) != MESSAGE_SIZE:
            _must_raise(ValueError, InterceptMessage.parse, data)
            _must_raise(ValueError, partial(memory_access, architecture=architecture), data)
            continue
        message = InterceptMessage.parse(data)
        assert message.build() == data
        memory = message.memory(architecture)
        assert memory is None or message.payload.startswith(memory.build())
        served = message.known_type in {MessageType.UNMAPPED_GPA, MessageType.GPA_INTERCEPT}
        expected = None
        if served and memory is not None and memory.access_type <= 2:
            expected = memory.gpa >> PAGE_SHIFT, Access(1 << memory.access_type)
        assert memory_access(data, architecture) == expected


def calls(data: bytes) -> None:
    """A request becomes a typed call, or an error that names what is wrong in few words."""
    for message in _received({rpc.REQUEST}, [data]):
        if not isinstance(message, rpc.Request):
            continue
        for methods in METHODS:
            _typed(partial(codec.decode_call, methods, message.method, message.params))
        _typed(partial(codec.decode_hello, message.params))


def events(data: bytes) -> None:
    """Every UNMAP event becomes the pages that it touches, all of them and no others."""
    size = 32
    whole = data[: len(data) // size * size]
    expected = []
    for at in range(0, len(whole), size):
        start, end = struct.unpack_from("<QQ", whole, at + 8)
        if whole[at] == 0x16 and start < end:
            expected.append((start // 4096, -(-end // 4096)))
    found = parse_events(whole)
    assert [(each.start, each.end) for each in found] == expected
    assert all(each.start < each.end <= PAGE_LIMIT for each in found)


def maps(data: bytes) -> None:
    """Any text is searched for a VMA without an error; what is found covers the page."""
    page, text = int.from_bytes(data[:7]), data[7:]
    descriptor = os.memfd_create("maps")
    asked = asking_by_parsing(ProcMaps(descriptor))
    try:
        os.write(descriptor, text or b"\n")
        for each in (page, 0x400, 0x7F0000000):
            vma = asked.vma_at(each)
            assert vma is None or vma.start <= each < vma.end
    finally:
        asked.close()


def smaps(data: bytes) -> None:
    """A VMA is io where its own record says so, not another's: as a walk line by line finds."""
    found = [(each.start, each.end, each.io) for each in parse_records(data)]
    assert found == list(_records_line_by_line(data))


def config(data: bytes) -> None:
    """A file is a configuration with paths that can be used, or a `ConfigError` that names the file."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as directory:
        file = Path(directory) / "interceptd.toml"
        file.write_bytes(data)
        try:
            loaded = load_config(file)
        except ConfigError as error:
            assert str(error).startswith(str(file))  # noqa: PT017 - not a test
        else:
            assert loaded.operator_path
            assert loaded.uids is not None
            assert loaded.limits.stated()


def recording(data: bytes) -> None:
    """A file has the same chunks, or the same fault, in one piece and byte by byte."""
    whole = _recorded([data])
    assert whole == _recorded(data[at : at + 1] for at in range(len(data)))


def working_set(data: bytes) -> None:
    """A file is refused, or written again as it was; its pages and the sampled ones are of its image."""
    try:
        found = working_sets.decode(data)
    except working_sets.WorkingSetError:
        return
    assert working_sets.encode(found) == data
    assert 0 <= working_sets.page_count(found.stored_runs) <= found.image_pages
    assert all(page < found.image_pages for page in working_sets.sampled_pages(found.stored_runs))


def handoff(data: bytes) -> None:
    """A hand-off is the same, or refused, however it is cut; what is taken is what a JSON decoder finds."""
    at_once = _handed_over(data)
    first = next(filter(None, (_handed_over(data[:size]) for size in range(len(data)))), at_once)
    if isinstance(at_once, Handoff):
        assert first == at_once, "more bytes make no hand-off of what was refused, nor another one"
        sent = json.loads(data)
        for each, fields in zip(at_once.regions, sent, strict=True):
            kib = fields.get("page_size_kib")
            size = fields.get("page_size")
            assert each.page_size == (size if size is not None else kib if kib is not None else 4096)
            assert each.page_size in PAGE_SIZES
            for name in ("base_host_virt_addr", "size", "offset"):
                value = getattr(each, name)
                assert value == fields[name]
                assert value % each.page_size == 0


TARGETS: Mapping[str, Callable[[bytes], None]] = {
    target.__name__: target
    for target in (
        frames,
        receiver,
        intercept,
        hv_message,
        calls,
        events,
        recording,
        working_set,
        maps,
        smaps,
        config,
        handoff,
    )
}


# ------------------------------------------------ helpers


def _handed_over(data: bytes) -> Handoff | str | None:
    """The hand-off, why it is refused, or None while it is not whole."""
    try:
        return parse(data)
    except Refused as refused:
        why = str(refused)
        assert why.isprintable()
        assert 0 < len(why) < ERROR_BYTES
        return why


def _recorded(pieces: Iterable[bytes]) -> tuple[list[Chunk], str]:
    """The chunks of a file, and how it ended."""
    reader = RecordingReader()
    chunks: list[Chunk] = []
    try:
        for piece in pieces:
            chunks += reader.feed(piece)
        reader.close()
    except RecordingError as error:
        return chunks, str(error)
    return chunks, ""


_FIRST_LINE = re.compile(
    rb"([0-9a-f]{8,16})-([0-9a-f]{8,16}) [r-][w-][x-][ps] [0-9a-f]{8,16} "
    rb"[0-9a-f]{2,8}:[0-9a-f]{2,8} [0-9]{1,20}"
)


def _records_line_by_line(smaps_text: bytes) -> Iterator[tuple[int, int, bool]]:
    vma = None
    for line in smaps_text.split(b"\n"):
        if first := _FIRST_LINE.match(line):
            vma = int(first[1], 16) >> PAGE_SHIFT, int(first[2], 16) >> PAGE_SHIFT
        elif not line[:1].isupper():
            vma = None
        elif vma is not None and line.startswith(b"VmFlags:"):
            yield *vma, bool({b"io", b"pf"} & set(line.removeprefix(b"VmFlags:").split()))
            vma = None


def _read_in_steps(data: bytes) -> int:
    """Where a reader stops that always takes as many bytes as are missing at least."""
    scanner, taken = FrameScanner(), 0
    while scanner.scan(data[:taken]) is None:
        taken += scanner.missing_bytes
    return taken


def _scanned(pieces: Iterator[bytes] | list[bytes]) -> int | str | None:
    """What a scanner says of a growing buffer in the end."""
    scanner = FrameScanner()
    end = None
    for buffer in pieces:
        try:
            end = scanner.scan(buffer)
        except ProtocolViolation as violation:
            assert violation.number in {errno.EMSGSIZE, errno.EBADMSG}  # noqa: PT017 - not a test
            return "refused"
        if end is not None:
            break
    assert end is None or end <= MESSAGE_LIMIT
    return end


def _received(accepts: set[int], pieces: list[bytes]) -> Iterator[rpc.Message | str]:
    """Every message, and at the end how it stands with the stream."""
    received = rpc.Receiver(accepts)
    for piece in pieces:
        received.receive_data(piece)
        while True:
            try:
                message = received.next_message()
            except ProtocolViolation as violation:
                assert _fits(violation)  # noqa: PT017 - not a test
                yield "lost"
                return
            if message is None:
                break
            yield message
    yield "unfinished" if received.has_bytes else "empty"


def _typed(decode: Callable[[], object]) -> None:
    try:
        call = decode()
    except WireError as error:
        assert error.number in {errno.EINVAL, errno.ENOSYS, errno.EPROTONOSUPPORT}  # noqa: PT017 - not a test
        assert _fits(error)  # noqa: PT017 - not a test
    else:
        assert isinstance(call, messages.Fields)
        fields = codec.to_fields(call)
        assert codec.decode_fields(type(call), "again", [msgpack.unpackb(msgpack.packb(fields))]) == call


def _fits(error: EncodedError) -> bool:
    return len(rpc.encode_error(1, error)) <= ERROR_BYTES


def _must_raise(kind: type[Exception], call: Callable[[bytes], object], data: bytes) -> None:
    try:
        call(data)
    except kind:
        return
    raise AssertionError(f"{call} took what it must refuse")
