"""What `help`, reprs and tracebacks show of the public names.

Owns the modules that they seem to come from, and the signatures of functions that are made from others. Must
not know what any of them does.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable

_PRIVATE = ("intercept_client._", "intercept_client.kvm._")


def show_as_from(module: str, values: Iterable[object]) -> None:
    """Let `values` and their bases name `module`, unless they come from a public module."""
    for value in values:
        for shown in (*getattr(value, "__mro__", ()), value):
            if getattr(shown, "__module__", "").startswith(_PRIVATE):
                shown.__module__ = module


def as_function(
    made: Callable[..., object], build: Callable[..., object], module: str, *, first: str, wrapper: str
) -> None:
    """Make `made` show itself with the name, docstring and parameters of `build`, after a `first` parameter.

    `first` is its name, and after a colon its type. The result is what `build` returns without the `wrapper`
    around it: `int` for `Exchange[int]`. `module` is where `made` is imported from.
    """
    built = inspect.signature(build)
    name, _, annotation = first.partition(": ")
    parameter = inspect.Parameter(
        name,
        inspect.Parameter.POSITIONAL_OR_KEYWORD if not annotation else inspect.Parameter.POSITIONAL_ONLY,
        annotation=annotation or inspect.Parameter.empty,
    )
    result = str(built.return_annotation).removeprefix(f"{wrapper}[").removesuffix("]")
    made.__module__ = module
    made.__name__ = made.__qualname__ = build.__name__
    made.__doc__ = build.__doc__
    made.__signature__ = built.replace(  # type: ignore[attr-defined]  # what inspect.signature looks at
        parameters=[parameter, *built.parameters.values()], return_annotation=result
    )
