"""The configuration in force, and its exchange on SIGHUP.

Owns the one place that holds it: readers ask `Settings.now` where they need a value and keep no copy. Must
not know the readers, nor how a configuration is read.
"""

from __future__ import annotations

from typing import Final

import msgspec

from interceptd.config.effective import shown
from interceptd.config.schema import Config
from interceptd.config.sources import config_keys

LIVE: Final = ("allowed_uids", "allowed_gids", "limits.", "timeouts.", "log.")
"""Keys, and tables of keys, that change while the daemon runs; the others are read once, when it starts."""


class Exchange(msgspec.Struct, frozen=True):
    """What a new configuration changed, as sentences: `key: before -> after`."""

    changed: list[str]
    needs_restart: list[str]


class Settings:
    """What `now` holds is whole and valid at every moment; it is exchanged in one step."""

    def __init__(self, config: Config) -> None:
        self.now = config

    def exchange(self, wanted: Config) -> Exchange:
        """Take over what may change live; what needs a restart stays as it is."""
        before, after = config_keys(self.now), config_keys(wanted)
        differing = {
            key: f"{key}: {shown(key, before[key])} -> {shown(key, after[key])}"
            for key in before
            if before[key] != after[key]
        }
        live = [key for key in differing if key.startswith(LIVE)]
        self.now = msgspec.structs.replace(
            self.now, **{name: getattr(wanted, name) for name in {key.partition(".")[0] for key in live}}
        )
        return Exchange(
            [differing[key] for key in live], [text for key, text in differing.items() if key not in live]
        )
