"""The store: the only door to its database, content files and bus.

The way of an append, each step needed by the next. A process may die before and after each: the
points have names, `content.…` in steps 1 and 3, `commit.…` from step 4 on (xs/fault.py), and
tests/test_faults.py dies at all of them:

1. its content is hashed as it arrives (`content`): small content stays in memory, large content
   goes to a temporary file, which is fsynced (`cas`);
2. it joins the waiting batch. Who finds no commit under way leads one (`group`): it does steps 3 to
   6 for all that wait (`committer`);
3. large content gets its name, and its folder is fsynced;
4. the frames get their ids, are encoded, and are written in one transaction with small content;
5. the transaction commits: fsync of the write-ahead log;
6. the frames are published to the bus; then every append is answered.

Locks, in the order in which they are taken: the store's lock file, that of `group`, the bus's own.

A command on the files starts through this module, and mostly does one thing. So parts are made when
they are asked for (`_Part`), and what only some commands need is imported by the functions that
need it.
"""

from __future__ import annotations

import time
from _weakref import ref

from xs import frame, ids
from xs.connections import Connections, Unfinished, forget_opened, has_index
from xs.errors import Invalid, NotAStore, NotFound, Unavailable
from xs.place import why_not_written
from xs.system import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any, Union

    from xs.bus import Bus
    from xs.cas import Cas
    from xs.commit import Append
    from xs.committer import Committer
    from xs.errors import Locked
    from xs.expiry import Sweeper
    from xs.group import GroupCommit
    from xs.index import Index
    from xs.lock import Lock
    from xs.runs import Runs
    from xs.schema import Stored
    from xs.work import Work

LOOK_SECONDS = 0.05  # between two looks for other processes' commits, when there is no server


_open: set[ref[Store]] = set()  # that this process has, for its children to leave to it


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


def _make_index(store: Store) -> Index:
    from xs.index import Index

    return Index(store.database)


def _make_cas(store: Store) -> Cas:
    from xs.cas import FOLDER, Cas

    return Cas(os.path.join(store.folder, FOLDER))


def _make_bus(store: Store) -> Bus:
    from xs.bus import Bus

    return Bus(store.index.mark() if store.exclusive else store.index.newest())


def _make_runs(store: Store) -> Runs:
    from xs.runs import Runs

    return Runs(store.folder, store.run)


def _make_committer(store: Store) -> Committer:
    from xs.committer import Committer

    return Committer(store)


def _make_group(store: Store) -> GroupCommit:
    from xs.group import GroupCommit

    if store._closed:
        raise Unavailable("the store is closing")
    return GroupCommit(store.committer, exclusive=store.exclusive)


