"""The configuration for people: a summary, a file with every key and its origin, one value for a log line.

Owns the wording; must not read any source.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from intercept_protocol.text import visible
from interceptd.config.schema import Config
from interceptd.config.sources import Loaded

_ORIGIN_COLUMN = 56
MODE = "socket_mode"
"""How the keys with an octal value end."""


def summary(config: Config) -> str:
    """What a daemon with this configuration would do, in one sentence."""
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
    """The lines of a configuration file with every key; a comment after each value names its origin."""
    derived = {"operator_socket": loaded.config.operator_path, "allowed_uids": sorted(loaded.config.uids)}
    for key, value, origin in loaded.values():
        shown = derived[key] if value is None and key in derived else value
        assignment = f"# {key} is not set" if shown is None else f"{key} = {_toml(key, shown)}"
        yield f"{assignment:<{_ORIGIN_COLUMN - 1}} # {visible(origin)}"


def shown(key: str, value: object) -> object:
    """A value as a log line shows it."""
    if value is None:
        return "default"
    return _toml(key, value) if key.endswith(MODE) else value


def _toml(key: str, value: object) -> str:
    if key.endswith(MODE):
        return f"0o{value:o}"
    plain = json.dumps(value, ensure_ascii=False)
    return plain if plain.isprintable() else json.dumps(value)  # JSON's escapes are valid in TOML
