"""What the C client reads of the daemon's answers: welcome, figures, lists and errors."""

from __future__ import annotations

from pathlib import Path

import pytest

from fakes.c_driver import MAPPING, REGION, STATISTICS, VMA, asked
from fakes.c_programs import CPrograms


def test_a_reason_that_is_not_known_and_too_long_is_cut(programs: CPrograms, socket_path: Path) -> None:
    printed, _ = asked(programs, socket_path, "intercept", answer=[1, 1, None, ["retry", "x" * 40]])
    assert printed == f"retry {'x' * 23} ok"


def test_a_restart_of_the_daemon_is_a_retry(programs: CPrograms, socket_path: Path) -> None:
    printed, _ = asked(programs, socket_path, "intercept", answer=[1, 1, None, ["retry", "restarted"]])
    assert printed == "retry restarted ok"


@pytest.mark.parametrize(
    ("hello", "printed"),
    [
        ({"protocol": 1, "features": {"x": [1], "kept": True, "y": {}}, "later": {"kept": False}}, "kept ok"),
        ({"features": {"kept": False}, "later": {"kept": True}}, "ok"),
        ({"kept": True, "features": {"chaos": 5}}, "chaos ok"),
        ({"features": {"kept": 1}}, "ok"),
        ({"features": [["kept", True]]}, "ok"),
        ({"protocol": 1}, "ok"),
        (None, "ok"),
        ({"limits": {"later": 7, "operators": 2**63, "vmms_per_uid": "x"}}, f"operators={2**63} ok"),
        ({"limits": [], "version": "1.2"}, "version 1.2 ok"),
        (
            {
                "features": {
                    "address_spaces": ["declared", "process", "later"],
                    "hypervisors": [7, "software"],
                    "architectures": ["x86_64", "arm64"],
                }
            },
            "declared process x86_64 arm64 ok",
        ),
        ({"features": {"hypervisors": ["software", "vmm"]}}, "software vmm ok"),
    ],
)
def test_hello_says_what_the_daemon_can_and_what_its_limits_are(
    programs: CPrograms, socket_path: Path, hello: object, printed: str
) -> None:
    assert asked(programs, socket_path, "open_vmm", answer=[1, 1, None, hello])[0] == printed


FIGURES = "1 2 3 4 5 6 7 {} 9 10 11 12 13 {} 23 {} resume mapped 3 resume later 1 retry kicked 2 ok"


def test_statistics_are_read_wherever_they_stand(programs: CPrograms, socket_path: Path) -> None:
    reply = {"later": [1], **dict(reversed(STATISTICS.items()))}
    printed, request = asked(programs, socket_path, "statistics", answer=[1, 1, None, reply])
    assert printed == FIGURES.format(8, 2**64 - 1, 9)
    assert request == [0, 1, "statistics", [{}]]


def test_statistics_of_an_earlier_daemon_lack_what_it_does_not_count(
    programs: CPrograms, socket_path: Path
) -> None:
    later = "restarts", "split_large_pages", "latency_waited"
    reply = {key: value for key, value in STATISTICS.items() if key not in later}
    assert asked(programs, socket_path, "statistics", answer=[1, 1, None, reply])[0] == FIGURES.format(
        0, 0, 0
    )


def test_more_reasons_than_there_is_room_for_are_left_out(programs: CPrograms, socket_path: Path) -> None:
    reply = STATISTICS | {"intercepts": {"retry": {f"r{n}": n for n in range(40)}}}
    printed, _ = asked(programs, socket_path, "statistics", answer=[1, 1, None, reply])
    assert printed.endswith("retry r30 30 retry r31 31 ok")


@pytest.mark.parametrize(
    ("result", "printed"),
    [
        (None, "nothing ok"),
        ({"frame": ["host", 5], "access": 3, "pfn": 2**52}, f"host 5 3 {2**52} ok"),
        ({"access": 1, "frame": ["file 0:1:18446744073709551615", 0]}, None),
    ],
)
def test_translate_says_what_the_guest_reaches(
    programs: CPrograms, socket_path: Path, result: object, printed: str | None
) -> None:
    said, request = asked(programs, socket_path, "translate", 2**40, answer=[1, 1, None, result])
    assert said == (printed or "file 0:1:18446744073709551615 0 1 ok")
    assert request == [0, 1, "translate", [{"gfn": 2**40}]]


@pytest.mark.parametrize(
    ("key", "element", "words"),
    [
        ("regions", REGION, "1 2 4096 later live 7 1 0 "),
        ("vmas", VMA, "4096 2 9 1 0 1 1 "),
        ("mappings", MAPPING, "1 2 4096 anonymous 8 5 "),
    ],
)
def test_a_list_comes_in_pages_as_large_as_there_is_room_for(
    programs: CPrograms, socket_path: Path, key: str, element: dict[str, object], words: str
) -> None:
    later, method = {"later": {"x": 1}, **element}, f"list_{key}"
    for told, more, after, printed in (
        (0, False, 0, "ok"),
        (2, False, 0, words * 2 + "ok"),
        (1, True, 5, words + "more ok"),
        (3, False, 2**40, words * 2 + "more ok"),
    ):
        reply = {"more": more, key: [later] * told}
        said, request = asked(programs, socket_path, method, 2, after, answer=[1, 1, None, reply])
        assert (said, request) == (printed, [0, 1, method, [{"after": after} if after else {}]])
        socket_path = socket_path.with_name(socket_path.name + "x")


@pytest.mark.parametrize(
    "error", [{"list": "add", "index": 3, "field": "kind"}, {"limit": "regions_per_uid"}]
)
def test_an_error_says_which_field_limit_and_element_it_is_about(
    programs: CPrograms, socket_path: Path, error: dict[str, object]
) -> None:
    reply = [1, 1, [22, "EINVAL", "no", {"later": 1, **error}], None]
    printed, _ = asked(programs, socket_path, "kick", answer=reply)
    ends = {"kind": " field=kind list=add index=3", "regions_per_uid": " limit=regions_per_uid"}
    assert printed == "refused 22 EINVAL no" + ends[str(list(error.values())[-1])]


@pytest.mark.parametrize("details", [None, [], {"field": 7, "limit": [], "index": "x"}, {7: 8}])
def test_details_of_another_form_say_nothing(programs: CPrograms, socket_path: Path, details: object) -> None:
    reply = [1, 1, [22, "EINVAL", "no", details], None]
    assert asked(programs, socket_path, "kick", answer=reply)[0].startswith("refused 22 EINVAL no")
