"""The server's log: one line an event, on standard error or in a file, as text or as JSON.

Events of several threads don't run into each other. What can't be written is lost: a disk that is
full, or a pipe that nobody reads, is no reason to stop serving. The next event tells how many were.

As text a line is `xs: MESSAGE` on standard error, as whoever reads that knows the time (the
journal is told the level as well, sd-daemon(3)), and `TIME LEVEL MESSAGE` in a file. Each line of a
longer message begins so. As JSON an event is an object in one line: time, level, message, and the
store and the script that it is about, if it is about one.
"""

from __future__ import annotations

import json
import os
import select
import threading
import time
from collections.abc import Callable

from xs import threads, times
from xs.errors import Usage
from xs.records import NamedTuple
from xs.terminal import harmless

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Optional

ERROR, WARNING, INFO, DEBUG = range(4)
LEVELS = ("error", "warning", "info", "debug")
_PRIORITIES = (3, 4, 6, 7)  # the same for syslog(3)
SELDOM_SECONDS = 10.0  # between two lines about what anybody can cause, as often as he likes
_PATIENCE_MS = 1000  # for whoever reads the log; then events are lost until it goes on
_SHORTAGE = "the process has no memory left, or no room for another thread"
_PIECE = 4096  # a pipe that can be written to takes so many bytes at once (pipe(7), PIPE_BUF)


class Options(NamedTuple):
    """How `xs serve` was told to log."""

    level: int = INFO
    is_json: bool = False
    path: Optional[str] = None  # of a file; None: standard error


def options_of(get: Callable[[str], Optional[str]], *, is_json: bool) -> Options:
    """The options that a command line gives by their names. Raises `Usage`."""
    level = get("log") or LEVELS[INFO]
    if level not in LEVELS:
        raise Usage(f"--log takes {', '.join(LEVELS[:-1])} or {LEVELS[-1]}, not {level!r}")
    path = get("log-file")
    return Options(LEVELS.index(level), is_json, None if path is None else os.path.abspath(path))


