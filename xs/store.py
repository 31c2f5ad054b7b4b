"""The store: the only door to index, content files and bus.

The way of an append, each step needed by the next. A process may die before and after each: the
points have names, `content.…` in steps 1 and 3, `commit.…` from step 4 on (xs/fault.py), and
tests/test_faults.py dies at all of them:

1. its content is hashed as it arrives: small content stays in memory, large content goes to a
   temporary file, which is fsynced;
2. it joins the waiting batch. Who finds no commit under way leads one: it does steps 3 to 6 for all
   that wait. What arrives meanwhile is led by the commit thread, so that a leader gets back to its
   own caller after one batch, and a client that is alone never pays a hand-over;
3. large content gets its name, and its folder is fsynced;
4. the frames get their ids, are encoded, and are written in one transaction with small content;
5. the transaction commits: fsync of the write-ahead log;
6. the frames are published to the bus; then every append is answered.

Locks, in the order in which they are taken: the store's lock file, `_queue_lock`, the bus's own.
Content files are unlinked only by the leader, after a commit that left no frame naming them.

A command on the files starts through this module, and mostly does one thing. So what only writing
needs is imported by the first commit, what only some commands need by the functions that need it,
and parts that a server has from its start are made when they are asked for (`_Part`).
"""

from __future__ import annotations

import os
import time
from _thread import allocate_lock

from xs import fault, frame, ids
from xs.connections import Unfinished
from xs.errors import (
    Locked,
    NoMemory,
    NoStore,
    NotAStore,
    NotFound,
    Unavailable,
    XsError,
)
from xs.index import Index
from xs.place import why_not_written
from xs.schema import FILENAME as INDEX_FILENAME
from xs.schema import Stored, is_of_sqlite, translated

TYPE_CHECKING = False
if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterator
    from typing import Any, Union

    from xs import threads
    from xs.bus import Bus
    from xs.cas import Cas
    from xs.commit import Append, Commit
    from xs.lock import Lock
    from xs.runs import Runs
    from xs.schema import Stored
    from xs.work import Work
    from xs.writer import Writer

BATCH_WORKS = 1000  # works that share one commit
GATHER_SECONDS = 0.005  # that a commit waits for more of them, at most
EPHEMERAL_RESERVE_MS = 1000  # ids are kept as given out so far ahead of ephemeral frames
LOOK_SECONDS = 0.05  # between two looks for other processes' commits, when there is no server
GC_AGE_SECONDS = 7 * 86_400  # how old a pin must be before gc takes it, unless asked otherwise

CAS_FOLDER = "cas"

_NO_MEMORY = NoMemory("no memory is left for this just now: nothing of it was stored")

# What may be in a store's directory before there is an index. After a power failure that includes
# the journal of its making: names of one folder reach the disk in any order.
_BEFORE_THE_INDEX = frozenset(
    ("lock", CAS_FOLDER, "sock", "token", "run", f"{INDEX_FILENAME}-journal")
)


def _clock() -> int:
    return time.time_ns() // 1_000_000


class _Part:
    """A part of a store, made when it is asked for; from then on it is a plain attribute."""

    def __init__(self, make: Callable[[Store], Any]) -> None:
        self._make = make

    def __set_name__(self, _: type, name: str) -> None:
        self._name = name

    def __get__(self, store: Store, _: type) -> Any:
        store.opened()
        return vars(store).setdefault(self._name, self._make(store))


def _make_cas(store: Store) -> Cas:
    from xs.cas import Cas

    return Cas(os.path.join(store.folder, CAS_FOLDER))


def _make_bus(store: Store) -> Bus:
    from xs.bus import Bus

    return Bus(store.index.mark() if store.exclusive else store.index.newest())


def _make_runs(store: Store) -> Runs:
    from xs.runs import Runs

    return Runs(store.folder, store.run)


