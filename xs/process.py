"""Processes of scripts: each in a session of its own, ended whole, never outliving its server.

A script's process may start others, ignore signals, sleep; its server may be killed at any moment.
So each process group has a watcher in it, a few bytes of `sh`, which waits on a pipe that the
server holds, the lifeline. However the server dies, the pipe ends, and the watcher kills its group.
As long as a watcher lives it holds the lock of the store's scripts too, so that the next server
starts its scripts only when those of the last one are gone: nothing runs twice.

Some programs give those that they start groups of their own, as Nushell does with what its
background jobs run. These groups are found where the system has /proc: by their session when a
script ends, and as children of the script's process when the server dies. Out of reach is only who
makes a session of its own, as a daemon does.

Knows neither topics nor Nushell.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

from xs import threads
from xs.errors import Invalid, NotAStore
from xs.records import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Optional

SCRIPT_BYTES = 1 << 20  # of a script's text; a longer one is refused
TERM_SECONDS = 1.0  # from asking a process group to end to ending it
NOT_RUN = (126, 127)  # with which sh ends if it can't run a command, or finds none (POSIX, 2.8.2)
LOCK_LOOK_SECONDS = 0.02  # between two looks whether another server's scripts are gone

# Python ignores some of them, and a shell others in what it runs in the background.
_NOT_IGNORED = [signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM]

# What a process finds open: 0 to 2 as everywhere, its input, and for the watcher alone the other
# two. `sh` of some systems knows file descriptors of one digit only.
INPUT, _LIFELINE, _LOCK = 3, 4, 5
# The watcher ignores what may be sent to the group, but for SIGKILL, from before it is there. It is
# a member of the group, so the group's number can't be given to another while it lives.
_WATCHED = (
    "trap '' TERM INT HUP QUIT; "
    "(read _ <&4; for one in $(cat /proc/$$/task/*/children); do kill -9 -$one; done; kill -9 0) "
    "</dev/null >/dev/null 2>&1 3<&- & "
    'trap - TERM INT HUP QUIT; exec "$@" 4<&- 5<&-'
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
        self._exit: int | None = None
        self._reaper = threads.Thread(lambda: threads.keep_on(self._reap), "xs-reap", insists=True)
        try:
            self._reaper.start()
        except RuntimeError:  # nobody would know when it ends
            self._ended = lambda: None
            self._signal(signal.SIGKILL)
            self._reap()
            self._put_away()
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN)) from None

    def _reap(self) -> bool:
        if self._exit is None:
            _, self._exit = os.waitpid(self.pid, 0)
        groups = _groups_of(self.pid)
        for group in groups:  # what it has left behind, and the watcher
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(group, signal.SIGKILL)
        self.status = os.waitstatus_to_exitcode(self._exit)
        self._ended()
        # Who is the first process of a container is left their remains, too.
        for group in groups:
            with contextlib.suppress(ChildProcessError):
                while True:
                    os.waitpid(-group, 0)
        return True

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
        self._put_away()

    def _put_away(self) -> None:
        self.close_input()
        os.close(self.output)
        os.close(self.errors)
        _remove(self._folder)


def _remove(folder: str) -> None:
    """Removes a process's files, as far as it goes."""
    import shutil  # here, with what it loads for archives: many a server runs no script

    shutil.rmtree(folder, ignore_errors=True)


