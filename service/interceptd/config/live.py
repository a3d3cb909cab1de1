"""The configuration in force, and its replacement on SIGHUP.

Owns the only reference to it: callers read `Settings.now` whenever they need a value, and keep no copy. Must
not know the callers, nor how a configuration is loaded.
"""

from __future__ import annotations

from typing import Final

import msgspec

from interceptd.config.effective import shown
from interceptd.config.schema import Config
from interceptd.config.sources import config_keys

LIVE: Final = ("allowed_uids", "allowed_gids", "limits.", "timeouts.", "log.")
"""Keys, and tables of keys, that a reload changes; the others are read only at the start."""


class Exchange(msgspec.Struct, frozen=True):
    """What a new configuration changed: lines `key: before -> after`."""

    changed: list[str]
    needs_restart: list[str]


class Settings:
    """`now` is complete and valid at every moment: it is replaced in one step."""

    def __init__(self, config: Config) -> None:
        self.now = config

    def exchange(self, wanted: Config) -> Exchange:
        """Adopt the keys that may change live, and leave those that need a restart."""
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
