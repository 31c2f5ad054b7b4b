"""Live delivery to connections: one thread sends to every follower that has caught up.

Waking a thread for each of 1,000 followers takes 300 ms in CPython; sending from one thread takes 7
(measured on a trial). So a follower that has caught up has no thread: its connection is parked
here, and when the bus has something, one thread encodes it once for all who want the same, and
sends it without blocking. Who can't take the bytes goes back to a thread of its own, which reads
the index until it has caught up, and is parked again. So does who wants a content that is large:
this thread makes a bounded amount for one after the other, so that nobody's reading costs memory
without end, or holds up the others.

A second thread watches parked connections for clients that go away. Both start with the first
follower.

Lock: `_lock` guards what is parked; under it sockets are written without blocking, and the bus's
own lock may be taken, never the other way round.
"""

from __future__ import annotations

import contextlib
import functools
import heapq
import select
import selectors
import socket
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Optional, Protocol

from xs import frame, framing, threads
from xs.errors import Unavailable, XsError
from xs.frame import Entry
from xs.reader import Form, Reader, portion, write_entries
from xs.sockets import is_half_closed
from xs.store import Store


class Parked(Protocol):
    """A connection whose response goes on without a thread."""

    sock: socket.socket
    chunked: bool

    def resume(self, follower: Follower) -> None:
        """Goes on in a thread of its own: `follower.unsent` first, then what it has missed."""

    def end_following(self) -> None:
        """Nothing more comes: ends the response in good order, and the connection."""

    def drop(self) -> None:
        """The client is gone."""


class Follower:
    """A reader on its way to a connection."""

    __slots__ = ("connection", "due", "is_parked", "pulse_due", "reader", "unsent")

    def __init__(self, connection: Parked, reader: Reader) -> None:
        self.connection = connection
        self.reader = reader
        self.unsent: bytes | memoryview = b""
        self.pulse_due: Optional[float] = None  # the time of its next pulse
        self.due: Optional[float] = None  # … or of looking at `until`, if that is sooner
        self.is_parked = False

    def set_due(self, now: float) -> None:
        """Finds when there is next something to be done though nothing comes."""
        options = self.reader.options
        if options.pulse is not None and self.pulse_due is None:
            self.pulse_due = now + options.pulse / 1000
        self.due = self.pulse_due
        if options.until is not None:
            look = now + _LOOK_AT_UNTIL
            self.due = look if self.due is None else min(look, self.due)

    @property
    def is_simple(self) -> bool:
        """Whether all it needs is the same bytes that others of its group get."""
        options = self.reader.options
        return options.limit is None and options.until is None

    def framed(self, data: bytes) -> bytes:
        return framing.chunk(data) if self.connection.chunked else data

    def parts(self, data: bytes) -> tuple[bytes, ...]:
        """As `framed`, in parts to be sent one after the other."""
        return framing.chunk_parts(data) if self.connection.chunked else (data,)


if TYPE_CHECKING:
    _Key = tuple[frame.Patterns, bool, Form, bool]


class _Group:
    """Followers that want the same bytes."""

    __slots__ = ("followers", "key")

    def __init__(self, key: _Key) -> None:
        self.key = key
        self.followers: dict[Follower, None] = {}  # a dictionary keeps the order of parking


