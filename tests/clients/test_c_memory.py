"""The VMM's own memory in C: handed over, and changed inside invalidations."""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from fakes.c_programs import Conversation, CPrograms, conversation
from fakes.eventually import PATIENCE
from fakes.scripted_daemon import Answer, HangUp, Hear, Refuse, ScriptedDaemon, Step, hello, replies
from intercept_protocol import rpc
from intercept_protocol.errors import WireError

NOWHERE: Final = 0x1000
"""Below mmap_min_addr, where nothing can be mapped."""
NO_FILE: Final = -1
BEGIN, END = "invalidate_begin", "invalidate_end"
ELSEWHERE: Final = 0x3000
EAGAIN: Final = Refuse(WireError(errno.EAGAIN, "an obstacle"))


class Receiving:
    """Answers hello and each attach_memory; notes what each brought."""

    def __init__(self, path: Path, answers: Sequence[bytes]) -> None:
        self.brought: list[list[str]] = []
        self._answers = answers
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        with self._listener, self._listener.accept()[0] as connection:
            for number, answer in enumerate([rpc.encode_result(1, {"protocol": 1}), *self._answers]):
                _, descriptors, _, _ = socket.recv_fds(connection, 4096, 10)
                if number:
                    self.brought.append([os.readlink(f"/proc/self/fd/{each}") for each in descriptors])
                for each in descriptors:
                    os.close(each)
                connection.sendall(answer)

    def join(self) -> None:
        self._thread.join(PATIENCE)


@pytest.mark.parametrize(
    ("obstacles", "end"), [(0, "left 0 ok"), (2, "left 0 ok"), (3, "left 0 refused 11 EAGAIN an obstacle")]
)
def test_the_memory_is_handed_over_with_the_first_byte_again_while_an_obstacle_may_pass_and_closed(
    programs: CPrograms, socket_path: Path, obstacles: int, end: str
) -> None:
    refusals = [rpc.encode_error(2 + n, EAGAIN.error) for n in range(obstacles)]
    receiving = Receiving(socket_path, [*refusals, rpc.encode_result(2 + obstacles, None)][:3])
    with conversation(programs / "c_driver", socket_path, "session", "vmm") as said:
        assert said.end() == "ok"
        assert said.do("attach_memory") == end
    receiving.join()
    assert len(receiving.brought) == min(obstacles + 1, 3)
    for brought in receiving.brought:
        assert [name.rsplit("/", 1)[1] for name in brought[:2]] == ["maps", "smaps"]
        assert brought[2:] in ([], ["anon_inode:[userfaultfd]"])


@pytest.mark.parametrize(
    ("no_room", "unwatched", "told"),
    [
        (1, 0, {"promise_begin_end": True, "userfaultfd_errno": errno.EMFILE}),
        (1, 1, {"promise_begin_end": True}),
    ],
)
def test_the_daemon_is_told_why_there_is_no_userfaultfd_if_one_was_wanted(
    programs: CPrograms, socket_path: Path, no_room: int, unwatched: int, told: dict[str, object]
) -> None:
    """P-40."""
    with (
        ScriptedDaemon(socket_path, ([*hello(), *replies(None)],)) as daemon,
        conversation(programs / "c_driver", socket_path, "session", "vmm") as said,
    ):
        assert said.end() == "ok"
        assert said.do("attach_memory", no_room, unwatched) == "left 0 ok"
    assert daemon.heard[1:] == [("attach_memory", [told])]


IMAGE_AND_LISTENER: Final = ["/dev/null", "/dev/zero"]


@pytest.mark.parametrize("others", [(), ("/dev/full",), ("/dev/full", "/dev/urandom")], ids=len)
@pytest.mark.parametrize("obstacles", [0, 2, 3])
def test_a_restore_hands_its_descriptors_over_in_order_again_while_an_obstacle_may_pass(
    programs: CPrograms, socket_path: Path, others: Sequence[str], obstacles: int
) -> None:
    """P-42."""
    refusals = [rpc.encode_error(2 + n, EAGAIN.error) for n in range(obstacles)]
    taken = rpc.encode_result(2 + obstacles, {"image_pages": 512, "later": 1, "partition_id": 7})
    receiving = Receiving(socket_path, [*refusals, taken][:3])
    with conversation(programs / "c_driver", socket_path, "session", "vmm") as said:
        assert said.end() == "ok"
        end = said.do("restore", *(int(n < len(others)) for n in range(2)))
    receiving.join()
    assert end == ("7 512 ok" if obstacles < 3 else "refused 11 EAGAIN an obstacle")
    assert receiving.brought == [[*IMAGE_AND_LISTENER, *others]] * min(obstacles + 1, 3)


# ------------------------------------------------ announced system calls


