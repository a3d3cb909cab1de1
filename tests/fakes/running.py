"""A call that runs in the background, and what became of it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Generic, ParamSpec, TypeVar

import outcome
import trio

Args = ParamSpec("Args")
Result = TypeVar("Result")


class Running(Generic[Result]):
    """Started at once; `result` waits for it and raises what it raised."""

    def __init__(
        self,
        nursery: trio.Nursery,
        call: Callable[Args, Awaitable[Result]],
        *args: Args.args,
        **kwargs: Args.kwargs,
    ) -> None:
        self._outcome: outcome.Outcome[Result] | None = None
        self._over = trio.Event()
        self._scope = trio.CancelScope()

        async def run() -> None:
            with self._scope:
                try:
                    self._outcome = outcome.Value(await call(*args, **kwargs))
                except Exception as error:
                    self._outcome = outcome.Error(error)
            self._over.set()

        nursery.start_soon(run)

    @property
    def done(self) -> bool:
        return self._over.is_set()

    async def result(self) -> Result:
        await self._over.wait()
        assert self._outcome is not None, "the call was cancelled"
        return self._outcome.unwrap()

    async def cancel(self) -> bool:
        """Cancel the call and wait for its end; whether it was cut off before it had a result."""
        self._scope.cancel()
        await self._over.wait()
        return self._outcome is None
