"""Expired frames are removed when their time comes: the thread of a server that does it.

Nothing depends on when that is, as no read gives what has expired. Without a server each commit
removes what it finds.
"""

from __future__ import annotations

import threading

from xs import threads
from xs.errors import NoMemory, XsError
from xs.work import Work

TYPE_CHECKING = False
if TYPE_CHECKING:
    from xs.commit import Commit
    from xs.store import Store


class SweepWork(Work):
    """Removes expired frames; the result is how many."""

    __slots__ = ()

    def apply(self, commit: Commit) -> int:
        return commit.sweep()


class Sweeper:
    """A thread that sleeps until the next frame expires, and removes it then.

    There is none until a frame has a time to expire: most stores have no such frame.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._changed = threading.Condition(threading.Lock())  # guards the next three
        self._next: int | None = None  # when the next frame expires
        self._thread: threads.Thread | None = None
        self._stopping = False

    def start(self) -> None:
        """Looks for when the next frame expires."""
        at = self._store.index.next_expiry()
        if at is not None:
            self.expect(at)

    def expect(self, at: int) -> None:
        """A frame expires at that time, in milliseconds since 1970."""
        with self._changed:
            if self._next is None or at < self._next:
                self._next = at
                self._changed.notify_all()
            if self._thread is None and not self._stopping:
                thread = threads.Thread(
                    lambda: threads.keep_on(self._sweep), "xs-sweep", insists=True
                )
                try:
                    thread.start()
                except RuntimeError:
                    return  # no more threads: the next frame may tell
                self._thread = thread

    def stop(self) -> None:
        """Ends the thread, which is then no more."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _sweep(self) -> bool:
        clock = self._store.clock
        with self._changed:
            while not self._stopping:
                if self._next is None:
                    self._changed.wait()
                else:
                    left = (self._next - clock()) / 1000
                    if left <= 0:
                        break
                    # The clock may be set forward while this waits: look once in a while.
                    self._changed.wait(min(left, 60.0))
            if self._stopping:
                return True
            due, self._next = self._next, None
        try:
            removed = self._store.run(SweepWork())
            upcoming = self._store.index.next_expiry()
            if not removed and upcoming is not None and upcoming <= clock():
                upcoming = clock() + 60_000  # it is damaged, and left to a repair
        except NoMemory:
            upcoming = clock() + 1000
        except XsError:
            upcoming = clock() + 60_000  # the disk may be full: try again later
        except BaseException:
            self._next = due
            raise
        if upcoming is not None:
            self.expect(upcoming)
        return False
