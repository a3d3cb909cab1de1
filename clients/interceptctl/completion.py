"""Shell completion of paths and of partition ids, which are fetched from the daemon.

Owns the request, which must be quick and must not fail; must not know commands.
"""

from __future__ import annotations

from typing import Final

import click
from click.shell_completion import CompletionItem

from intercept_protocol.text import visible

from . import operator_client

PATIENCE: Final = 1.0
"""Seconds to wait for each answer: a user who pressed Tab is waiting."""
SOCKET_PATH: Final = click.Path(readable=False)
"""Completed as a path, not checked: `operator_client` reports what `connect` says."""


def partition_ids(context: click.Context, _: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The partitions whose ids start with `incomplete`; none if the daemon cannot be reached."""
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
