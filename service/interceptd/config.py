"""Configuration: one TOML file, every key typed, with its default here.

Owns keys, units and defaults; must not know who reads them. Errors name file, key and what was expected.
"""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Annotated, Literal, get_args, get_type_hints

import msgspec
from msgspec import Meta

from intercept_protocol.frames import MESSAGE_LIMIT
from interceptd.peer import overflow_uid

Count = Annotated[int, Meta(ge=1, le=1 << 32)]
Milliseconds = Annotated[int, Meta(ge=1, le=3_600_000)]
Uid = Annotated[int, Meta(ge=0, le=2**32 - 2)]


class ConfigError(Exception):
    """A configuration that cannot be used; the text names the file, the key and what was expected."""


class _Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class Limits(_Table, frozen=True, kw_only=True):
    """How much a client may ask for. Each is stated in `hello`; reaching one is an error that names it."""

    connections_without_hello: Count = 512
    partitions_per_uid: Count = 64
    vmms_per_uid: Count = 128
    """VMM connections, with a partition or without one yet."""
    vps_per_partition: Annotated[int, Meta(ge=1, le=256)] = 256
    notifiers_per_partition: Count = 64
    regions_per_partition: Count = 1 << 20
    mappings_per_partition: Count = 1 << 20
    """Pieces in which a partition is mapped; neighbours that continue each other are one."""
    vmas_per_partition: Count = 1 << 20
    open_invalidations_per_partition: Count = 1024
    deposit_pages_per_partition: Count = 1 << 20
    operators: Count = 32

    def stated(self) -> dict[str, int]:
        """As `hello` puts it, with those that are not configurable."""
        stated: dict[str, int] = msgspec.to_builtins(self)
        return stated | {"message_bytes": MESSAGE_LIMIT, "requests_in_flight_per_connection": 1}


class Timeouts(_Table, frozen=True, kw_only=True):
    """Bounds on waiting, in milliseconds."""

    hello_ms: Milliseconds = 5_000
    invalidate_ms: Milliseconds = 5_000
    """How long an intercept waits for an invalidation or a map to end; a partition may set its own."""
    hypervisor_ms: Milliseconds = 5_000
    """How long a VMM may take to answer a map or unmap request."""
    drain_ms: Milliseconds = 5_000
    """From SIGTERM, or the end of a partition, until what is still in flight is cut off."""


class Log(_Table, frozen=True, kw_only=True):
    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "console", "json"] = "auto"
    """`auto` is console on a terminal and json otherwise."""


class Config(_Table, frozen=True, kw_only=True):
    socket: str = "/run/interceptd/vmm.sock"
    operator_socket: str | None = None
    """Default: operator.sock beside `socket`."""
    socket_mode: Annotated[int, Meta(ge=0, le=0o777)] = 0o660
    allowed_uids: list[Uid] | None = None
    """Who may connect. Default: root and the uid that the daemon runs as, unless that is the overflow uid: so
    looks everybody in a user namespace that has no map, and so it must be named."""
    limits: Limits = Limits()
    timeouts: Timeouts = Timeouts()
    log: Log = Log()

    @property
    def operator_path(self) -> str:
        return self.operator_socket or str(Path(self.socket).with_name("operator.sock"))

    @property
    def uids(self) -> frozenset[int]:
        if self.allowed_uids is not None:
            return frozenset(self.allowed_uids)
        return frozenset({0, os.geteuid()} - {overflow_uid()})


def load_config(path: Path | None) -> Config:
    """Read a file, or give the defaults for None. Raises `ConfigError`."""
    if path is None:
        return Config()
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{path}: is not TOML: {error}") from None
    except RecursionError:
        raise ConfigError(f"{path}: is nested too deep") from None
    try:
        config = msgspec.convert(table, Config)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path}: {_explain(str(error))}") from None
    for key in ("socket", "operator_socket"):
        if not _is_file_path(getattr(config, key)):
            raise ConfigError(f"{path}: {key}: expected the path of a socket, got {getattr(config, key)!r}")
    return config


def _is_file_path(path: str | None) -> bool:
    return path is None or (bool(Path(path).name) and "\0" not in path)


def _explain(text: str) -> str:
    why, _, where = text.rpartition(" - at `$") if " - at `$" in text else (text, "", "")
    where = where.rstrip("`").lstrip(".")
    for prefix in ("Object contains unknown field `",):
        if why.startswith(prefix):
            key = why.removeprefix(prefix).rstrip("`")
            return f"{f'{where}.' if where else ''}{key}: is no key of this table"
    if why.startswith("Invalid enum value "):
        got = why.removeprefix("Invalid enum value ")
        why = f"expected one of {', '.join(_choices(where))}, got {got}"
    return f"{where or 'the file'}: {why[:1].lower() + why[1:]}"


def _choices(key: str) -> tuple[str, ...]:
    """What a key that is one of a few words may be."""
    form: type = Config
    for name in key.split("."):
        form = get_type_hints(form)[name]
    return get_args(form)
