"""Methods made of functions that describe what to do.

Owns what `help` and `inspect.signature` say about such a method. Must not know what is described, nor who
does it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable


def as_method(method: Callable[..., object], build: Callable[..., object], *, wrapper: str) -> None:
    """Make `method` show itself as a method with the name, docstring and parameters of `build`.

    Its result is what `build` returns without the `wrapper` around it: `int` for `Exchange[int]`.
    """
    built = inspect.signature(build)
    myself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    result = str(built.return_annotation).removeprefix(f"{wrapper}[").removesuffix("]")
    method.__name__ = build.__name__
    method.__qualname__ = build.__name__
    method.__doc__ = build.__doc__
    method.__signature__ = built.replace(  # type: ignore[attr-defined]  # what inspect.signature looks at
        parameters=[myself, *built.parameters.values()], return_annotation=result
    )
