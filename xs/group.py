"""The group commit: works wait in a queue, and who leads commits all that wait in one transaction.

Who finds no commit under way leads one batch. What has arrived meanwhile is led by the commit
thread, so that a leader gets back to its own caller after one batch, and a client that is alone
never pays a hand-over. What a batch is, `committer` knows.
"""

from __future__ import annotations

from _thread import allocate_lock

from xs.errors import Unavailable

TYPE_CHECKING = False
if TYPE_CHECKING:
    import threading
    from collections.abc import Callable
    from typing import Any

    from xs import threads
    from xs.commit import Append
    from xs.committer import Committer
    from xs.content import Content
    from xs.work import Work

BATCH_WORKS = 1000  # works that share one commit


class GroupCommit:
    """The queue of a store's works, from any thread.

    `exclusive`: this process is the store's one writer, and works may be left to the commit thread.
    """

    def __init__(self, committer: Committer, *, exclusive: bool) -> None:
        self._committer = committer
        self._commit = committer.commit
        self._exclusive = exclusive
        self._lock = allocate_lock()  # guards all below; nobody commits while holding it
        self._changed: threading.Condition | None = None  # once there are threads to wait
        self._queue: list[Work] = []
        self._leading = False
        self._handed_over = False
        self._thread: threads.Thread | None = None
        self._closing = self._closed = False

    @property
    def is_leading(self) -> bool:
        """Whether some thread is committing, or about to."""
        return self._leading

    def run(self, work: Work) -> Any:
        """Does `work`, waits until it is durable, and gives its result or raises its error."""
        work.waiter = waiter = allocate_lock()
        waiter.acquire()
        self.submit(work)
        if not work.finished:
            waiter.acquire()
        if work.error is not None:
            raise work.error
        return work.result

    def start(self, work: Work) -> Callable[[], Any]:
        """Hands `work` to the commit thread; the function that it gives waits, as `run` does."""
        work.waiter = waiter = allocate_lock()
        waiter.acquire()
        if self._exclusive:
            with self._lock:
                self._check_open()
                self._queue.append(work)
                leads = not self._leading and not self._hand_over()
                self._leading = True
            if leads:
                self._stop_leading()
        else:
            self.submit(work)  # one command on the files: a thread would gain nothing

        def wait() -> Any:
            waiter.acquire()
            if work.error is not None:
                raise work.error
            return work.result

        return wait

    def submit(self, work: Work) -> None:
        """Does `work` in the next batch. It may be done when this returns, or later."""
        self.submit_all([work])

    def submit_all(self, works: list[Work]) -> None:
        """As `submit`. The list is empty once they will be done, whatever this raises then."""
        with self._lock:
            self._check_open()
            self._queue += works
            works.clear()
            if self._leading:
                return
            self._leading = True
            try:
                batch = self._take_batch()
            except MemoryError:
                batch = None  # it stays in the queue
        try:
            if batch is not None:
                self._commit(batch)
        except MemoryError:
            self._committer.give_up(batch or [])
        finally:  # also after Ctrl-C: the store may still be used, if only to end something
            self._stop_leading()

    def append_alone(self, append: Append, content: Content | None) -> bytes | None:
        """As `Committer.append_alone`, unless somebody else leads or waits: then None, too."""
        with self._lock:
            if self._leading or self._queue or self._closing:
                return None
            self._leading = True
        try:
            return self._committer.append_alone(append, content)
        finally:
            self._stop_leading()

    def end_with(self, works: list[Work]) -> None:
        """Does the last works and waits for them. What is submitted later is refused."""
        works[-1].waiter = waiter = allocate_lock()
        waiter.acquire()
        with self._lock:
            if self._closing:
                return
            self._closing = True
            self._queue += works
            leads = not self._leading and not self._hand_over()
            self._leading = True
        if leads:
            self._stop_leading()
        waiter.acquire()

    def close(self) -> bool:
        """Finishes what was submitted, and ends the commit thread; False if that was done before.

        What is submitted later is refused.
        """
        with self._lock:
            self._closing = True
            if self._leading:
                self._waiting().wait_for(lambda: not self._leading)
            if self._closed:
                return False
            self._closed = True
            if self._thread is not None:
                self._waiting().notify_all()
        if self._thread is not None:
            self._thread.join()
        return True

    def _check_open(self) -> None:
        if self._closing:
            raise Unavailable("the store is closing")

    def _stop_leading(self) -> None:
        try:
            has_stopped = self._stops_leading()
        except MemoryError:
            has_stopped = False
        if not has_stopped:
            from xs import threads  # here: a command on the files does without

            threads.keep_on(self._stops_leading)

    def _stops_leading(self) -> bool:
        with self._lock:
            if not self._queue:
                self._leading = False
                if self._closing:
                    self._waiting().notify_all()
                return True
            if self._hand_over():
                return True
            batch = self._take_batch()
        try:
            self._commit(batch)
        except MemoryError:
            self._committer.give_up(batch)
        return False

    def _hand_over(self) -> bool:
        """Lets the commit thread lead; `_lock` is held. `_leading` is to be set behind it.

        False if there is no such thread, and no room for one: then who leads goes on.
        """
        changed = self._waiting()
        if self._thread is None:
            from xs import threads

            thread = threads.Thread(lambda: threads.keep_on(self._lead), "xs-commit", insists=True)
            try:
                thread.start()
            except RuntimeError:
                return False
            self._thread = thread
        changed.notify_all()
        self._handed_over = True  # behind all that may find no memory: else nobody would lead
        return True

    def _waiting(self) -> threading.Condition:
        """What tells of changes of the queue; `_lock` is held."""
        if self._changed is None:
            import threading

            self._changed = threading.Condition(self._lock)
        return self._changed

    def _take_batch(self) -> list[Work]:
        batch, self._queue = self._queue[:BATCH_WORKS], self._queue[BATCH_WORKS:]
        return batch

    def _lead(self) -> bool:
        """The commit thread: leads while something waits, and rests while someone else can."""
        with self._lock:
            while not self._handed_over:
                if self._closed:
                    return True
                self._waiting().wait()
            if not self._queue:
                self._handed_over = self._leading = False
                self._waiting().notify_all()
                return False
            batch = self._take_batch()
        try:
            self._commit(batch)
        except MemoryError:
            self._committer.give_up(batch)
        return False
