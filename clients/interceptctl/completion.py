"""Shell completion of paths and of partition ids, which are fetched from the daemon.

Owns the request, which must be quick and must not fail; must not know commands.
"""

from __future__ import annotations

import os
from typing import Final

import click
from click.shell_completion import CompletionItem

from intercept_protocol.text import visible

from . import operator_client

PATIENCE: Final = 1.0
"""Seconds to wait for each answer: a user who pressed Tab is waiting."""


class SocketPath(click.Path):
    """Completed as a path. An empty one is refused; for others `connect` says what is wrong."""

    def __init__(self) -> None:
        super().__init__(readable=False)

    def convert(
        self, value: str | os.PathLike[str], param: click.Parameter | None, ctx: click.Context | None
    ) -> str | bytes | os.PathLike[str]:
        if not os.fspath(value):
            self.fail("an empty path names no socket", param, ctx)
        return super().convert(value, param, ctx)


SOCKET_PATH: Final = SocketPath()


def partition_ids(context: click.Context, _: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The partitions whose ids start with `incomplete`; none if the daemon cannot be reached."""
    path = context.find_root().params["path"]
    try:
        with operator_client.operator(path, PATIENCE) as operator:
            summaries = operator.list_partitions()
    except click.ClickException:
        return []
    return [
        CompletionItem(str(summary.partition_id), help=visible(summary.name))
        for summary in summaries
        if str(summary.partition_id).startswith(incomplete)
    ]
