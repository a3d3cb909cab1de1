"""Listen addresses: their syntax, and binding them."""

from __future__ import annotations

import socket
import stat
from pathlib import Path

import pytest

from interceptd.connections.listen_address import ListenAddress
from interceptd.connections.unix_listener import ListenError


@pytest.mark.parametrize(
    "text",
    ["unix:/run/interceptd/metrics.sock", "127.0.0.1:9477", "[::1]:9477", "0.0.0.0:0", "10.1.2.3:65535"],
)
def test_a_place_is_written_as_it_is_read(text: str) -> None:
    assert str(ListenAddress(text)) == text


@pytest.mark.parametrize(
    "text",
    ["", "unix:", "unix:metrics.sock", "unix:/a\0b", "/metrics.sock", "9477", ":9477", "localhost:9477",
     "127.0.0.1", "127.0.0.1:", "127.0.0.1:-1", "127.0.0.1:65536", "127.0.0.1:٣", "::1:94", "[127.0.0.1]:1"],
)  # fmt: skip
def test_an_invalid_place_is_refused_with_what_was_expected(text: str) -> None:
    with pytest.raises(ValueError, match="expected unix:/PATH, or an IP address and a port") as refusal:
        ListenAddress(text)
    assert repr(text) in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "local"),
    [
        ("unix:/x", True),
        ("127.9.9.9:1", True),
        ("[::1]:1", True),
        ("0.0.0.0:1", False),
    ],
)
def test_local_means_reachable_only_from_this_machine(text: str, local: bool) -> None:
    assert ListenAddress(text).local is local


def test_port_0_is_shown_as_the_bound_port() -> None:
    place = ListenAddress("127.0.0.1:0")
    with place.listen(0) as listener:
        bound = str(place.bound(listener))
        assert bound == f"127.0.0.1:{listener.getsockname()[1]}"
        with socket.create_connection(listener.getsockname(), timeout=10):
            pass


def test_a_port_that_is_taken_is_an_error_that_names_it() -> None:
    with ListenAddress("127.0.0.1:0").listen(0) as listener:
        taken = ListenAddress(f"127.0.0.1:{listener.getsockname()[1]}")
        with pytest.raises(ListenError, match=f"{taken}: Address already in use"), taken.listen(0):
            pass


def test_a_path_is_bound_with_its_mode_and_shown_as_written(tmp_path: Path) -> None:
    place = ListenAddress(f"unix:{tmp_path}/metrics.sock")
    with place.listen(0o620) as listener:
        assert stat.S_IMODE((tmp_path / "metrics.sock").stat().st_mode) == 0o620
        assert place.bound(listener) is place
