"""The `interceptd` command.

Owns flags, environment and exit statuses. Must not know what the daemon does.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import IO, Any, Concatenate

import click
import trio

from intercept_protocol.text import visible
from interceptd import __version__
from interceptd.config import effective
from interceptd.config.live import Settings
from interceptd.config.sources import CHAOS_VARIABLE, ConfigError, Setting, Sources, set_flag
from interceptd.connections.unix_listener import ListenError
from interceptd.daemon import Daemon
from interceptd.ledger.ledger_format import LEDGER_FORMAT, READABLE_FORMATS
from interceptd.logs.configure import configure_logs
from interceptd.process import SIGNALS, Reloader, run_until_signalled, tell_if_closed
from interceptd.successor import check_command
from interceptd.systemd.fd_store import FdStore
from interceptd.systemd.journald import Priority, is_journal
from interceptd.systemd.notify import LEDGER_FORMAT_FACT, ServiceManager
from interceptd.systemd.socket_activation import PassedSockets, take_passed_sockets

STDERR = 2
Flags = tuple[Setting, ...]
ADDRESS_KEYS = {"socket": "socket", "operator_socket": "operator_socket", "metrics_listen": "metrics.listen"}
"""The configuration key of each flag that takes an address."""


class Failure(click.ClickException):
    """An error message. In the journal it has the priority of an error."""

    def show(self, file: IO[Any] | None = None) -> None:
        prefix = Priority.ERROR.prefix if is_journal(os.environ, STDERR) else ""
        for line in f"Error: {self.format_message()}".splitlines():
            click.echo(f"{prefix}{line}", file=file, err=file is None)


@click.group()
@click.version_option(__version__, prog_name="interceptd")
def main() -> None:
    """Handle hypervisor memory intercepts outside the hypervisor."""


def _flags(context: click.Context, option: click.Parameter, values: tuple[str, ...]) -> Flags:
    """Parse the values of --set."""
    try:
        return tuple(map(set_flag, values))
    except ValueError as error:
        raise click.BadParameter(str(error), context, option) from None


_FILE = click.Path(readable=False, path_type=Path)  # `ConfigError` reports a file that cannot be read
_CONFIGURATION = (
    click.argument("file", metavar="[FILE]", type=_FILE, required=False),
    click.option("--config", "config_file", metavar="FILE", type=_FILE, help="The same as FILE alone: TOML."),
    click.option("--socket", metavar="PATH", help="Socket for VMMs  [default: /run/interceptd/vmm.sock]."),
    click.option(
        "--operator-socket", metavar="PATH", help="Socket for operators  [default: operator.sock beside it]."
    ),
    click.option(
        "--metrics-listen",
        metavar="ADDRESS",
        help="Metrics: unix:/PATH or IP:PORT  [default: none].",
    ),
    click.option(
        "--set",
        "settings",
        metavar="KEY=VALUE",
        multiple=True,
        callback=_flags,
        help="Set any key, e.g. limits.operators=8. Overrides the environment, which overrides the file.",
    ),
)


def _configured(command: Callable[Concatenate[Sources, ...], None]) -> Callable[..., None]:
    """Add the arguments that a configuration is read from to a command."""

    @wraps(command)
    def configured(file: Path | None, config_file: Path | None, settings: Flags, **rest: Any) -> None:
        if file is not None and config_file is not None:
            raise click.UsageError(f"two configuration files: {file} and --config {config_file}")
        addresses = {name: rest.pop(name) for name in ADDRESS_KEYS}
        command(_sources(file or config_file, settings, addresses), **rest)

    for parameter in reversed(_CONFIGURATION):
        configured = parameter(configured)
    return configured


@main.command()
@_configured
def serve(sources: Sources) -> None:
    """Serve VMMs. SIGTERM or SIGINT drains, a second one ends at once; SIGHUP reloads.

    Exit status: 0 drained, 1 cannot start, 2 usage error, 128+N ended by a second signal N.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # pending until our receiver opens
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # after the receiver closes, a late signal changes nothing
    try:
        settings = Settings(sources.load().config)
        chaos = _chaos()
    except ConfigError as error:
        raise Failure(str(error)) from None
    configure_logs(settings.now.log)
    tell_if_closed(settings.now)
    _raise_descriptor_limit()
    try:
        store = FdStore.from_environment(os.environ)
        passed = take_passed_sockets(os.environ, os.getpid(), keeps=store is not None)
        status = trio.run(_run, settings, sources, chaos, passed, store)
    except ListenError as error:
        raise Failure(str(error)) from None
    sys.exit(status)


