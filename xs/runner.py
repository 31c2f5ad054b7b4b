"""A thread that keeps one script in service: its orders, its process, what comes out of that.

Everything about a script happens in its runner's thread, one thing after another: so nothing of it
needs a lock. Others only `submit` orders and `wake` it. What a generator or a handler is to do with
all this is in `generators` and `handlers`.
"""

from __future__ import annotations

import collections
import contextlib
import selectors
import socket
import threading
from collections.abc import Callable

from xs import frame, ids, meta, process, threads
from xs.commit import Append
from xs.errors import Failed, Full, Invalid, Unavailable, XsError
from xs.log import ERROR, INFO, WARNING, log_of
from xs.meta import as_meta
from xs.pipes import Pipes
from xs.process import SCRIPT_BYTES, Command, Processes
from xs.records import NamedTuple
from xs.schema import Script
from xs.store import Store
from xs.work import Work

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Optional

START_SECONDS = 60.0  # from a process's start to its first sign of life; above it: it has failed
RESTART_SECONDS = 1.0  # before a script is started again, doubled while it keeps failing …
RESTART_SECONDS_MAX = 60.0  # … up to this
SELECT_SECONDS_MAX = 3600.0  # in one wait: epoll counts milliseconds in 32 bits
WELL_SECONDS = 10.0  # a process that ran so long has run well
_KEYS_LOOKED_AT = 100  # of a script's meta that means nothing here
_ALIKE = 0.8  # so much two keys have in common if one is a slip of the other (1 is all)
_START = b"start"  # what a Nushell script's process says first, behind the mark


class Context(NamedTuple):
    """What all runners of a store share."""

    store: Store
    processes: Processes
    log: Callable[[str], None]
    gone: Callable[[Runner], bool]  # whether a runner with nothing to do may end (see `_main`)


class Order(NamedTuple):
    """What a frame tells the runner of a name: `puts` a script in service, or takes it out."""

    puts: bool
    id: int


class Backoff:
    """How long to wait before a process is started again."""

    def __init__(self) -> None:
        self._seconds = RESTART_SECONDS

    def after(self, *, well: bool) -> float:
        """The wait after a process that ran `well`, or failed."""
        if well:
            self._seconds = RESTART_SECONDS
            return self._seconds
        seconds = self._seconds
        self._seconds = min(seconds * 2, RESTART_SECONDS_MAX)
        return seconds


