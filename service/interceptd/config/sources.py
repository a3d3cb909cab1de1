"""The sources of the configuration: defaults, a TOML file, the environment, flags; later ones override.

Owns their order, the spelling of a key in each (`limits.operators`, INTERCEPTD_LIMITS__OPERATORS,
`--set limits.operators=3`) and the errors, which name the source, the key and what was expected. Must not
know what the keys mean.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final, Literal, get_args, get_origin, get_type_hints

import msgspec

from intercept_protocol.text import visible
from interceptd.config.schema import Config
from interceptd.connections.listen_address import ListenAddress

PREFIX: Final = "INTERCEPTD_"
CHAOS_VARIABLE: Final = "INTERCEPTD_CHAOS"
"""For tests. It is not a key, so that no file can turn it on."""
NOT_KEYS: Final = frozenset({CHAOS_VARIABLE, "INTERCEPTD_KEEP"})
"""Variables of ours that set no key; the second one belongs to `systemd/fd_store.py`."""
NOT_SET: Final = "default"

Table = dict[str, object]
"""Values by dotted key."""


class ConfigError(Exception):
    """An invalid configuration; the text names the source, the key and what was expected, and is safe to
    print on a terminal."""

    def __init__(self, message: str) -> None:
        super().__init__(visible(message))


class Setting(msgspec.Struct, frozen=True):
    """One key and its value as text; `origin` names the source, for people."""

    origin: str
    key: str
    text: str


class Loaded(msgspec.Struct, frozen=True):
    """A configuration, and the origin of each key that was set."""

    config: Config
    origins: Mapping[str, str] = msgspec.field(default_factory=dict)

    def values(self) -> Iterator[tuple[str, object, str]]:
        """Every key with its value and its origin, in the order of the schema."""
        for key, value in config_keys(self.config).items():
            yield key, value, self.origins.get(key, NOT_SET)


class Sources(msgspec.Struct, frozen=True):
    """What is read at the start and at every reload. Flags and environment stay those of the start."""

    file: Path | None = None
    environment: Mapping[str, str] = msgspec.field(default_factory=dict)
    flags: tuple[Setting, ...] = ()

    def load(self) -> Loaded:
        """Load all sources; blocks while it reads the file. Raises `ConfigError`."""
        values: Table = {}
        origins: dict[str, str] = {}
        for origin, table in self._tables():
            _converted(table, origin)  # each on its own, so that the error names the source
            keys = flat(table)
            values |= keys
            origins |= dict.fromkeys(keys, origin)
        return Loaded(_converted(_nested(values), "configuration"), origins)

    def _tables(self) -> Iterator[tuple[str, dict[str, object]]]:
        if self.file is not None:
            yield str(self.file), _read(self.file)
        for setting in (*_from_environment(self.environment), *self.flags):
            yield setting.origin, _nested({setting.key: _value(setting)})


def load_config(path: Path | None) -> Config:
    """The configuration of one file, or the defaults for None. Raises `ConfigError`."""
    return Sources(path).load().config


def flat(table: Mapping[str, object], prefix: str = "") -> Table:
    """Nested tables as one table with dotted keys."""
    keys: Table = {}
    for name, value in table.items():
        keys |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return keys


def config_keys(config: Config) -> Table:
    """Every key of a configuration with its value as in a file."""
    return flat(msgspec.to_builtins(config, enc_hook=str))  # `ListenAddress` is the only type that TOML lacks


def set_flag(text: str) -> Setting:
    """Parse the `KEY=VALUE` of --set. Raises ValueError."""
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise ValueError(f"expected KEY=VALUE, got {text!r}")
    return Setting(f"--set {key}", key, value)


def _read(file: Path) -> dict[str, object]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{file}: is not valid TOML: {error}") from None
    except RecursionError:
        raise ConfigError(f"{file}: is nested too deeply") from None


def _from_environment(environment: Mapping[str, str]) -> Iterable[Setting]:
    for name, text in sorted(environment.items()):
        if name.startswith(PREFIX) and name not in NOT_KEYS:
            key = name.removeprefix(PREFIX).lower().replace("__", ".")
            yield Setting(f"environment: {name}", key, text)


def _value(setting: Setting) -> object:
    """The value of a setting in the syntax of the file, except that text needs no quotes."""
    hint = _type_of(setting.key)
    if get_origin(hint) is Literal or not {str, ListenAddress}.isdisjoint({hint, *get_args(hint)}):
        return setting.text
    try:
        parsed = tomllib.loads(f"value = {setting.text}")
    except (tomllib.TOMLDecodeError, RecursionError):
        return setting.text  # the error is then about its type
    return parsed["value"] if len(parsed) == 1 else setting.text


def _nested(table: Table) -> dict[str, object]:
    nested: dict[str, object] = {}
    for key, value in table.items():
        *path, name = key.split(".")
        inner = nested
        for part in path:
            deeper = inner.setdefault(part, {})
            assert isinstance(deeper, dict), "each source was converted on its own"
            inner = deeper
        inner[name] = value
    return nested


def _converted(table: Mapping[str, object], origin: str) -> Config:
    try:
        config = msgspec.convert(table, Config, dec_hook=_decode)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{origin}: {_explain(str(error))}") from None
    for key in ("socket", "operator_socket"):
        if not _is_file_path(getattr(config, key)):
            raise ConfigError(f"{origin}: {key}: expected the path of a socket, got {getattr(config, key)!r}")
    return config


def _is_file_path(path: str | None) -> bool:
    return path is None or (bool(Path(path).name) and "\0" not in path)


def _decode(hint: type, value: object) -> object:
    """Decode a type that TOML lacks."""
    assert hint is ListenAddress, "the schema has no other such type"
    if not isinstance(value, str):
        raise TypeError(f"expected `str`, got `{type(value).__name__}`")
    return ListenAddress(value)


def _explain(text: str) -> str:
    why, _, where = text.rpartition(" - at `$") if " - at `$" in text else (text, "", "")
    where = where.rstrip("`").lstrip(".")
    if why.startswith("Object contains unknown field `"):
        key = why.removeprefix("Object contains unknown field `").rstrip("`")
        return f"{f'{where}.' if where else ''}{key}: unknown key"
    if why.startswith("Invalid enum value "):
        got = why.removeprefix("Invalid enum value ")
        why = f"expected one of {', '.join(get_args(_type_of(where)))}, got {got}"
    return f"{where or 'the file'}: {why[:1].lower() + why[1:]}"


def _type_of(key: str) -> object:
    """The type of a key; None for an unknown key."""
    hint: object = Config
    for name in key.split("."):
        hint = get_type_hints(hint).get(name) if isinstance(hint, type) else None
    return hint