class Store:
    """One store, in its directory.

    `exclusive`: this process is the store's one writer until `close` (a server). Otherwise each
    batch takes the lock, and reads see what other processes have committed.
    """

    if TYPE_CHECKING:
        cas: Cas
        bus: Bus
        runs: Runs
    else:
        cas, bus, runs = _Part(_make_cas), _Part(_make_bus), _Part(_make_runs)

    def __init__(
        self,
        folder: str,
        *,
        exclusive: bool = False,
        create: bool = False,
        clock: Callable[[], int] = _clock,
    ) -> None:
        """Opens the store in `folder`; `create` makes one where there is nothing yet.

        `clock` gives milliseconds since 1970. Raises `NoStore`, `NotAStore`, `Locked`.
        """
        self.folder = folder
        self.exclusive = exclusive
        self.clock = clock
        _check_folder(folder, create=create)
        self._unwritable = why_not_written(folder)
        self._lock: Lock | None = None
        if exclusive or create:
            self._open_lock()
        read_only = self._unwritable is not None
        try:
            if exclusive or (create and not _has_index(folder)):
                self._with_lock_held_once(create=create)
            try:
                self.index = Index(folder, create=exclusive or create, read_only=read_only)
            except Unfinished:
                # Another process is just making it, or was killed while it did.
                if read_only:
                    raise
                self._with_lock_held_once(create=True)
                self.index = Index(folder)
            try:
                if exclusive:
                    self.cas.remove_stale()
                mark = self.bus.newest if exclusive else self.index.mark()
                if not mark and not read_only:
                    fault.at("store.before-folder-fsync")
                    _sync_names(folder)
            except BaseException:
                self.index.close()
                raise
        except BaseException:
            if self._lock is not None:
                self._lock.close()
            raise
        self._writer: Writer | None = None
        self._ids = ids.Sequence(mark)
        self._reserved = mark  # no id up to here will be given out again, whatever happens
        self._held_back: set[bytes] = set()  # content files that only a backup may still need
        self._queue_lock = allocate_lock()  # guards the next seven
        self._queue_changed: threading.Condition | None = None  # once there are threads to wait
        self._queue: list[Work] = []
        self._gathering = 0  # how many works the commit thread waits for, if it does
        self._leading = False
        self._handed_over = False
        self._committer: threads.Thread | None = None
        self._commit_seconds = 0.0  # what the last one took; the leader's alone
        self._answered = 1  # in the last commit; the commit thread's alone
        self._closing = self._closed = False
        self._data_version: Callable[[], int] | None = None
        self._sweeps = False
        self._sweeper: threads.Thread | None = None
        self._next_expiry: int | None = None
        self._expiry_known: threading.Condition | None = None  # guards the two above

    def _open_lock(self) -> Lock:
        """The store's lock, not taken. Raises `NotAStore` where nobody may write."""
        if self._unwritable is not None:
            raise NotAStore(self._unwritable)
        if self._lock is None:
            from xs.lock import Lock

            try:
                self._lock = Lock(self.folder)
            except OSError as error:
                raise NotAStore(
                    f"can't write to the store at {self.folder}: its lock: {error.strerror}"
                ) from None
        return self._lock

    def _with_lock_held_once(self, *, create: bool) -> None:
        """Makes what a store consists of, under its lock, which a server then keeps."""
        from xs.lock import SERVE, WRITE

        lock = self._open_lock()
        lock.acquire(SERVE if self.exclusive else WRITE)
        try:
            fault.at("store.locked")
            os.makedirs(os.path.join(self.folder, CAS_FOLDER), 0o700, exist_ok=True)
            fault.at("store.folders-made")
            if create:
                os.chmod(self.folder, 0o700)  # an empty directory that was there may be open to all
                if not (self.exclusive and _has_index(self.folder)):  # else it is opened next
                    Index(self.folder, create=True).close()
        finally:
            if not self.exclusive:
                lock.release()

    def opened(self) -> None:
        """Before a part of it is used: one that is yet to be opened can do so now."""

    # Writing

    def append(self, append: Append) -> bytes:
        """Appends one frame and answers its line, when it is durable."""
        from xs.work import AppendWork

        return bytes(self.run(AppendWork(append)))

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
        if self.exclusive:
            with self._queue_lock:
                self._check_open()
                self._queue.append(work)
                leads = not self._leading
                self._leading = True
                leads = leads and not self._hand_over()
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
        with self._queue_lock:
            self._check_open()
            self._queue += works
            works.clear()
            if self._leading:
                if len(self._queue) >= self._gathering > 0:
                    self._waiting().notify_all()
                return
            self._leading = True
            try:
                batch = self._take_batch()
            except MemoryError:
                batch = None  # it stays in the queue
        try:
            if batch is not None:
                self._commit(batch)
        finally:  # also after Ctrl-C: the store may still be used, if only to end something
            self._stop_leading()

    def _stop_leading(self) -> None:
        try:
            has_stopped = self._stops_leading()
        except MemoryError:
            has_stopped = False
        if not has_stopped:
            from xs import threads  # here: a command on the files does without

            threads.keep_on(self._stops_leading)

    def _stops_leading(self) -> bool:
        with self._queue_lock:
            if not self._queue:
                self._leading = False
                if self._closing:
                    self._waiting().notify_all()
                return True
            if self._hand_over():
                return True
            batch = self._take_batch()
        self._commit(batch)
        return False

    def _check_open(self) -> None:
        if self._closing:
            raise Unavailable("the store is closing")

    def _hand_over(self) -> bool:
        """Lets the commit thread lead; `_queue_lock` is held and `_leading` is set.

        False if there is no such thread, and no room for one: then who leads goes on.
        """
        changed = self._waiting()
        if self._committer is None:
            from xs import threads

            committer = threads.Thread(lambda: threads.keep_on(self._lead), "xs-commit")
            try:
                committer.start()
            except RuntimeError:
                return False
            self._committer = committer
        self._handed_over = True
        changed.notify_all()
        return True

    def _waiting(self) -> threading.Condition:
        """What tells of changes of the queue; `_queue_lock` is held."""
        if self._queue_changed is None:
            import threading

            self._queue_changed = threading.Condition(self._queue_lock)
        return self._queue_changed

    def _take_batch(self) -> list[Work]:
        batch, self._queue = self._queue[:BATCH_WORKS], self._queue[BATCH_WORKS:]
        return batch

    def _lead(self) -> bool:
        """The commit thread: leads while something waits, and rests while someone else can."""
        with self._queue_lock:
            while not self._handed_over:
                if self._closed:
                    return True
                self._answered = 1
                self._waiting().wait()
            self._gather(self._answered)
            if not self._queue:
                self._handed_over = self._leading = False
                self._waiting().notify_all()
                return False
            batch = self._take_batch()
        self._commit(batch)
        self._answered = len(batch) - sum(work.is_much for work in batch)
        return False

    def _gather(self, answered: int) -> None:
        """Waits until those who were just answered are back, but no longer than a commit takes.

        Most who append side by side go on at once. In one commit with those who wait already, not
        in the one after it, all of them are answered sooner (bench/append.py: with 8 clients half
        as often again). Who appends alone is not waited for. `_queue_lock` is held.
        """
        everyone = answered + len(self._queue)
        if everyone < 2 or any(work.is_much for work in self._queue):
            return
        deadline = time.monotonic() + min(self._commit_seconds, GATHER_SECONDS)
        self._gathering = everyone
        while len(self._queue) < everyone and not self._closing:
            left = deadline - time.monotonic()
            if left <= 0:
                break
            self._waiting().wait(left)
        self._gathering = 0

    def _commit(self, batch: list[Work]) -> None:
        """One transaction for a batch; then delivery, then the answers."""
        try:
            commit = self._commit_or_raise(batch)
        except Locked as error:
            self._shut_out(batch, error)
            return
        except Exception as error:
            if len(batch) > 1:
                # One of them may be to blame, for instance by its size: each for itself.
                for work in batch:
                    try:
                        self._commit([work])
                    except MemoryError:  # it must not keep those behind it waiting
                        work.error = _NO_MEMORY
                        _finish(work)
                return
            try:
                cause = error if isinstance(error, XsError) else _unexpected(error)
                batch[0].error = self.index.connections.disk_error(cause) or cause
            except MemoryError:
                batch[0].error = _NO_MEMORY
            _finish(batch[0])
            return
        try:
            self._deliver(commit)
        except MemoryError:  # who follows reads the index
            self.bus.lose()
        fault.at("commit.before-answers")
        for work in batch:
            _finish(work)
        fault.at("commit.answered")

    def _deliver(self, commit: Commit) -> None:
        """What follows from a transaction that is durable, before it is answered."""
        if commit.gone and self.exclusive:  # else nothing is in the bus
            self.bus.discard(commit.gone, commit.gone_runs)
        if commit.gone_runs:
            self.runs.forget(commit.gone_runs)
        fault.at("commit.before-delivery")
        if commit.unseen_mark is not None:  # before what is above it: readers go to the index
            self.bus.skip_to(commit.unseen_mark)
        if self.exclusive:  # else others write too, and only the index has all that they did
            self.bus.publish(commit.durable_entries())
        if commit.history_mark is not None:
            self.bus.skip_to(commit.history_mark)
        if commit.earliest_expiry is not None:
            self._expect_expiry(commit.earliest_expiry)

    def _shut_out(self, batch: list[Work], error: Locked) -> None:
        """Another process has the store's lock, and keeps it: nothing of the batch was done."""
        for work in batch:
            work.error = error
            _finish(work)

    def _commit_or_raise(self, batch: list[Work]) -> Commit:
        writer = self._writer or self._begin_writing()
        if not self.exclusive:
            from xs.lock import WRITE

            lock = self._open_lock()
            lock.acquire(WRITE)
        try:
            others_wrote = writer.begin()
            try:
                fault.at("commit.begun")
                if not self.exclusive or others_wrote:
                    self._ids.raise_to(writer.mark())
                commit = self._new_commit(
                    writer, self.cas, self._ids, self.clock(), delivers=self.exclusive
                )
                if self.exclusive and others_wrote:
                    # Somebody removed the lock's file, and another took the lock.
                    commit.unseen_mark = writer.newest()
                for work in batch:
                    work.error = None
                    try:
                        work.result = work.apply(commit)
                    except XsError as error:
                        if work.is_whole or is_of_sqlite(error):
                            raise
                        work.error = self.index.connections.disk_error(error) or error
                fault.at("commit.applied")
                self._finish_transaction(commit)
                started = time.monotonic()
                try:
                    writer.commit()
                except MemoryError:  # before SQLite had done it, or behind that
                    if not any(map(writer.has_committed, commit.stored_ids())):
                        raise
                self._commit_seconds = time.monotonic() - started
            except BaseException:
                writer.rollback()
                self._reserved = 0  # what this transaction may have reserved was undone with it
                raise
            fault.at("commit.durable")
            # Before another process can have the lock, and name one of them anew.
            if commit.unnamed_files:
                try:
                    self._remove_files(commit.unnamed_files)
                except MemoryError:
                    pass  # gc finds them
            return commit
        finally:
            if not self.exclusive:
                lock.release()

    def _begin_writing(self) -> Writer:
        from xs.commit import Commit

        self._open_lock()
        self._new_commit = Commit
        self._writer = self.index.writer()
        return self._writer

    def _remove_files(self, digests: list[bytes]) -> None:
        if self.cas.is_held():  # by a backup: then a later commit removes them, else gc finds them
            self._held_back.update(digests)
            return
        for digest in digests:
            fault.at("commit.before-unlink")
            try:
                self.cas.remove(digest)
            except OSError:
                pass  # gc finds it
            fault.at("commit.unlinked")
        self._held_back.clear()

    def _finish_transaction(self, commit: Commit) -> None:
        commit.apply_trims()
        if not self.exclusive:
            commit.sweep()
            if commit.writer.runs_being_written():
                from xs.runs import KILLED

                commit.end_runs(self.runs.is_gone, KILLED)
        if self._held_back and not self.cas.is_held():
            commit.look_again(self._held_back)
        commit.look_for_unnamed_files()
        if commit.newest_ephemeral > self._reserved:
            # The disk must know of ids that no stored frame shows. One commit reserves a second.
            reserve = commit.newest_ephemeral + (EPHEMERAL_RESERVE_MS << 80)
            commit.writer.raise_mark(reserve)
            self._reserved = reserve

    # Expiry

    def start_sweeping(self) -> None:
        """Removes frames when they expire, in a thread that sleeps until the next one does.

        There is none until a frame has a time to expire: most stores have no such frame.
        """
        import threading

        self._expiry_known = threading.Condition(threading.Lock())
        self._sweeps = True
        at = self.index.next_expiry()
        if at is not None:
            self._expect_expiry(at)

    def _expect_expiry(self, at: int) -> None:
        if not self._sweeps:
            return
        assert self._expiry_known is not None
        with self._expiry_known:
            if self._next_expiry is None or at < self._next_expiry:
                self._next_expiry = at
                self._expiry_known.notify_all()
            if self._sweeper is None and not self._closing:
                from xs import threads

                sweeper = threads.Thread(lambda: threads.keep_on(self._sweep), "xs-sweep")
                try:
                    sweeper.start()
                except RuntimeError:
                    return  # no more threads: the next frame may tell
                self._sweeper = sweeper

    def _sweep(self) -> bool:
        from xs.work import SweepWork

        assert self._expiry_known is not None
        with self._expiry_known:
            while not self._closing:
                if self._next_expiry is None:
                    self._expiry_known.wait()
                else:
                    left = (self._next_expiry - self.clock()) / 1000
                    if left <= 0:
                        break
                    # The clock may be set forward while this waits: look once in a while.
                    self._expiry_known.wait(min(left, 60.0))
            if self._closing:
                return True
            due, self._next_expiry = self._next_expiry, None
        try:
            removed = self.run(SweepWork())
            upcoming = self.index.next_expiry()
            if not removed and upcoming is not None and upcoming <= self.clock():
                upcoming = self.clock() + 60_000  # it is damaged, and left to a repair
        except NoMemory:
            upcoming = self.clock() + 1000
        except XsError:
            upcoming = self.clock() + 60_000  # the disk may be full: try again later
        except BaseException:
            self._next_expiry = due
            raise
        if upcoming is not None:
            self._expect_expiry(upcoming)
        return False

    # Reading

    def newest(self) -> int:
        """The position of a reader that has seen all there is."""
        if self.exclusive:
            return self.bus.newest
        newest = self.index.newest()  # which may have been removed: who follows goes on from there
        return max(self.bus.newest, newest) if "bus" in vars(self) else newest

    def wait_for_run(self, first: int, position: int, timeout: float) -> bool:
        """Waits until there may be more of a run above `position`; False if nothing came.

        Without a server it is for LOOK_SECONDS, whatever `timeout` is.
        """
        if self.exclusive:
            return self.bus.wait_for_run(first, position, timeout)
        time.sleep(LOOK_SECONDS)
        return False

    def wait(self, position: int) -> bool:
        """Waits until there may be something above `position`; False if nothing came for a while.

        Without a server nobody publishes what other processes commit: then this looks for it.
        """
        if self.exclusive:
            return self.bus.wait(position)
        if self._data_version is None:
            self._data_version = self.index.connections.data_version()
        version = self._data_version()
        time.sleep(LOOK_SECONDS)
        newest = self.newest()
        if version == self._data_version() and newest <= position:
            return False
        self.bus.skip_to(newest)
        return True

    def get(self, value: int) -> bytes:
        """The line of the frame with that id, stored or ephemeral. Raises `NotFound`."""
        line = self.index.get(value, self.clock())
        if line is None:
            entry = self.bus.find(value)
            if entry is None or not entry.is_live(self.clock()) or b'"ttl":"ephe' not in entry.line:
                raise NotFound(f"no frame {ids.text(value)}")
            line = entry.line
        return line

    def content_of(self, value: int) -> tuple[int, Iterator[bytes]]:
        """Size and blocks of the content of that frame. Raises `NotFound`, `Damaged`."""
        stored = self.index.stored(value, self.clock())
        if stored is not None:
            return self.stored_content(stored)
        hash_ = frame.hash_text(self.get(value))
        return (0, iter(())) if hash_ is None else self.content(hash_)

    def stored_content(self, stored: Stored) -> tuple[int, Iterator[bytes]]:
        """Size and blocks of a stored frame's content."""
        hash_ = frame.hash_text(stored.line)
        if hash_ is None:
            return 0, iter(())
        if stored.is_file:
            return self.cas.open(frame.parse_integrity(hash_))
        return self.cas.verified(stored.content or b"", hash_)

    def content(self, hash_: str) -> tuple[int, Iterator[bytes]]:
        """Size and blocks of the content with that hash. Raises `NotFound`, `Damaged`."""
        digest = frame.parse_integrity(hash_)
        now = self.clock()
        if self.index.names_file(digest, now):
            return self.cas.open(digest)
        data = self.index.content(digest, now)
        if data is None:
            data = self.bus.content(digest)
        if data is None:
            raise NotFound(f"no content {hash_}")
        return self.cas.verified(data, hash_)

    # Housekeeping

    def gc(self, age_seconds: float) -> tuple[int, int]:
        """Removes what was put by POST /cas and no frame names, older than `age_seconds`.

        Answers how many contents went, and their bytes.
        """
        from xs.work import RemoveOrphanWork, UnpinWork

        removed, size = self.run(UnpinWork(self.clock() - int(age_seconds * 1000)))
        fault.at("gc.unpinned")
        for digest in self.cas.digests():
            if self.cas.age(digest) >= age_seconds and not self.index.names_file(
                digest, self.clock()
            ):
                work = RemoveOrphanWork(digest)
                found = self.run(work)
                removed += found > 0
                size += found
        fault.at("gc.orphans-removed")
        self.cas.remove_stale()
        fault.at("gc.done")
        return removed, size

    def check(self) -> Iterator[Union[str, tuple[int, int]]]:
        """Problems, one sentence each, and at the end (frames, contents) that were looked at."""
        from xs.check import problems

        return problems(self.index, self.cas)

    def refuse_more(self, last: Append | None = None) -> None:
        """From now on nothing can be appended; `last` is the last frame that is.

        What is still being written here, piece by piece, is ended before it.
        """
        from xs.runs import STOPPED
        from xs.work import AppendWork, EndRunsWork

        waiter = allocate_lock()
        waiter.acquire()
        with self._queue_lock:
            if self._closing:
                return
            self._closing = True
            leads = not self._leading
            works: list[Work] = [EndRunsWork(self.runs.is_own, STOPPED)]
            if last is not None:
                works.append(AppendWork(last))
            works[-1].waiter = waiter
            self._queue += works
            self._leading = True
            leads = leads and not self._hand_over()
        if leads:
            self._stop_leading()
        waiter.acquire()

    def close(self) -> None:
        """Finishes what was submitted, then closes. What is submitted later is refused."""
        with self._queue_lock:
            self._closing = True
            if self._leading:
                self._waiting().wait_for(lambda: not self._leading)
            if self._closed:
                return
            self._closed = True
            if self._committer is not None:
                self._waiting().notify_all()
        if self._expiry_known is not None:
            with self._expiry_known:
                self._expiry_known.notify_all()
        for thread in (self._sweeper, self._committer):
            if thread is not None:
                thread.join()
        for part in ("runs", "bus"):
            if part in vars(self):
                vars(self)[part].close()
        self.index.close()
        if self._lock is not None:
            self._lock.close()


