"""Shell completion, requested as shells do: the programs' output."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fakes.eventually import PATIENCE
from fakes.scripted_daemon import ScriptedDaemon, hello, replies
from intercept_protocol.events import EventName
from intercept_protocol.messages import PartitionList, PartitionSummary

PROGRAMS = Path(sys.executable).parent


def complete(shell: str, line: str, cursor_word: int, *, path: Path | None = None) -> list[str]:
    """What `shell` is answered for the words of `line`, the cursor at the end of word `cursor_word`."""
    program, *_ = words = line.split(" ")
    asked = {
        f"_{program.upper()}_COMPLETE": f"{shell}_complete",
        "COMP_WORDS": line,
        "COMP_CWORD": words[cursor_word] if shell == "fish" else str(cursor_word),
    }
    socket = {} if path is None else {"INTERCEPTCTL_SOCKET": str(path)}
    answer = subprocess.run(
        [PROGRAMS / program],
        env=os.environ | asked | socket,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
    )
    assert answer.stderr == ""
    return [line for line in answer.stdout.splitlines() if line]


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("interceptctl wa", ["plain,watch"]),
        ("interceptctl policy s", ["plain,show", "plain,set"]),
        ("interceptctl watch --event partition_", [
            f"plain,{name}" for name in EventName if name.startswith("partition_")
        ]),
        ("interceptctl top --so", ["plain,--sort"]),
        ("interceptctl --socket /run/x", ["file,/run/x"]),
        ("interceptctl restore --on-image-error k", ["plain,kill"]),
        ("interceptctl restore --image /x", ["file,/x"]),
        ("interceptd serve --config /etc/x", ["file,/etc/x"]),
        ("interceptd check", ["plain,check-config"]),
    ],
)  # fmt: skip
def test_bash_is_offered_the_valid_completions(line: str, offered: list[str]) -> None:
    assert sorted(complete("bash", line, line.count(" "))) == sorted(offered)


def test_zsh_and_fish_get_the_same_completions_with_help() -> None:
    zsh = complete("zsh", "interceptctl wat", 1)
    fish = complete("fish", "interceptctl wat", 1)

    assert zsh[:2] == ["plain", "watch"]
    assert fish[0].startswith("plain,watch\tPrint the daemon")


def test_partition_ids_come_from_the_daemon(socket_path: Path) -> None:
    def summary(number: int) -> PartitionSummary:
        return PartitionSummary(
            partition_id=number, name="a,b\x1b", uid=1, pid=2, address_space="declared",
            hypervisor="software", vps=4, regions=1, mapped_gfns=512, intercepts=0, invalidations=0, age_ms=1,
        )  # fmt: skip

    page = PartitionList(partitions=[summary(number) for number in (1, 17, 2)], more=False)
    with ScriptedDaemon(socket_path, ([*hello(), *replies(page)],)):
        offered = complete("bash", "interceptctl show 1", 2, path=socket_path)

    assert offered == ["plain,1", "plain,17"]


def test_without_a_daemon_no_id_is_offered_and_no_error_shown(tmp_path: Path) -> None:
    assert complete("bash", "interceptctl show 1", 2, path=tmp_path / "none.sock") == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
@pytest.mark.parametrize("program", ["interceptd", "interceptctl"])
def test_the_script_that_the_documents_name_is_one_the_shell_can_read(shell: str, program: str) -> None:
    asking = {f"_{program.upper()}_COMPLETE": f"{shell}_source"}
    script = subprocess.run(
        [PROGRAMS / program],
        env=os.environ | asking,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
    )
    assert program in script.stdout
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here: its script was made, and not read")
    subprocess.run([shell, "-n"], input=script.stdout, text=True, timeout=PATIENCE, check=True)


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
def test_bash_itself_completes_a_command() -> None:
    ask = (
        'eval "$(_INTERCEPTCTL_COMPLETE=bash_source interceptctl)"; '
        "COMP_WORDS=(interceptctl wat); COMP_CWORD=1; "
        '_interceptctl_completion interceptctl wat; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    answer = subprocess.run(
        ["bash", "--norc", "-c", ask],
        env=os.environ | {"PATH": f"{PROGRAMS}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
    )

    assert answer.stdout == "watch\n"