class Output:
    """Where a log goes. Its file descriptor stays the same when the file is opened anew."""

    def __init__(self) -> None:
        self.options = Options()
        self._descriptor = 2
        self._is_journal = _is_journal(2)
        self._lock = threading.Lock()  # guards what is written, and the next two; taken last
        self._lost = 0  # events, since the last one that could be written
        self._is_cut = False  # whether that one was broken off

    def open(self, options: Options) -> None:
        """From now on it is as in `options`. Raises `Usage` if its file can't be opened."""
        if options.path is not None:
            try:
                self._descriptor = _open(options.path)
            except OSError as error:
                raise Usage(f"can't write the log {options.path}: {error.strerror}") from None
            self._is_journal = False
        self.options = options

    def reopen(self) -> None:
        """Opens the file anew: the old one may have been moved away. Raises `OSError`.

        Nothing is lost or cut on the way: an event goes to one of the two, whole.
        """
        if self.options.path is None:
            return
        opened = _open(self.options.path)
        try:
            with self._lock:
                os.dup2(opened, self._descriptor, inheritable=False)
        finally:
            os.close(opened)

    @property
    def descriptor(self) -> int:
        return self._descriptor

    @property
    def is_plain(self) -> bool:
        """Whether a person may be reading it beside standard output."""
        return self.options.path is None and not self.options.is_json

    def write(self, level: int, store: str | None, script: str | None, text: str) -> None:
        with self._lock:
            if self._lost and self._is_ready():
                gap = self._event(WARNING, None, None, f"{self._lost} events were lost here")
                self._lost = 0 if self._put(gap) else self._lost + 1
            if not self._put(self._event(level, store, script, text)):
                self._lost += 1

    def _event(self, level: int, store: str | None, script: str | None, text: str) -> bytes:
        now = times.timestamp(time.time_ns() // 1_000_000)
        if self.options.is_json:
            event = {"time": now, "level": LEVELS[level], "store": store, "script": script}
            given = {name: value for name, value in event.items() if value is not None}
            lines = [harmless(json.dumps({**given, "message": text}, ensure_ascii=False))]
        else:
            start = "xs: " if self.options.path is None else f"{now} {LEVELS[level]} "
            start += "".join(f"{name}: " for name in (store, script) if name is not None)
            lines = [start + line for line in harmless(text).split("\n") if line.strip()]
        if self._is_journal:
            lines = [f"<{_PRIORITIES[level]}>{line}" for line in lines]
        return "".join(f"{line}\n" for line in lines).encode("utf-8", "backslashreplace")

    def _put(self, data: bytes) -> bool:
        """Writes all of it; False if not all could be written."""
        if self._is_cut:
            data = b"\n" + data
        whole = len(data)
        try:
            while data and self._is_ready():
                data = data[os.write(self._descriptor, data[:_PIECE]) :]
        except OSError:
            pass  # nobody can be told
        if len(data) < whole:
            self._is_cut = bool(data)
        return not data

    def _is_ready(self) -> bool:
        """Whether a write goes through, or does so soon."""
        poll = select.poll()
        poll.register(self._descriptor, select.POLLOUT)
        return bool(poll.poll(0 if self._lost else _PATIENCE_MS))


class Log:
    """A log, or the part of it that is about one store, or one script.

    Calling it logs a message, at level INFO unless another is given.
    """

    __slots__ = ("_script", "_store", "output")

    def __init__(
        self, output: Output | None = None, store: str | None = None, script: str | None = None
    ) -> None:
        self.output = output or Output()
        self._store = store
        self._script = script

    def __call__(self, text: str, level: int = INFO) -> None:
        if level <= self.output.options.level:
            self.output.write(level, self._store, self._script, text)

    def defect(self, what: str, error: BaseException) -> None:
        """Logs an error of ours, with the place where it was raised."""
        if threads.is_shortage(error):  # of nobody's place, and there may be no memory to tell it
            self(f"{what}: {_SHORTAGE}", ERROR)
            return
        where: list[str] = []
        try:
            import traceback

            where = traceback.format_exception(type(error), error, error.__traceback__)
        except OSError:
            pass  # there is no descriptor left for its file
        self(f"{what}: {type(error).__name__}: {error}\n{''.join(where)}", ERROR)

    def reopen(self) -> None:
        """As `Output.reopen`; if that fails it goes on with the old file."""
        try:
            self.output.reopen()
        except OSError as error:
            self(f"can't open {self.output.options.path} anew: {error.strerror}", ERROR)

    @property
    def is_debug(self) -> bool:
        return self.output.options.level >= DEBUG

    def for_store(self, store: str) -> Log:
        """The same log, for what is about that store."""
        return Log(self.output, store, self._script)

    def for_script(self, script: str) -> Log:
        """The same log, for what is about the script of that name."""
        return Log(self.output, self._store, script)

    def catch_threads(self) -> None:
        """From now on an exception that ends a thread is logged."""

        def caught(args: threading.ExceptHookArgs) -> None:
            name = args.thread.name if args.thread is not None else "a thread"
            if args.exc_value is not None:
                self.defect(name, args.exc_value)

        threading.excepthook = caught


class Seldom:
    """Warnings of one kind, of which anybody can cause any number: one in `SELDOM_SECONDS`.

    It tells how many were left out since the one before it.
    """

    def __init__(self, log: Log, seconds: float = SELDOM_SECONDS) -> None:
        self._log = log
        self._seconds = seconds
        self._lock = threading.Lock()  # guards the next two; taken last
        self._due = 0.0
        self._left_out = 0

    def __call__(self, text: str) -> None:
        with self._lock:
            now = time.monotonic()
            if now < self._due:
                self._left_out += 1
                return
            self._due = now + self._seconds
            left_out, self._left_out = self._left_out, 0
        if left_out:
            text += f" ({left_out} more like that were left out before)"
        self._log(text, WARNING)


class Lines(Log):
    """A log whose messages go to a function, line by line, whatever their level."""

    __slots__ = ("_take",)

    def __init__(
        self, take: Callable[[str], None], store: str | None = None, script: str | None = None
    ) -> None:
        super().__init__(None, store, script)
        self._take = take

    def __call__(self, text: str, level: int = INFO) -> None:
        start = "".join(f"{name}: " for name in (self._store, self._script) if name is not None)
        for line in text.splitlines():
            if line.strip():
                self._take(start + line)

    def for_store(self, store: str) -> Log:
        return Lines(self._take, store, self._script)

    def for_script(self, script: str) -> Log:
        return Lines(self._take, self._store, script)


def log_of(log: Callable[[str], None]) -> Log:
    """`log` itself if it is a `Log`, else one that calls it."""
    return log if isinstance(log, Log) else Lines(log)


def _open(path: str) -> int:
    # A pipe that nobody reads is not waited for, neither now nor when it is full.
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOCTTY | os.O_NONBLOCK
    return os.open(path, flags, 0o600)


def _is_journal(descriptor: int) -> bool:
    """Whether systemd's journal is at the other end (systemd.exec(5), $JOURNAL_STREAM)."""
    try:
        found = os.fstat(descriptor)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"
