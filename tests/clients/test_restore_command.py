"""`interceptctl restore`: what it hands over, shows and records, and how it ends."""

from __future__ import annotations

import errno
import json
import os
import pty
import signal
import socket
import stat
import struct
import sys
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
from click.testing import CliRunner, Result

from fakes.scripted_daemon import Answer, HangUp, Hear, Look, Refuse, ScriptedDaemon, Step, hello, replies
from intercept_client import TraceRing
from intercept_protocol.addresses import PAGE_SIZE
from intercept_protocol.errors import WireError
from intercept_protocol.messages import RestoreReply, RestoreState, RestoreStatistics
from intercept_protocol.trace import (
    COUNT_PLACE,
    NO_MEMORY,
    RECORD,
    RECORD_SIZE,
    RECORDS_AT_LEAST,
    RING_HEADER,
    Kind,
    backing_number,
)
from intercept_protocol.working_set import RUN, WorkingSet, decode, encode
from interceptctl.cli import main
from interceptctl.restore import following
from interceptctl.restore.image import opened
from interceptctl.restore.shown import Shown
from interceptctl.restore.touches import Touches

PAGES = 1024
PARTITION = 7
MEMORY = b"".join(struct.pack("<Q", number) * (PAGE_SIZE // 8) for number in range(PAGES))
IMAGE, ZERO = backing_number("image"), backing_number("zero")


def now(
    state: RestoreState, pages_in: int = 8, *, error: str = "", faults: int = 3, pid: int = 4242
) -> RestoreStatistics:
    return RestoreStatistics(
        state=state, image_pages=PAGES, pages_in=pages_in,
        demand_pages=3 if pages_in else 0, around_pages=5 if pages_in else 0,
        prefetched_pages=0, zero_pages=1, removed_pages=0, faults=faults, retries=0, image_errors=0,
        first_fault_ms=2, quiet_ms=30, pid=pid, error=error, latency=(2, 1, *[0] * 22),
    )  # fmt: skip


WAITING = now(RestoreState.WAITING, 0, pid=0, faults=0)
SERVING = now(RestoreState.SERVING)
ENDED = now(RestoreState.ENDED)
TAKEN = RestoreReply(partition_id=PARTITION, image_pages=PAGES)


def stored(*runs: tuple[int, int]) -> bytes:
    return b"".join(RUN.pack(*run) for run in runs)


class Place:
    """A directory with a memory image, in which the daemon's sockets and ours are."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.daemon = directory / "vmm.sock"
        self.listen = directory / "fc.sock"
        self.image = directory / "mem"
        self.image.write_bytes(MEMORY)
        self.working_set = directory / "touched"

    def run(self, *arguments: object, **other: object) -> Result:
        paths = {"listen": self.listen, "image": self.image, **other}
        words = [str(word) for name, path in paths.items() for word in (f"--{name}", path)]
        command = ["--socket", str(self.directory / "operator.sock"), "restore", *words]
        return CliRunner().invoke(main, [*command, *map(str, arguments)])

    def against(self, asked: Sequence[Step], then: Sequence[Step], *arguments: object) -> Result:
        """With a daemon that does `asked` with the first request, and `then` on the next connection."""
        self.served = ScriptedDaemon(self.daemon, ([*hello(), Hear(), *asked], [*hello(), *then]))
        with self.served:
            return self.run(*arguments)

    def write_working_set(self, *runs: tuple[int, int], pages: int = PAGES) -> None:
        with opened(self.image) as image:
            digest = image.digest(stored(*runs))
        self.working_set.write_bytes(encode(WorkingSet(pages, digest, stored(*runs))))

    def recorded(self) -> bytes:
        """The runs of the file, which belongs to the image."""
        found = decode(self.working_set.read_bytes())
        with opened(self.image) as image:
            assert (found.image_pages, found.digest) == (PAGES, image.digest(found.stored_runs))
        return found.stored_runs


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setattr(following, "PAUSE", 0)
    return Place(tmp_path)


# ---------------------------------------------------------------- what is handed over


def test_the_daemon_gets_the_options_the_image_and_a_socket_that_listens(place: Place) -> None:
    seen: list[object] = []

    def look() -> None:
        image, listener = place.served.descriptors
        seen.append(os.readlink(f"/proc/self/fd/{image}"))
        with socket.socket(fileno=os.dup(listener)) as listening:
            seen.append(listening.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
            seen.append(listening.getsockname())
        seen.append(stat.S_IMODE(place.listen.stat().st_mode))

    options = ("--around", 16, "--on-image-error", "kill", "--wait", 1.5, "--detach", "--json")
    result = place.against([Look(look), Answer(TAKEN)], [], *options)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == {"partition_id": PARTITION, "image_pages": PAGES}
    assert seen == [str(place.image), 1, str(place.listen), 0o600]
    [(_, [greeting]), (method, [fields])] = place.served.heard
    assert greeting == {"role": "vmm", "protocol": 1, "name": "fc.sock"}
    assert (method, fields) == ("restore", {
        "around_pages": 16, "on_image_error": "kill", "connect_timeout_ms": 1500,
        "prefetch": False, "trace": False,
    })  # fmt: skip
    assert place.listen.exists(), "the VMM has still to connect"


def test_a_detached_restore_says_where_the_vmm_is_waited_for(place: Place) -> None:
    result = place.against([Answer(TAKEN)], [], "--detach")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == f"partition 7: waiting for a VMM at {place.listen}\n"


def test_a_working_set_is_handed_over_as_the_list_of_its_pages(place: Place) -> None:
    place.write_working_set((900, 3), (0, 1))
    seen: list[bytes] = []
    look = Look(lambda: seen.append(os.pread(place.served.descriptors[2], 100, 0)))
    result = place.against([look, Answer(TAKEN)], [], "--detach", "--prefetch", place.working_set)
    assert result.exit_code == 0, result.output
    assert seen == [stored((900, 3), (0, 1))]


def test_the_vmm_socket_may_be_named(place: Place, tmp_path: Path) -> None:
    place.daemon = tmp_path / "elsewhere.sock"
    result = place.against([Answer(TAKEN)], [], "--detach", "--vmm-socket", place.daemon)
    assert result.exit_code == 0, result.output


# ---------------------------------------------------------------- how it ends


def test_it_stays_until_the_vm_ends_and_then_says_what_was_brought_in(place: Place) -> None:
    seen: list[bool] = []
    look = Look(lambda: seen.append(place.listen.exists()))
    then = [*replies(WAITING), Hear(), look, Answer(SERVING), Hear(), look, Answer(ENDED)]
    result = place.against([Answer(TAKEN)], then)
    assert result.exit_code == 0, result.output
    assert result.stderr.splitlines() == [
        f"partition 7: waiting for a VMM at {place.listen}",
        "partition 7: serving pid 4242",
        "partition 7: the VM ended",
    ]
    assert result.stdout.splitlines() == [
        "the VM ended",
        "32 KiB brought in of an image of 4 MiB, 4 KiB of it zero",
        "12 KiB on demand, 20 KiB around, 0 KiB prefetched",
        "3 faults, P50 2us, P99 4us; the first after 2 ms, the last after 30 ms",
    ]
    assert seen == [True, False], "its path is of no use once the VMM is there"
    assert place.served.methods == ["hello", "restore", "hello", *["restore_progress"] * 3]


def test_json_has_the_fields_of_the_protocol(place: Place) -> None:
    result = place.against([Answer(TAKEN)], replies(ENDED), "--json")
    printed = json.loads(result.stdout)
    assert (printed["partition_id"], printed["interrupted"], printed["recorded"]) == (7, False, None)
    assert (printed["restore"]["state"], printed["restore"]["pages_in"]) == ("ended", 8)


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_leaves_the_vm_served_and_says_so(place: Place) -> None:
    result = place.against([Answer(TAKEN)], [Hear(), Look(interrupt), Answer(SERVING)])
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[:2] == ["interrupted; the daemon goes on with it", "serving pid 4242"]


def test_ctrl_c_before_the_vmm_is_there_leaves_the_path_that_it_will_connect_to(place: Place) -> None:
    result = place.against([Answer(TAKEN)], [Hear(), Look(interrupt), Answer(WAITING)])
    assert result.stdout.splitlines()[1] == f"waiting for a VMM at {place.listen}"
    assert place.listen.exists()


def test_a_refused_hand_over_is_shown_with_its_reason_while_it_waits(place: Place) -> None:
    refused = now(RestoreState.WAITING, 0, error="a hand-off was refused: 4096 bytes")
    result = place.against([Answer(TAKEN)], replies(WAITING, refused, ENDED))
    assert result.stderr.splitlines()[1] == (
        f"partition 7: waiting for a VMM at {place.listen}; a hand-off was refused: 4096 bytes"
    )


def test_if_no_vmm_comes_in_time_it_says_what_to_do(place: Place) -> None:
    late = now(RestoreState.ENDED, 0, error="no VMM connected within 60 s", pid=0)
    result = place.against([Answer(TAKEN)], replies(WAITING, late))
    assert result.exit_code == 1
    assert "Error: the restore ended: no VMM connected within 60 s\n" in result.stderr
    assert (
        f"load its snapshot with {place.listen} as backend_path; --wait gives it more time" in result.stderr
    )
    assert (result.stdout, place.listen.exists()) == ("", False)


def test_an_image_error_that_killed_the_vmm_is_exit_code_1_after_what_was_brought_in(place: Place) -> None:
    killed = now(RestoreState.ENDED, error="page 9 of the image: Input/output error")
    result = place.against([Answer(TAKEN)], replies(killed))
    assert result.exit_code == 1
    assert result.stdout.startswith("32 KiB brought in of an image of 4 MiB, ")
    assert result.stderr.endswith("Error: the restore ended: page 9 of the image: Input/output error\n")


def test_a_state_that_only_a_later_daemon_knows_is_shown_as_it_is(place: Place) -> None:
    later = msgspec.structs.replace(SERVING, state="resting")
    result = place.against([Answer(TAKEN)], replies(later, ENDED))
    assert result.exit_code == 0, result.output
    assert result.stderr.splitlines()[0] == "partition 7: resting"


# ---------------------------------------------------------------- a daemon that is restarted


def test_it_goes_on_with_the_daemon_that_follows(place: Place) -> None:
    scripts: list[list[Step]] = [
        [*hello(), *replies(TAKEN)],
        [*hello(), *replies(SERVING), HangUp()],
        [*hello(), *replies(ENDED)],
    ]
    with ScriptedDaemon(place.daemon, tuple(scripts)):
        result = place.run()
    assert result.exit_code == 0, result.output
    assert "the daemon went away; waiting for the next" in result.stderr
    assert result.stdout.startswith("the VM ended\n")


@pytest.mark.parametrize(
    "answer",
    [
        Refuse(WireError(errno.ENOENT, "restore_progress: no restore 7")),
        Answer(now(RestoreState.SERVING, pid=9)),
    ],
    ids=["unknown", "another's"],
)
def test_a_daemon_that_began_anew_is_told_from_one_that_goes_on(place: Place, answer: Step) -> None:
    scripts: list[list[Step]] = [
        [*hello(), *replies(TAKEN)],
        [*hello(), *replies(SERVING), HangUp()],
        [*hello(), Hear(), answer],
    ]
    with ScriptedDaemon(place.daemon, tuple(scripts)):
        result = place.run()
    assert result.exit_code == 1
    assert "the daemon knows nothing of partition 7 any more: it was started anew" in result.stderr


def test_ctrl_c_while_no_daemon_is_there_says_that_the_guest_waits(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "time", SimpleNamespace(sleep=lambda _: interrupt()))
    scripts: list[list[Step]] = [[*hello(), *replies(TAKEN)], [*hello(), Hear(), HangUp()]]
    with ScriptedDaemon(place.daemon, tuple(scripts)):
        result = place.run()
    assert result.exit_code == 0, result.output
    assert result.stdout == (
        "no daemon is there: the guest waits at the first page that is missing until one goes on\n"
    )


# ---------------------------------------------------------------- what is refused


def replace_by_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda place: place.image.unlink(), "No such file"),
        (lambda place: place.image.write_bytes(b""), "the file is empty"),
        (lambda place: place.image.write_bytes(bytes(5000)), "larger file (mem_file_path), not the state"),
        (lambda place: replace_by_fifo(place.image), "a regular file or a block device"),
        (lambda place: place.listen.write_text("mine"), "a file that is not a socket"),
    ],
    ids=["missing", "empty", "odd", "fifo", "file in the way"],
)
def test_what_cannot_be_handed_over_is_refused_before_the_daemon_is_asked(
    place: Place, spoil: Callable[[Place], object], why: str
) -> None:
    spoil(place)
    result = place.run()
    assert result.exit_code == 1
    assert why in result.stderr
    assert not place.listen.is_socket()


def test_a_path_on_which_somebody_listens_is_left_to_him(place: Place) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(place.listen))
        other.listen()
        result = place.run()
        other.setblocking(False)
        with pytest.raises(BlockingIOError):
            other.accept()
    assert result.exit_code == 1
    assert "or the daemon for an earlier restore, listens there" in result.stderr
    assert place.listen.is_socket()


def test_a_socket_that_nobody_listens_on_any_more_is_replaced(place: Place) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(place.listen))
    result = place.against([Answer(TAKEN)], [], "--detach")
    assert result.exit_code == 0, result.output
    assert stat.S_IMODE(place.listen.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("listen", "why"), [("x" * 120, "at most 107"), ("nowhere/fc.sock", "there is no such directory")]
)
def test_a_path_that_no_socket_can_have_is_explained(place: Place, listen: str, why: str) -> None:
    result = place.run(listen=place.directory / listen)
    assert result.exit_code == 1
    assert why in result.stderr


def test_a_daemon_that_is_not_there_is_exit_code_3_and_named(place: Place) -> None:
    result = place.run()
    assert result.exit_code == 3
    assert (
        f"{place.daemon}: no such file; is interceptd running with --socket set to this path?"
        in result.stderr
    )
    assert not place.listen.exists()


def test_the_operator_socket_is_reported_as_no_vmm_socket(place: Place) -> None:
    script: list[Step] = [Hear(), Refuse(WireError(errno.EACCES, "role vmm is not for this socket"))]
    with ScriptedDaemon(place.daemon, (script,)):
        result = place.run()
    assert result.exit_code == 3
    assert "not a VMM socket, or access denied: EACCES: role vmm" in result.stderr


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (WireError(errno.EINVAL, "restore: image: /dev/null", field="image"), "image: /dev/null (--image)"),
        (WireError(errno.EINVAL, "restore: 5 of 4 pages", field="prefetch"), "5 of 4 pages (--prefetch)"),
        (
            WireError(errno.ESHUTDOWN, "the daemon is draining"),
            "refused: ESHUTDOWN: the daemon is draining\n",
        ),
        (WireError(errno.ENOSYS, "no method 'restore'"), "of version 0, which cannot restore snapshots"),
    ],
)
def test_a_refusal_is_exit_code_1_and_names_the_option(place: Place, error: WireError, why: str) -> None:
    result = place.against([Refuse(error)], [])
    assert result.exit_code == 1
    assert why in result.stderr
    assert not place.listen.exists(), "nobody will accept there"


def test_a_recording_that_nobody_stays_for_is_refused(place: Place) -> None:
    result = place.run("--detach", "--record", place.working_set)
    assert result.exit_code == 2
    assert "--record needs this program to stay" in result.stderr


def test_a_working_set_of_another_image_is_refused(place: Place) -> None:
    place.write_working_set((900, 3))
    place.image.write_bytes(bytes(PAGES * PAGE_SIZE))
    result = place.run("--prefetch", place.working_set)
    assert result.exit_code == 1
    assert f"{place.working_set}: it is the working set of another image than {place.image}" in result.stderr
    place.image.write_bytes(bytes(PAGE_SIZE))
    result = place.run("--prefetch", place.working_set)
    assert "of an image of 4 MiB, and " in result.stderr


@pytest.mark.parametrize("content", [None, b"%PDF"])
def test_a_file_that_is_no_working_set_is_refused(place: Place, content: bytes | None) -> None:
    if content is not None:
        place.working_set.write_bytes(content)
    result = place.run("--prefetch", place.working_set)
    assert result.exit_code == 1
    assert ("No such file" if content is None else "this is not a working set") in result.stderr


# ---------------------------------------------------------------- what is recorded


def write(descriptor: int, *records: tuple[int, ...], before: int = 0) -> None:
    """Records as a daemon writes them: kind, detail and the numbers."""
    for number, (kind, detail, *values) in enumerate(records, before):
        packed = RECORD.pack(0, kind, 0, detail, *values, *[0] * (6 - len(values)))
        os.pwrite(descriptor, packed, RING_HEADER + number % RECORDS_AT_LEAST * RECORD_SIZE)
    os.pwrite(descriptor, struct.pack("=Q", before + len(records)), COUNT_PLACE)


def mapped(first: int, count: int, backing: int = IMAGE, access: int = 7) -> tuple[int, ...]:
    return Kind.GUEST_MAPPED, access, first, count, 0x7000, first, backing


def touch(page: int, detail: int = 0) -> tuple[int, ...]:
    return Kind.INTERCEPT, detail, page, 1000


RUN_OF_A_GUEST = (
    (Kind.REGION_ADDED, 1, 0, PAGES, 0x7000, 7),
    mapped(0, PAGES, backing=0, access=0),
    mapped(512, 64),
    touch(530),
    mapped(0, 1),
    touch(0),
)
TOUCHED = stored((512, 64), (0, 1))


def test_the_pages_that_were_touched_are_recorded_until_the_vm_ends(place: Place) -> None:
    trace = Look(lambda: write(place.served.descriptors[2], *RUN_OF_A_GUEST))
    then = [Hear(), trace, Answer(SERVING), *replies(ENDED)]
    result = place.against([Answer(TAKEN)], then, "--record", place.working_set, "--json")
    assert result.exit_code == 0, result.output
    assert place.recorded() == TOUCHED
    assert json.loads(result.stdout)["recorded"] == {
        "file": str(place.working_set), "pages": 65, "lost_records": 0, "passed_over": 0, "restarted": False,
    }  # fmt: skip
    assert sorted(each.name for each in place.directory.iterdir() if each.is_file()) == ["mem", "touched"]


def test_what_was_touched_before_ctrl_c_or_a_bad_end_is_recorded(place: Place) -> None:
    for last in (Answer(SERVING), Answer(now(RestoreState.ENDED, error="killed"))):
        trace = Look(lambda: write(place.served.descriptors[2], *RUN_OF_A_GUEST))
        place.against([Answer(TAKEN)], [Hear(), trace, Look(interrupt), last], "--record", place.working_set)
        assert place.recorded() == TOUCHED
        for path in (place.working_set, place.daemon, place.listen):
            path.unlink(missing_ok=True)


def test_what_was_prefetched_stays_in_the_set_and_comes_first(place: Place) -> None:
    place.write_working_set((900, 3), (520, 1))
    trace = Look(lambda: write(place.served.descriptors[3], *RUN_OF_A_GUEST))
    then: list[Step] = [Hear(), trace, Answer(ENDED)]
    place.against([Answer(TAKEN)], then, "--prefetch", place.working_set, "--record", place.working_set)
    assert place.recorded() == stored((900, 3), (520, 1), (512, 8), (521, 55), (0, 1))


def test_a_recording_without_a_touch_leaves_the_file_as_it_was(place: Place) -> None:
    place.working_set.write_text("of yesterday")
    result = place.against([Answer(TAKEN)], replies(ENDED), "--record", place.working_set)
    assert place.working_set.read_text() == "of yesterday"
    assert f"{place.working_set}: not written, as nothing was touched" in result.stdout


@pytest.mark.parametrize("faults", [1, 4], ids=["counted anew", "not traced"])
def test_a_recording_says_that_it_ends_with_the_daemon_that_wrote_the_trace(
    place: Place, faults: int
) -> None:
    trace = Look(lambda: write(place.served.descriptors[2], *RUN_OF_A_GUEST))
    then = [Hear(), trace, Answer(SERVING), *replies(SERVING, now(RestoreState.ENDED, faults=faults))]
    result = place.against([Answer(TAKEN)], then, "--record", place.working_set)
    assert place.recorded() == TOUCHED
    assert "the daemon was restarted: pages touched after that are missing" in result.stdout


def test_what_was_touched_before_the_daemon_began_anew_is_recorded(place: Place) -> None:
    trace = Look(lambda: write(place.served.descriptors[2], *RUN_OF_A_GUEST))
    unknown = Refuse(WireError(errno.ENOENT, "restore_progress: no restore 7"))
    then: list[Step] = [Hear(), trace, Answer(SERVING), Hear(), unknown]
    result = place.against([Answer(TAKEN)], then, "--record", place.working_set)
    assert result.exit_code == 1
    assert place.recorded() == TOUCHED
    assert f"{place.working_set}: 65 pages (260 KiB)" in result.stderr


def test_a_recording_that_cannot_be_written_is_refused_before_the_daemon_is_asked(place: Place) -> None:
    result = place.run("--record", place.directory / "nowhere" / "touched")
    assert result.exit_code == 1
    assert "nowhere/touched.part: No such file or directory" in result.stderr
    assert not place.listen.exists()


def taken(*records: tuple[int, ...], prefetched: bytes = b"") -> bytes:
    with closing(TraceRing(RECORDS_AT_LEAST)) as ring:
        touches = Touches(ring, PAGES, prefetched)
        write(ring.descriptor, *records)
        touches.drain()
        assert touches.lost == 0
        return touches.pages.stored_runs()


def test_a_page_that_the_vmm_had_given_back_is_not_of_the_set() -> None:
    assert taken(mapped(8, 2, ZERO), mapped(10, 6), touch(9), mapped(40, 1, ZERO), touch(40)) == stored(
        (10, 6)
    )


def test_what_comes_for_another_reason_than_a_touch_is_not_of_the_set() -> None:
    assert taken(mapped(700, 50), mapped(8, 2), touch(9), touch(9)) == stored((8, 2))


def test_faults_may_be_answered_in_another_order_than_their_pages_come() -> None:
    assert taken(mapped(700, 5), mapped(8, 2), touch(9), touch(701)) == stored((8, 2), (700, 5))


def test_what_is_brought_in_beside_a_touch_is_of_the_set_only_so_far_as_a_touch_reaches() -> None:
    assert taken(mapped(0, PAGES), touch(600)) == stored((88, PAGES - 88))


def test_an_intercept_that_is_no_access_to_memory_touches_nothing() -> None:
    assert taken(mapped(0, 1), touch(0, NO_MEMORY)) == b""


def test_records_that_were_overwritten_are_counted() -> None:
    with closing(TraceRing(RECORDS_AT_LEAST)) as ring:
        touches = Touches(ring, PAGES, b"")
        write(ring.descriptor, *[mapped(1, 1), touch(1)] * 200)
        touches.drain()
        assert touches.lost == 400 - RECORDS_AT_LEAST + 1
        assert touches.pages.stored_runs() == stored((1, 1))


# ---------------------------------------------------------------- the bar


def test_a_terminal_shows_a_bar_of_the_pages_that_are_in(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pty.openpty()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with os.fdopen(theirs, "w") as terminal, monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", terminal)
        with Shown(PARTITION, Path("fc.sock")) as shown:
            shown.show(WAITING)
            shown.say("the daemon went away; waiting for the next")
            shown.show(now(RestoreState.SERVING, 512, faults=1))
    printed = b""
    with suppress(OSError):  # EIO at the end of a terminal
        while more := os.read(ours, 1 << 16):
            printed += more
    os.close(ours)
    assert "partition 7: waiting for a VMM at fc.sock" in printed.decode()
    assert "the daemon went away; waiting for the next\r\n" in printed.decode()
    assert "partition 7: serving pid 4242 " in printed.decode()
    assert "2 MiB of 4 MiB, 1 fault" in printed.decode()