class Processes:
    """All processes of one store's scripts, in a folder that is theirs while a server runs."""

    def __init__(self, folder: str, variables: dict[str, str]) -> None:
        """`variables`: the environment of every process."""
        self.folder = folder
        self._variables = variables
        self._prefix = os.urandom(4).hex() + "-"
        self._counter = 0
        self._counter_lock = threading.Lock()
        self._has_started = False
        self.is_closed = False
        if os.path.islink(folder):  # whatever lies there would be cleared away
            raise NotAStore(f"not a store: {folder} is a link")
        os.makedirs(folder, 0o700, exist_ok=True)
        path = os.path.join(folder, "lock")
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
        with contextlib.ExitStack() as opened:
            self._lock = _high(os.open(path, flags, 0o600))
            opened.callback(os.close, self._lock)
            reading, self._lifeline = os.pipe()
            opened.callback(os.close, self._lifeline)
            self._watched = _high(reading)
            opened.pop_all()

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
            # A script for a request does not wait for the lock: it may run by now.
            if entry.is_dir(follow_symlinks=False) and not entry.name.startswith(self._prefix):
                _remove(entry.path)

    def _place(self, files: dict[str, bytes]) -> str:
        """A new folder with these files in it, for one process."""
        with self._counter_lock:
            self._counter += 1
            folder = os.path.join(self.folder, f"{self._prefix}{self._counter}")
        os.mkdir(folder, 0o700)
        try:
            for name, data in files.items():
                with open(os.path.join(folder, name), "xb") as file:
                    file.write(data)
        except BaseException:
            _remove(folder)
            raise
        return folder

    def start(self, command: Command, ended: Callable[[], None]) -> Process:
        """Starts a command in a session of its own. Raises `OSError`.

        `ended` is called, in a thread of its own, when it has ended.
        """
        if not self._has_started:  # not before: of many stores in a process few may have scripts
            _inherit_nothing()
            self._has_started = True
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
                setsid=True,  # so it has a group of its own, and no terminal
                setsigmask=[],
                setsigdef=_NOT_IGNORED,
            )
        except BaseException:
            for number in opened:
                os.close(number)
            _remove(folder)
            raise
        for number in theirs_all:
            os.close(number)
        return Process(pid, folder, input_, output, errors, ended)

    def close(self) -> None:
        """No more processes. Those that still run are ended by their watchers."""
        self.is_closed = True
        os.close(self._lifeline)
        os.close(self._watched)
        os.close(self._lock)
        self._watched = self._lock = -1  # whoever comes too late gets an error


@contextlib.contextmanager
def short_name(folder: str) -> Iterator[str]:
    """Another name for a folder while it is held, as short as the address of a socket has to be.

    Any process of the same user may follow it. Raises `OSError`.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        short = f"/proc/{os.getpid()}/fd/{descriptor}"
        if os.path.exists(short) and os.path.samefile(short, folder):  # Linux
            yield short
            return
    finally:
        os.close(descriptor)
    import tempfile

    with tempfile.TemporaryDirectory() as place:
        link = os.path.join(place, "d")
        os.symlink(folder, link)
        yield link


def command_of(text: bytes) -> Command:
    """Runs a script whose first line is `#!`, as the kernel would. Raises `Invalid`.

    The kernel itself is not asked to: a file that was just written can be busy, because another
    thread forks meanwhile, and its file system may forbid to execute what is there (execve(2)).
    """
    line = text[2:].split(b"\n", 1)[0].strip().decode("utf-8", "surrogateescape")
    interpreter, *argument = line.split(None, 1) or [""]
    is_program = (
        "\0" not in line
        and os.path.isabs(interpreter)
        and os.path.isfile(interpreter)
        and os.access(interpreter, os.X_OK)
    )
    if not is_program:
        raise Invalid(f"no such program: {interpreter!r}: #! is followed by the path of a program")
    return Command([interpreter, *argument, "{folder}/script"], {"script": text}, {}, 0)


def _inherit_nothing() -> None:
    """Keeps to this process what it was started with beyond the three files that all have."""
    for name in os.listdir("/dev/fd"):
        with contextlib.suppress(OSError):
            if int(name) > 2:
                os.set_inheritable(int(name), False)


def _high(number: int) -> int:
    """The same file under a number above all that a process finds open."""
    try:
        return fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, 10)
    finally:
        os.close(number)


def _groups_of(session: int) -> set[int]:
    """The process groups of a session, and of what it started in groups of their own."""
    groups = {session}
    with contextlib.suppress(OSError):  # without /proc, or a file to read it, the first is known
        for name in os.listdir("/proc"):
            with contextlib.suppress(ValueError, ProcessLookupError, PermissionError):
                if os.getsid(int(name)) == session:
                    groups.add(os.getpgid(int(name)))
    return groups
