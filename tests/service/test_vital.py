"""How the process ends where something outlives it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest

from interceptd import vital


class _Full:
    """A stream that takes nothing more."""

    def flush(self) -> None:
        raise BrokenPipeError


@pytest.fixture
def exits(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    statuses: list[int] = []
    with monkeypatch.context() as patched:
        patched.setattr(os, "_exit", statuses.append)
        yield statuses


@pytest.mark.parametrize("stream", [None, _Full()], ids=["closed", "full"])
def test_nothing_stops_a_process_that_leaves(
    stream: object, exits: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To unwind would end every partition."""
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", stream)
        patched.setattr(sys, "stderr", stream)
        vital.leave(vital.EX_SOFTWARE)
    assert exits == [vital.EX_SOFTWARE]
