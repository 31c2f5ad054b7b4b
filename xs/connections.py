"""Connections to a store's database: how they are opened, who has one, and what their errors are.

Nothing but SQLite opens `xs.db*` while this process has it open: closing the file by other means
would drop SQLite's locks. So what this process has open is counted here, and `wal` looks at the log
of a store before it is opened.
"""

from __future__ import annotations

from _thread import LockType, allocate_lock

from xs import sqlite
from xs.errors import (
    Damaged,
    DiskError,
    Full,
    NotAStore,
    Unavailable,
    XsError,
    replaced,
)
from xs.schema import (
    APPLICATION_ID,
    FILENAME,
    FORMAT,
    check_tables,
    migrate,
    translated,
    uri,
)
from xs.system import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable

    from xs.still import Still

READERS_MAX = 4  # idle connections kept; each costs some 170 KB
WRITER_CACHE_KB = 8192
READER_CACHE_KB = 1024
CHECKPOINT_PAGES = 4000  # 16 MB of log between two checkpoints (bench/batch.py: + 10 %)
BUSY_MS = 10_000  # how long SQLite waits for another process's transaction
_TYPE_BITS, _LINK = 0o170000, 0o120000  # S_IFMT, S_IFLNK; `stat` is not needed for more
_MODE, _OWNER_WRITES = 0o7777, 0o200
_OPEN_BYTES = 65_536  # that SQLite may need on the disk to open a store, if only for reading

# How often this process has the index of a store's folder open, by device and inode of the folder.
_opened: dict[tuple[int, int], int] = {}
_kept_open: dict[tuple[int, int], int] = {}  # its file, once it was looked at besides SQLite
_opening = allocate_lock()  # guards both, and the next; taken last
# Of each folder that was ever opened: held while its log is looked at, on a disk that may be slow.
_looking: dict[tuple[int, int], LockType] = {}
# What a child of this process can't close, nor open anew (`Connections.leave_to_parent`).
_left_to_parent: dict[tuple[int, int] | None, Connections] = {}


class Unfinished(NotAStore):
    """The database has nothing in it yet: it is just being made, or its making was broken off."""


