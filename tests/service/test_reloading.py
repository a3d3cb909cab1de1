"""A reload that fails changes nothing and ends nothing, whoever's fault it is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import trio
from structlog.testing import capture_logs

from interceptd.config.live import Settings
from interceptd.config.schema import Config
from interceptd.process import Reloader
from interceptd.systemd.notify import ServiceManager


async def no_thread(_: Callable[[], Config]) -> Config:
    raise RuntimeError("can't start new thread")


async def test_where_the_system_refuses_a_thread_to_read_in_the_configuration_stays_and_it_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = Settings(before := Config(socket="/run/vmm.sock"))
    monkeypatch.setattr(trio.to_thread, "run_sync", no_thread)
    with capture_logs() as logs:
        await Reloader(settings, Config, ServiceManager()).reload(lambda: "serving")
    assert [(line["event"], line["error"]) for line in logs] == [
        ("configuration_not_reloaded", "can't start new thread")
    ]
    assert settings.now is before
