"""Who waits for which answer: one subscription to the stream for all requests of a gateway.

A request's `Waiter` is in the table before its frame is appended, and its frame's id joins it in
the very transaction, so no answer can come before somebody waits for it. One thread is woken when
an answer was published, and by nothing else, and wakes only those who got something. So a thousand
that wait cost as much as one.

A waiter keeps what has come for it up to a bound. What comes beyond that, for a client that is slow
to read, it reads later, by position, from the bus's ring or from the index. Ephemeral frames that
have left the ring by then are lost, and with them the rest of the answer: a body with a hole in it
would be worse.

Locks: a waiter's own, and `Answers._lock`; both are leaves, held for a few lines.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import time
from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple, Optional, Union

from xs import frame, ids, threads
from xs.commit import Append, Commit
from xs.errors import Unavailable, XsError
from xs.exchange import RESPONSE
from xs.frame import Entry
from xs.schema import Stored
from xs.store import Store
from xs.work import AppendWork, Work

KEPT_FRAMES = 256  # of one answer, while its client is slow to read them
KEPT_BYTES = 256 * 1024  # of their content, and some for each
_FRAME_BYTES = 500

_RESPONSES = frozenset((RESPONSE,))

if TYPE_CHECKING:
    # Of a frame: line, content, stored, begins.
    _Parts = tuple[bytes, Union[bytes, None], Union[Stored, None], Union[bool, None]]


class Busy(Unavailable):
    """As many requests wait as are allowed to."""


class Gone(Exception):
    """The client has closed its connection."""


class Stopped(Exception):
    """The server stops before there was an answer, or the rest of one."""


class Lost(Exception):
    """Frames of an answer are not there any more. `str` says it in half a sentence, for the log."""


class Found(NamedTuple):
    """A frame of an answer, with its content if that has been found along with it.

    Of an ephemeral frame it always has been (`content`), of a stored one mostly (`stored`).
    `begins`: whether it is the first of a run; None where only the index knows.
    """

    id: int
    hash: Optional[str]
    meta: dict[str, Any]
    content: Optional[bytes]
    stored: Optional[Stored]
    begins: Optional[bool]

    @property
    def size(self) -> int:
        """What it is counted with while it is kept, in bytes: not exactly those it takes."""
        kept = self.content or (self.stored.content if self.stored else None) or b""
        return _FRAME_BYTES + len(kept)


class Waiter:
    """One request that waits for its answer, frame by frame. `next` is for one thread alone."""

    __slots__ = (
        "_answers",
        "_error",
        "_found",
        "_lock",
        "_missed",
        "_missed_to",
        "_position",
        "_ready",
        "_rest",
        "_size",
        "frame_id",
        "has_begun",
        "request_id",
        "run",
    )

    def __init__(self, answers: Answers, request_id: str) -> None:
        self.request_id = request_id
        self.frame_id: Optional[str] = None  # of the request's frame, once it has one
        self.has_begun = False  # whether it was given a frame
        self.run: Optional[int] = None  # what its thread reads in place of frames (`reads`)
        self._answers = answers
        self._ready = threading.Lock()  # released when there may be something to look at
        self._ready.acquire()
        self._rest: Optional[_Rest] = None  # what is read again, before what is in `_found`
        self._position = -1  # of the last frame that was given
        self._lock = threading.Lock()  # guards all below
        self._found: deque[Found] = deque()
        self._size = 0
        self._missed = 0  # frames that came after those, and were not kept
        self._missed_to = -1  # the last of them
        self._error: Optional[Exception] = None

    def next(self, seconds: Optional[float] = None) -> Found:
        """The next frame of the answer. Raises `TimeoutError` if none has come in so long.

        Raises `Gone`, `Stopped`, `Lost`, and what the append of the request has failed with.
        """
        deadline = None if seconds is None else time.monotonic() + seconds
        while True:
            found = self._next()
            if found is not None:
                self._position = found.id
                if not self.has_begun:
                    self._answers.begun(self)
                return found
            left = -1.0 if deadline is None else max(0.0, deadline - time.monotonic())
            if not self._ready.acquire(timeout=left):
                raise TimeoutError

    def _next(self) -> Optional[Found]:
        with self._lock:
            if isinstance(self._error, Gone):
                raise self._error
        if self._rest is not None:
            found = self._rest.next()
            if found is not None:
                return found
            self._rest = None
        with self._lock:
            if self._found:
                found = self._found.popleft()
                self._size -= found.size
                return found
            if self._missed:
                self._rest = _Rest(
                    self._answers, self, self._position, self._missed_to, self._missed
                )
                self._missed = 0
            elif self._error is not None:
                raise self._error
        return None if self._rest is None else self._rest.next()

    def reads(self, first: int) -> None:
        """Its thread reads the run whose first frame has this id, and is woken there by `fail`.

        If that comes just before it waits, it finds out when it next looks around by itself.
        """
        self.run = first

    def check(self) -> None:
        """Raises what `fail` was given, if it was called."""
        with self._lock:
            if self._error is not None:
                raise self._error

    def named(self, frame_id: str) -> None:
        """The request's frame has this id. A transaction that is done again gives it another."""
        self._answers.named(self, frame_id)

    def offer(self, found: Found) -> None:
        """A frame of the answer has come."""
        with self._lock:
            if self._missed or len(self._found) >= KEPT_FRAMES or self._size > KEPT_BYTES:
                self._missed += 1
                self._missed_to = found.id
                return  # whoever has so much to read is awake
            self._found.append(found)
            self._size += found.size
        self._wake()

    def fail(self, error: Exception) -> None:
        """Nothing more will come; `next` raises this. From any thread."""
        with self._lock:
            if self._error is None or isinstance(error, Gone):
                self._error = error
        self._wake()
        if self.run is not None:
            self._answers.wake_run(self.run)

    def _wake(self) -> None:
        try:
            self._ready.release()
        except RuntimeError:
            pass  # it was released, and nobody has looked yet