class Connections:
    """The connections to one store's database: those of readers, and one to write.

    `exclusive`: this process is its one writer, so that who reads need not look whether it is still
    the store's. Raises `NotAStore` for a file that is no store's or is of a newer format.
    """

    def __init__(
        self,
        folder: str,
        *,
        create: bool = False,
        read_only: bool = False,
        exclusive: bool = False,
    ) -> None:
        self._path = os.path.join(folder, FILENAME)
        self.read_only = read_only
        self._exclusive = exclusive
        self._watches: list[sqlite3.Connection] = []  # of `data_version`
        self._watching = allocate_lock()  # held while one of them is used, or all are closed
        self._looking: set[sqlite3.Connection] = set()  # those of them that are in use
        self._readers_lock = allocate_lock()  # guards the next three; taken last
        self._readers: list[sqlite3.Connection] = []
        self._in_use = 1  # connections of reads under way, the writer's, and until `close` one more
        self._closed = ""  # why it is
        # Of connections without locks: as what they were opened.
        self._still: dict[sqlite3.Connection, Still] = {}
        self._mode = "ro" if read_only else "rw"
        self._write_connection: sqlite3.Connection | None = None
        # Before it is opened: if it is replaced meanwhile, that is noticed.
        self._file = _file_at(self._path)
        self._place = _enter(folder)
        try:
            connection = self._connect_first("rwc" if create else self._mode)
            try:
                self._check_format(connection, create=create)
            except BaseException:
                connection.close()
                raise
        except BaseException as error:
            behind = self.disk_error(error)
            _leave(self._place)
            if behind is not None:
                raise behind from error
            raise
        if self._file is None:  # it was made just now, under the store's lock
            self._file = _file_at(self._path)
        self._readers.append(connection)

    def close(self) -> None:
        """Closes every connection; reads under way in other threads end with `Unavailable`."""
        with self._readers_lock:
            if self._closed:
                return
            self._closed = "the store is closing"
            readers, self._readers = self._readers, []
        for connection in readers:
            connection.close()
        with self._watching:
            for connection in self._watches:
                connection.close()
        try:
            if self._write_connection is not None:
                try:
                    with translated():
                        self._write_connection.close()
                finally:
                    self._put_back()
        finally:
            self._put_back()

    def leave_to_parent(self, *, is_writing: bool) -> None:
        """In a process that was just forked: nothing of this is used any more.

        SQLite keeps its locks (fcntl(2), which a child does not inherit) in the process's memory,
        for all connections to a file in common. With one that was inherited it would take the
        parent's for its own, and any other connection of the child to that file would lock nothing.
        So they are closed while the parent still has its own, and can't be taken for gone: at once.
        That can't be done with one that a thread was using, as that thread is not here to end it.
        """
        # A thread of the parent's may have had them.
        self._readers_lock, self._watching = allocate_lock(), allocate_lock()
        self._closed = "the store was opened before a fork: begin again what was begun before it"
        opened = [*self._readers, *self._watches]
        is_reading = self._in_use - 1
        if self._write_connection is not None:
            opened.append(self._write_connection)
            is_reading -= 1
        place, self._place = self._place, None  # which this process has left
        if is_reading or is_writing or self._looking:
            _left_to_parent[place] = self
            return
        for connection in opened:
            connection.close()

    def take(self) -> sqlite3.Connection:
        """A connection to read from: one that is idle, or a new one."""
        if not self._exclusive:
            self.check_in_place()
        return self._take()

    def check_in_place(self) -> None:
        """Raises `Unavailable` unless the file that is open is still the one at its path.

        A repair puts another one there, and so does who restores, moves or removes a store. What is
        written to the old one then is lost. Who asks with the store's lock, which a repair takes,
        has an answer that holds while the lock does.
        """
        if _file_at(self._path) != self._file:
            raise replaced(os.path.dirname(self._path))

    def _take(self) -> sqlite3.Connection:
        with self._readers_lock:
            if self._closed:
                raise Unavailable(self._closed)
            self._in_use += 1
            connection = self._readers.pop() if self._readers else None
        if connection is not None:
            if not self._still or self._is_as_opened(connection):
                return connection
            del self._still[connection]
            connection.close()
        try:
            return self._connect_again()
        except BaseException:
            self._put_back()
            raise

    def _connect_again(self) -> sqlite3.Connection:
        connection = self._connect(self._mode)
        try:
            self.check_in_place()  # now: by its path it may have been another one that was opened
        except BaseException:
            connection.close()
            raise
        return connection

    def _is_as_opened(self, connection: sqlite3.Connection) -> bool:
        """Whether nobody has come to write since a connection was opened without locks."""
        from xs.still import when_still

        still = self._still.get(connection)
        return still is None or when_still(self._path) == still

    def give_back(self, connection: sqlite3.Connection, *, usable: bool) -> None:
        """A connection that is idle again is kept, if it can be used and there are few.

        Raises `Unavailable` if what was read from it is not what was there at one moment.
        """
        is_torn = False
        if self._still:
            from xs.still import is_unchanged

            is_torn = not is_unchanged(self._path, self._still.get(connection))
        self._give_back(connection, usable=usable and not is_torn)
        if is_torn:
            raise Unavailable(
                f"the store at {os.path.dirname(self._path)} was written to while it was read "
                "without a lock, as it may not be written to here: try again"
            )

    def _give_back(self, connection: sqlite3.Connection, *, usable: bool) -> None:
        with self._readers_lock:
            usable = usable and not connection.in_transaction
            if usable and not self._closed and len(self._readers) < READERS_MAX:
                self._readers.append(connection)
                self._in_use -= 1
                return
        self._still.pop(connection, None)
        connection.close()
        self._put_back()

    def writing(self) -> sqlite3.Connection:
        """The connection for changes: that with which the index was opened, if it is idle."""
        if self._write_connection is None:
            self._write_connection = self._take()
            with translated():
                self._write_connection.execute(f"PRAGMA cache_size = -{WRITER_CACHE_KB}")
        return self._write_connection

    def data_version(self) -> Callable[[], int]:
        """A function whose value changes when another process has committed."""
        connection = self._connect_again()
        self._watches.append(connection)

        def version() -> int:
            # One that is closed while it is in use takes the process with it.
            with self._watching:
                if self._closed:
                    raise Unavailable(self._closed)
                self._looking.add(connection)
                try:
                    with translated():
                        return int(connection.execute("PRAGMA data_version").fetchone()[0])
                finally:
                    self._looking.discard(connection)

        return version

    def disk_error(self, error: BaseException) -> DiskError | None:
        """What is behind an error of the index, if that is an error of the disk.

        SQLite says that a database is malformed also when the disk could not read it, and only
        reading all of it tells. What was read, and is not what was stored, has no such cause.
        """
        is_of_sqlite = isinstance(error, Damaged) and isinstance(error.__cause__, sqlite.Error)
        if not is_of_sqlite or self._place is None:
            return None
        reason = _why_not_read(self._place, self._path)
        if reason is None:
            return None
        return DiskError(
            f"the disk can't read {self._path}: {reason}: what is on it may be whole, and be read "
            "again later"
        )

    def begin(self, connection: sqlite3.Connection) -> None:
        """Begins a transaction in which all that is read is of one moment."""
        with translated():
            connection.execute("BEGIN")
        if self.read_only:  # the moment is that of the first look, which may have to be repeated
            from xs.still import once_settled

            once_settled(self._path, lambda: _look(connection))

    def _put_back(self) -> None:
        """One less of this index's connections is in use; when none is, this process has left."""
        with self._readers_lock:
            self._in_use -= 1
            is_last = self._in_use == 0
        if is_last:
            _leave(self._place)

    def _connect_first(self, mode: str) -> sqlite3.Connection:
        if mode != "ro":
            for suffix in ("-wal", "-shm"):
                _make_writable(self._path + suffix)
        try:
            return self._connect(mode)
        except Unavailable:
            from xs.place import check_length

            folder = os.path.dirname(self._path)
            check_length(folder)
            if os.path.exists(self._path) and not os.access(self._path, os.R_OK):
                raise NotAStore(f"can't read {self._path}: Permission denied") from None
            found = os.statvfs(folder)
            if found.f_bavail * found.f_frsize < _OPEN_BYTES:
                raise Full(
                    f"the disk is full: even to read the store takes {_OPEN_BYTES // 1024} KiB "
                    "of it"
                ) from None
            if found.f_files and not found.f_favail:
                raise Full("the disk is full: it has no room for another file") from None
            raise

    def _connect(self, mode: str) -> sqlite3.Connection:
        if mode != "ro":
            return self._connect_now(mode)
        from xs.still import once_settled

        return once_settled(self._path, lambda: self._connect_now(mode))

    def _connect_now(self, mode: str) -> sqlite3.Connection:
        with translated():
            connection = self._open(mode)
            try:
                for setting in (
                    f"busy_timeout = {BUSY_MS}",
                    f"cache_size = -{READER_CACHE_KB}",
                    "synchronous = FULL",
                    f"wal_autocheckpoint = {CHECKPOINT_PAGES}",
                    "fullfsync = ON",  # F_FULLFSYNC on macOS
                    "checkpoint_fullfsync = ON",
                ):
                    connection.execute(f"PRAGMA {setting}")
            except BaseException:
                connection.close()
                raise
            return connection

    def _open(self, mode: str) -> sqlite3.Connection:
        still = None
        if mode == "ro":
            from xs.still import when_still  # here: who may write has no need of it

            still = when_still(self._path)
        connection = sqlite.connect(
            uri(self._path, mode, locks=still is None),
            uri=True,
            isolation_level=None,
            check_same_thread=False,
            cached_statements=256,
        )
        if still is not None:
            self._still[connection] = still
        return connection

    def _check_format(self, connection: sqlite3.Connection, *, create: bool) -> None:
        with translated():
            connection.execute("BEGIN")  # all three at one moment: it may be just being made
            tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
            application = connection.execute("PRAGMA application_id").fetchone()[0]
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version == FORMAT and application == APPLICATION_ID:
                check_tables(connection)
            connection.execute("COMMIT")
        if application not in (0, APPLICATION_ID) or (application == 0 and tables):
            raise NotAStore(f"not a store: {self._path} is another program's database")
        if version > FORMAT:
            raise NotAStore(
                f"the store at {os.path.dirname(self._path)} has format {version}, and this xs "
                f"knows formats up to {FORMAT}: use a newer xs"
            )
        if version < FORMAT:
            if self.read_only and version:
                raise NotAStore(
                    f"the store at {os.path.dirname(self._path)} has format {version} and can't be "
                    f"written to here: open it once where it can, which makes it format {FORMAT}"
                )
            if self.read_only or not (create or application):
                raise Unfinished(f"not a store: {self._path} is empty")
            migrate(connection)


