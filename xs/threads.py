"""Threads that are started or not, but never waited for in vain, and loops that outlast a shortage.

`threading.Thread.start` waits until the new thread says that it runs, which one that finds no
memory to begin with never does (CPython 3.9 to 3.14): whoever starts it waits for ever. These are
daemons: they end with the process.
"""

from __future__ import annotations

import _thread
import mmap
import sys
import threading
import time
from collections.abc import Callable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_START_SECONDS = 5.0  # for a thread to come up, on a machine that has much else to do
# Of memory, without which none is started: its stack, what Python takes to begin with, and some for
# those that run already. A thread that is started and finds no memory ends without a word.
_ROOM_BYTES = 2 * 1024 * 1024
PAUSE_SECONDS = 0.05  # before something is tried again that there was no memory for

running: dict[int, tuple[str, int]] = {}  # what runs, by `get_ident`: a name, and `get_native_id`


class Thread:
    """A thread of its own for `act`, to be started once.

    With `insists` it is called again if it raises `MemoryError`, as it does where there is no
    memory for its very beginning.
    """

    __slots__ = ("_act", "_came", "_insists", "_name", "_number", "_runs", "_turn")

    def __init__(self, act: Callable[[], object], name: str, *, insists: bool = False) -> None:
        self._act = act
        self._name = name
        self._insists = insists
        self._number = 0
        self._turn = threading.Lock()  # taken by the thread that comes, or by who gives it up
        self._came = threading.Lock()  # held until it has come
        self._runs = threading.Lock()  # held until it has ended

    def start(self) -> None:
        """Returns once it runs. Raises `RuntimeError` if there is no room for it."""
        self._came.acquire()
        self._runs.acquire()
        try:
            main = self._main
            references = sys.getrefcount(main)
            _start(main)
        except BaseException:
            self._runs.release()
            raise
        deadline = time.monotonic() + _START_SECONDS
        while True:
            try:
                if self._came.acquire(timeout=PAUSE_SECONDS):
                    return
                # One that has ended without a word refers to its function no more.
                is_gone = sys.getrefcount(main) <= references
                if (is_gone or time.monotonic() > deadline) and self._turn.acquire(False):
                    break
            except MemoryError:
                pass  # it may run all the same
        self._runs.release()
        raise RuntimeError("can't start new thread: it does not come up")

    def _main(self) -> None:
        if not self._turn.acquire(False):
            return  # nobody waits for it any more
        self._number = _thread.get_ident()
        self._came.release()
        try:
            while True:
                try:
                    run(self._name, self._act)
                    return
                except MemoryError as error:
                    if not self._insists:
                        report(self._name, error)
                        return
                time.sleep(PAUSE_SECONDS)
        finally:
            self._runs.release()

    def join(self, seconds: float = -1.0) -> bool:
        """Waits until it has ended, for so long at most; whether it has.

        It may ask itself: then it has not.
        """
        if self._number == _thread.get_ident():
            return False
        ended = self._runs.acquire(timeout=seconds)
        if ended:
            self._runs.release()
        return ended


def _start(act: Callable[..., object], *args: object) -> None:
    try:
        # Not shared, which would make a file of it and halve the rate of connections.
        mmap.mmap(-1, _ROOM_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()
        _thread.start_new_thread(act, args)
    except (MemoryError, OSError):
        raise RuntimeError("can't start new thread: no memory") from None


def run(name: str, act: Callable[..., object], *args: object) -> None:
    """What each thread does; a profiler may take its place. Raises `MemoryError`."""
    number = _thread.get_ident()
    try:
        running[number] = name, threading.get_native_id()
        act(*args)
    except MemoryError:
        raise
    except Exception as error:
        report(name, error)
    finally:
        running.pop(number, None)


def report(name: str, error: BaseException) -> None:
    """Tells of an error that nobody else hears of, as if it had ended a thread of that name."""
    try:
        named: Any = _Named(name)
        args = (type(error), error, error.__traceback__, named)
        threading.excepthook(threading.ExceptHookArgs(args))
    except MemoryError:
        pass  # nor can anybody be told


class _Named:
    """What an excepthook asks a thread for."""

    def __init__(self, name: str) -> None:
        self.name = name


def keep_on(step: Callable[[], object]) -> None:
    """Calls `step` again and again, until it gives True."""
    while True:
        try:
            if insist(step):
                return
        except MemoryError:
            pass  # not even for that call


def insist(act: Callable[[], object]) -> object:
    """What `act` gives. Where memory is short it is called again, after a pause.

    So whatever it had begun by then has to be such that it can be begun again.
    """
    while True:
        try:
            try:
                return act()
            except RuntimeError as error:
                if not is_shortage(error):
                    raise
        except MemoryError:
            pass  # also in looking at the error
        time.sleep(PAUSE_SECONDS)


def is_shortage(error: BaseException) -> bool:
    """Whether there was no memory, or no room for a thread or a lock."""
    if isinstance(error, RuntimeError):
        return str(error).startswith(("can't start new thread", "can't allocate lock"))
    return isinstance(error, MemoryError)