class Store:
    """One store, in its directory.

    `exclusive`: this process is the store's one writer until `close` (a server). Otherwise each
    batch takes the lock, and reads see what other processes have committed. `run`, `submit` and
    `submit_all` are those of `group` (see there), with no call in between.
    """

    is_parents = False  # in a process that was forked: it is of no use here

    if TYPE_CHECKING:
        index: Index
        cas: Cas
        bus: Bus
        runs: Runs
        committer: Committer
        group: GroupCommit
        run: Callable[[Work], Any]
        submit: Callable[[Work], None]
        submit_all: Callable[[list[Work]], None]
    else:
        index, cas, bus = _Part(_make_index), _Part(_make_cas), _Part(_make_bus)
        runs, committer, group = _Part(_make_runs), _Part(_make_committer), _Part(_make_group)
        run = _Part(lambda store: store.group.run)
        submit = _Part(lambda store: store.group.submit)
        submit_all = _Part(lambda store: store.group.submit_all)

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
        self.sweeper: Sweeper | None = None
        self._closed = False
        self._data_version: Callable[[], int] | None = None
        if not has_index(folder):
            from xs.creation import check_folder

            check_folder(folder, create=create)
        self._unwritable = why_not_written(folder)
        self._lock: Lock | None = None
        if exclusive or create:
            self.open_lock()
        read_only = self._unwritable is not None
        try:
            if exclusive or (create and not has_index(folder)):
                self._make(create=create)
            try:
                self.database = Connections(
                    folder,
                    create=exclusive or create,
                    read_only=read_only,
                    exclusive=exclusive,
                )
            except Unfinished:
                # Another process is just making it, or was killed while it did.
                if read_only:
                    raise
                self._make(create=True)
                self.database = Connections(folder, exclusive=exclusive)
            try:
                if exclusive:
                    self.cas.remove_stale()
                    if not self.bus.newest:
                        from xs.creation import outlast_power_loss

                        outlast_power_loss(folder)
            except BaseException:
                self.database.close()
                raise
        except BaseException:
            if self._lock is not None:
                self._lock.close()
            raise
        _open.add(ref(self, _open.discard))

    def _make(self, *, create: bool) -> None:
        """Makes what a store consists of, under its lock, which a server then keeps."""
        from xs.creation import make

        make(self.folder, self.open_lock(), exclusive=self.exclusive, create=create)

    def open_lock(self) -> Lock:
        """The store's lock, not taken. Raises `NotAStore` where nobody may write, …"""
        if self._unwritable is not None:
            raise NotAStore(self._unwritable)
        if self._lock is None:
            from xs.lock import Lock

            try:
                self._lock = Lock(self.folder)
            except OSError as error:
                from xs.disk import refusal

                sentence = f"can't write to the store at {self.folder}: its lock"
                raise refusal(sentence, error) from None
        return self._lock

    def opened(self) -> None:
        """Before a part of it is used: one that is yet to be opened can do so now."""

    # Writing

    def check_ttl(self, ttl: str) -> str:
        """That TTL. Raises `Invalid` for an ephemeral frame where nobody can follow it live."""
        if ttl == frame.EPHEMERAL and not self.exclusive:
            raise Invalid("an ephemeral frame needs a server: start one with xs serve")
        return ttl

    def append(self, append: Append) -> bytes:
        """Appends one frame and answers its line, when it is durable."""
        from xs.work import AppendWork

        return bytes(self.run(AppendWork(append)))

    def start(self, work: Work) -> Callable[[], Any]:
        """Hands `work` to the commit thread; the function that it gives waits, as `run` does."""
        return self.group.start(work)

    def shut_out(self, batch: list[Work], error: Locked) -> None:
        """Another process has the store's lock, and keeps it: nothing of the batch was done."""
        from xs.committer import finish

        for work in batch:
            work.error = error
            finish(work)

    def start_sweeping(self) -> None:
        """From now on frames are removed when they expire."""
        from xs.expiry import Sweeper

        self.sweeper = Sweeper(self)
        self.sweeper.start()

    # Reading

    def newest(self) -> int:
        """The position of a reader that has seen all there is."""
        if self.exclusive:
            return self.bus.newest
        newest = self.index.newest()  # which may have been removed: who follows goes on from there
        return max(self.bus.newest, newest) if "bus" in vars(self) else newest

    def lines(self, topics: frozenset[str], after: int, until: int) -> Iterator[bytes]:
        """The stored frames of these topics; of a run, only its first."""
        walk = self.index.walk(topics, chunks=False)
        while True:
            page, count = walk.page(after, until, 1 << 30, self.clock())
            if not count:
                return
            lines = page.split(b"\n")[:-1]
            yield from lines
            after = ids.parse(frame.id_of(lines[-1]))

    def wait_for_run(self, first: int, position: int, timeout: float) -> bool:
        """Waits until there may be more of a run above `position`; False if nothing came.

        Without a server it is for LOOK_SECONDS, whatever `timeout` is.
        """
        if self.exclusive:
            return self.bus.wait_for_run(first, position, timeout)
        time.sleep(LOOK_SECONDS)
        return False

    def wait(self, position: int, seconds: float | None = None) -> bool:
        """Waits until there may be something above `position`; False if nothing came for a while.

        Without a server nobody publishes what other processes commit: then this looks for it, for
        LOOK_SECONDS whatever `seconds` is.
        """
        if self.exclusive:
            return self.bus.wait(position, seconds)
        if self._data_version is None:
            self._data_version = self.database.data_version()
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
        return _in_memory(stored.content or b"", hash_)

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
        return _in_memory(data, hash_)

    # Housekeeping

    def gc(self, age_seconds: float) -> tuple[int, int]:
        """Removes contents older than that which no frame names; how many, and their bytes."""
        from xs.garbage import collect

        return collect(self, age_seconds)

    def check(self) -> Iterator[Union[str, tuple[int, int]]]:
        """Problems, one sentence each, and at the end (frames, contents) that were looked at."""
        from xs.check import problems

        return problems(self.index, self.cas)

    def refuse_more(self, last: Append | None) -> None:
        """From now on nothing can be appended; `last` is the last frame that is.

        What is still being written here, piece by piece, is ended before it.
        """
        from xs.runs import STOPPED
        from xs.runsteps import EndRunsWork
        from xs.work import AppendWork

        works: list[Work] = [EndRunsWork(self.runs.is_own, STOPPED)]
        if last is not None:
            works.append(AppendWork(last))
        self.group.end_with(works)

    def leave_to_parent(self) -> None:
        """In a process that was just forked: closes here what the parent goes on with."""
        self.is_parents = self._closed = True
        group = vars(self).get("group")
        self.database.leave_to_parent(is_writing=group is not None and group.is_leading)
        if self._lock is not None:
            self._lock.leave_to_parent()

    def close(self) -> None:
        """Finishes what was submitted, then closes. What is submitted later is refused."""
        if self.is_parents:
            return
        self._closed = True
        _open.discard(ref(self))
        parts = vars(self)
        if "group" in parts and not self.group.close():
            return
        if self.sweeper is not None:
            self.sweeper.stop()
        for part in ("runs", "bus"):
            if part in parts:
                parts[part].close()
        self.database.close()
        if self._lock is not None:
            self._lock.close()


def leave_to_parent() -> None:
    """In a process that was just forked: what its parent has open is not used here any more."""
    forget_opened()
    while _open:
        store = _open.pop()()
        if store is not None:
            store.leave_to_parent()


def _in_memory(data: bytes, hash_: str) -> tuple[int, Iterator[bytes]]:
    """Size and blocks of content that was found under that hash. Raises `Damaged`."""
    from xs.content import checked

    return len(data), iter((checked(data, hash_),))
