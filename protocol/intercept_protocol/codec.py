"""Converts typed requests and replies to and from the maps on the wire.

Owns validation, field by field, and the wording of its errors. Must not know any method: see `messages`.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TypeVar, get_args, get_origin, get_type_hints

import msgspec

from ._choices import Choices, choices_at, narrowed
from .elements import about_element
from .errors import ProtocolViolation, WireError
from .messages import HELLOS, PROTOCOL_VERSION, Call, Hello


def role_of(hello: Hello) -> str:
    """The role in a hello, as on the wire."""
    return str(hello.__struct_config__.tag)


T = TypeVar("T")
Reply = TypeVar("Reply")

_BYTES_ARE_BYTES = (bytes,)
"""For msgspec, which would otherwise decode a string as the base64 of bytes."""
_MISSING, _UNKNOWN = "is missing", "unknown field"
_QUOTED = 120
"""Characters of the peer's text that an error quotes."""
_NOT_A_CHOICE = ("invalid enum value", "expected `str")
"""How msgspec's messages start when an enumerated field has another value."""


def decode_call(methods: Mapping[str, type[T]], method: str, params: list[object]) -> T:
    """The typed request. Raises `WireError`: ENOSYS for an unknown method, EINVAL that names the field."""
    struct = methods.get(method)
    if struct is None:
        raise WireError(errno.ENOSYS, f"no method {method!r:.80} for this role", methods=sorted(methods))
    return decode_fields(struct, method, params)


def decode_fields(struct: type[T], method: str, params: list[object]) -> T:
    """Convert `params`, an array of at most one map, to `struct`. Raises `WireError` EINVAL."""
    try:
        return _decode(struct, params)
    except WireError as error:
        raise WireError(error.number, f"{method}: {error.message}", **error.details) from None


def _decode(struct: type[T], params: list[object]) -> T:
    """The same. The error does not name the method."""
    fields = _fields(params)
    if None in fields.values():
        optional = _optional(struct)
        fields = {name: item for name, item in fields.items() if item is not None or name not in optional}
    _check_words(struct, fields)
    try:
        return msgspec.convert(fields, struct, builtin_types=_BYTES_ARE_BYTES)
    except msgspec.ValidationError as error:
        _check_elements(struct, fields)
        path, why = _explain(str(error))
        field = path if why in (_MISSING, _UNKNOWN) else path.partition("[")[0]
        choices = choices_at(struct, path) if why.startswith(_NOT_A_CHOICE) else None
        if choices is None or not choices.words:
            raise WireError(errno.EINVAL, f"{field}: {why}", field=field) from None
        raise _no_choice(field, choices, why) from None


def _check_words(struct: type, fields: Mapping[object, object]) -> None:
    """Raise the error about the first word that the type of its field has, and this request does not take."""
    for field, choices in narrowed(struct).items():
        if isinstance(word := fields.get(field), str) and word not in choices.words:
            raise _no_choice(field, choices, f"invalid enum value {word!r:.{_QUOTED}}")


def _no_choice(field: str, choices: Choices, why: str) -> WireError:
    message = f"{field}: must be {choices}; {why}"
    return WireError(errno.EINVAL, message, field=field, choices=list(choices.words))


def _check_elements(struct: type, fields: Mapping[object, object]) -> None:
    """Raise the error about the first element of a list of maps that is wrong, if one is."""
    for name, element in _lists_of_maps(struct):
        items = fields.get(name)
        for index, item in enumerate(items if isinstance(items, list) else ()):
            with about_element(name, index):
                if not isinstance(item, dict):
                    raise WireError(errno.EINVAL, "must be a map of fields", field="params")
                _decode(element, [item])


@cache
def _lists_of_maps(struct: type) -> Sequence[tuple[str, type[msgspec.Struct]]]:
    """The fields of a request that are lists of maps, with the type of an element."""
    return [
        (name, element)
        for name, hint in get_type_hints(struct).items()
        if get_origin(hint) is list
        for element in get_args(hint)
        if isinstance(element, type) and issubclass(element, msgspec.Struct)
    ]


def decode_hello(params: list[object]) -> Hello:
    """The typed hello. Another protocol version is EPROTONOSUPPORT, before any other field is checked."""
    fields = _fields(params)
    version = fields.get("protocol")
    if version is None:
        raise WireError(errno.EINVAL, "hello: protocol: is missing", field="protocol")
    if type(version) is int and version != PROTOCOL_VERSION:
        raise WireError(
            errno.EPROTONOSUPPORT,
            f"hello: unsupported protocol {version} (supported: {PROTOCOL_VERSION})",
            supported=[PROTOCOL_VERSION],
        )
    role = fields.get("role")
    if not isinstance(role, str) or role not in HELLOS:
        raise WireError(
            errno.EINVAL, f"hello: role: must be one of {', '.join(HELLOS)}", field="role", choices=[*HELLOS]
        )
    return decode_fields(HELLOS[role], "hello", params)


def decode_reply(call: Call[Reply], result: object) -> Reply:
    """The typed reply of a peer. Raises `ProtocolViolation` EPROTO if it is malformed."""
    try:
        reply: Reply = msgspec.convert(result, call.REPLY, builtin_types=_BYTES_ARE_BYTES)
    except msgspec.ValidationError as error:
        raise ProtocolViolation(errno.EPROTO, f"{call.METHOD}: malformed answer: {error!s:.200}") from None
    return reply


def to_fields(value: msgspec.Struct) -> dict[str, object]:
    """A request or reply as the map on the wire, without the fields that are None."""
    fields: dict[str, object] = msgspec.to_builtins(value, builtin_types=_BYTES_ARE_BYTES)
    return {name: item for name, item in fields.items() if item is not None}


def _fields(params: list[object]) -> dict[object, object]:
    match params:
        case []:
            return {}
        case [dict(fields)]:
            return fields
        case _:
            raise WireError(errno.EINVAL, "params must be an array of at most one map", field="params")


def _optional(struct: type) -> frozenset[str]:
    """The fields that may be absent, and may therefore also be nil."""
    return frozenset(field.name for field in msgspec.structs.fields(struct) if not field.required)


def _explain(text: str) -> tuple[str, str]:
    """msgspec's message as (field, problem), shortened: it quotes the peer, who may have sent 64 KiB."""
    for prefix, verdict in (
        ("Object missing required field `", _MISSING),
        ("Object contains unknown field `", _UNKNOWN),
    ):
        if text.startswith(prefix):
            return text.removeprefix(prefix).removesuffix("`")[:_QUOTED], verdict
    why, _, path = text.rpartition(" - at `")
    if path.startswith("key`"):
        return "params", "every field name must be a string"
    return path.removesuffix("`").removeprefix("$."), why[:1].lower() + why[1:_QUOTED]
