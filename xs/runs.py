"""Runs: contents that are written piece by piece, a frame for each, and who writes them.

A `Run` is one such content on its way into the store: `write` makes its next frames durable, `end`
or `break_off` its last one. Whoever writes holds a claim (`claim`), so that a run whose writer was
killed can be told from one that goes on slowly: the first is ended as broken off by the next who
has the store's lock, the second by nobody else.

`chunked` fills runs from bodies as they arrive; handlers, whose frames belong in one transaction,
have `begin_run`, `extend_run` and `end_run` of `runsteps` (see `effects`).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator

from xs import fault, frame, threads
from xs.commit import Append
from xs.content import INLINE_MAX, small
from xs.errors import Conflict, Invalid, NotFound, Unavailable, XsError
from xs.runsteps import EndRunsWork, RunWork
from xs.work import Work

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from xs.claim import Claim

PIECE_MAX = INLINE_MAX  # bytes of one frame's piece: each lies in the index, beside its frame
COMMIT_MAX = 1024 * 1024  # bytes of pieces that one commit takes
LOOK_SECONDS = 0.2  # between two looks whether another process's run is still being written

SCRIPT_WRITER = "script-"  # begins the names of writers that are scripts (`effects`)

KILLED = "its writer was killed, or went away"
STOPPED = "the server stopped"


class Run:
    """One content that is being written. One thread at a time may call it.

    `first` is the id of its first frame, and `line` that frame, once `write` or `end` has made it;
    `last` is the id of the last one. `is_answered`: its idempotency key had made that frame before,
    and nothing is to be written.
    """

    def __init__(self, runs: Runs, append: Append, writer: str) -> None:
        self.append = append
        self.writer = writer
        self.first: int | None = None
        self.last: int | None = None
        self.line = b""
        self.is_answered = False
        self._runs = runs
        self._is_open = True

    def write(self, data: bytes) -> None:
        """Adds a frame, or as many as `data` takes; durable when this returns.

        Raises `NotFound` when the run was removed meanwhile, and whatever else an append raises.
        """
        for part in _parts(data):
            self._do(part)

    def end(self, data: bytes = b"") -> bytes:
        """Adds what is left, and ends the run: it is whole. Answers the line of its first frame."""
        *parts, rest = _parts(data)
        for part in parts:
            self._do(part)
        if self.first is None and not rest:
            self._do([])  # a step by itself, so that it can be told whether it was done
        self._do(rest, ended=True)
        fault.at("run.ended")
        return self.line

    def break_off(self, reason: str) -> None:
        """Ends the run, if it was begun, before it is whole. If that fails, it is done later."""
        if self.first is None or not self._is_open:
            return
        try:
            self._do([], ended=True, error_text=reason)
        except XsError:
            if self._is_open:  # the disk may be full
                self._runs.end_later(self, reason)

    def _do(self, part: list[bytes], *, ended: bool = False, error_text: str | None = None) -> None:
        if self.is_answered:
            return
        contents = [small(piece) for piece in part]
        work = RunWork(
            self.append,
            self.writer,
            self.first,
            self.last,
            contents,
            ended=ended,
            error_text=error_text,
        )
        try:
            result = self._runs.do(work)
        except (NotFound, Conflict):
            self._is_open = False
            raise
        self._is_open = not ended
        fault.at("run.step-done")
        self.line = self.line or result.line
        self.first, self.last = result.first, result.last
        self.is_answered = self.first is None


def is_script(writer: str) -> bool:
    """Whether that writer is a script's registration, which outlives processes."""
    return writer.startswith(SCRIPT_WRITER)


def _claim_of(writer: str) -> str:
    return writer.partition(".")[0]


def first_of(append: Append) -> Append:
    """The append of a run's first frame: with `more` in its meta. Raises `Invalid`."""
    from xs.meta import META_MAX  # here: most commands have no need of it

    if append.ttl == frame.EPHEMERAL:
        raise Invalid("a chunked content can't be ephemeral: give the frame another ttl")
    meta = frame.first_meta(append.meta)
    if len(meta.encode()) > META_MAX:
        raise Invalid(f"meta is too large: at most {META_MAX} bytes of JSON")
    return append._replace(meta=meta)


def _parts(data: bytes) -> list[list[bytes]]:
    """The pieces of `data`, as many in a list as one commit takes; one empty list for none."""
    each = list(pieces(data))
    count = COMMIT_MAX // PIECE_MAX
    return [each[at : at + count] for at in range(0, len(each), count)] or [[]]


def pieces(data: bytes) -> Iterator[bytes]:
    """`data` in pieces of at most PIECE_MAX bytes, cut between characters if it is UTF-8."""
    start = 0
    while len(data) - start > PIECE_MAX:
        end = start + PIECE_MAX
        for back in range(4):
            if data[end - back] & 0b1100_0000 != 0b1000_0000:  # not amid a character
                end -= back
                break
        yield data[start:end]
        start = end
    if start < len(data):
        yield data[start:]


