"""Chunked content: bodies that arrive slowly, as runs of frames, and runs as bodies again.

Writing: a body's bytes are frames as soon as they are there. What comes within GATHER_SECONDS of
the frame before is gathered until then, so that a source of single bytes makes no more than twenty
frames a second; a slow one never waits at all.

Reading: the pieces of a run in order, and then, while it is being written, each further one as it
becomes durable. What broke off while it was written breaks off here too, and so does what has lost
a piece: nobody takes a part for the whole. Each reading begins at the first piece. Of a run that
has ended the pieces are counted before the first of them is given, of one that is being written at
its end.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator

from xs import frame, ids, threads
from xs.commit import Append
from xs.content import small
from xs.errors import (
    BrokenBody,
    Invalid,
    NoMemory,
    NotFound,
    TooLarge,
    Unavailable,
    XsError,
)
from xs.pieces import lacking
from xs.records import NamedTuple
from xs.runs import COMMIT_MAX, PIECE_MAX, Run, Shared, first_of, is_script, pieces
from xs.runsteps import RunResult, RunWork
from xs.schema import BROKEN, WHOLE, StoredPiece
from xs.store import Store

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Optional

GATHER_SECONDS = 0.05  # between two frames of a run, unless there is enough for a whole piece
WAITING_MAX = 1024 * 1024  # bytes read and not yet durable, above which reading waits
SHARED_MAX = 256 * 1024  # bytes that are kept for a moment, for the others who wait for them
IDLE_SECONDS = 1.0  # between two looks around, for a reader of a run to which nothing is added

BROKE_OFF = "the writer broke off"


# Writing


def append(store: Store, append: Append, body: Iterable[bytes]) -> bytes:
    """Makes a run of frames from a body as it arrives, and answers the first frame, at its end.

    `append` has no content. If the body breaks off, by whatever exception, what had come is kept,
    the run is ended as broken off, and the exception goes on up. Raises what an append raises:
    when the first bytes have come, or later.
    """
    first_of(append)  # what is wrong with it is said before there need be a store
    run = store.runs.begin(append)
    gathered = _Gathered(run)
    try:
        for block in body:
            gathered.add(block)
            if run.is_answered:
                gathered.drop()
                return run.line
        return gathered.end()
    except BrokenBody as error:
        gathered.break_off(BROKE_OFF)
        kept = "" if run.first is None else f"; {ids.text(run.first)} has what came before"
        broken = BrokenBody(f"{error}{kept}")
        broken.status = error.status
        raise broken from None
    except BaseException as error:
        reason = f"it can't be stored: {error}" if isinstance(error, XsError) else BROKE_OFF
        gathered.break_off(reason)
        raise


def go_on(
    store: Store,
    append: Append,
    writer: str,
    first: int | None,
    last: int | None,
    body: Iterable[bytes],
    *,
    ended: bool,
    error_text: str | None,
) -> RunResult:
    """A step of a run that another process writes, which holds the claim in `writer`.

    That process has begun on the store's files, and this one has taken them over as a server. The
    step is as `RunWork` has it.
    """
    if is_script(writer) or store.runs.is_own(writer) or store.runs.is_gone(writer):
        raise Invalid("no other process on this machine writes to this store under that claim")
    store.runs.look_after(writer)
    data = b""
    for block in body:
        data += block
        if len(data) > COMMIT_MAX:
            raise TooLarge(f"too much for one step: at most {COMMIT_MAX} bytes")
    contents = [small(piece) for piece in pieces(data)]
    work = RunWork(append, writer, first, last, contents, ended=ended, error_text=error_text)
    result: RunResult = store.run(work)
    return result


class _Gathered:
    """What was read of a body and is not yet durable.

    Who reads writes, too, if the last frame is long enough ago: a slow source pays no hand-over.
    What comes sooner is left to a thread, which writes when the time has come, or there is enough
    for a piece: so what a fast source sends meanwhile shares the next commit (bench/chunked.py).
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._changed = threading.Condition(threading.Lock())  # guards all below
        self._blocks: list[bytes] = []
        self._size = 0
        self._due = 0.0  # when the next frame may be made
        self._reader_writes = self._thread_writes = False
        self._is_ended = False
        self._error: BaseException | None = None
        self._thread: threads.Thread | None = None

    def add(self, block: bytes) -> None:
        """Takes in a block. Raises what has gone wrong with those before it."""
        if not block:
            return
        with self._changed:
            self._changed.wait_for(lambda: self._size < WAITING_MAX or self._error is not None)
            self._check()
            self._blocks.append(block)
            self._size += len(block)
            if self._thread_writes or time.monotonic() < self._due:
                self._leave_to_thread()
                return
            self._reader_writes = True
            data = self._take()
        self._write(data)
        with self._changed:
            self._reader_writes = False
            self._changed.notify_all()
            if self._size:
                self._leave_to_thread()
            self._check()

    def end(self) -> bytes:
        """Writes what is left, and the end. Answers the line of the first frame."""
        with self._changed:
            data = self._finish()
            self._check()
        return self._run.end(data)

    def break_off(self, reason: str) -> None:
        """Writes what is left, if that can be done, and that it broke off."""
        with self._changed:
            data = self._finish()
            failed = self._error is not None
        if data and not failed and self._run.first is not None:
            self._write(data)
        self._run.break_off(reason)

    def drop(self) -> None:
        """What is left is wanted by nobody."""
        with self._changed:
            self._finish()

    def _finish(self) -> bytes:
        self._is_ended = True
        self._changed.notify_all()
        self._changed.wait_for(lambda: not self._thread_writes)
        return b"".join(self._blocks)

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _seconds_left(self) -> float:
        return 0.0 if self._size >= PIECE_MAX else self._due - time.monotonic()

    def _take(self) -> bytes:
        data = b"".join(self._blocks)
        # A character that has come in part, as blocks of text may end in one, waits for its rest:
        # until the next time at most, for these may be no text.
        end = len(data) - _begun_character(data) or len(data)
        self._blocks = [data[end:]] if end < len(data) else []
        self._size = len(data) - end
        self._due = time.monotonic() + GATHER_SECONDS
        return data[:end]

    def _write(self, data: bytes) -> None:
        try:
            self._run.write(data)
        except BaseException as error:
            self._error = error

    def _leave_to_thread(self) -> None:
        if self._thread is None:
            thread = threads.Thread(self._flush_all, "xs-gather")
            try:
                thread.start()
            except RuntimeError:
                raise NoMemory from None
            self._thread = thread
        self._changed.notify_all()

    def _flush_all(self) -> None:
        try:
            self._flush()
        except MemoryError as error:
            self._error = error
            with self._changed:
                self._thread_writes = False
                self._changed.notify_all()

    def _flush(self) -> None:
        while True:
            with self._changed:
                self._thread_writes = False
                self._changed.notify_all()
                while True:
                    if self._is_ended or self._error is not None:
                        return
                    left = None
                    if self._size and not self._reader_writes:
                        left = self._seconds_left()
                        if left <= 0:
                            break
                    self._changed.wait(left)
                self._thread_writes = True
                data = self._take()
            self._write(data)


