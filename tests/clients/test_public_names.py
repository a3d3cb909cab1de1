"""What `help` shows of the client library: every exported name explains itself and is found where it says."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from typing import Final

import pytest

import intercept_client
import intercept_protocol
from fakes.documents import HANDING_OVER, VMM

MODULES: Final = (
    "intercept_client",
    "intercept_client.kvm",
    "intercept_client.libc",
    "intercept_client.memory",
    "intercept_client.trio_memory",
)
EXPORTED: Final = [(module, name) for module in MODULES for name in importlib.import_module(module).__all__]
UNCLEAR: Final = re.compile(r"^(?:.|_.*|args|kwargs|arg\d*|obj|tmp|val)$")
"""Names of parameters that say nothing."""


def exported(module: str, name: str) -> object:
    value: object = getattr(importlib.import_module(module), name)
    return value


def own_methods(value: type) -> Iterator[tuple[str, object]]:
    """What a class of ours offers; enums and exceptions inherit methods that Python documents."""
    for name, member in inspect.getmembers(value, callable):
        owner = next((base for base in value.__mro__ if name in vars(base)), object)
        if not name.startswith("_") and owner.__module__.startswith(
            ("intercept_client", "intercept_protocol")
        ):
            yield name, member


def callables(module: str, name: str) -> Iterator[tuple[str, object]]:
    """An exported function, or the methods of an exported class."""
    value = exported(module, name)
    if isinstance(value, type):
        yield from own_methods(value)
    elif callable(value) and not hasattr(value, "__args__"):
        yield name, value


def explains(name: str, shown: object) -> bool:
    """Whether it has a docstring of its own: not that of a base, nor the signature that a dataclass makes."""
    text = vars(shown).get("__doc__") if inspect.isclass(shown) else inspect.getdoc(shown)
    return bool(text) and not str(text).startswith(f"{name}(")


@pytest.mark.parametrize(("module", "name"), EXPORTED)
def test_an_exported_class_or_function_and_its_methods_have_docstrings(module: str, name: str) -> None:
    value = exported(module, name)
    shown = [(name, value)] if inspect.isclass(value) else []
    assert [one for one, what in (*shown, *callables(module, name)) if not explains(one, what)] == []


@pytest.mark.parametrize(("module", "name"), EXPORTED)
def test_an_exported_class_names_a_public_module_from_which_it_can_be_imported(
    module: str, name: str
) -> None:
    value = exported(module, name)
    if not inspect.isclass(value) and not inspect.isfunction(value):
        return
    private = re.compile(r"^intercept_.*\._")
    assert [shown for shown in getattr(value, "__mro__", (value,)) if private.match(shown.__module__)] == []
    assert getattr(importlib.import_module(value.__module__), value.__name__) is value


@pytest.mark.parametrize(("module", "name"), EXPORTED)
def test_the_parameters_of_an_exported_name_say_what_they_are(module: str, name: str) -> None:
    unclear = [
        f"{called}({parameter})"
        for called, one in callables(module, name)
        if callable(one)
        for parameter in inspect.signature(one).parameters
        if UNCLEAR.match(parameter)
    ]
    assert unclear == []


def test_the_public_modules_are_those_that_are_documented() -> None:
    """Any other has an underscore."""
    public = {
        module.name
        for package in (intercept_client, intercept_protocol)
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}.")
        if not module.name.rpartition(".")[2].startswith("_")
    }
    assert {name for name in public if name.startswith("intercept_client")} == set(MODULES) - {
        "intercept_client"
    }
    for name in public:
        assert (
            f"`{name.removeprefix('intercept_protocol.')}`" in (intercept_protocol.__doc__ or "")
            or name in MODULES
        )


def test_a_name_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(ImportError, match="BlockingVpm"):
        exec("from intercept_client import BlockingVpm")


def test_a_program_of_threads_does_not_import_trio() -> None:
    program = (
        "import sys, intercept_client, intercept_client.memory, intercept_client.kvm;"
        "print('trio' in sys.modules); intercept_client.TrioVmm; print('trio' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


def test_a_vmms_example_imports_the_client_library_alone_and_is_short() -> None:
    for example in (VMM, HANDING_OVER):
        assert re.findall(r"^(?:from|import) .*", example, flags=re.MULTILINE) == [
            "from intercept_client import ("
        ]
    assert len(VMM.splitlines()) < 15


def test_the_version_is_that_of_the_distribution() -> None:
    assert intercept_client.__version__ == version("interceptd")