class Delivery:
    """The followers of one store that have caught up."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._bus = store.bus
        self._lock = threading.Lock()
        self._position = store.bus.newest  # everything up to here was sent to all that are parked
        self._groups: dict[_Key, _Group] = {}
        self._by_name: dict[str, dict[_Group, None]] = {}  # a topic or wildcard → who wants it
        self._pulses: list[tuple[float, int, Follower]] = []  # a heap
        self._pulse_number = 0
        self._pulses_worth = 64  # entries, above which it is worth while to look for old ones
        self._stopping = False
        self._after: list[Callable[[], None]] = []  # to be done by the thread, without the lock
        self._anyone = threading.Event()  # somebody may be parked: the thread has work
        # Clients that send no more would be readable for ever. That they go away is something that
        # epoll(7) tells of a socket that is watched for nothing; elsewhere the next frame shows it.
        self._half_closed: dict[int, Follower] = {}  # by their sockets' numbers
        self._threads: list[threads.Thread] = []  # none before the first follower

    def _begin(self) -> None:
        """Starts the threads; `_lock` is held. Raises `Unavailable`.

        It waits for a follower: a process that serves many stores has none on most of them.
        """
        try:
            with contextlib.ExitStack() as opened:
                self._selector = opened.enter_context(selectors.DefaultSelector())
                self._waker, self._wakened = socket.socketpair()
                opened.enter_context(self._waker)
                opened.enter_context(self._wakened)
                self._selector.register(self._wakened, selectors.EVENT_READ, None)
                self._ends = select.epoll() if hasattr(select, "epoll") else None
                if self._ends is not None:
                    opened.enter_context(self._ends)
                    self._selector.register(self._ends, selectors.EVENT_READ, None)
                watch = threads.Thread(
                    lambda: threads.keep_on(self._watch), "xs-watch", insists=True
                )
                deliver = threads.Thread(
                    lambda: threads.keep_on(self._deliver), "xs-deliver", insists=True
                )
                watch.start()
                try:
                    deliver.start()
                except BaseException:
                    self._waker.send(_END)
                    watch.join()
                    raise
                opened.pop_all()
        except (OSError, RuntimeError):
            raise Unavailable("there is no room to follow a stream just now: try again") from None
        self._threads = [deliver, watch]

    def park(self, follower: Follower) -> bool:
        """Takes over a follower that has caught up; False if there is something for it to read.

        Raises `Unavailable` when nobody can be taken over.
        """
        with self._lock:
            if not self._threads and not self._stopping:
                self._begin()
            if not self._groups:
                # The thread rests while nobody is parked, and has not kept up.
                self._position = self._bus.newest
            if self._stopping or follower.reader.position < self._position:
                return False
            try:
                self._add(follower)
                self._anyone.set()
            except BaseException:
                self._insist_on_removing(follower)
                raise
        return True

    def stop(self) -> None:
        """Sends what is still to be sent, and ends every parked response in good order."""
        self._bus.close()
        with self._lock:
            if not self._threads:
                self._stopping = True
                return
        self._anyone.set()
        self._threads[0].join()
        with self._lock:
            self._stopping = True
            followers = [f for group in self._groups.values() for f in group.followers]
            for follower in followers:
                self._remove(follower)
        for follower in followers:
            follower.connection.end_following()
        self._waker.send(_END)
        self._threads[1].join()
        self._selector.close()
        if self._ends is not None:
            self._ends.close()
        self._waker.close()
        self._wakened.close()

    # Who is parked

    def _add(self, follower: Follower) -> None:
        reader = follower.reader
        follower.is_parked = True
        key = _key(follower)
        group = self._groups.get(key)
        if group is None:
            group = self._groups[key] = _Group(key)
            for name in _names(reader.patterns):
                self._by_name.setdefault(name, {})[group] = None
        group.followers[follower] = None
        self._selector.register(follower.connection.sock, selectors.EVENT_READ, follower)
        if follower.due is None:
            follower.set_due(time.monotonic())
        if follower.due is not None:
            if len(self._pulses) > self._pulses_worth:
                # Those of followers that left are still in it, until they would have been due.
                self._pulses = [p for p in self._pulses if p[2].is_parked and p[2].due == p[0]]
                heapq.heapify(self._pulses)
                self._pulses_worth = 2 * len(self._pulses) + 64
            self._pulse_number += 1
            heapq.heappush(self._pulses, (follower.due, self._pulse_number, follower))
            self._bus.wake()

    def _remove(self, follower: Follower) -> bool:
        """Takes a follower out; False if it was out already. It has passed what was sent so far.

        It can be called again if it has found no memory, or where `_add` has.
        """
        if not follower.is_parked:
            return False
        try:
            self._selector.unregister(follower.connection.sock)
        except KeyError:  # half-closed
            number = follower.connection.sock.fileno()
            if self._half_closed.pop(number, None) and self._ends is not None:
                self._ends.unregister(number)
        reader = follower.reader
        group = self._groups.get(_key(follower))
        if group is not None:
            group.followers.pop(follower, None)
            if not group.followers:
                for name in _names(reader.patterns):
                    self._by_name.get(name, {}).pop(group, None)
                    if not self._by_name.get(name):
                        self._by_name.pop(name, None)
                del self._groups[group.key]
        follower.is_parked = False
        return True

    def _insist_on_removing(self, follower: Follower) -> None:
        while True:
            try:
                self._remove(follower)
                return
            except MemoryError:
                time.sleep(threads.PAUSE_SECONDS)

    # Delivering

    def _deliver(self) -> bool:
        self._do_what_follows()  # what the last round has left, where memory was short
        # While nobody is parked, an append does not pay for waking this thread.
        self._anyone.wait()
        self._bus.wait_until(self._has_work, self._seconds_to_pulse)
        try:
            with self._lock:
                entries = self._bus.after(self._position)
                if entries is None:
                    self._send_all_back()
                elif entries:
                    self._dispatch(portion(entries))
                self._send_pulses()
                if not self._groups and not self._bus.closed:
                    self._anyone.clear()
        finally:  # also where memory is short: the rest follows in the next round
            self._do_what_follows()
        return self._bus.closed and not entries and self._bus.newest == self._position

    def _do_what_follows(self) -> None:
        while self._after:
            self._after[0]()
            del self._after[0]

    def _has_work(self) -> bool:
        return (
            self._bus.newest > self._position or self._bus.closed or self._seconds_to_pulse() == 0.0
        )

    def _dispatch(self, entries: list[Entry]) -> None:
        now = self._store.clock()
        wanted: dict[_Group, list[Entry]] = {}
        everything = self._by_name.get("*", {})
        live = [entry for entry in entries if entry.is_live(now)]
        for group in everything:
            wanted[group] = live
        if len(self._by_name) > bool(everything):
            for entry in live:
                for name in (entry.topic, *frame.prefixes(entry.topic)):
                    for group in self._by_name.get(name, ()):
                        found = wanted.setdefault(group, [])
                        if not found or found[-1] is not entry:
                            found.append(entry)
        first = entries[0].id
        newest = entries[-1].id
        for group, found in wanted.items():
            _, chunks, form, _ = group.key
            if not chunks:
                found = [entry for entry in found if entry.first is None]
            data: bytes | None = None  # what all who want the same get …
            end, is_all = newest, True  # … how far that goes, and whether it is all
            for follower in list(group.followers):
                reader = follower.reader
                try:
                    if follower.is_simple and reader.position < first:
                        if data is None:
                            block, count = write_entries(form, self._store, found)
                            if count < len(found):
                                end = found[count - 1].id if count else self._position
                                is_all = False
                            data = follower.framed(block) if block else b""
                    else:
                        self._send_own(follower, found, newest)
                        continue
                except (XsError, OSError, MemoryError):
                    # Content that can't be read, or for which there is no memory: the body breaks
                    # off. Its client can come back, and nobody else waits until it goes well.
                    self._take_out(follower, follower.connection.drop)
                    continue
                self._send(follower, data, end, is_all)
        self._position = newest

    def _send_own(self, follower: Follower, found: list[Entry], newest: int) -> None:
        """The same to one who has a bound of its own, or some of it already."""
        reader = follower.reader
        mine = [entry for entry in found if entry.id > reader.position]
        block = reader.live(mine)
        is_all = not mine or reader.position >= mine[-1].id
        data = follower.framed(block) if block else b""
        self._send(follower, data, newest if is_all else reader.position, is_all)
        if follower.is_parked and not follower.is_simple and reader.is_finished:
            self._take_out(follower, follower.connection.end_following)

    def _send(self, follower: Follower, data: bytes, position: int, is_all: bool) -> None:
        """Sends without blocking; the follower has passed `position` then.

        Who can't take all of it goes back to a thread of its own, and so does he for whom this is
        not all.
        """
        sent = 0
        try:
            if data:
                sent = follower.connection.sock.send(data, socket.MSG_DONTWAIT)
        except BlockingIOError:
            pass
        except (OSError, MemoryError):  # without memory it may have been sent, nobody knows how far
            self._take_out(follower, follower.connection.drop)
            return
        if position > follower.reader.position:
            follower.reader.position = (
                position  # if memory gets short now, it is not sent this again
            )
        if sent == len(data) and is_all:
            return
        try:
            follower.unsent = memoryview(data)[sent:]
            resume = functools.partial(follower.connection.resume, follower)
        except MemoryError:
            self._take_out(follower, follower.connection.drop)
        else:
            self._take_out(follower, resume)

    def _take_out(self, follower: Follower, act: Callable[[], None]) -> None:
        """Takes a follower out, and has `act` done with its connection: both, whatever it takes.

        Who has been sent a part must not be taken for one who has all.
        """
        while True:
            try:
                self._after.append(act)
                break
            except MemoryError:
                time.sleep(threads.PAUSE_SECONDS)
        self._insist_on_removing(follower)

    def _send_all_back(self) -> None:
        """This thread itself has fallen behind the ring: each follower reads for itself."""
        newest = self._bus.newest
        for follower in [f for group in self._groups.values() for f in group.followers]:
            follower.reader.position = max(follower.reader.position, self._position)
            self._take_out(follower, functools.partial(follower.connection.resume, follower))
        self._position = newest

    # Pulses

    def _seconds_to_pulse(self) -> float | None:
        # Without the lock: the bus asks under its own, which is taken after this one.
        try:
            return max(0.0, self._pulses[0][0] - time.monotonic())
        except IndexError:
            return None

    def _send_pulses(self) -> None:
        now = time.monotonic()
        while self._pulses and self._pulses[0][0] <= now:
            due, _, follower = self._pulses[0]
            reader = follower.reader
            if not follower.is_parked or follower.due != due:
                heapq.heappop(self._pulses)  # it left, or was parked anew with a time of its own
                continue
            # Overdue first: what was published by then is still given.
            if reader.is_finished or (reader.is_overdue and self._bus.newest <= self._position):
                self._take_out(follower, follower.connection.end_following)
                heapq.heappop(self._pulses)
                continue
            pulse, pulse_due = reader.options.pulse, follower.pulse_due
            if pulse is not None and pulse_due is not None and pulse_due <= now:
                reader.position = max(reader.position, self._position)
                self._send(follower, follower.framed(reader.pulse()), self._position, True)
                # In step with the first one; what was missed meanwhile is not made up for.
                missed = int((now - pulse_due) * 1000 // pulse)
                follower.pulse_due = pulse_due + (missed + 1) * pulse / 1000
            follower.set_due(now)
            self._pulse_number += 1
            heapq.heapreplace(self._pulses, (follower.due, self._pulse_number, follower))

    # Watching

    def _watch(self) -> bool:
        for key, _ in self._selector.select():
            if key.data is not None:
                self._look_at(key.data)
            elif key.fileobj is self._ends:
                self._drop_ended()
            else:
                return True  # `_END` has come
        return False

    def _look_at(self, follower: Follower) -> None:
        """A parked client sent something, or went away."""
        with self._lock:
            if not follower.is_parked:
                return
            sock = follower.connection.sock
            try:
                data = sock.recv(65536, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if data:
                return  # nothing can be asked while an answer goes on
            if is_half_closed(sock):
                self._selector.unregister(sock)
                self._half_closed[sock.fileno()] = follower
                if self._ends is not None:
                    self._ends.register(sock.fileno(), 0)
                return
            self._remove(follower)
        threads.insist(follower.connection.drop)

    def _drop_ended(self) -> None:
        """Half-closed clients went away."""
        assert self._ends is not None
        with self._lock:
            found = [self._half_closed.get(number) for number, _ in self._ends.poll(0)]
        for follower in found:
            with self._lock:
                is_out = follower is not None and self._remove(follower)
            if follower is not None and is_out:
                threads.insist(follower.connection.drop)


_END = b"."  # what ends the thread that watches
_LOOK_AT_UNTIL = 0.2  # seconds between looks at the clock for a follower with `until`


def _key(follower: Follower) -> _Key:
    reader = follower.reader
    return (reader.patterns, reader.chunks, reader.form, follower.connection.chunked)


def _names(patterns: frame.Patterns) -> list[str]:
    return ["*"] if patterns is None else list(patterns)
