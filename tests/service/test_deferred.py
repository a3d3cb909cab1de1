"""Modules whose loading is put off until somebody uses them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from interceptd.deferred import deferred

NAME = "deferred_by_a_test"
INNER = f"{NAME}.inner"
PROGRAM = """
from pathlib import Path
ANSWER = 42
LOADED = Path(__file__).with_name("loaded")
LOADED.touch()
"""


@pytest.fixture
def loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """There once the package `NAME` was loaded."""
    package = tmp_path / NAME
    package.mkdir()
    (package / "__init__.py").write_text(PROGRAM)
    (package / "inner.py").write_text("ANSWER = 43")
    monkeypatch.syspath_prepend(tmp_path)
    yield package / "loaded"
    for name in (NAME, INNER):
        sys.modules.pop(name, None)


def test_a_deferred_module_is_not_loaded_however_often_it_is_imported(loaded: Path) -> None:
    with deferred(NAME):
        import_module(NAME)
        import_module(NAME)
    assert not loaded.exists()


def test_a_deferred_module_is_loaded_when_it_is_used_after_the_block(loaded: Path) -> None:
    with deferred(NAME):
        module = import_module(NAME)
    assert (module.ANSWER, loaded.exists()) == (42, True)


def test_a_deferred_module_is_loaded_when_it_is_used_within_the_block(loaded: Path) -> None:
    with deferred(NAME):
        answer = import_module(NAME).ANSWER
        again = import_module(NAME).ANSWER
    assert (answer, again, loaded.exists()) == (42, 42, True)


def test_a_module_inside_a_deferred_one_is_imported_together_with_it(loaded: Path) -> None:
    with deferred(NAME):
        assert import_module(INNER).ANSWER == 43
    assert loaded.exists()


def test_an_import_after_the_block_gets_the_module_itself(loaded: Path) -> None:
    with deferred(NAME):
        stand_in = import_module(NAME)
    module = import_module(NAME)
    assert loaded.exists()
    assert module is not stand_in
    assert stand_in.LOADED is module.LOADED


def test_a_module_that_is_loaded_already_is_left_alone(loaded: Path) -> None:
    before = import_module(NAME)
    with deferred(NAME):
        within = import_module(NAME)
    assert loaded.exists()
    assert (within, sys.modules[NAME]) == (before, before)


def test_a_block_that_fails_leaves_no_stand_in_behind(loaded: Path) -> None:
    with pytest.raises(ZeroDivisionError), deferred(NAME):
        _ = 1 / 0
    assert NAME not in sys.modules
    assert not loaded.exists()


def test_a_deferred_module_that_is_missing_is_an_import_error_when_it_is_used() -> None:
    with deferred("no_such_module"):
        module = import_module("no_such_module")
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        _ = module.ANSWER
