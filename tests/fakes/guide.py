"""The commands of the pages in deploy/, section by section.

Owns where they stand and where each ends. Must not know what they do.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

_DEPLOY: Final = Path(__file__).parents[2] / "deploy"
GUIDE: Final = _DEPLOY / "README.md"
NIGHT: Final = _DEPLOY / "THURSDAY_NIGHT.md"
ALERTS: Final = _DEPLOY / "prometheus" / "alerts.yml"
_BLOCK: Final = re.compile(r"^```console\n(.*?)^```", re.DOTALL | re.MULTILINE)
_COMMAND: Final = re.compile(r"^[$#] ((?:.*\\\n)*.*)$", re.MULTILINE)
_COMMENT: Final = re.compile(r" +#[^'\"]*$")


def commands(section: str, page: Path = GUIDE) -> Sequence[str]:
    """What the section has a reader type, without comments."""
    text = page.read_text(encoding="utf-8").split(f"\n## {section}\n")[1].split("\n## ")[0]
    typed = [command for block in _BLOCK.findall(text) for command in _COMMAND.findall(block)]
    return [_COMMENT.sub("", command) for command in typed]