class _Rest:
    """Frames of an answer that were not kept, read again by position, some at a time."""

    def __init__(
        self, answers: Answers, waiter: Waiter, position: int, until: int, count: int
    ) -> None:
        self._answers = answers
        self._waiter = waiter
        self._position = position
        self._until = until
        self._left = count
        self._found: deque[Found] = deque()

    def next(self) -> Optional[Found]:
        """The next one; None after the last. Raises `Lost` if not all of them are there."""
        while not self._found and self._position < self._until:
            found, self._position = self._answers.read(self._waiter, self._position, self._until)
            self._found.extend(found)
        if self._found:
            self._left -= 1
            return self._found.popleft()
        if self._left:
            raise Lost(f"{self._left} of its frames are gone, and its client was slow to read")
        return None


class RequestWork(AppendWork):
    """Appends a request's frame, and lets its answer find the waiter by that frame's id."""

    __slots__ = ("asks",)

    def __init__(self, append: Append, asks: Waiter) -> None:
        super().__init__(append, _tell_error)
        self.asks = asks

    def apply(self, commit: Commit) -> bytes:
        line = super().apply(commit)
        # Before it is published: an answer may be there as soon as that is.
        self.asks.named(frame.id_of(line))
        return line


def _tell_error(work: Work) -> None:
    if work.error is not None and isinstance(work, RequestWork):
        work.asks.fail(work.error)


