"""`python -m interceptctl`, and the command of that name."""

from __future__ import annotations

from . import cli
from .output import guarded_stdout


def main() -> None:
    with guarded_stdout():
        cli.main(prog_name="interceptctl")


if __name__ == "__main__":
    main()
