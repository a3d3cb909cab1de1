"""Examples of what the daemon refuses."""

from __future__ import annotations

import errno

from intercept_protocol import rpc
from intercept_protocol.errors import ProtocolViolation, error_name
from wire_vectors.exchanges import TOKEN
from wire_vectors.forms import MalformedVector, RefusalVector


def refused() -> list[RefusalVector]:
    translate = {"gfn": 1}
    region = {"start_gfn": 1, "page_count": 1, "start_uaddr": 4096, "kind": "auto", "writable": True}
    vma = {
        "start_uaddr": 4096, "page_count": 1, "start_pfn": 1, "readable": True, "writable": True,
        "executable": False, "io": False,
    }  # fmt: skip
    cases: list[tuple[str, str, list[object], int, str | None]] = [
        ("vmm", "translate", [], errno.EINVAL, "gfn"),
        ("vmm", "translate", [{}], errno.EINVAL, "gfn"),
        ("vmm", "translate", [{"gfn": None}], errno.EINVAL, "gfn"),
        ("vmm", "translate", [{"gfn": -1}], errno.EINVAL, "gfn"),
        ("vmm", "translate", [{"gfn": True}], errno.EINVAL, "gfn"),
        ("vmm", "translate", [{"gfn": 1.0}], errno.EINVAL, "gfn"),
        ("vmm", "translate", [{"gfn": "1"}], errno.EINVAL, "gfn"),
        ("vmm", "translate", [translate | {"gpa": 4096}], errno.EINVAL, "gpa"),
        ("vmm", "translate", [translate | {b"gfn": 1}], errno.EINVAL, "params"),
        ("vmm", "translate", [translate, translate], errno.EINVAL, "params"),
        ("vmm", "translate", [1], errno.EINVAL, "params"),
        ("vmm", "kick", [{"vp_index": "some"}], errno.EINVAL, "vp_index"),
        ("operator", "subscribe", [{"events": ["partition_born"]}], errno.EINVAL, "events"),
        ("operator", "subscribe", [{"events": [], "reasons": ["bored"]}], errno.EINVAL, "reasons"),
        ("vmm", "kick", [{"vp_index": 2**32}], errno.EINVAL, "vp_index"),
        ("vmm", "add_region", [region], errno.EINVAL, "executable"),
        ("vmm", "add_region", [region | {"executable": 1}], errno.EINVAL, "executable"),
        ("vmm", "add_region", [region | {"executable": False, "kind": "ram"}], errno.EINVAL, "kind"),
        ("vmm", "map_vmas", [{"vmas": {}}], errno.EINVAL, "vmas"),
        ("vmm", "map_vmas", [{"vmas": [vma, vma | {"io": 1}]}], errno.EINVAL, "io"),
        ("vmm", "map_vmas", [{"vmas": [vma, 1]}], errno.EINVAL, "params"),
        (
            "vmm",
            "change_regions",
            [{"add": [region | {"executable": False}, region]}],
            errno.EINVAL,
            "executable",
        ),
        ("vmm", "change_regions", [{"remove": {}}], errno.EINVAL, "remove"),
        ("vmm", "create_partition", [{"address_space": "declared"}], errno.EINVAL, "hypervisor"),
        (
            "vmm",
            "create_partition",
            [{"address_space": "image", "hypervisor": "userfaultfd"}],
            errno.EINVAL,
            "address_space",
        ),
        ("vmm", "prefault", [{"start_gfn": 1}], errno.EINVAL, "page_count"),
        ("vmm", "list_mappings", [{"after": -1}], errno.EINVAL, "after"),
        ("operator", "list_regions", [], errno.EINVAL, "partition_id"),
        ("vmm", "invalidate_begin", [{"start_uaddr": 0, "length": 4096}], errno.ENOSYS, None),
        ("vmm", "no_such_method", [], errno.ENOSYS, None),
        ("notifier", "translate", [translate], errno.ENOSYS, None),
        ("notifier", "invalidate", [{"start_uaddr": 0}], errno.EINVAL, "length"),
        ("operator", "drain", [{}], errno.EINVAL, "timeout_ms"),
        ("operator", "drain", [{"timeout_ms": 2**32}], errno.EINVAL, "timeout_ms"),
        ("vmm", "restore", [{"around_pages": 0}], errno.EINVAL, "around_pages"),
        ("vmm", "restore", [{"around_pages": 513}], errno.EINVAL, "around_pages"),
        ("vmm", "restore", [{"on_image_error": "zero"}], errno.EINVAL, "on_image_error"),
        ("vmm", "restore", [{"connect_timeout_ms": 3_600_001}], errno.EINVAL, "connect_timeout_ms"),
        ("vmm", "restore_progress", [], errno.EINVAL, "partition_id"),
    ]
    return [_refusal(*case) for case in cases]