def _finish(work: Work) -> None:
    """Tells whoever waits for it what has come of it."""
    try:
        if work.error is not None:
            work.discard()
        work.finish()
    except Exception as error:  # it must not keep those behind it from hearing theirs
        from xs import threads

        threads.report("what has come of an append", error)


def _unexpected(error: Exception) -> XsError:
    from xs.cas import on_disk

    try:
        with on_disk(), translated():
            raise error
    except XsError as found:
        return found
    except Exception:
        from xs import threads

        if threads.is_shortage(error):
            return NoMemory(str(_NO_MEMORY))
        return XsError(f"{type(error).__name__}: {error}")


def _sync_names(folder: str) -> None:
    """Makes the name of a store durable that nobody has been answered by yet.

    Who made it, and the folders above it, may have been killed before that was: all that are this
    user's may be new.
    """
    from xs.cas import sync_folder

    path = os.path.abspath(folder)
    sync_folder(path)
    sync_folder(os.path.dirname(path))
    try:
        while os.stat(path).st_uid == os.geteuid() and path != os.path.dirname(path):
            path = os.path.dirname(path)
            sync_folder(path)
    except OSError:
        pass  # what can't be opened was not made by this user


def _has_index(folder: str) -> bool:
    return os.path.exists(os.path.join(folder, INDEX_FILENAME))


def _check_folder(folder: str, *, create: bool) -> None:
    """Raises `NoStore` or `NotAStore` unless there is a store, or one may be made."""
    if _has_index(folder):
        return
    hint = f"make one with xs serve {folder} or xs append {folder} TOPIC"
    if os.path.lexists(folder) and not os.path.isdir(folder):
        raise NotAStore(f"not a store: {folder} is not a directory")
    if not create:
        raise NoStore(f"no store at: {folder}: {hint}")
    reason = why_not_written(folder)
    if reason is not None:
        raise NotAStore(reason)
    try:
        os.makedirs(folder, 0o700, exist_ok=True)
        others = set(os.listdir(folder)) - _BEFORE_THE_INDEX
    except OSError as error:
        raise NotAStore(f"can't make a store at {folder}: {error.strerror}") from None
    if others and not _has_index(folder):  # another process may have made it meanwhile
        raise NotAStore(
            f"not a store: {folder} has other files in it: name an empty or a new directory"
        )
