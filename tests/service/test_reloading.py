"""A failed reload changes nothing and ends nothing, whatever the cause."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import trio
from structlog.testing import capture_logs
from trio.testing import wait_all_tasks_blocked

from fakes.eventually import PATIENCE
from interceptd.config.live import Settings
from interceptd.config.schema import Config
from interceptd.process import Reloader
from interceptd.systemd.notify import ServiceManager


async def read_at_once(load: Callable[[], Config], **_options: object) -> Config:
    """Virtual time does not wait for a thread."""
    return load()


async def no_thread(_: Callable[[], Config], **_options: object) -> Config:
    raise RuntimeError("can't start new thread")


async def test_a_reload_without_a_thread_to_read_in_is_logged_and_changes_nothing(
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


async def test_the_end_does_not_wait_for_a_reload_whose_disk_does_not_answer() -> None:
    answered = threading.Event()
    waited = []

    def load() -> Config:
        waited.append(answered.wait(PATIENCE))
        return Config()

    async with trio.open_nursery() as process:
        process.start_soon(Reloader(Settings(Config()), load, ServiceManager()).reload, lambda: "serving")
        await wait_all_tasks_blocked()
        process.cancel_scope.cancel()
    assert waited == []
    answered.set()


@pytest.mark.parametrize(
    ("wanted", "told"),
    [
        (Config(allowed_uids=[]), ["nobody_may_connect"]),
        (Config(allowed_uids=[], allowed_gids=[36]), []),
        (Config(), []),
    ],
    ids=["nobody", "a group", "the default"],
)
async def test_a_configuration_that_lets_nobody_connect_is_told(
    wanted: Config, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("interceptd.process.configure_logs", lambda _: None)  # it would end the capture
    monkeypatch.setattr(trio.to_thread, "run_sync", read_at_once)
    with capture_logs() as logs:
        await Reloader(Settings(Config(allowed_uids=[1])), lambda: wanted, ServiceManager()).reload(str)
    assert [line["event"] for line in logs if line["log_level"] == "warning"] == told