@contextmanager
def notifier(programs: CPrograms, path: Path, *steps: Step) -> Iterator[tuple[ScriptedDaemon, Conversation]]:
    with (
        ScriptedDaemon(path, ([*hello(), *steps],)) as daemon,
        conversation(programs / "c_driver", path, "session", "notifier") as said,
    ):
        assert said.end() == "ok"
        yield daemon, said


def announced(*ranges: tuple[str, int]) -> list[tuple[str, list[object]]]:
    return [(method, [{"start_uaddr": start, "length": 4096}]) for method, start in ranges]


@pytest.mark.parametrize(
    ("call", "end"),
    [
        (("munmap", NOWHERE), "0 done ok"),
        (("mprotect", NOWHERE), "-1 Cannot allocate memory ok"),
        (("madvise", NOWHERE), "-1 Cannot allocate memory ok"),
        (("mremap", NOWHERE, 0), "-1 Bad address ok"),
        (("mmap_fixed", NOWHERE, NO_FILE), "-1 Bad file descriptor ok"),
        (("punch_hole", NOWHERE, NO_FILE), "-1 Bad file descriptor ok"),
        (("ftruncate", NOWHERE, NO_FILE), "-1 Bad file descriptor ok"),
    ],
)
def test_a_call_is_made_inside_an_invalidation_and_returns_what_the_kernel_says(
    programs: CPrograms, socket_path: Path, call: tuple[object, ...], end: str
) -> None:
    with notifier(programs, socket_path, *replies(None, None)) as (daemon, said):
        assert said.do(*call) == end
    assert daemon.heard[1:] == announced((BEGIN, NOWHERE), (END, NOWHERE))


def test_mremap_to_a_place_announces_the_place_too(programs: CPrograms, socket_path: Path) -> None:
    with notifier(programs, socket_path, *replies(*[None] * 4)) as (daemon, said):
        assert said.do("mremap", NOWHERE, ELSEWHERE) == "-1 Bad address ok"
    assert daemon.heard[1:] == announced(
        (BEGIN, NOWHERE), (BEGIN, ELSEWHERE), (END, ELSEWHERE), (END, NOWHERE)
    )


def test_where_the_second_begin_is_refused_the_first_ends_and_the_call_is_not_made(
    programs: CPrograms, socket_path: Path
) -> None:
    refused = Refuse(WireError(errno.ENOSPC, "too many", limit="open_invalidations_per_partition"))
    with notifier(programs, socket_path, *replies(None), Hear(), refused, *replies(None)) as (daemon, said):
        end = said.do("mremap", NOWHERE, ELSEWHERE)
    assert end.startswith("-1 Operation canceled refused 28 ENOSPC too many")
    assert daemon.heard[1:] == announced((BEGIN, NOWHERE), (BEGIN, ELSEWHERE), (END, NOWHERE))


def test_a_call_whose_begin_is_refused_is_not_made_and_the_next_is(
    programs: CPrograms, socket_path: Path
) -> None:
    refused = Refuse(WireError(errno.EINVAL, "no", field="length"))
    with notifier(programs, socket_path, Hear(), refused, *replies(None, None)) as (daemon, said):
        end = said.do("munmap", NOWHERE)
        assert said.do("munmap", NOWHERE) == "0 done ok"
    assert end == "-1 Operation canceled refused 22 EINVAL no field=length"
    assert daemon.methods == ["hello", BEGIN, BEGIN, END]


@pytest.mark.parametrize("steps", [[HangUp()], [Hear()]], ids=["closed", "not answered"])
def test_a_call_whose_begin_is_not_answered_is_not_made_and_the_connection_is_over(
    programs: CPrograms, socket_path: Path, steps: list[Step]
) -> None:
    """Closing it ends what the daemon may have begun (N-6)."""
    with notifier(programs, socket_path, *steps) as (_, said):
        said.do("timeout", 50)
        ends = [said.do("munmap", NOWHERE), said.do("munmap", NOWHERE)]
    assert [end.split(" lost ")[0] for end in ends] == ["-1 Operation canceled"] * 2


@pytest.mark.parametrize(
    "steps",
    [[HangUp()], [Hear(), Refuse(WireError(errno.ENOENT, "no"))]],
    ids=["closed", "refused"],
)
def test_a_call_whose_end_fails_was_made_and_the_connection_is_over(
    programs: CPrograms, socket_path: Path, steps: list[Step]
) -> None:
    with notifier(programs, socket_path, Hear(), Answer(None), *steps) as (daemon, said):
        assert said.do("munmap", NOWHERE).startswith("0 done lost ")
        assert said.do("munmap", NOWHERE).startswith("-1 Operation canceled lost ")
    assert daemon.methods[:2] == ["hello", BEGIN]