class Reading:
    """A block with a connection of its own, in a read transaction. SQLite's errors become ours."""

    __slots__ = ("_connection", "_connections")

    def __init__(self, connections: Connections) -> None:
        self._connections = connections

    def __enter__(self) -> sqlite3.Connection:
        self._connection = connection = self._connections.take()
        try:
            self._connections.begin(connection)
        except XsError as error:
            self._connections.give_back(connection, usable=True)
            raise (self._connections.disk_error(error) or error) from error.__cause__
        except BaseException:
            self._connections.give_back(connection, usable=False)
            raise
        return connection

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        usable = error is None or isinstance(error, (XsError, sqlite.Error))
        try:
            with translated():
                if self._connection.in_transaction:  # some errors end it
                    self._connection.execute("COMMIT")
            translated().__exit__(None, error, None)
        except Damaged as damaged:
            raise (self._connections.disk_error(damaged) or damaged) from damaged.__cause__
        finally:
            self._connections.give_back(self._connection, usable=usable)
        if isinstance(error, Damaged):
            behind = self._connections.disk_error(error)
            if behind is not None:
                raise behind from error.__cause__


def _look(connection: sqlite3.Connection) -> None:
    with translated():
        connection.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchall()


def _enter(folder: str) -> tuple[int, int] | None:
    """Before the index of that folder is opened. Raises `Damaged` if its log is.

    A log that is there has to be read by who opens it first. To look at it costs nothing where
    there is none, nor the memory beside it, which is what an orderly close leaves.
    """
    try:
        found = os.stat(folder)
    except OSError:
        return None  # opening it will say what is wrong
    place = found.st_dev, found.st_ino
    if place in _left_to_parent:
        raise Unavailable(
            f"the store at {folder} was in use when this process was forked, and can't be opened "
            "in it: fork while nothing is under way, or start a process anew"
        )
    with _opening:
        looking = _looking.setdefault(place, allocate_lock())
    with looking:
        # Others may leave it meanwhile, but who comes waits here: nobody opens it beside this.
        if place not in _opened and (
            has_log(folder) or os.path.exists(os.path.join(folder, FILENAME + "-shm"))
        ):
            from xs import wal  # here: it brings in what is seldom needed

            wal.check(folder)
            wal.make_durable(folder)
        with _opening:
            _opened[place] = _opened.get(place, 0) + 1
    return place


