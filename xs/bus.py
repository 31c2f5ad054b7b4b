"""Live delivery inside the process: a bounded ring of recent frames, one Condition, positions.

What was committed is published here, in order of id. Who follows the stream holds a position (the
last id it has passed) and asks for what comes after it; a position that has fallen out of the ring
is told so, and reads the index instead. So nobody's slowness costs memory here. Ephemeral frames
live in the ring alone, with their content. No disk, no HTTP.
"""

from __future__ import annotations

import threading
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable

from xs.records import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from xs.frame import Entry

RING_FRAMES = 8192
RING_BYTES = 8 * 1024 * 1024  # of lines and ephemeral content
_TRIM = 1024  # frames beyond the bound before the lists are cut: cutting one by one is slow


class Watch(NamedTuple):
    """Somebody who is to be woken by what is published on topics that `wants`."""

    wants: Callable[[str], bool]
    wake: Callable[[], None]


class Bus:
    """The ring and those who wait for it. Any thread may call anything."""

    def __init__(self, mark: int) -> None:
        """`mark`: the position of a reader that has seen all there is."""
        self._lock = threading.Lock()  # guards all below; no other lock is taken under it
        self._changed = threading.Condition(self._lock)
        self._waiting = 0  # how many threads wait for that
        self._ids: list[int] = []
        self._entries: list[Entry] = []
        self._bytes = 0
        self._floor = mark  # from here on, all that was published is in the ring
        self._newest = mark
        self._closed = False
        self._watches: tuple[Watch, ...] = ()
        # Who waits for the rest of a run, by its first frame's id; and how many do.
        self._run_changed: dict[int, tuple[threading.Condition, int]] = {}

    @property
    def newest(self) -> int:
        """The position of a reader that has seen all that was published."""
        return self._newest

    @property
    def floor(self) -> int:
        """The least position from which on all that was published is in the ring."""
        return self._floor

    @property
    def closed(self) -> bool:
        return self._closed

    def publish(self, entries: list[Entry], imported: int | None = None) -> None:
        """Adds committed frames, in order of id, all above the newest, and wakes who waits.

        `imported`: history came in the same commit up to there, as in `skip_to`. Nobody sees the
        one without the other: who was given what lies above it would not look for it any more.
        """
        if not entries:
            if imported is not None:
                self.skip_to(imported)
            return
        with self._lock:
            self._newest = max(self._newest, entries[-1].id)
            self._entries += entries
            self._ids += [entry.id for entry in entries]
            self._bytes += _size(entries)
            if len(self._ids) > RING_FRAMES + _TRIM or self._bytes > RING_BYTES:
                self._trim()
            if imported is not None:
                self._skip(imported)
            if self._waiting:  # mostly nobody: who follows a connection is told by its delivery
                self._changed.notify_all()
            if self._run_changed:
                for first in {entry.first for entry in entries if entry.first is not None}:
                    if first in self._run_changed:
                        self._run_changed[first][0].notify_all()
            watches = self._watches
        if watches:
            topics = {entry.topic for entry in entries}
            for watch in watches:
                if imported is not None or any(map(watch.wants, topics)):
                    watch.wake()

    def watch(self, wants: Callable[[str], bool], wake: Callable[[], None]) -> Watch:
        """Calls `wake` whenever something is published on a topic that `wants`, until `unwatch`.

        Also when history was imported, or the bus closes. Unlike `wait` this costs nothing for what
        is published on other topics. `wake` must not block: it is called by who publishes.
        """
        watch = Watch(wants, wake)
        with self._lock:
            self._watches = (*self._watches, watch)
        return watch

    def unwatch(self, watch: Watch) -> None:
        with self._lock:
            self._watches = tuple([each for each in self._watches if each is not watch])

    def after(self, position: int) -> list[Entry] | None:
        """All entries above a position; None when some have left the ring: ask the index."""
        with self._lock:
            if position < self._floor:
                return None
            if position >= self._newest:
                return []
            return self._entries[bisect_right(self._ids, position) :]

    def wait(self, position: int, timeout: float | None = None) -> bool:
        """Waits until something is above `position` or the bus closes; False after `timeout` s."""
        with self._lock:
            self._waiting += 1
            try:
                return self._changed.wait_for(
                    lambda: self._newest > position or self._closed, timeout
                )
            finally:
                self._waiting -= 1

    def wait_for_run(self, first: int, position: int, timeout: float) -> bool:
        """Waits for a frame above `position` that continues a run; False after `timeout` seconds.

        True as well when there may have been one, and when the bus closes. Only those who wait for
        that very run are woken, however much else goes on; `wake_run` does, and then it is False.
        """

        def may_have_come() -> bool:
            if self._closed or position < self._floor:
                return True
            above = bisect_right(self._ids, position)
            return any(entry.first == first for entry in self._entries[above:])

        with self._lock:
            if may_have_come():
                return True
            changed, count = self._run_changed.get(first, (threading.Condition(self._lock), 0))
            self._run_changed[first] = (changed, count + 1)
            try:
                return changed.wait(timeout) and may_have_come()
            finally:
                count = self._run_changed[first][1] - 1
                if count:
                    self._run_changed[first] = (changed, count)
                else:
                    del self._run_changed[first]

    def wake_run(self, first: int) -> None:
        """Lets those who wait for the rest of a run look around."""
        with self._lock:
            if first in self._run_changed:
                self._run_changed[first][0].notify_all()

    def wait_until(self, is_true: Callable[[], bool], timeout: Callable[[], float | None]) -> None:
        """Waits until `is_true`, looked at whenever something happens here, or `timeout` seconds.

        Both are asked under the lock, so that no `wake` can fall between the asking and the wait.
        """
        with self._lock:
            if not is_true():
                self._waiting += 1
                try:
                    self._changed.wait(timeout())
                finally:
                    self._waiting -= 1

    def skip_to(self, mark: int) -> None:
        """History was imported up to `mark`: who has not passed it reads the index.

        So ephemeral frames up to there are given to nobody who has not got them by now.
        """
        with self._lock:
            is_newer = mark > self._newest
            self._skip(mark)
            if is_newer:
                self._changed.notify_all()
            watches = self._watches
        for watch in watches:
            watch.wake()

    def _skip(self, mark: int) -> None:
        self._newest = max(self._newest, mark)
        if mark > self._floor:
            self._floor = mark
            del self._entries[: bisect_right(self._ids, mark)]
            del self._ids[: bisect_right(self._ids, mark)]
            self._bytes = _size(self._entries)

    def lose(self, mark: int) -> None:
        """There was no memory to publish what came up to `mark`: who is below reads the index."""
        with self._lock:
            self._entries.clear()
            self._ids.clear()
            self._bytes = 0
            self._floor = self._newest = max(self._newest, mark)
            self._changed.notify_all()
            watches = self._watches
        for watch in watches:
            watch.wake()

    def discard(
        self, removed: Iterable[int], runs: frozenset[int] | set[int] = frozenset()
    ) -> None:
        """Frames with these ids were removed: whoever has not got them won't.

        `runs`: and those that continue the ones with these ids.
        """
        with self._lock:
            if runs:
                removed = [*removed, *(e.id for e in self._entries if e.first in runs)]
            for value in removed:
                place = bisect_left(self._ids, value)
                if place < len(self._ids) and self._ids[place] == value:
                    entry = self._entries[place]
                    self._bytes -= entry.size
                    self._entries[place] = entry._replace(line=b"", content=None, digest=None)

    def find(self, value: int) -> Entry | None:
        """The entry with that id, if it is in the ring and was not removed."""
        with self._lock:
            place = bisect_left(self._ids, value)
            if place < len(self._ids) and self._ids[place] == value:
                entry = self._entries[place]
                return entry if entry.line else None
            return None

    def content(self, digest: bytes) -> bytes | None:
        """The content of an ephemeral frame in the ring."""
        with self._lock:
            for entry in reversed(self._entries):
                if entry.digest == digest:
                    return entry.content
            return None

    def wake(self) -> None:
        """Lets everyone who waits look again."""
        with self._lock:
            self._changed.notify_all()

    def close(self) -> None:
        """Nothing more will be published; who waits goes on."""
        with self._lock:
            self._closed = True
            self._changed.notify_all()
            for changed, _ in self._run_changed.values():
                changed.notify_all()
            watches = self._watches
        for watch in watches:
            watch.wake()

    def _trim(self) -> None:
        drop = max(0, len(self._entries) - RING_FRAMES)
        freed = _size(self._entries[:drop])
        while self._bytes - freed > RING_BYTES and drop < len(self._entries) - 1:
            freed += self._entries[drop].size
            drop += 1
        if drop:
            self._floor = self._ids[drop - 1]
            self._bytes -= freed
            del self._entries[:drop]
            del self._ids[:drop]


def _size(entries: list[Entry]) -> int:
    return sum([len(entry.line) for entry in entries]) + sum(
        [len(entry.content) for entry in entries if entry.content]
    )
