"""VMMs that use a third-party MessagePack-RPC library."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, Final

import pytest

from fakes.daemon_process import DaemonProcess
from fakes.foreign_client import ErrorResponse, ForeignClient, ForeignError
from fakes.raw_client import READ, WRITE, intercept_message

GFN: Final = 0x100
UADDR: Final = 0x7000_0000_0000
PFN: Final = 0xFFFF_FFFF_F000
"""Large, because some libraries take numbers above 2^32 for floats."""
REGION: Final = {"start_gfn": GFN, "page_count": 4, "start_uaddr": UADDR}


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    with DaemonProcess(tmp_path_factory.mktemp("daemon")) as process:
        yield process.wait_serving()


class ForeignVmm:
    """One partition of declared memory with a writable MMIO region, and what its hypervisor was asked."""

    def __init__(self, opened: ExitStack, daemon: DaemonProcess, hypervisor: str) -> None:
        self._opened = opened
        self._daemon = daemon
        self.asked: list[tuple[str, Any]] = []
        self.answer: object = None
        """What the hypervisor answers, or the exception that its handler raises."""
        self.vmm = self._connect("vmm", name="foreign")
        fields = {"address_space": "declared", "hypervisor": hypervisor}
        self.partition = self.vmm.request("create_partition", fields)
        if hypervisor == "vmm":
            self.join("hypervisor").serve(self._carry_out)
        vma = {"start_uaddr": UADDR, "page_count": 4, "start_pfn": PFN, "io": True}
        self.vmm.request("map_vma", {**vma, "readable": True, "writable": True, "executable": False})
        kind = {"kind": "auto", "writable": False, "executable": False}
        assert self.vmm.request("add_region", {**REGION, **kind}) == {"kind": "mmio"}

    def join(self, role: str, **fields: object) -> ForeignClient:
        return self._connect(role, **self.partition, **fields)

    def _connect(self, role: str, **fields: object) -> ForeignClient:
        client = self._opened.enter_context(ForeignClient(self._daemon.socket))
        assert client.request("hello", {"protocol": 1, "role": role, **fields})["server"] == "interceptd"
        return client

    def _carry_out(self, method: str, params: list[Any]) -> object:
        self.asked.append((method, params[0]))
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer


@pytest.fixture
def opened() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def software(opened: ExitStack, daemon: DaemonProcess) -> ForeignVmm:
    return ForeignVmm(opened, daemon, "software")


@pytest.fixture
def own(opened: ExitStack, daemon: DaemonProcess) -> ForeignVmm:
    """A VMM that is its own hypervisor."""
    return ForeignVmm(opened, daemon, "vmm")


def test_a_foreign_vp_is_answered(software: ForeignVmm) -> None:
    vp = software.join("vp", vp_index=0)
    touches = [(GFN, READ), (GFN + 1, READ), (GFN + 1, WRITE), (GFN + 4, READ)]
    assert [vp.request("intercept", intercept_message(*touch)) for touch in touches] == [
        ["resume", "mapped"],
        ["resume", "already_mapped"],
        ["forward", "permission"],
        ["forward", "no_region"],
    ]


def test_a_foreign_vmm_reads_large_numbers_and_nested_replies(software: ForeignVmm) -> None:
    software.join("vp", vp_index=0).request("intercept", intercept_message(GFN, READ))
    reached = software.vmm.request("translate", {"gfn": GFN})
    assert (reached["frame"], reached["pfn"], reached["access"]) == (["host", PFN], PFN, 1)
    assert software.vmm.request("statistics", {})["intercepts"]["resume"]["mapped"] == 1


def test_a_foreign_notifier_revokes_memory(software: ForeignVmm) -> None:
    vp, notifier = software.join("vp", vp_index=0), software.join("notifier")
    vp.request("intercept", intercept_message(GFN, READ))
    memory = {"start_uaddr": UADDR, "length": 4 * 4096}
    notifier.request("invalidate_begin", memory)
    assert software.vmm.request("translate", {"gfn": GFN}) is None
    notifier.request("invalidate_end", memory)
    assert vp.request("intercept", intercept_message(GFN, READ)) == ["resume", "mapped"]


def test_a_foreign_client_gets_the_whole_error_and_continues(software: ForeignVmm) -> None:
    with pytest.raises(ForeignError) as refused:
        software.vmm.request("kick", {"vp_index": 7})
    number, name, message, details = refused.value.error
    assert (number, name, type(message), type(details)) == (errno.ENOENT, "ENOENT", str, dict)
    assert software.vmm.request("kick", {"vp_index": "all"}) is None


def test_a_foreign_hypervisor_is_asked_to_map_and_to_unmap(own: ForeignVmm) -> None:
    vp = own.join("vp", vp_index=0)
    assert vp.request("intercept", intercept_message(GFN, READ)) == ["resume", "mapped"]
    assert own.asked == [("map_gpa", {**REGION, "start_pfn": PFN, "access": 1})]
    own.vmm.request("remove_region", REGION)
    assert own.asked[1:] == [("unmap_gpa", {"start_gfn": GFN, "page_count": 4})]


@pytest.mark.parametrize(
    "answer",
    [ErrorResponse([errno.ENOSPC, "ENOSPC", "no memslot is left", {}]), ValueError("of its author's")],
    ids=["an error of the wire", "a text, as the library has it"],
)
def test_a_map_refused_by_a_foreign_hypervisor_fails_only_the_intercept(
    own: ForeignVmm, answer: BaseException
) -> None:
    vp = own.join("vp", vp_index=0)
    own.answer = answer
    assert vp.request("intercept", intercept_message(GFN, READ)) == ["fail", "hypervisor_error"]
    own.answer = None
    assert vp.request("intercept", intercept_message(GFN, READ)) == ["resume", "mapped"]
