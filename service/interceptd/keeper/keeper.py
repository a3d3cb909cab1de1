"""The keeper's loop: one daemon at a time, its messages, the keeper's signals, and the clock.

Owns when the daemon is started, asked to end, and given up. Must not know what the daemon serves.
"""

from __future__ import annotations

import os
import resource
import select
import signal
import socket
import time
from collections.abc import Sequence
from typing import Final, NamedTuple

from interceptd.keeper import child
from interceptd.keeper.log import log
from interceptd.keeper.notify_socket import Message, NotifySocket
from interceptd.keeper.store import CAPACITY, Store, close

SIGNALS: Final = (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
SHORTEST_PAUSE, LONGEST_PAUSE = 0.05, 1.0
"""Seconds before a daemon that did not become ready is started again."""
CHECK_SECONDS: Final = 30.0
"""How long the next version may take to check that it can take over."""
MESSAGES_AT_ONCE: Final = 1024
"""More than a socket's queue holds (net.unix.max_dgram_qlen)."""
SPARE_DESCRIPTORS: Final = 64
FORMAT_FACT: Final = "X_INTERCEPTD_LEDGER_FORMAT"


class _Check(NamedTuple):
    pid: int
    daemon: int
    deadline: float


class Keeper:
    """Runs `program` with `arguments`, whose first is `serve`. After `patience` seconds without a ready
    daemon it lets go of what it keeps."""

    def __init__(self, program: Sequence[str], arguments: Sequence[str], patience: float) -> None:
        self._program, self._arguments, self._patience = program, arguments, patience
        self._epoll = select.epoll()
        self._notify = NotifySocket(os.environ.get("NOTIFY_SOCKET", ""))
        self._store = Store(self._epoll, _capacity())
        self._passed = child.passed_to_us(os.environ)
        self._environment = _environment(self._notify.name, self._store.capacity)
        self._wakes, wake = socket.socketpair()
        for each in (self._wakes, wake):
            each.setblocking(False)
        self._wake = wake
        self._pid: int | None = None
        """The daemon's."""
        self._ready = False
        self._served = False
        """Whether any daemon was ready."""
        self._status = 0
        """The last daemon's exit status."""
        self._pause = SHORTEST_PAUSE
        self._start_at: float | None = None
        self._give_up_at: float | None = None
        self._check: _Check | None = None
        self._format = ""
        self._pending: list[signal.Signals] = []
        """Signals for the daemon once it is ready: before, they would kill it."""
        self._ending = self._done = self._ignored = False

    def run(self) -> int:
        """Run until the daemon has drained or a signal ends the keeper; returns the exit status."""
        signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
        for number in SIGNALS:
            signal.signal(number, lambda *_: None)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # our parent may have blocked them
        self._epoll.register(self._wakes, select.EPOLLIN)
        self._epoll.register(self._notify, select.EPOLLIN)
        self._start()
        while not self._done:
            self._turn()
        return self._status

    def _turn(self) -> None:
        woken = {descriptor for descriptor, _ in self._epoll.poll(self._seconds_to_wait())}
        ours = {self._notify.fileno(), self._wakes.fileno()}
        for descriptor in woken - ours:
            self._store.drop(descriptor)  # first of all: it makes room
        if self._notify.fileno() in woken:
            self._hear()
        if self._wakes.fileno() in woken:
            for number in self._wakes.recv(4096):
                self._obey_signal(number)
        self._look_at_the_clock()

    # ------------------------------------------------ the daemon's life

    def _start(self) -> None:
        self._start_at, self._ready = None, False
        named = [*self._passed, *self._store.named()]
        try:
            self._pid = child.start([*self._program, *self._arguments], self._environment, named, SIGNALS)
        except OSError as error:
            log("error", "daemon_process_not_started", error=error.strerror)
            self._start_later()
        else:
            log("info", "daemon_process_started", pid=self._pid, passed=len(named))

    def _start_later(self) -> None:
        self._start_at = time.monotonic() + self._pause
        self._pause = min(2 * self._pause, LONGEST_PAUSE)

    def _reap(self) -> None:
        """Reap every process that ended: the first process of a container inherits the orphans."""
        self._hear()  # what the daemon said before it ended, while it still counts as ours
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            code = os.waitstatus_to_exitcode(status)
            if pid == self._pid:
                self._ended(code)
            elif self._check is not None and pid == self._check.pid:
                self._checked(code)

    def _ended(self, code: int) -> None:
        self._pid, self._status = None, code if code >= 0 else 128 - code
        how = f"status {code}" if code >= 0 else signal.Signals(-code).name
        log("info" if code == 0 else "warning", "daemon_process_ended", how=how, kept=len(self._store))
        if code == 0 or self._ending or not self._served:
            self._done = True
            return
        if self._give_up_at is None and self._store:
            self._give_up_at = time.monotonic() + self._patience
        if self._ready:
            self._start()
        else:
            self._start_later()

    def _became_ready(self) -> None:
        self._ready = self._served = True
        self._give_up_at, self._pause = None, SHORTEST_PAUSE
        pending, self._pending = self._pending, []
        for number in pending:
            self._signal(number)

    # ------------------------------------------------ the clock

    def _seconds_to_wait(self) -> float | None:
        deadlines = [self._start_at, self._give_up_at, self._check and self._check.deadline]
        nearest = min((deadline for deadline in deadlines if deadline is not None), default=None)
        return None if nearest is None else max(0.0, nearest - time.monotonic())

    def _look_at_the_clock(self) -> None:
        now = time.monotonic()
        if self._give_up_at is not None and now >= self._give_up_at:
            self._give_up()
        if self._start_at is not None and now >= self._start_at and not self._done:
            self._start()
        if self._check is not None and now >= self._check.deadline:
            os.kill(self._check.pid, signal.SIGKILL)
            self._check = self._check._replace(deadline=now + CHECK_SECONDS)

    def _give_up(self) -> None:
        """Let go of everything, and kill the daemon that is not ready: it has duplicates."""
        log("error", "descriptors_let_go", kept=len(self._store), patience_s=self._patience)
        self._give_up_at = None
        self._signal(signal.SIGKILL)
        self._store.let_go()

    # ------------------------------------------------ messages and signals

    def _hear(self) -> None:
        """Take the messages that have arrived; endless senders do not hold up the loop."""
        for _ in range(MESSAGES_AT_ONCE):
            if (message := self._notify.receive()) is None:
                return
            if message.pid == self._pid and message.complete:
                self._obey(message)
                continue
            if not self._ignored:
                log("warning", "message_ignored", pid=message.pid, complete=message.complete)
            self._ignored = True
            for descriptor in message.descriptors:
                close(descriptor)

    def _obey(self, message: Message) -> None:
        facts, name = message.facts, message.facts.get("FDNAME", "stored")
        if facts.get("FDSTORE") == "1":
            if not self._store.add(name, message.descriptors, polled=facts.get("FDPOLL") != "0"):
                log("error", "descriptors_refused", name=name, kept=len(self._store))
        else:
            for descriptor in message.descriptors:
                close(descriptor)
        if facts.get("FDSTOREREMOVE") == "1":
            self._store.remove(name)
        if facts.get("READY") == "1":
            self._format = facts.get(FORMAT_FACT, "")
            self._became_ready()
        if (longer := facts.get("EXTEND_TIMEOUT_USEC", "")).isdecimal() and self._give_up_at is not None:
            self._give_up_at = max(self._give_up_at, time.monotonic() + int(longer) / 1e6)
        self._notify.forward(facts)

    def _obey_signal(self, number: int) -> None:
        match number:
            case signal.SIGCHLD:
                self._reap()
            case signal.SIGTERM | signal.SIGINT:
                self._end()
            case signal.SIGHUP:
                self._signal_when_ready(signal.SIGHUP)
            case signal.SIGUSR1:
                self._restart()

    def _signal(self, number: signal.Signals) -> None:
        if self._pid is not None:
            os.kill(self._pid, number)

    def _signal_when_ready(self, number: signal.Signals) -> None:
        if self._ready:
            self._signal(number)
        elif number not in self._pending:
            self._pending.append(number)

    def _end(self) -> None:
        """Drain the daemon; if it is taking over, once it is ready. A second signal does not wait for
        that."""
        if self._pid is None:
            self._done = True
        elif self._ending or self._give_up_at is None:
            self._signal(signal.SIGINT)
        else:
            self._signal_when_ready(signal.SIGINT)
        self._ending = True

    # ------------------------------------------------ a planned restart

    def _restart(self) -> None:
        """Begin to check whether the installed version accepts the arguments and reads the ledgers."""
        if self._pid is None or not self._ready or self._check is not None:
            log("warning", "restart_refused", why="the daemon is not ready, or a restart has begun")
            return
        reads = ["--ledger-format", self._format] if self._format else []
        command = [*self._program, "check-config", *reads, *self._arguments[1:]]
        quiet = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
        try:
            pid = os.posix_spawn(command[0], command, os.environ, file_actions=quiet)
        except OSError as error:
            log("error", "restart_refused", why=error.strerror)
        else:
            self._check = _Check(pid, self._pid, time.monotonic() + CHECK_SECONDS)

    def _checked(self, code: int) -> None:
        assert self._check is not None
        daemon, self._check = self._check.daemon, None
        if code != 0:
            log("error", "restart_refused", why=f"check-config ended with status {code}")
        elif daemon == self._pid:
            log("info", "daemon_restarting", pid=daemon)
            self._signal(signal.SIGTERM)


def _capacity() -> int:
    """Raise the soft limit of open files to the hard one; returns how many descriptors fit. During a start
    each one takes two numbers."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return CAPACITY if hard == resource.RLIM_INFINITY else min(CAPACITY, (hard - SPARE_DESCRIPTORS) // 2)


def _environment(address: str, capacity: int) -> dict[str, str]:
    """The daemon's, without what depends on its pid. It gets the watchdog only if that watches the keeper."""
    inherited = {name: value for name, value in os.environ.items() if name not in child.LISTEN_VARIABLES}
    if inherited.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        del inherited["WATCHDOG_PID"], inherited["WATCHDOG_USEC"]
    return inherited | {"NOTIFY_SOCKET": address, "INTERCEPTD_KEEP": "yes", "FDSTORE": str(capacity)}
