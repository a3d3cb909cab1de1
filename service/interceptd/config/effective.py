"""The configuration as people read it: a sentence, a file with every key and its origin, a value of a change.

Owns the wording; must not read anything.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from intercept_protocol.text import visible
from interceptd.config.schema import Config
from interceptd.config.sources import Loaded

_ORIGIN_COLUMN = 56
MODE = "socket_mode"
"""The last part of keys that are read in octal."""


def summary(config: Config) -> str:
    """What a daemon with this configuration does, in a sentence."""
    uids = _listed("uid", sorted(config.uids)) if config.uids else "no uid"
    gids = f" and members of {_listed('gid', config.allowed_gids)}" if config.allowed_gids else ""
    metrics = "no metrics" if config.metrics.listen is None else f"metrics at {config.metrics.listen}"
    return visible(
        f"would serve VMMs of {uids}{gids} at {config.socket} (mode {config.socket_mode:04o}) "
        f"and operators at {config.operator_path}, {metrics}, and log {config.log.level} and above"
    )


def _listed(noun: str, numbers: Sequence[int]) -> str:
    return f"{noun}{'' if len(numbers) == 1 else 's'} {', '.join(map(str, numbers))}"


def lines(loaded: Loaded) -> Iterator[str]:
    """A configuration file with every key; behind each value, where it comes from."""
    derived = {"operator_socket": loaded.config.operator_path, "allowed_uids": sorted(loaded.config.uids)}
    for key, value, origin in loaded.values():
        shown = derived[key] if value is None and key in derived else value
        assignment = f"# {key} is not set" if shown is None else f"{key} = {_toml(key, shown)}"
        yield f"{assignment:<{_ORIGIN_COLUMN - 1}} # {visible(origin)}"


def shown(key: str, value: object) -> object:
    """A value in one line of the log."""
    if value is None:
        return "default"
    return _toml(key, value) if key.endswith(MODE) else value


def _toml(key: str, value: object) -> str:
    if key.endswith(MODE):
        return f"0o{value:o}"
    plain = json.dumps(value, ensure_ascii=False)
    return plain if plain.isprintable() else json.dumps(value)  # whose escapes are TOML's, too