class Answers:
    """The requests of one store that wait for their answers."""

    def __init__(self, store: Store, most: int) -> None:
        """`most`: how many may wait until their answers begin."""
        self._store = store
        self._bus = store.bus
        self._most = most
        # A dictionary's own operations are atomic: who commits is not kept waiting for a lock here.
        self._by_request: dict[str, Waiter] = {}
        self._by_frame: dict[str, Waiter] = {}
        self._lock = threading.Lock()  # guards the number below
        self._waiting = 0
        self._random = int.from_bytes(os.urandom(6), "big")
        self._numbers = itertools.count()
        self._stopping = False
        self._wakened = threading.Lock()  # released when an answer was published
        self._wakened.acquire()
        self._position = store.bus.newest
        self._watch = self._bus.watch(RESPONSE.__eq__, self._wake)
        self._thread = threads.Thread(
            lambda: threads.keep_on(self._run), "xs-answers", insists=True
        )

    @property
    def waiting(self) -> int:
        """How many requests wait for the beginning of their answers."""
        return self._waiting

    def check_room(self) -> None:
        """Raises `Busy` if no more may wait."""
        if self._waiting >= self._most:
            raise Busy(f"{self._most} requests are waiting already: try again in a moment")

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Who still waits is told that the server stops."""
        self._bus.unwatch(self._watch)
        self._stopping = True
        self._wake()
        self._thread.join()
        for waiter in list(self._by_request.values()):
            waiter.fail(Stopped())

    def expect(self) -> Waiter:
        """A waiter for the answer to a new request, whose id it has. Raises `Busy`."""
        with self._lock:
            self.check_room()
            self._waiting += 1
        # In the form of the stream's own ids, but another than any of them.
        number = next(self._numbers) & 0xFFFFFFFF
        value = self._store.clock() << 80 | self._random << 32 | number
        waiter = Waiter(self, ids.text(value))
        self._by_request[waiter.request_id] = waiter
        return waiter

    def forget(self, waiter: Waiter) -> None:
        """Ends what `expect` began: further frames of the answer are nobody's."""
        if not waiter.has_begun:
            self.begun(waiter)
        self._by_request.pop(waiter.request_id, None)
        if waiter.frame_id is not None:
            self._by_frame.pop(waiter.frame_id, None)

    def begun(self, waiter: Waiter) -> None:
        waiter.has_begun = True
        with self._lock:
            self._waiting -= 1

    def named(self, waiter: Waiter, frame_id: str) -> None:
        """From now on frames that name this one are its answer's, too."""
        if waiter.frame_id is not None:
            self._by_frame.pop(waiter.frame_id, None)
        waiter.frame_id = frame_id
        self._by_frame[frame_id] = waiter
        if waiter.request_id not in self._by_request:  # it was forgotten before, or just now
            self._by_frame.pop(frame_id, None)

    def wake_run(self, first: int) -> None:
        self._bus.wake_run(first)

    # Whose answer it is

    def _wake(self) -> None:
        try:
            self._wakened.release()
        except RuntimeError:
            pass  # it is awake already

    def _run(self) -> bool:
        self._wakened.acquire()
        if self._stopping:
            return True
        try:
            self._hand_out()
        except XsError:
            pass  # what is stored can't be read: those who wait are told when their time is up
        except MemoryError:
            self._wake()
            raise
        return False

    def _hand_out(self) -> None:
        while True:
            entries = self._bus.after(self._position)
            if entries is not None:
                break
            # Nothing was wanted for so long that the place has left the ring, or much came at once.
            floor = self._bus.floor
            position, self._position = self._position, floor
            while position < floor:
                rows, position = self._rows(position, floor)
                for stored in rows:
                    self._offer((stored.line, None, stored, None))
        if not entries:
            return
        self._position = entries[-1].id
        if not self._by_request:
            return
        now = self._store.clock()
        found = [each for each in entries if _is_answer(each) and each.is_live(now)]
        contents = self._contents(found)
        for each in found:
            self._offer((each.line, each.content, contents.get(each.line), each.begins))

    def _contents(self, entries: list[Entry]) -> dict[bytes, Stored]:
        """Stored frames with their content, by their lines: in one go, not by each who waits.

        Up to one that can't be read: those from there on each is told of, or reads, by itself.
        """
        with_content = [
            each for each in entries if each.content is None and b'"hash":null' not in each.line
        ]
        found: dict[bytes, Stored] = {}
        if with_content:
            position, until = with_content[0].id - 1, with_content[-1].id
            with contextlib.suppress(XsError):
                while position < until:
                    rows, position = self._rows(position, until)
                    found.update((stored.line, stored) for stored in rows)
        return found

    def _offer(self, parts: _Parts) -> None:
        if self._by_request:
            found = _found(parts)
            waiter = None if found is None else self._waiter_for(found.meta)
            if waiter is not None and found is not None:
                waiter.offer(found)

    def _waiter_for(self, meta: dict[str, Any]) -> Optional[Waiter]:
        request_id, frame_id = meta.get("request_id"), meta.get("frame_id")
        if request_id is not None:
            # A handler's frame names its cause in any case. What it answers somebody who has gone
            # must not reach the one whose request it was given.
            return self._by_request.get(request_id) if isinstance(request_id, str) else None
        return self._by_frame.get(frame_id.lower()) if isinstance(frame_id, str) else None

    # Reading again

    def read(self, waiter: Waiter, position: int, until: int) -> tuple[list[Found], int]:
        """Some of a waiter's frames up to `until`, and the position after them."""
        entries = self._bus.after(position)
        if entries is None:
            rows, position = self._rows(position, until)
            return self._own(waiter, [(row.line, None, row, None) for row in rows]), position
        now = self._store.clock()
        names = _names(waiter)
        found: list[Entry] = []
        size = 0
        for entry in entries:
            if entry.id > until:
                break
            # Only so many: what is held here stays in memory when it leaves the ring.
            if len(found) >= KEPT_FRAMES or size > KEPT_BYTES:
                until = position
                break
            position = entry.id
            if _is_answer(entry) and entry.is_live(now) and _has_any(entry.line, names):
                found.append(entry)
                size += entry.size
        contents = self._contents(found)
        parts = [(e.line, e.content, contents.get(e.line), e.begins) for e in found]
        return self._own(waiter, parts), until

    def _own(self, waiter: Waiter, frames: Iterable[_Parts]) -> list[Found]:
        names = _names(waiter)
        own = []
        for parts in frames:
            if _has_any(parts[0], names):
                found = _found(parts)
                if found is not None and self._waiter_for(found.meta) is waiter:
                    own.append(found)
        return own

    def _rows(self, position: int, until: int) -> tuple[list[Stored], int]:
        """Stored answers up to `until`, some at a time, and the position after them."""
        index, now = self._store.index, self._store.clock()
        rows = index.walk(_RESPONSES, chunks=False).rows(position, until, KEPT_FRAMES, now)
        return rows, ids.parse(frame.id_of(rows[-1].line)) if rows else until


def _is_answer(entry: Entry) -> bool:
    """Whether it may be a frame of an answer by its own ids.

    One that continues a run is its first frame's, whoever caused it, and read with that.
    """
    return entry.topic == RESPONSE and entry.first is None


def _names(waiter: Waiter) -> list[bytes]:
    return [name.encode() for name in (waiter.request_id, waiter.frame_id) if name]


def _has_any(line: bytes, names: list[bytes]) -> bool:
    """Whether the line may be that of an answer with one of these ids: it need be decoded then."""
    if b"\\" in line:
        return True  # meta is kept as it came, and JSON may have any character escaped
    lower = line.lower()  # an id of a frame may be given in either case
    return any(name in lower for name in names)


def _found(parts: _Parts) -> Optional[Found]:
    """An answer's frame; None if its meta can't be that of one."""
    line, content, stored, begins = parts
    fields = frame.Frame.from_json(line)
    if not isinstance(fields.meta, dict):
        return None
    return Found(ids.parse(fields.id), fields.hash, fields.meta, content, stored, begins)