def _refusal(role: str, method: str, params: list[object], number: int, field: str | None) -> RefusalVector:
    request = rpc.encode_request(7, method, params).hex()
    return RefusalVector(role, method, request, number, error_name(number), field)


def refused_hellos() -> list[RefusalVector]:
    joined = {"protocol": 1, "role": "notifier", "partition_id": 1, "token": TOKEN}
    cases: list[tuple[list[object], int, str | None]] = [
        ([], errno.EINVAL, "protocol"),
        ([{"role": "vmm"}], errno.EINVAL, "protocol"),
        ([{"protocol": None, "role": "vmm"}], errno.EINVAL, "protocol"),
        ([{"protocol": "1", "role": "vmm"}], errno.EINVAL, "protocol"),
        ([{"protocol": True, "role": "vmm"}], errno.EINVAL, "protocol"),
        ([{"protocol": 2, "role": "vmm", "new": 1}], errno.EPROTONOSUPPORT, None),
        ([{"protocol": 1}], errno.EINVAL, "role"),
        ([{"protocol": 1, "role": "admin"}], errno.EINVAL, "role"),
        ([{"protocol": 1, "role": "vmm", "name": "x" * 65}], errno.EINVAL, "name"),
        ([{"protocol": 1, "role": "vmm", "token": TOKEN}], errno.EINVAL, "token"),
        ([joined | {"token": TOKEN[:15]}], errno.EINVAL, "token"),
        ([joined | {"token": "AAECAwQFBgcICQoLDA0ODw=="}], errno.EINVAL, "token"),
        ([joined | {"role": "vp"}], errno.EINVAL, "vp_index"),
    ]
    return [_refusal("", "hello", *case) for case in cases]


# ---------------------------------------------------------------- no MessagePack-RPC: the connection ends


def malformed() -> list[MalformedVector]:
    cases = [
        ("no array", "7b226a736f6e72706322"),
        ("an HTTP request", b"GET / HTTP/1.1\r\n".hex()),
        ("the byte that MessagePack never uses", "940001a16d91c1"),
        ("an ext type", "940001a16d91d40100"),
        ("an array of 5 elements", "950001a16d90c0"),
        ("a request of 3 elements", "930001a16d"),
        ("a type above 2", "940301a16d90"),
        ("a type that is no integer", "94c201a16d90"),
        ("a response, unasked", "940101c0c0"),
        ("a notification", "9302a16d90"),
        ("a negative msgid", "9400ffa16d90"),
        ("a msgid above 32 bits", "9400cf0000000100000000a16d90"),
        ("a msgid that is a boolean", "9400c3a16d90"),
        ("a msgid that is a float", "9400cb3ff0000000000000a16d90"),
        ("a method that is no string", "9400010590"),
        ("params that are a map", "940001a16d80"),
        ("params that are nil", "940001a16dc0"),
        ("a string that is not UTF-8", "940001a16d91a1ff"),
        ("a map whose key is an array", "940001a16d91819000"),
        ("17 levels of arrays", "940001a16d" + "91" * 16 + "c0"),
        ("bytes announced over the limit", "940001a16d91c600010000"),
        ("an array announced over the limit", "940001a16d91ddffffffff"),
        ("a map announced over the limit", "940001a16d91df00008000"),
    ]
    return [_violation(name, bytes.fromhex(encoded)) for name, encoded in cases]


def _violation(name: str, data: bytes) -> MalformedVector:
    receiver = rpc.Receiver({rpc.REQUEST})
    for size in range(1, len(data) + 1):
        receiver.receive_data(data[size - 1 : size])
        try:
            receiver.next_message()
        except ProtocolViolation as violation:
            return MalformedVector(name, data.hex(), size, violation.number, violation.name)
    raise AssertionError(f"{name}: is not refused")