@main.command(context_settings={"ignore_unknown_options": True})
@click.option(
    "--patience",
    type=click.FloatRange(min=0),
    default=10.0,
    show_default=True,
    metavar="SECONDS",
    help="How long VMMs wait for a daemon that does not become ready, before their connections end.",
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="-- serve [ARGUMENTS]...")
def keep(patience: float, arguments: tuple[str, ...]) -> None:
    """Run `serve`, and start it again unless it has drained: of a kill or a crash, VMMs notice only a wait.

    SIGUSR1 restarts it in the installed version, if that accepts the configuration. SIGTERM and SIGINT drain
    it and end. SIGHUP reloads.

    Exit status: that of `serve` when it has drained, or when it could not start at first.
    """
    if arguments[:1] != ("serve",):
        raise click.UsageError("expected -- serve and its arguments")
    # Another process image: this one has loaded everything that a daemon needs, and a keeper does not.
    os.execv(sys.executable, [sys.executable, "-m", "interceptd.keeper", str(patience), *arguments])


@main.command("check-config")
@click.option(
    "--ledger-format",
    type=int,
    default=LEDGER_FORMAT,
    metavar="N",
    help="Also check that this version can go on from a daemon that keeps its state in this format.",
)
@click.option("--quiet", is_flag=True, help="Print only errors.")
@_configured
def check_config(sources: Sources, ledger_format: int, *, quiet: bool) -> None:
    """Show what `serve` would do with the same arguments: every key, its value and its source.

    Exit status: 0 valid, 1 invalid (the error names source, key and what was expected), 2 usage error.
    """
    if ledger_format not in READABLE_FORMATS:
        readable = ", ".join(map(str, sorted(READABLE_FORMATS)))
        raise Failure(f"ledger format {ledger_format} cannot be read: version {__version__} reads {readable}")
    try:
        loaded = sources.load()
        _chaos()
    except ConfigError as error:
        raise Failure(str(error)) from None
    if quiet:
        return
    click.echo(f"# {visible(str(sources.file or 'no file'))}: {effective.summary(loaded.config)}")
    for line in effective.lines(loaded):
        click.echo(line)


def _sources(file: Path | None, settings: Flags, addresses: Mapping[str, str | None]) -> Sources:
    """`addresses` are the flags that set one key each."""
    flags = tuple(
        Setting(f"--{name.replace('_', '-')}", ADDRESS_KEYS[name], address)
        for name, address in addresses.items()
        if address is not None
    )
    return Sources(file, dict(os.environ), settings + flags)


def _raise_descriptor_limit() -> None:
    """Raise the soft limit, which is low only for select(2), to the hard one: each VP takes a descriptor."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def _run(
    settings: Settings, sources: Sources, chaos: int, passed: PassedSockets, store: FdStore | None
) -> int:
    facts = () if store is None else (f"{LEDGER_FORMAT_FACT}={LEDGER_FORMAT}",)
    manager = ServiceManager.from_environment(os.environ, os.getpid(), facts)
    reloader = Reloader(settings, lambda: sources.load().config, manager)
    daemon = Daemon(
        settings,
        chaos=chaos,
        passed=passed,
        manager=manager,
        store=store,
        check_successor=check_command(sys.argv[2:]),  # behind `interceptd serve`
    )
    return await run_until_signalled(daemon, reloader)


def _chaos() -> int:
    text = os.environ.get(CHAOS_VARIABLE, "0")
    if not text.isdecimal() or int(text) > 1000:
        raise ConfigError(f"environment: {CHAOS_VARIABLE}: expected a number from 0 to 1000, got {text!r}")
    return int(text)
