"""What a shell may complete beyond options and words: paths, and partitions, by asking the daemon.

Owns that question, which must be quick and may not fail; must not know commands.
"""

from __future__ import annotations

import os
from typing import Final

import click
from click.shell_completion import CompletionItem

from intercept_protocol.text import visible

from . import operator_client

PATIENCE: Final = 1.0
"""Seconds that somebody who pressed Tab waits at most for each answer."""


class SocketPath(click.Path):
    """Completed as a path. Whether a socket is there is for `connect` to say; an empty path names nothing."""

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
    """The partitions whose ids begin so, each with its name; none where the daemon cannot be asked."""
    path = context.find_root().params["path"]
    try:
        with operator_client.operator(path, PATIENCE) as operator:
            summaries = operator_client.all_partitions(operator)
    except click.ClickException:
        return []
    return [
        CompletionItem(str(summary.partition_id), help=visible(summary.name))
        for summary in summaries
        if str(summary.partition_id).startswith(incomplete)
    ]