class Runner:
    """Keeps the script of one name. `kind` and what it does are the subclass's."""

    kind = ""
    meta_keys: tuple[str, ...] = ()  # what the meta of the frame that brings a script can say

    def __init__(self, context: Context, name: str) -> None:
        self.context = context
        self.store = context.store
        self.name = name
        self._log = log_of(context.log).for_script(name)
        self.finished_frames = 0
        self.last_error: str | None = None
        self.pipes: Pipes | None = None
        self.source: int | None = None  # the frame that put the script in service
        self.selector = selectors.DefaultSelector()
        self._orders: collections.deque[Order] = collections.deque()
        self._obeys = False  # one of them is being carried out
        self.obeyed = -1  # the last one that was
        self._stopping = threading.Event()
        self._woken = False
        self._wakened, self._waker = socket.socketpair()
        self._wakened.setblocking(False)
        self._waker.setblocking(False)
        self.selector.register(self._wakened, selectors.EVENT_READ)
        self._thread = threads.Thread(self._main, f"xs-{self.kind}")

    # For other threads

    def start(self) -> None:
        self._thread.start()

    def submit(self, order: Order) -> None:
        self._orders.append(order)
        self.wake()

    def wake(self) -> None:
        """Lets the thread look around."""
        if not self._woken:
            self._woken = True
            with contextlib.suppress(OSError):  # full, or closed: it is awake, or has ended
                self._waker.send(b".")

    def stop(self) -> None:
        """The server stops: ends the process, keeps what it has done. `join` waits for it."""
        self._stopping.set()
        self.wake()

    def join(self) -> None:
        self._thread.join()

    @property
    def is_stopping(self) -> bool:
        return self._stopping.is_set()

    @property
    def has_orders(self) -> bool:
        return bool(self._orders)

    def log(self, text: str, level: int = INFO) -> None:
        self._log(text, level)

    def status(self) -> dict[str, Any]:
        """What `xs ps` shows of it."""
        pipes, source = self.pipes, self.source
        return {
            "kind": self.kind,
            "name": self.name,
            "id": None if source is None else ids.text(source),
            "pid": None if pipes is None else pipes.pid,
            "since": None if pipes is None else pipes.started,
            "frames": self.finished_frames,
            "error": self.last_error,
        }

    # The thread

    def _main(self) -> None:
        while not self._stopping.is_set():
            try:
                self._obey()
                if self.source is not None:
                    self.step()
                elif self.context.gone(self):
                    break
            except Exception as error:  # a defect of ours, or a store that is closing
                if not self._stopping.is_set():
                    self.last_error = f"{type(error).__name__}: {error}"
                    if isinstance(error, (XsError, OSError)):
                        self.log(self.last_error, ERROR)
                    else:
                        self._log.defect("a defect", error)
                self.close_process()
                self._stopping.wait(RESTART_SECONDS)
        self.close()

    def close(self) -> None:
        """Gives back what it has: the end of its thread, or in place of one that can't start."""
        try:
            self.leave()
        except XsError as error:
            self.log(f"could not end in good order: {error}", WARNING)
        finally:
            self.close_process()
            self.selector.close()
            self._wakened.close()
            self._waker.close()

    def _obey(self) -> None:
        while self._orders and not self._stopping.is_set():
            order = self._orders[0]
            self._obeys = True
            try:
                if order.puts:
                    self.put(order.id)
                else:
                    self.take_out(order.id)
            finally:
                self._obeys = False
            self._orders.popleft()  # now: one that could not be carried out is tried again
            self.obeyed = order.id

    def put(self, source: int) -> None:
        """Puts the script of that frame in service, in place of the one that is."""
        raise NotImplementedError

    def take_out(self, frame_id: int) -> None:
        """Takes the script out of service, because that frame says so."""
        raise NotImplementedError

    @classmethod
    def refusal(cls, name: str, source: int, reason: str) -> Append:
        """The frame that says why the script of that frame can't be put in service."""
        raise NotImplementedError

    def step(self) -> None:
        """Waits for something to happen, and does what is to be done then."""
        raise NotImplementedError

    def leave(self) -> None:
        """The server stops."""
        raise NotImplementedError

    # What subclasses have in common

    def read_source(self, source: int) -> tuple[frame.Frame, bytes]:
        """The frame with that id and its content, the script. Raises `XsError`."""
        line = self.store.get(source)
        if frame.begins_run(line) or frame.continuation_in(frame.meta_of(line)) is not None:
            # The rest of it may come at any time, or never; and a part of a script is another one.
            raise Invalid("a script is one frame, and no chunked content: append it as a whole")
        size, blocks = self.store.content_of(source)
        if size > SCRIPT_BYTES:
            raise Invalid(f"the script is too long: at most {SCRIPT_BYTES} bytes")
        text = b"".join(blocks)
        if not text.strip():
            raise Invalid("the frame has no content: it is to be the script")
        found = frame.Frame.from_json(line)
        self._warn_of_slips(found.meta)
        return found, text

    def _warn_of_slips(self, meta: Any) -> None:
        """Logs keys that look like one that counts: meta may have others, and those say nothing."""
        others = [key for key in meta if key not in self.meta_keys] if type(meta) is dict else []
        if others:
            import difflib  # here: it brings `re`, and most have no need of it

            for key in others[:_KEYS_LOOKED_AT]:
                near = difflib.get_close_matches(key.lower(), self.meta_keys, 1, _ALIKE)
                if near and near[0] not in meta:
                    self.log(f"its meta has {short(key)}: did you mean {near[0]}?", WARNING)

    def is_stored(self, source: int) -> bool:
        """Whether that frame can be found again after a restart."""
        return self.store.index.get(source, self.store.clock()) is not None

    def kept(self, source: int) -> Script | None:
        """What the index keeps of the script that came with that frame."""
        wanted = ids.text(source)
        for script in self.store.index.scripts(self.kind, self.name):
            if script.source == wanted:
                return script
        return None

    def persist(self, work: Work) -> None:
        """Does `work`, again and again while the disk is full or the like.

        Raises `XsError` if that lasts until the server stops.
        """
        told = False
        while True:
            try:
                self.store.run(work)
                return
            except (Full, Unavailable) as error:
                if self._stopping.is_set():
                    raise
                if not told:
                    self.log(f"waits: {error}", WARNING)
                told = True
            self._stopping.wait(RESTART_SECONDS)

    def start_process(self, command: Command) -> Pipes:
        """Starts a process. Raises `Failed`."""
        try:
            process = self.context.processes.start(command, self.wake)
        except OSError as error:
            raise Failed(f"it can't be started: {error.strerror}") from None
        self.pipes = Pipes(process, command.mark, self.selector, self.log)
        return self.pipes

    def close_process(self) -> None:
        pipes, self.pipes = self.pipes, None
        if pipes is not None:
            pipes.close()

    def end_process(self) -> str:
        """Ends the process, and answers the last lines of its standard error."""
        pipes = self.pipes
        if pipes is None:
            return ""
        pipes.end()
        self.close_process()
        return pipes.tail

    def select(self, timeout: Optional[float]) -> None:
        """Waits until a pipe is ready, somebody wakes this thread, or `timeout` seconds."""
        if (self._orders and not self._obeys) or self._stopping.is_set():
            timeout = 0
        elif timeout is not None:
            timeout = min(timeout, SELECT_SECONDS_MAX)
        events = self.selector.select(timeout)
        ready = {key.fd for key, _ in events}
        if self._wakened.fileno() in ready:
            with contextlib.suppress(BlockingIOError):
                self._wakened.recv(4096)
            # After that: or the byte of a wake-up that comes between the two were taken with it,
            # and nobody would send another. Before what it may be about is looked at.
            self._woken = False
        if self.pipes is not None:
            self.pipes.handle(ready)


def command_of(
    text: bytes, in_nushell: Callable[[bytes], Command], *, has_input: bool = True
) -> Command:
    """How a script is run. Raises `Invalid`, `NoNushell`.

    Asked before each start: what runs it may have moved since the last one, as by an upgrade.
    """
    if not text.startswith(b"#!"):
        return in_nushell(text)
    command = process.command_of(text)
    return command if has_input else command._replace(input_at=None)


def check_levels(text: bytes, most: int) -> None:
    """Raises `Invalid` if arrays and objects are nested deeper than `most` in JSON text."""
    if text.count(b"[") + text.count(b"{") > most:
        try:
            meta.check_depth(text.decode("utf-8", "replace"), most)
        except Invalid:
            raise Invalid(f"it is nested deeper than {most} levels") from None


def short(value: Any) -> str:
    """The beginning of a value that came as JSON, for a sentence about it."""
    return as_meta(value)[:64]


def is_start(said: bytes | None) -> bool:
    return said == _START