def _begun_character(data: bytes) -> int:
    """How many bytes at the end begin a character in UTF-8 without ending it (RFC 3629 §3)."""
    for count, byte in enumerate(reversed(data[-3:]), 1):
        if byte & 0b1100_0000 != 0b1000_0000:
            length = 4 if byte >= 0xF0 else 3 if byte >= 0xE0 else 2 if byte >= 0xC0 else 1
            return count if length > count else 0
    return 0


# Reading


def content(store: Store, value: int) -> tuple[int | None, Iterator[bytes]]:
    """Size and blocks of a frame's content; of a run's first frame, those of the whole run.

    The size of a run is None. An empty block is given now and then while nothing comes, so that the
    caller can look around. Raises `NotFound`, `Damaged`, and `BrokenBody` on its way where a run
    was broken off.
    """
    stored = store.index.stored(value, store.clock())
    if stored is None:
        return store.content_of(value)  # an ephemeral frame's, if there is one
    size, blocks = store.stored_content(stored)
    if frame.may_begin_run(stored.line) and store.index.begins_run(value):
        return None, run_content(store, value, blocks)
    return size, blocks


def run_content(store: Store, first: int, blocks: Iterator[bytes]) -> Iterator[bytes]:
    """The blocks of a run by its first frame's id, after those of that frame; as in `content`."""
    yield from blocks
    name = f"the content {ids.text(first)}"
    position = first
    given = 0  # pieces
    is_live = writer_is_gone = False
    with store.runs.reading(first) as shared:
        while True:
            # Before the look into the index: what is published after these is not missed.
            is_closed, seen = store.bus.closed, store.bus.newest
            # Those who have caught up are woken at once, and all want the same next.
            step = _next_shared(store, first, position, shared) if is_live else None
            step = step or _next(store, first, position)
            if step is None:
                raise NotFound(f"{name} was removed while it was read")
            if step.data is None:
                yield from _blocks(store, step.pieces)
            elif step.data:
                yield step.data
            if step.pieces:
                position = step.pieces[-1].id
                ends = step.pieces[-1].ends
                given += len(step.pieces)
                if ends == WHOLE:
                    if given != step.total:
                        raise lacking(first)
                    return
                if ends == BROKEN:
                    raise BrokenBody(f"{name} broke off while it was written")
            elif step.writer is None or writer_is_gone:
                raise BrokenBody(f"{name} has no end, and nobody goes on with it")
            elif is_closed:
                raise Unavailable("the store is closing")
            else:
                is_live = store.wait_for_run(first, max(seen, position), IDLE_SECONDS)
                if not is_live:
                    # Without a server nobody ends what a killed writer has left; it may have ended
                    # well just now, so there is one more look.
                    writer_is_gone = not store.exclusive and store.runs.is_gone(step.writer)
                    yield b""


