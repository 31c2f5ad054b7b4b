"""Processes of scripts: each in a group of its own, ended whole, and never outliving its server.

A script's process may start others, ignore signals, sleep; its server may be killed at any moment.
So each process group has a watcher in it, a few bytes of `sh`, which waits on a pipe that the
server holds, the lifeline. However the server dies, the pipe ends, and the watcher kills its group.
As long as a watcher lives it holds the lock of the store's scripts too, so that the next server
starts its scripts only when those of the last one are gone: nothing runs twice.

Knows neither topics nor Nushell.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable

from xs.errors import Invalid
from xs.records import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Optional

SCRIPT_BYTES = 1 << 20  # of a script's text; a longer one is refused
TERM_SECONDS = 1.0  # from asking a process group to end to ending it
LOCK_LOOK_SECONDS = 0.02  # between two looks whether another server's scripts are gone

# What a process finds open: 0 to 2 as everywhere, its input, and for the watcher alone the other
# two. `sh` of some systems knows file descriptors of one digit only.
INPUT, _LIFELINE, _LOCK = 3, 4, 5
# The watcher ignores what may be sent to the group, but for SIGKILL. It is a member of the group,
# so the group's number can't be given to another while it lives.
_WATCHED = (
    "(trap '' TERM INT HUP QUIT; read _ <&4; kill -9 0) </dev/null >/dev/null 2>&1 3<&- & "
    'exec "$@" 4<&- 5<&-'
)


class Command(NamedTuple):
    """How a script's process is started: its words, files to be placed, and variables.

    In the words `{folder}` stands for the folder of the files. `input_at` is the file descriptor on
    which it reads its input, 0 or INPUT; None if it has none. Each line of its output that is meant
    for us begins with `mark`.
    """

    words: list[str]
    files: dict[str, bytes]
    variables: dict[str, str]
    input_at: Optional[int]
    mark: bytes = b""


class Process:
    """A running script. `output` and `errors` are ends of pipes, not blocking; so is `input`.

    `status` is None while it runs, then its exit status, negative for a signal's number.
    """

    def __init__(
        self,
        pid: int,
        folder: str,
        input_: Optional[int],
        output: int,
        errors: int,
        ended: Callable[[], None],
    ) -> None:
        self.pid = pid
        self._folder = folder
        self.input = input_
        self.output = output
        self.errors = errors
        self.status: int | None = None
        self.started = time.time()
        self._ended = ended
        self._reaper = threading.Thread(target=self._reap, name="xs-reap", daemon=True)
        self._reaper.start()

    def _reap(self) -> None:
        _, status = os.waitpid(self.pid, 0)
        self._signal(signal.SIGKILL)  # what it has left behind, and the watcher
        self.status = os.waitstatus_to_exitcode(status)
        self._ended()

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)

    def close_input(self) -> None:
        """Tells the process that nothing more comes."""
        if self.input is not None:
            os.close(self.input)
            self.input = None

    def kill(self) -> None:
        """Ends the group at once, and waits until its leader is gone."""
        if self.status is None:
            self._signal(signal.SIGKILL)
        self._reaper.join()

    def end(self, seconds: float = TERM_SECONDS) -> None:
        """Asks the group to end, and ends it after so many seconds."""
        if self.status is None:
            self._signal(signal.SIGTERM)
            self._reaper.join(seconds)
        self.kill()

    def close(self) -> None:
        """Ends it, if it still runs, closes its pipes, and removes its files."""
        self.kill()
        self.close_input()
        os.close(self.output)
        os.close(self.errors)
        shutil.rmtree(self._folder, ignore_errors=True)


class Processes:
    """All processes of one store's scripts, in a folder that is theirs while a server runs."""

    def __init__(self, folder: str, variables: dict[str, str]) -> None:
        """`variables`: the environment of every process."""
        self.folder = folder
        self._variables = variables
        self._counter = 0
        self._counter_lock = threading.Lock()
        os.makedirs(folder, 0o700, exist_ok=True)
        path = os.path.join(folder, "lock")
        self._lock = _high(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        reading, self._lifeline = os.pipe()
        self._watched = _high(reading)

    def acquire(self, give_up: Callable[[], bool]) -> bool:
        """Waits until no process of an earlier server is left; False if `give_up` says so first."""
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if give_up():
                    return False
                time.sleep(LOCK_LOOK_SECONDS)  # there is nothing of the kernel's to wait for
                continue
            self._clear()
            return True

    def _clear(self) -> None:
        for entry in os.scandir(self.folder):
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)

    def _place(self, files: dict[str, bytes]) -> str:
        """A new folder with these files in it, for one process."""
        with self._counter_lock:
            self._counter += 1
            folder = os.path.join(self.folder, str(self._counter))
        os.mkdir(folder, 0o700)
        for name, data in files.items():
            with open(os.path.join(folder, name), "xb") as file:
                file.write(data)
        return folder

    def start(self, command: Command, ended: Callable[[], None]) -> Process:
        """Starts a command in a group of its own. Raises `OSError`.

        `ended` is called, in a thread of its own, when it has ended.
        """
        folder = self._place(command.files)
        opened: list[int] = []

        def pipe(*, writes: bool) -> tuple[int, int]:
            reading, writing = os.pipe()
            ours, theirs = (reading, writing) if writes else (writing, reading)
            opened.append(ours)
            theirs = _high(theirs)
            opened.append(theirs)
            os.set_blocking(ours, False)
            return ours, theirs

        input_: int | None = None
        actions: list[tuple[int, ...] | tuple[int, int, str, int, int]]
        actions = [(os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0)]
        theirs_all = []
        try:
            if command.input_at is not None:
                input_, theirs = pipe(writes=False)
                actions.append((os.POSIX_SPAWN_DUP2, theirs, command.input_at))
                theirs_all.append(theirs)
            output, theirs = pipe(writes=True)
            actions.append((os.POSIX_SPAWN_DUP2, theirs, 1))
            theirs_all.append(theirs)
            errors, theirs = pipe(writes=True)
            actions.append((os.POSIX_SPAWN_DUP2, theirs, 2))
            theirs_all.append(theirs)
            actions.append((os.POSIX_SPAWN_DUP2, self._watched, _LIFELINE))
            actions.append((os.POSIX_SPAWN_DUP2, self._lock, _LOCK))
            pid = os.posix_spawn(
                "/bin/sh",
                ["sh", "-c", _WATCHED, "xs"]
                + [word.replace("{folder}", folder) for word in command.words],
                {**self._variables, **command.variables},
                file_actions=actions,
                setpgroup=0,
                setsigmask=[],
                setsigdef=[signal.SIGPIPE, signal.SIGINT, signal.SIGTERM, signal.SIGXFSZ],
            )
        except BaseException:
            for number in opened:
                os.close(number)
            shutil.rmtree(folder, ignore_errors=True)
            raise
        for number in theirs_all:
            os.close(number)
        return Process(pid, folder, input_, output, errors, ended)

    def close(self) -> None:
        """No more processes. Those that still run are ended by their watchers."""
        os.close(self._lifeline)
        os.close(self._watched)
        os.close(self._lock)


def command_of(text: bytes) -> Command:
    """Runs a script whose first line is `#!`, as the kernel would. Raises `Invalid`.

    The kernel itself is not asked to: a file that was just written can be busy, because another
    thread forks meanwhile, and its file system may forbid to execute what is there (execve(2)).
    """
    line = text[2:].split(b"\n", 1)[0].strip().decode("utf-8", "surrogateescape")
    interpreter, *argument = line.split(None, 1) or [""]
    if not os.path.isabs(interpreter) or not os.access(interpreter, os.X_OK):
        raise Invalid(f"no such program: {interpreter!r}: #! is followed by the path of a program")
    return Command([interpreter, *argument, "{folder}/script"], {"script": text}, {}, 0)


def _high(number: int) -> int:
    """The same file under a number above all that a process finds open."""
    moved = fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(number)
    return moved
