"""Every test asserts something that can fail.

A test looks by an `assert`, by `pytest.raises`, or by calling a helper that fails where the test should. The
helpers are listed here, and those of ours are looked into as well.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
HELPERS = {
    "assert_names": "protocol/test_messages.py",
    "assert_same_frames": "live/test_resolving.py",
    "eventually": "fakes/eventually.py",
    "in_thread": "kvm/test_daemon_death.py",
}
"""Functions of ours that assert, each with its file."""
OTHERS = {
    "TARGETS[target]": "each function of fuzz/targets.py asserts what it states, or fails in what it calls",
    "find": "hypothesis: raises unless an example is found",
    "pytest.fail": "",
    "pytest.raises": "",
    "run_state_machine_as_test": "hypothesis: raises what a step of the machine does, which asserts",
    "trio.testing.assert_checkpoints": "",
    "trio.testing.assert_no_checkpoints": "",
    "vmm.reports.wait_for": "TimeoutError unless the guest reports the value",
}
"""What else raises, as tests call them, and when."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(file: Path) -> Iterator[Function]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, Function):
            yield node


def asserts(function: Function) -> bool:
    return any(isinstance(node, ast.Assert) for node in ast.walk(function))


def looks(function: Function) -> bool:
    called = {ast.unparse(node.func) for node in ast.walk(function) if isinstance(node, ast.Call)}
    return asserts(function) or not called.isdisjoint({*HELPERS, *OTHERS})


def cannot_fail(assertion: ast.Assert, function: Function) -> bool:
    """Whether it asks of one argument alone whether it is there, or in a range: asked to use the argument."""
    match assertion.test:
        case ast.Compare(ast.Name(name), [ast.IsNot()], [ast.Constant(None)]):
            return name in {argument.arg for argument in function.args.args}
        case ast.Compare(ast.Name(name), [ast.In()], [ast.Call(ast.Name("range"))]):
            return name in {argument.arg for argument in function.args.args}
    return False


TEST_FILES = sorted(TESTS.rglob("test_*.py"))
CONFTESTS = sorted(TESTS.rglob("conftest.py"))


@pytest.mark.parametrize("file", TEST_FILES, ids=[str(file.relative_to(TESTS)) for file in TEST_FILES])
def test_every_test_of_a_file_asserts_something(file: Path) -> None:
    blind = [
        f"{function.name} (line {function.lineno})"
        for function in functions(file)
        if function.name.startswith("test_") and not looks(function)
    ]
    assert blind == []


@pytest.mark.parametrize("file", TEST_FILES + CONFTESTS, ids=lambda file: str(file.relative_to(TESTS)))
def test_no_assertion_of_a_file_is_there_to_use_an_argument(file: Path) -> None:
    idle = [
        f"{function.name} (line {node.lineno})"
        for function in functions(file)
        for node in ast.walk(function)
        if isinstance(node, ast.Assert) and cannot_fail(node, function)
    ]
    assert idle == []


@pytest.mark.parametrize("file", TEST_FILES, ids=[str(file.relative_to(TESTS)) for file in TEST_FILES])
def test_no_assertion_of_a_file_is_a_choice_between_two(file: Path) -> None:
    """`assert a == b if c else d` asserts `d`, not `a == d`, where `c` is false."""
    choices = [
        f"line {node.lineno}"
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Assert) and isinstance(node.test, ast.IfExp)
    ]
    assert choices == []


@pytest.mark.parametrize("name", HELPERS)
def test_every_helper_that_asserts_for_a_test_does_assert(name: str) -> None:
    (helper,) = [function for function in functions(TESTS / HELPERS[name]) if function.name == name]
    assert asserts(helper)