class Step(NamedTuple):
    """What comes after a position in a run: the pieces, and their bytes where those are few.

    `total` is how many pieces all of the run has, once it has ended.
    """

    after: int
    pieces: list[StoredPiece]
    data: Optional[bytes]
    writer: Optional[str]
    expires: Optional[int]
    total: Optional[int]


def _next(store: Store, first: int, after: int) -> Step | None:
    """What comes next, from the index; None if the run is gone."""
    found = store.index.run(first, after, store.clock())
    if found is None:
        return None
    run, pieces = found
    size = sum(len(piece.stored.content or b"") for piece in pieces)
    is_small = size <= SHARED_MAX and not any(piece.stored.is_file for piece in pieces)
    data = b"".join(_blocks(store, pieces)) if is_small else None
    return Step(after, pieces, data, run.writer, run.expires, run.pieces)


def _next_shared(store: Store, first: int, after: int, shared: Shared) -> Step | None:
    """The same, looked up once for all who want it at this moment (bench/chunked.py)."""
    with shared.lock:
        step: Step | None = shared.step
        if (
            step is None
            or step.after != after
            or (step.expires is not None and step.expires <= store.clock())
        ):
            step = _next(store, first, after)
            # More may come after nothing, but not after something that ends where it did.
            shared.step = step if step is not None and step.pieces and step.data else None
        return step


def _blocks(store: Store, pieces: list[StoredPiece]) -> Iterator[bytes]:
    """The contents of pieces, the small ones together."""
    together: list[bytes] = []
    for piece in pieces:
        blocks = store.stored_content(piece.stored)[1]
        if not piece.stored.is_file:
            together += blocks
            continue
        if together:
            yield b"".join(together)
            together = []
        yield from blocks
    if together:
        yield b"".join(together)
