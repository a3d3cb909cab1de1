"""What a shell may complete beyond options and words: paths, and partitions, by asking the daemon.

Owns that question, which must be quick and may not fail; must not know commands.
"""

from __future__ import annotations

from typing import Final

import click
from click.shell_completion import CompletionItem

from intercept_protocol.text import visible

from . import operator_client

PATIENCE: Final = 1.0
"""Seconds that somebody who pressed Tab waits at most for each answer."""
SOCKET_PATH: Final = click.Path(readable=False)
"""Completed as a path and not checked: nobody reads a socket, and what `connect` says about it is worded by
`asking`."""


def partition_ids(context: click.Context, _: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The partitions whose ids begin so, each with its name; none where the daemon cannot be asked."""
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
