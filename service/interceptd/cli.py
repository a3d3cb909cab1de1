"""The `interceptd` command.

Owns flags, environment and exit statuses. Must not know what the daemon does.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from pathlib import Path

import click
import msgspec
import trio

from interceptd import __version__
from interceptd.config import Config, ConfigError, Metrics, load_config
from interceptd.daemon import END_SIGNALS, Daemon, run_until_signalled
from interceptd.listening import ListenError
from interceptd.logs import configure_logs
from interceptd.passed_sockets import PassedSockets, take_passed_sockets
from interceptd.place import Place
from interceptd.service_manager import ServiceManager

CHAOS_VARIABLE = "INTERCEPTD_CHAOS"


@click.group()
@click.version_option(__version__, prog_name="interceptd")
def main() -> None:
    """Handle hypervisor memory intercepts outside the hypervisor."""


@main.command()
@click.option("--socket", metavar="PATH", help="Socket for VMMs  [default: /run/interceptd/vmm.sock].")
@click.option(
    "--operator-socket", metavar="PATH", help="Socket for operators  [default: operator.sock beside it]."
)
@click.option(
    "--metrics-listen",
    metavar="PLACE",
    help="Metrics: unix:/PATH or an IP address and port  [default: none].",
)
@click.option("--config", "config_file", type=click.Path(path_type=Path), help="TOML configuration file.")
def serve(
    socket: str | None, operator_socket: str | None, metrics_listen: str | None, config_file: Path | None
) -> None:
    """Serve VMMs until SIGTERM or SIGINT, which drain; a second one ends at once.

    Exit status: 0 drained, 1 cannot start, 2 wrong usage, 128+N ended by a second signal N.
    """
    try:
        config = load_config(config_file)
        chaos = _chaos()
    except ConfigError as error:
        raise click.ClickException(str(error)) from None
    flags = {"socket": socket, "operator_socket": operator_socket}
    config = msgspec.structs.replace(config, **{key: path for key, path in flags.items() if path is not None})
    if metrics_listen is not None:
        config = msgspec.structs.replace(config, metrics=_listening_at(metrics_listen, config.metrics))
    configure_logs(config.log)
    signal.pthread_sigmask(signal.SIG_BLOCK, END_SIGNALS)  # an early one is kept until our receiver opens
    for number in END_SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # what is left when it closes: a late one changes nothing
    _raise_descriptor_limit()
    try:
        passed = take_passed_sockets(os.environ, os.getpid())
        status = trio.run(_run, config, chaos, passed)
    except ListenError as error:
        raise click.ClickException(str(error)) from None
    sys.exit(status)


@main.command("check-config")
@click.argument("file", type=click.Path(path_type=Path))
def check_config(file: Path) -> None:
    """Say what `serve --config FILE` would do, and do nothing.

    Exit status: 0 it can be used, 1 it cannot, with the file, the key and what was expected, 2 wrong usage.
    """
    try:
        config = load_config(file)
    except ConfigError as error:
        raise click.ClickException(str(error)) from None
    uids = ", ".join(map(str, sorted(config.uids))) or "none"
    place = config.metrics.listen
    metrics = "no metrics" if place is None else f"metrics at {place}"
    click.echo(
        f"{file}: would serve VMMs of uids {uids} at {config.socket} (mode {config.socket_mode:04o}) "
        f"and operators at {config.operator_path}, {metrics}, and log {config.log.level} and above"
    )


def _listening_at(text: str, metrics: Metrics) -> Metrics:
    try:
        return msgspec.structs.replace(metrics, listen=Place(text))
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--metrics-listen") from None


def _raise_descriptor_limit() -> None:
    """A VP is a descriptor: take as many as we may. The soft limit is low for the sake of select(2)."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def _run(config: Config, chaos: int, passed: PassedSockets) -> int:
    manager = ServiceManager.from_environment(os.environ, os.getpid())
    return await run_until_signalled(Daemon(config, chaos=chaos, passed=passed, manager=manager))


def _chaos() -> int:
    text = os.environ.get(CHAOS_VARIABLE, "0")
    if not text.isdecimal() or int(text) > 1000:
        raise ConfigError(f"environment: {CHAOS_VARIABLE}: expected a number from 0 to 1000, got {text!r}")
    return int(text)
