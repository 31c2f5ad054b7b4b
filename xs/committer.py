"""A batch of works is done: one transaction, then delivery, then the answers.

These are steps 3 to 6 of an append (`store` has them all). Content files are unlinked here alone,
after a commit that left no frame naming them.
"""

from __future__ import annotations

import time

from xs import fault, frame, ids
from xs.commit import Append, Commit
from xs.errors import Locked, NoMemory, XsError
from xs.frame import Entry
from xs.lock import WRITE
from xs.schema import is_of_sqlite, translated
from xs.writer import Writer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from xs.content import Content
    from xs.store import Store
    from xs.work import Work

EPHEMERAL_RESERVE_MS = 1000  # ids are kept as given out so far ahead of ephemeral frames

_PAUSE_SECONDS = 0.05  # before an answer is tried again that there was no memory for
_NO_MEMORY = NoMemory("no memory is left for this just now: nothing of it was stored")


class Committer:
    """Commits batches to a store. One thread at a time: `group` sees to that."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._exclusive = store.exclusive
        self._writer: Writer | None = None
        mark = store.bus.newest if store.exclusive else 0  # else each transaction asks for it
        self._ids = ids.Sequence(mark)
        self._reserved = mark  # no id up to here will be given out again, whatever happens
        self._held_back: set[bytes] = set()  # content files that only a backup may still need
        self._durable: Commit | None = None  # the one under way, once it is

    def commit(self, batch: list[Work]) -> None:
        """One transaction for a batch; then delivery, then the answers."""
        self._durable = None
        try:
            self._commit_or_raise(batch)
        except Locked as error:
            self._store.shut_out(batch, error)
            return
        except Exception as error:
            if self._durable is None:
                self._fail(batch, error)
                return
        commit = self._durable
        assert commit is not None
        try:
            self._deliver(commit)
        except MemoryError:  # who follows reads the index
            self._store.bus.lose(commit.newest())
        fault.at("commit.before-answers")
        for work in batch:
            finish(work)
        self._durable = None
        fault.at("commit.answered")

    def append_alone(self, append: Append, content: Content | None) -> bytes | None:
        """A plain append (`commit.is_plain`) in a transaction of its own, delivered; its line.

        It is what `commit` does, without that which only other works need: a client that waits for
        each of its appends has a fifth to a quarter less to wait for (bench/append.py). None if
        nothing was done: whatever was in the way, `commit` meets it as well, and tells it.
        """
        writer = self._writer
        if writer is None or self._held_back or not self._exclusive:
            return None
        try:
            entries = self._append_alone(writer, append, content)
        except Exception as error:
            if not isinstance(error, XsError):
                _unexpected(error)
            return None
        if entries is None:
            return None
        fault.at("alone.durable")
        try:
            fault.at("alone.before-delivery")
            self._store.bus.publish(entries)
        except MemoryError:  # who follows reads the index
            self._store.bus.lose(entries[0].id)
        fault.at("alone.before-answer")
        return entries[0].line

    def _append_alone(
        self, writer: Writer, append: Append, content: Content | None
    ) -> list[Entry] | None:
        topic, _, meta, ttl, _, _ = append
        hash_ = None if content is None else content.hash
        self._store.database.check_in_place()
        try:
            if not writer.begins_again():
                writer.rollback()
                return None
            fault.at("alone.begun")
            value = self._ids.next(self._store.clock())
            json = frame.encode(topic, self._ids.text(value), hash_, meta, ttl)
            line = json.encode()
            if not writer.append_now(value, topic, json, line, content):
                writer.rollback()
                return None
            entries = [Entry(value, topic, line)]  # behind the commit nothing may fail any more
            fault.at("alone.applied")
            fault.at("alone.before-fsync")
            try:
                writer.execute("COMMIT")
            except MemoryError:
                if not _has_committed(writer, value):
                    raise
        except BaseException:
            writer.rollback()
            raise
        return entries

    def _fail(self, batch: list[Work], error: Exception) -> None:
        """A transaction was undone."""
        if len(batch) > 1:
            # One of them may be to blame, for instance by its size: each for itself.
            for n, work in enumerate(batch):
                try:
                    self.commit([work])
                except MemoryError:  # it must not keep those behind it waiting
                    self.give_up(batch[n : n + 1])
            return
        try:
            cause = error if isinstance(error, XsError) else _unexpected(error)
            batch[0].error = self._store.database.disk_error(cause) or cause
        except MemoryError:
            batch[0].error = _NO_MEMORY
        finish(batch[0])

    def give_up(self, batch: list[Work]) -> None:
        """There was no memory to begin a commit, or to go on with one.

        Who still waits is told what has come of it: it is done if it was durable by then.
        """
        for work in batch:
            if not work.finished:
                if self._durable is None:
                    work.error = _NO_MEMORY
                finish(work)
        self._durable = None

    def _commit_or_raise(self, batch: list[Work]) -> None:
        store = self._store
        lock = None if self._exclusive else store.open_lock()
        writer = self._writer
        if writer is None:
            self._writer = writer = Writer(store.database.writing())
        if lock is not None:
            lock.acquire(WRITE)
        try:
            store.database.check_in_place()  # what is written to a file that was replaced is lost
            others_wrote = writer.begin()
            try:
                fault.at("commit.begun")
                if lock is not None or others_wrote:
                    mark = writer.mark()
                    if not mark:
                        from xs.creation import outlast_power_loss

                        outlast_power_loss(store.folder)
                    self._ids.raise_to(mark)
                commit = Commit(writer, store, self._ids, store.clock())
                if self._exclusive and others_wrote:
                    # Somebody removed the lock's file, and another took the lock.
                    commit.unseen_mark = writer.newest()
                for work in batch:
                    work.error = None
                    try:
                        work.result = work.apply(commit)
                    except XsError as error:
                        if work.is_whole or is_of_sqlite(error):
                            raise
                        work.error = error
                fault.at("commit.applied")
                self._finish_transaction(commit)
                try:
                    writer.commit()
                except MemoryError:
                    if not any(_has_committed(writer, value) for value in commit.stored_ids()):
                        raise
                self._durable = commit  # whatever fails from here on
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
        finally:
            if lock is not None:
                lock.release()

    def _finish_transaction(self, commit: Commit) -> None:
        commit.apply_trims()
        if not self._exclusive:
            commit.sweep()
            if commit.writer.runs_being_written():
                from xs.runs import KILLED
                from xs.runsteps import end_runs

                end_runs(commit, self._store.runs.is_gone, KILLED)
        if self._held_back and not self._store.cas.is_held():
            commit.look_again(self._held_back)
        commit.look_for_unnamed_files()
        if commit.newest_ephemeral > self._reserved:
            # The disk must know of ids that no stored frame shows. One commit reserves a second.
            reserve = commit.newest_ephemeral + (EPHEMERAL_RESERVE_MS << 80)
            commit.writer.raise_mark(reserve)
            self._reserved = reserve

    def _remove_files(self, digests: list[bytes]) -> None:
        cas = self._store.cas
        if cas.is_held():  # by a backup: then a later commit removes them, else gc finds them
            self._held_back.update(digests)
            return
        for digest in digests:
            fault.at("commit.before-unlink")
            try:
                cas.remove(digest)
            except OSError:
                pass  # gc finds it
            fault.at("commit.unlinked")
        self._held_back.clear()

    def _deliver(self, commit: Commit) -> None:
        """What follows from a transaction that is durable, before it is answered."""
        store = self._store
        if commit.gone and self._exclusive:  # else nothing is in the bus
            store.bus.discard(commit.gone, commit.gone_runs)
        if commit.gone_runs:
            store.runs.forget(commit.gone_runs)
        fault.at("commit.before-delivery")
        if commit.unseen_mark is not None:  # before what is above it: readers go to the index
            store.bus.skip_to(commit.unseen_mark)
        if self._exclusive:
            store.bus.publish(commit.durable_entries(), commit.history_mark)
        elif commit.history_mark is not None:  # others write too, and only the index has it all
            store.bus.skip_to(commit.history_mark)
        if commit.earliest_expiry is not None and store.sweeper is not None:
            store.sweeper.expect(commit.earliest_expiry)


def _has_committed(writer: Writer, value: int) -> bool:
    """Whether SQLite had committed when it found no memory; asked until there is some to find out.

    Not to know it would be to lose a frame, or to store it twice.
    """
    while True:
        try:
            return writer.has_committed(value)
        except MemoryError:
            time.sleep(_PAUSE_SECONDS)


def finish(work: Work) -> None:
    """Tells whoever waits for it what has come of it."""
    try:
        if work.error is not None:
            work.discard()
    except Exception as error:  # what is left over is found at the next start
        _report(error)
    while True:
        try:
            work.finish()
            return
        except MemoryError:  # nobody else would tell it
            time.sleep(_PAUSE_SECONDS)
        except Exception as error:  # it must not keep those behind it from hearing theirs
            _report(error)
            return


def _report(error: Exception) -> None:
    from xs import threads

    threads.report("what has come of an append", error)


def _unexpected(error: Exception) -> XsError:
    try:
        from xs.disk import on_disk

        with on_disk(), translated():
            raise error
    except XsError as found:
        return found
    except Exception:
        from xs import threads

        if threads.is_shortage(error):
            return NoMemory(str(_NO_MEMORY))
        threads.report("a commit", error)  # a defect of ours: who appends is told no more of it
        return XsError(f"{type(error).__name__}: {error}")
