"""The package's metadata: its dependencies are what it imports, and it says that it is typed."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parents[2]
PROJECT: Final = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PACKAGES: Final = [ROOT / path for path in PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]]
OURS: Final = {package.name for package in PACKAGES}


def imported(module: Path) -> Iterator[str]:
    """The top-level names that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        match node:
            case ast.Import(names=names):
                yield from (alias.name.partition(".")[0] for alias in names)
            case ast.ImportFrom(module=str(name), level=0):
                yield name.partition(".")[0]


def normalized(distribution: str) -> str:
    """PEP 503."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


def needed(modules: Iterable[Path]) -> set[str]:
    """The distributions that they import."""
    names = {name for module in modules for name in imported(module)}
    installed = packages_distributions()
    return {normalized(installed[name][0]) for name in names - OURS - sys.stdlib_module_names}


def required(texts: Iterable[str]) -> set[str]:
    return {normalized(re.split(r"[<>=!~ ;\[]", text)[0]) for text in texts}


def test_the_dependencies_match_the_imports() -> None:
    report = ROOT / "clients" / "interceptctl" / "report"
    modules = {module for package in PACKAGES for module in package.rglob("*.py")}
    of_report = set(report.glob("*.py"))
    always = required(PROJECT["project"]["dependencies"])
    assert needed(modules - of_report) == always
    assert needed(of_report) - always == required(PROJECT["project"]["optional-dependencies"]["report"])


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.name)
def test_a_package_says_that_it_is_typed(package: Path) -> None:
    """PEP 561: without the marker a type checker takes its imports for untyped."""
    assert (package / "py.typed").is_file()


def test_no_part_of_a_package_is_a_symbolic_link() -> None:
    """An sdist leaves it out, and so does the wheel that is built from it."""
    assert [path for package in PACKAGES for path in package.rglob("*") if path.is_symlink()] == []


def test_the_operators_tool_uses_the_public_client_library_alone() -> None:
    """Or what it needs is missing from the library for everybody else."""
    private = re.compile(r"(?:from|import) intercept_(?:client|protocol)(?:\.\w+)*\._")
    tool = (ROOT / "clients" / "interceptctl").rglob("*.py")
    assert [path.name for path in tool if private.search(path.read_text(encoding="utf-8"))] == []
