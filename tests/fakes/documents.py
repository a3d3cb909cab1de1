"""The Python examples and the commands of the documents, as they stand there.

Owns finding them, and where they have the sockets; must not know what they do.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
DIRECTORY: Final = "/tmp/interceptd"
"""Where the documents have the sockets."""


def examples(document: str) -> list[str]:
    """The Python blocks of a document, whose path is relative to the repository."""
    text = (ROOT / document).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def commands(document: str, section: str) -> list[tuple[str, str]]:
    """The prompt, `#` for root or `$`, and the rest of the line, of each command in a section's consoles."""
    heading, kind, found = "", "", []
    for line in (ROOT / document).read_text(encoding="utf-8").splitlines():
        if line.startswith("```"):
            kind = "" if kind else line[3:] or "text"
        elif not kind and line.startswith("#"):
            heading = line.lstrip("# ")
        elif kind == "console" and heading == section and line[:2] in ("# ", "$ "):
            found.append((line[0], line[2:]))
    return found


[VMM] = examples("README.md")
[HEARING, HANDING_OVER, CHANGING, RESTORING, ADDING_RAM] = examples("clients/README.md")


def at(example: str, directory: Path) -> str:
    """The example with its sockets in `directory`."""
    assert DIRECTORY in example
    return example.replace(DIRECTORY, str(directory))


def printed(example: str) -> list[str]:
    """What it prints, by the comments beside."""
    return re.findall(r"print\(.*\)  # (.*)$", example, flags=re.MULTILINE)