class Shared:
    """What those who read one run live have found last: `step`, guarded by `lock`."""

    __slots__ = ("lock", "readers", "step")

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.readers = 0
        self.step: Any = None


class Runs:
    """The runs of one store, as one process sees them. Any thread may call anything."""

    def __init__(self, folder: str, do: Callable[[Work], Any]) -> None:
        """`do` does a work, waits until it is durable, and gives its result."""
        self.do = do
        self._folder = folder
        self._lock = threading.Condition(threading.Lock())  # guards all below; taken last
        self._claim: Claim | None = None
        self._begun = 0  # runs, to tell them apart
        self._others: set[str] = set()  # claims of other processes, to be looked at
        self._unended: dict[Run, str] = {}  # runs whose end could not be written
        self._read: dict[int, Shared] = {}  # by the first frames' ids
        self._watch: threads.Thread | None = None
        self._closed = False

    def begin(self, append: Append) -> Run:
        """A run whose first frame has this topic, meta, ttl, condition and key.

        Nothing is written yet. Raises `Invalid` for meta or a ttl that a run can't have.
        """
        return Run(self, first_of(append), self.new_writer())

    def new_writer(self) -> str:
        """What a run of this process has for its writer: the process's claim, and a number.

        The claim is made at the first need.
        """
        with self._lock:
            if self._claim is None:
                from xs.claim import Claim

                try:
                    self._claim = Claim(self._folder)
                except OSError as error:
                    raise Unavailable(f"the store can't be written: {error.strerror}") from None
            self._begun += 1
            return f"{self._claim.token}.{self._begun}"

    def is_own(self, writer: str) -> bool:
        """Whether it is a writer of this process."""
        claim = self._claim  # `close` may take it away meanwhile
        return claim is not None and _claim_of(writer) == claim.token

    def is_gone(self, writer: str) -> bool:
        """Whether the process of that writer lives no more. A script goes on in the next one."""
        if self.is_own(writer) or is_script(writer):
            return False
        from xs.claim import is_held

        return not is_held(self._folder, _claim_of(writer))

    def end_abandoned(self) -> None:
        """Ends the runs whose writers are gone, and looks after those of other living ones."""
        from xs.claim import remove_stale

        for writer in self.do(EndRunsWork(self.is_gone, KILLED)):
            if not self.is_own(writer) and not is_script(writer):
                self.look_after(writer)
        remove_stale(self._folder)

    def look_after(self, writer: str) -> None:
        """From now on the runs of another process are ended as soon as it is gone."""
        with self._lock:
            self._others.add(_claim_of(writer))
            self._start_watching()

    def end_later(self, run: Run, reason: str) -> None:
        """Ends a run as soon as that can be done."""
        with self._lock:
            self._unended[run] = reason
            self._start_watching()

    @contextlib.contextmanager
    def reading(self, first: int) -> Iterator[Shared]:
        """What the readers of that run share, while there are any."""
        with self._lock:
            shared = self._read.setdefault(first, Shared())
            shared.readers += 1
        try:
            yield shared
        finally:
            with self._lock:
                shared.readers -= 1
                if not shared.readers and self._read.get(first) is shared:
                    del self._read[first]

    def forget(self, removed: Iterable[int]) -> None:
        """Runs were removed: what was found of them is not given any more."""
        for first in removed:
            shared = self._read.get(first)
            if shared is not None:
                with shared.lock:
                    shared.step = None

    def _start_watching(self) -> None:
        if self._watch is None and not self._closed:
            watch = threads.Thread(lambda: threads.keep_on(self._look), "xs-runs", insists=True)
            with contextlib.suppress(RuntimeError):  # no more threads: the next call may have one
                watch.start()
                self._watch = watch

    def _look(self) -> bool:
        with self._lock:
            self._lock.wait_for(lambda: self._closed, LOOK_SECONDS)
            if self._closed or not (self._others or self._unended):
                self._watch = None
                return True
            others, unended = set(self._others), dict(self._unended)
        gone = {claim for claim in others if self.is_gone(claim)}
        if gone and self._try(EndRunsWork(lambda w: _claim_of(w) in gone, KILLED)):
            with self._lock:
                self._others -= gone
        for run, reason in unended.items():
            with self._lock:
                del self._unended[run]
            try:
                run.break_off(reason)  # which puts it back if it fails
            except MemoryError:
                self.end_later(run, reason)
                raise
        return False

    def _try(self, work: Work) -> bool:
        try:
            self.do(work)
        except XsError:
            return False
        return True

    def close(self) -> None:
        """Gives the claim back: what was not ended is for the next who has the store's lock."""
        with self._lock:
            self._closed = True
            self._lock.notify_all()
            watch, claim, self._claim = self._watch, self._claim, None
        if watch is not None:
            watch.join()
        if claim is not None:
            claim.close()
