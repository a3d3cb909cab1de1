"""The C headers in other people's programs: every language that they promise, wherever they are included."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import pytest

from fakes.eventually import PATIENCE
from fakes.scripted_daemon import HangUp, Hear, ScriptedDaemon, hello, replies
from intercept_protocol.messages import PartitionCredentials

HEADER: Final = Path(__file__).parents[2] / "clients" / "c"
STRICT: Final = ("-pedantic", "-Wall", "-Wextra", "-Werror", "-Wconversion", "-Wredundant-decls")
LANGUAGES: Final = ("c99", "c11", "gnu11", "c++11", "c++17")
COMPILERS: Final = {"gcc": "g++", "clang": "clang++"}
"""By the C compiler, that of C++."""
OURS: Final = (
    '#include "intercept_hypervisor.h"\n#include "intercept_memory.h"\n#include "intercept_client.h"'
)
THEIRS: Final = "#include <sys/mman.h>\n#include <time.h>"
PROGRAM: Final = "int main(void) { return MAP_ANONYMOUS == CLOCK_MONOTONIC; }"
"""Uses names that an earlier POSIX, or strict POSIX, hides."""
EXTENSIONS: Final = "#ifdef __STRICT_ANSI__\n#define _DEFAULT_SOURCE\n#endif"
"""What a program in strict C defines itself, to have such names."""
PLACES: Final = {
    "first": (EXTENSIONS, OURS, THEIRS, PROGRAM),
    "last": (EXTENSIONS, THEIRS, OURS, PROGRAM),
    "alone": (OURS, "int main(void) { return IC_OK; }"),
}
CPP_PROGRAM: Final = """
#include "intercept_client.h"
#include <cstdio>

int main(int, char **argv) {
    static ic_connection vmm;
    ic_partition partition;
    if (ic_open_vmm(&vmm, argv[1], "guest") != IC_OK) return 1;
    ic_new_partition wanted = ic_new_partition();
    if (ic_create_partition(&vmm, &wanted, &partition) != IC_OK) return 2;
    bool lost = ic_kick(&vmm, 0) == IC_LOST;
    std::printf("partition %d lost %d ", int(partition.partition_id), lost);
    std::printf("%s: %s", vmm.error.name, vmm.error.message);
}
"""


def compiler(name: str, language: str) -> Sequence[str]:
    """Its command; skips where it is not installed."""
    command = COMPILERS[name] if "++" in language else name
    if shutil.which(command) is None:
        pytest.skip(f"{command} is not installed")
    return command, f"-std={language}", *STRICT, f"-I{HEADER}"


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES.keys())
@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("name", COMPILERS)
def test_the_header_compiles_and_hides_nothing_wherever_it_is_included(
    name: str, language: str, place: Sequence[str], tmp_path: Path
) -> None:
    assert compiled(name, language, place, tmp_path) == (0, "")


def test_the_functions_may_be_symbols_of_one_file(tmp_path: Path) -> None:
    assert compiled("gcc", "c99", ("#define IC_API", *PLACES["alone"]), tmp_path) == (0, "")


def compiled(name: str, language: str, place: Sequence[str], tmp_path: Path) -> tuple[int, str]:
    """The compiler's status, and what it says."""
    source = tmp_path / ("program.cpp" if "++" in language else "program.c")
    source.write_text("\n".join(place) + "\n")
    done = subprocess.run(
        [*compiler(name, language), "-fsyntax-only", source],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    return done.returncode, done.stderr


def test_a_program_in_cpp_speaks_to_a_daemon(socket_path: Path, tmp_path: Path) -> None:
    source = tmp_path / "program.cpp"
    source.write_text(CPP_PROGRAM)
    build = [*compiler("gcc", "c++17"), "-o", str(tmp_path / "program"), str(source)]
    subprocess.run(build, check=True, timeout=PATIENCE)
    script = [*hello(), *replies(PartitionCredentials(partition_id=7, token=bytes(16))), Hear(), HangUp()]
    with ScriptedDaemon(socket_path, (script,)):
        ran = subprocess.run(
            [tmp_path / "program", socket_path], capture_output=True, text=True, timeout=PATIENCE, check=True
        )
    assert ran.stdout == "partition 7 lost 1 receive: the daemon closed: Connection reset by peer"