def forget_opened() -> None:
    """In a process that was just forked: what its parent has open is not open here."""
    global _opening
    _opening = allocate_lock()
    _looking.clear()
    _opened.clear()
    while _kept_open:
        os.close(_kept_open.popitem()[1])


def _leave(place: tuple[int, int] | None) -> None:
    if place is not None:
        with _opening:
            _opened[place] -= 1
            if not _opened[place]:
                del _opened[place]
                if place in _kept_open:
                    os.close(_kept_open.pop(place))


def _why_not_read(place: tuple[int, int], path: str) -> str | None:
    """The system's word for why an index, or its log, can't be read to its end; None if it can."""
    try:
        with _opening:
            if place not in _opened:
                return None  # it was closed meanwhile, and what is there now may be another
            # Closed when nobody here has it open any more: that gives SQLite's locks back.
            if place not in _kept_open:
                _kept_open[place] = os.open(path, os.O_RDONLY)
            file = _kept_open[place]
            _opened[place] += 1
        try:
            _read_all(file)
        finally:
            _leave(place)
        log = os.open(path + "-wal", os.O_RDONLY)
        try:
            _read_all(log)
        finally:
            os.close(log)
    except FileNotFoundError:
        return None
    except OSError as error:
        return error.strerror
    return None


def _read_all(file: int) -> None:
    at = 0
    while size := len(os.pread(file, 1 << 20, at)):
        at += size


def _file_at(path: str) -> tuple[int, int] | None:
    """Which file lies at that path; None if there is none. Raises `NotAStore` for a link.

    SQLite keeps the log beside what a link leads to, where nobody would look for it: not the check
    of a log, nor a repair.
    """
    try:
        found = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise Unavailable(f"{path} can't be looked at: {error.strerror}") from None
    if found.st_mode & _TYPE_BITS == _LINK:
        raise NotAStore(f"not a store: {path} is a link: link to the store's whole directory")
    return found.st_dev, found.st_ino


def _make_writable(path: str) -> None:
    """Lets the owner write what SQLite has made for who could only read then, and left behind."""
    try:
        mode = os.stat(path).st_mode
        if not mode & _OWNER_WRITES:
            os.chmod(path, mode & _MODE | _OWNER_WRITES)
    except OSError:
        pass  # it is not there, mostly


def has_index(folder: str) -> bool:
    """Whether there is one. SQLite begins with an empty file, which is none before its journal."""
    path = os.path.join(folder, FILENAME)
    try:
        size = os.stat(path).st_size
    except OSError:
        return False
    return size > 0 or os.path.exists(path + "-journal")


def has_log(folder: str) -> bool:
    try:
        return os.stat(os.path.join(folder, FILENAME + "-wal")).st_size > 0
    except OSError:
        return False
