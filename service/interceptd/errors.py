"""Errors that one part of the daemon raises and a higher one handles."""

from __future__ import annotations


class PartitionLost(Exception):
    """The guest may still reach memory that it must not, and nothing can revoke it: the partition ends."""
