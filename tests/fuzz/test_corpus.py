"""What fuzzing found of interest, and what once was a bug: every kept input holds again."""

from __future__ import annotations

import pytest

from fuzz.targets import KEPT, TARGETS

KEPT_INPUTS = [(name, file.name) for name in TARGETS for file in sorted((KEPT / name).iterdir())]


@pytest.mark.parametrize("target", TARGETS)
def test_each_target_has_a_corpus(target: str) -> None:
    assert list((KEPT / target).iterdir())


@pytest.mark.parametrize(("target", "name"), KEPT_INPUTS)
def test_corpus_input_passes_its_target(target: str, name: str) -> None:
    TARGETS[target]((KEPT / target / name).read_bytes())
