"""The SQLite index of a store: its connections, and everything that is read from it.

The door to the files with SQL: `schema` (what is there), `rows` (single ones), `scan` (the way
through them), `pieces` (runs) and `writer` (changes). Nothing but SQLite opens `xs.db*` while this
process has it open: closing the file by other means would drop SQLite's locks. `wal` looks at the
log of a store before that.

Where a frame lies: its row is `milliseconds of its id << 15 | order within the millisecond`, so
rows are in order of id by themselves, the id needs no index of its own and times are ranges. Rows
are private to these files; every position outside is an id, resolved in the transaction that uses
it.

Finding frames by topic: a frame's row has its topic's number (an index), and for a dotted topic the
table `below` lists it under each wildcard above it: `a.b.c` under `a.*` and `a.b.*`. So a wildcard
costs as much as an exact topic, however many topics it covers.

Finding small content by hash: an index over all digests would put every append on a page of its own
choosing (on a trial 3 × slower at 300,000 frames). So the index is over a number that begins with a
bucket, some thousands of frames that were appended together, and goes on with the digest: writes
stay close, and a look-up asks each bucket.
"""

from __future__ import annotations

import os
from _thread import allocate_lock

from xs import frame, sqlite
from xs.errors import Damaged, DiskError, Full, NotAStore, Unavailable, XsError
from xs.rows import (
    LINE,
    bounds,
    id_at,
    inline_content,
    is_whole,
    mark_of,
    names_file,
    newest_id,
    stored_with_id,
)
from xs.scan import (
    LARGE_PAGE_BYTES,
    Asked,
    Source,
    bounded_page,
    bounded_rows,
    dense_page,
    joined_page,
    merged,
    next_large,
    one,
    pieces_of,
    select,
    source_of,
)
from xs.schema import (
    APPLICATION_ID,
    FILENAME,
    FORMAT,
    IS_SCRIPT_TOPIC,
    LARGE_JSON,
    ORDER_BITS,
    Script,
    Stored,
    StoredPiece,
    check_tables,
    migrate,
    sum_of_answer,
    translated,
    uri,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable, Iterator
    from typing import Any, Optional

    from xs.pieces import Run
    from xs.writer import Writer

PAGE_ROWS = 1000  # frames in one page of a read
READERS_MAX = 4  # idle connections kept; each costs some 170 KB
WRITER_CACHE_KB = 8192
READER_CACHE_KB = 1024
CHECKPOINT_PAGES = 4000  # 16 MB of log between two checkpoints (bench/batch.py: + 10 %)
_OPEN_BYTES = 65_536  # that SQLite may need on the disk to open a store, if only for reading
BUSY_MS = 10_000  # how long SQLite waits for another process's transaction


# How often this process has the index of a store's folder open, by device and inode of the folder.
_opened: dict[tuple[int, int], int] = {}
_kept_open: dict[tuple[int, int], int] = {}  # its file, once it was looked at besides SQLite
_opening = allocate_lock()  # guards both; held while a log is looked at


class Unfinished(NotAStore):
    """The database has nothing in it yet: it is just being made, or its making was broken off."""


class Index:
    """One store's database. Reads from any thread; one `Writer` at a time.

    Raises `NotAStore` for a file that is none or is of a newer format.
    """

    def __init__(self, folder: str, *, create: bool = False, read_only: bool = False) -> None:
        self._path = os.path.join(folder, FILENAME)
        self._read_only = read_only
        self._watches: list[sqlite3.Connection] = []  # of `data_version`
        self._readers_lock = allocate_lock()  # guards the next three; taken last
        self._readers: list[sqlite3.Connection] = []
        self._in_use = 1  # connections of reads under way, the writer's, and until `close` one more
        self._closed = False
        self._mode = "ro" if read_only else "rw"
        self._write_connection: sqlite3.Connection | None = None
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
        self._readers.append(connection)

    def close(self) -> None:
        """Closes every connection; reads under way in other threads end with `Unavailable`."""
        with self._readers_lock:
            if self._closed:
                return
            self._closed = True
            readers, self._readers = self._readers, []
        for connection in (*readers, *self._watches):
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

    def _put_back(self) -> None:
        """One less of this index's connections is in use; when none is, this process has left."""
        with self._readers_lock:
            self._in_use -= 1
            is_last = self._in_use == 0
        if is_last:
            _leave(self._place)

    # Reading

    def get(self, value: int, now: int) -> bytes | None:
        """The line of the frame with that id, or None."""
        stored = self.stored(value, now)
        return stored.line if stored else None

    def stored(self, value: int, now: int) -> Stored | None:
        """The frame with that id and its content, or None."""
        with self._reader() as reader:
            return stored_with_id(reader, value, now)

    def next(self, value: int, patterns: frame.Patterns, now: int) -> bytes | None:
        """The first frame above that id among those selected, or None."""
        with self._reader() as reader:
            return one(reader, patterns, value, None, now)

    def prev(self, value: int, patterns: frame.Patterns, now: int) -> bytes | None:
        """The last frame below that id among those selected, or None."""
        with self._reader() as reader:
            return one(reader, patterns, None, value, now)

    def first(self, patterns: frame.Patterns, now: int) -> bytes | None:
        return self._one(patterns, -1, None, now)

    def last(self, patterns: frame.Patterns, now: int) -> bytes | None:
        return self._one(patterns, None, None, now)

    def _one(
        self, patterns: frame.Patterns, after: int | None, before: int | None, now: int
    ) -> bytes | None:
        """As `scan.one` at either end: a single statement, which is a transaction by itself."""
        connection = self._take()
        usable = False
        try:
            with translated():
                found = one(connection, patterns, after, before, now)
            usable = True
            return found
        except Damaged as error:
            raise (self.disk_error(error) or error) from error.__cause__
        finally:
            self._give_back(connection, usable=usable)

    def start_of_last(
        self,
        patterns: frame.Patterns,
        count: int,
        after: int,
        until: int | None,
        now: int,
        *,
        chunks: bool = True,
    ) -> int | None:
        """The id of the oldest among the newest `count` selected frames; None if there are none.

        Without `chunks` frames that continue a run don't count.
        """
        with self._reader() as reader:
            source = source_of(patterns)
            pieces = pieces_of(reader, patterns, after, until) if chunks else None
            if source is None and pieces is None:
                return None
            low, high = bounds(reader, after, until)
            values = {"low": low, "high": high, "now": now, "count": count}
            if source is not None:
                values.update(source.values)
                newest = select(source, "f.row AS row", descending=True)
            if pieces is not None:
                values.update(pieces[0].values)
                newest = merged(source, pieces[0], "expires", descending=True)
            row = reader.execute(f"SELECT min(row) FROM ({newest})", values).fetchone()[0]
            return None if row is None else max(id_at(reader, row), id_at(reader, row, "piece"))

    def page(
        self,
        after: int,
        until: int | None,
        patterns: frame.Patterns,
        limit: int,
        now: int,
        *,
        chunks: bool = True,
    ) -> tuple[bytes, int]:
        """The next selected frames above `after`: their lines, each with its newline, and how many.

        At most PAGE_ROWS and `limit` frames; bounded in bytes too. No frames means that there are
        none (now). A page ends before a damaged frame; one that would begin with it raises
        `Damaged`. SQLite joins the page itself, so that Python handles one value (measured with
        bench/replay.py: 2 × the frames a second that rows give). Without `chunks` frames that
        continue a run are left out.
        """
        with self._reader() as reader:
            source = source_of(patterns)
            pieces = pieces_of(reader, patterns, after, until) if chunks else None
            if source is None and pieces is None:
                return b"", 0
            asked = Asked(after, until, patterns)
            low, high = bounds(reader, after, until)
            values = {"low": low, "high": high, "now": now, "count": min(limit, PAGE_ROWS)}
            if source is not None:
                values.update(source.values)
                page, found = self._page_of_frames(reader, source, asked, values, pieces)
                if found or pieces is None:
                    return page, found
            assert pieces is not None
            values.update(pieces[0].values)
            rows = merged(source, pieces[0], "sum, json")
            return bounded_page(reader, f"SELECT {LINE} FROM ({rows}) f", asked, values)

    def _page_of_frames(
        self,
        reader: sqlite3.Connection,
        source: Source,
        asked: Asked,
        values: dict[str, Any],
        pieces: tuple[Source, int] | None,
    ) -> tuple[bytes, int]:
        """The frames of a page that come before the first piece."""
        if pieces is not None:
            values = {**values, "high": min(values["high"], pieces[1] - 1)}
        bound = next_large(reader, values["low"])
        if bound is None or bound > values["high"]:
            bound = values["high"] + 1
        small = {**values, "high": bound - 1}
        page, found = dense_page(reader, source, asked, small)
        if not found:
            page, found = joined_page(reader, source, asked, small)
        if found or bound > values["high"]:
            return page, found
        return bounded_page(reader, select(source, LINE), asked, {**values, "low": bound - 1})

    def rows(
        self,
        after: int,
        until: int | None,
        patterns: frame.Patterns,
        limit: int,
        now: int,
        *,
        chunks: bool = True,
    ) -> list[Stored]:
        """As `page`, frame by frame and with inline content; the list is bounded in bytes.

        It ends before a damaged frame; one that would begin with it raises `Damaged`.
        """
        with self._reader() as reader:
            source = source_of(patterns)
            pieces = pieces_of(reader, patterns, after, until) if chunks else None
            if source is None and pieces is None:
                return []
            low, high = bounds(reader, after, until)
            values = {"low": low, "high": high, "now": now, "count": min(limit, PAGE_ROWS)}
            if source is not None:
                values.update(source.values)
                rows = select(source, f"{LINE}, f.content, f.digest")
            if pieces is not None:
                values.update(pieces[0].values)
                rows = merged(source, pieces[0], "sum, json, content, digest")
                rows = f"SELECT {LINE}, f.content, f.digest FROM ({rows}) f"
            return bounded_rows(reader, rows, Asked(after, until, patterns), values)

    def content(self, digest: bytes, now: int) -> bytes | None:
        """Inline content with that digest, of a frame or pinned; None if there is none here."""
        with self._reader() as reader:
            return inline_content(reader, digest, now)

    def names_file(self, digest: bytes, now: int) -> bool:
        """Whether a frame or a pin names the file with that digest."""
        with self._reader() as reader:
            return names_file(reader, digest, now)

    def mark(self) -> int:
        """No id above it has been given out, as far as the disk knows."""
        with self._reader() as reader:
            return mark_of(reader)

    def newest(self) -> int:
        """The id of the newest stored frame; -1 if there is none.

        The mark may be above ids that are still to come: a server reserves some for ephemeral
        frames.
        """
        with self._reader() as reader:
            return newest_id(reader)

    def begins_run(self, value: int) -> bool:
        """Whether the frame with that id is the first of a run."""
        from xs.pieces import run_of

        with self._reader() as reader:
            return run_of(reader, value) is not None

    def run(self, first: int, after: int, now: int) -> tuple[Run, list[StoredPiece]] | None:
        """A run by its first frame's id, and its next pieces above an id; None if it is none.

        All in one moment: without pieces, and with no writer, nothing more will come.
        """
        from xs.pieces import pieces_after, run_of

        with self._reader() as reader:
            found = run_of(reader, first)
            if found is None or (found.expires is not None and found.expires <= now):
                return None
            return found, pieces_after(reader, first, found.number, after)

    def next_expiry(self) -> int | None:
        """When the next frame expires, in milliseconds since 1970; None if none ever will."""
        with self._reader() as reader:
            found = reader.execute(
                "SELECT min(expires) FROM frame WHERE expires IS NOT NULL"
            ).fetchone()[0]
            return None if found is None else int(found)

    def data_version(self) -> Callable[[], int]:
        """A function whose value changes when another process has committed."""
        connection = self._connect(self._mode)
        self._watches.append(connection)

        def version() -> int:
            with translated():
                return int(connection.execute("PRAGMA data_version").fetchone()[0])

        return version

    # Scripts

    def script_topics(self) -> list[str]:
        """The topics on which scripts are put in service and out, of frames that ever were."""
        with self._reader() as reader:
            query = f"SELECT name FROM topic INDEXED BY topic_script WHERE {IS_SCRIPT_TOPIC}"
            return [name for (name,) in reader.execute(query)]

    def scripts(self, kind: str, name: str) -> list[Script]:
        """What is kept of all the scripts that this one name has had."""
        with self._reader() as reader:
            query = (
                "SELECT kind, name, source, active, position, state FROM script "
                "WHERE kind = ? AND name = ?"
            )
            return [Script(*row) for row in reader.execute(query, (kind, name))]

    def active_scripts(self, kind: str) -> list[Script]:
        """What is kept of all those of a kind that are in service, in order of their frames."""
        with self._reader() as reader:
            query = (
                "SELECT kind, name, source, active, position, state FROM script "
                "WHERE kind = ? AND active ORDER BY source"
            )
            return [Script(*row) for row in reader.execute(query, (kind,))]

    # Checking

    def problems(self) -> Iterator[str]:
        """What SQLite's own check and the cross-checks between tables find wrong."""
        with self._reader() as reader:
            for (text,) in reader.execute("PRAGMA integrity_check(100)"):
                if text != "ok":
                    yield f"xs.db: {text}"
            for what, query in _CROSS_CHECKS:
                for row in reader.execute(query):
                    yield f"{what}: {row[0]}"
            for name, key, total, line in reader.execute(
                "SELECT t.name, a.key, a.sum, CAST(a.json AS BLOB) FROM answered a "
                "LEFT JOIN topic t ON t.number = a.topic"
            ):
                if total != sum_of_answer(key, line) or frame.topic_of(line) != name:
                    yield f"what was answered to the key {key} on {name} is damaged"

    def everything(self) -> Iterator[tuple[int, bytes, Optional[bytes], bool, bool]]:
        """Every row in order, also what no read gives: damaged ones, and those that have expired.

        Of each its millisecond, line, content, is that a file, does all of the row agree.
        """
        from xs.pieces import continues

        row = -1
        while True:
            page = []
            size = 0
            with self._reader() as reader:
                both = " UNION ALL ".join(
                    f"SELECT * FROM (SELECT row, sum, json, content, digest, expires, {ends} "
                    f"FROM {table} WHERE row > :row ORDER BY row LIMIT :count)"
                    for table, ends in (("frame", "NULL AS ends"), ("piece", "ends"))
                )
                cursor = reader.execute(
                    f"SELECT {LINE}, f.content, f.digest IS NULL, f.expires, f.ends "
                    f"FROM ({both}) f ORDER BY f.row LIMIT :count",
                    {"row": row, "count": PAGE_ROWS},
                )
                last = row
                for row, total, line, content, is_file, expires, ends in cursor:
                    if row <= last:
                        raise Damaged(f"the index is damaged: row {row} comes after row {last}")
                    last = row
                    whole = is_whole(row, total, line)
                    if whole and ends is None:
                        whole = expires == frame.expiry(frame.ttl_of(line), row >> ORDER_BITS)
                    elif whole:
                        whole = continues(line, ends)
                    line = line if isinstance(line, bytes) else b""
                    page.append((row >> ORDER_BITS, line, content, bool(is_file), whole))
                    size += len(line) + len(content or b"")
                    if size > LARGE_PAGE_BYTES:
                        break
                cursor.close()
            if not page:
                return
            yield from page

    def file_digests(self) -> Iterator[bytes]:
        """Digests of all the files that frames or pins name."""
        last = b""
        while True:
            with self._reader() as reader:
                found = reader.execute(
                    "SELECT digest FROM (SELECT digest FROM file UNION "
                    "SELECT digest FROM pin WHERE content IS NULL) WHERE digest > ? "
                    "ORDER BY digest LIMIT 1000",
                    (last,),
                ).fetchall()
            if not found:
                return
            for (digest,) in found:
                if digest <= last:
                    raise Damaged("the index is damaged: digests are out of order")
                last = digest
                yield digest

    # Writing

    def writer(self) -> Writer:
        """The one door to changes. The caller sees to it that there is one at a time."""
        from xs.writer import Writer  # here: who only reads has no need of it

        return Writer(self._writing())

    def checkpoint(self) -> None:
        """Folds the write-ahead log back into the database, as far as readers allow."""
        with translated():
            self._writing().execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()

    def disk_error(self, error: BaseException) -> DiskError | None:
        """What is behind an error of the index, if that is an error of the disk.

        SQLite says that a database is malformed also when the disk could not read it.
        """
        if not isinstance(error, Damaged) or self._place is None:
            return None
        reason = _why_not_read(self._place, self._path)
        if reason is None:
            return None
        return DiskError(
            f"the disk can't read {self._path}: {reason}: what is on it may be whole, and be read "
            "again later"
        )

    # Connections

    def _reader(self) -> _Reading:
        """A connection inside a read transaction, which ends with the block."""
        return _Reading(self)

    def _take(self) -> sqlite3.Connection:
        """A connection to read from: one that is idle, or a new one."""
        with self._readers_lock:
            if self._closed:
                raise Unavailable("the store is closing")
            self._in_use += 1
            if self._readers:
                return self._readers.pop()
        try:
            return self._connect(self._mode)
        except BaseException:
            self._put_back()
            raise

    def _give_back(self, connection: sqlite3.Connection, *, usable: bool) -> None:
        """A connection that is idle again is kept, if it can be used and there are few."""
        with self._readers_lock:
            usable = usable and not connection.in_transaction
            if usable and not self._closed and len(self._readers) < READERS_MAX:
                self._readers.append(connection)
                self._in_use -= 1
                return
        connection.close()
        self._put_back()

    def _writing(self) -> sqlite3.Connection:
        """The connection for changes: that with which the index was opened, if it is idle."""
        if self._write_connection is None:
            self._write_connection = self._take()
            with translated():
                self._write_connection.execute(f"PRAGMA cache_size = -{WRITER_CACHE_KB}")
        return self._write_connection

    def _connect_first(self, mode: str) -> sqlite3.Connection:
        try:
            return self._connect(mode)
        except Unavailable:
            found = os.statvfs(os.path.dirname(self._path))
            if found.f_bavail * found.f_frsize >= _OPEN_BYTES:
                raise
            raise Full(
                f"the disk is full: even to read the store takes {_OPEN_BYTES // 1024} KiB of it"
            ) from None

    def _connect(self, mode: str) -> sqlite3.Connection:
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
        return sqlite.connect(
            uri(self._path, mode),
            uri=True,
            isolation_level=None,
            check_same_thread=False,
            cached_statements=256,
        )

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
            if self._read_only and version:
                raise NotAStore(
                    f"the store at {os.path.dirname(self._path)} has format {version} and can't be "
                    f"written to here: open it once where it can, which makes it format {FORMAT}"
                )
            if self._read_only or not (create or application):
                raise Unfinished(f"not a store: {self._path} is empty")
            migrate(connection, version)


def _enter(folder: str) -> tuple[int, int] | None:
    """Before the index of that folder is opened. Raises `Damaged` if its log is.

    A log that is there has to be read by who opens it first. To look at it costs nothing where
    there is none, which is what a store that was closed in good order leaves.
    """
    try:
        found = os.stat(folder)
    except OSError:
        return None  # opening it will say what is wrong
    place = found.st_dev, found.st_ino
    with _opening:
        if place not in _opened and _has_log(folder):
            from xs import wal  # here: it brings in what is seldom needed

            wal.check(folder)
        _opened[place] = _opened.get(place, 0) + 1
    return place


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
            # Closed when nobody here has it open any more: that gives SQLite's locks back.
            if place not in _kept_open:
                _kept_open[place] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        _read_all(_kept_open[place])
        log = os.open(path + "-wal", os.O_RDONLY | os.O_CLOEXEC)
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


def _has_log(folder: str) -> bool:
    try:
        return os.stat(os.path.join(folder, FILENAME + "-wal")).st_size > 0
    except OSError:
        return False


class _Reading:
    """A block with a connection of its own, in a read transaction. SQLite's errors become ours."""

    __slots__ = ("_connection", "_index")

    def __init__(self, index: Index) -> None:
        self._index = index

    def __enter__(self) -> sqlite3.Connection:
        self._connection = connection = self._index._take()
        try:
            with translated():
                connection.execute("BEGIN")
        except XsError as error:
            self._index._give_back(connection, usable=True)
            raise (self._index.disk_error(error) or error) from error.__cause__
        except BaseException:
            self._index._give_back(connection, usable=False)
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
            raise (self._index.disk_error(damaged) or damaged) from damaged.__cause__
        finally:
            self._index._give_back(self._connection, usable=usable)
        if isinstance(error, Damaged):
            behind = self._index.disk_error(error)
            if behind is not None:
                raise behind from error.__cause__


_OF_EITHER = "(SELECT row FROM frame UNION ALL SELECT row FROM piece)"
# Whether the topic `p` is a wildcard above the topic `t`, and how many there are.
_IS_ABOVE = (
    "(substr(p.name, -2) = '.*' AND "
    "substr(t.name, 1, length(p.name) - 1) = substr(p.name, 1, length(p.name) - 1))"
)
_DOTS = "length(t.name) - length(replace(t.name, '.', ''))"
_CROSS_CHECKS = [
    (
        "a frame is listed under a wildcard without being stored, at row",
        "SELECT row FROM below WHERE row NOT IN (SELECT row FROM frame)",
    ),
    (
        "a frame is listed under a wildcard that is not above its topic, at row",
        "SELECT b.row FROM below b JOIN frame f ON f.row = b.row "
        "JOIN topic t ON t.number = f.topic LEFT JOIN topic p ON p.number = b.prefix "
        f"WHERE NOT coalesce({_IS_ABOVE}, 0)",
    ),
    (
        "frames are listed under wildcards more often than they should be by",
        "SELECT n FROM (SELECT (SELECT count(*) FROM below) - total(n * dots) AS n FROM "
        "(SELECT topic, count(*) AS n FROM frame GROUP BY topic) "
        f"JOIN (SELECT number, {_DOTS} AS dots FROM topic t) ON number = topic) WHERE n != 0",
    ),
    (
        "a frame is not listed under the wildcards above its topic, at row",
        "SELECT row FROM frame WHERE topic IN (SELECT number FROM topic WHERE instr(name, '.')) "
        "AND row NOT IN (SELECT row FROM below)",
    ),
    (
        "a frame's content is neither beside it nor named as a file, at row",
        "SELECT row FROM frame WHERE digest IS NULL AND row NOT IN (SELECT row FROM file) "
        """AND substr(json, instr(json, '"id":"') + 31, 10) = '","hash":"'""",
    ),
    (
        "a frame has no topic, at row",
        "SELECT row FROM frame WHERE topic NOT IN (SELECT number FROM topic)",
    ),
    (
        "a frame is listed under another topic than its own, at row",
        "SELECT f.row FROM frame f JOIN topic t ON t.number = f.topic "
        """WHERE substr(f.json, 11, length(t.name) + 8) != t.name || '","id":"'""",
    ),
    (
        "content is named for a frame that is not stored, at row",
        f"SELECT row FROM file WHERE row NOT IN {_OF_EITHER}",
    ),
    (
        "a frame's place does not follow from its JSON's size, at row",
        f"SELECT row FROM frame WHERE (length(CAST(json AS BLOB)) > {LARGE_JSON}) "
        "!= (row IN (SELECT row FROM large))",
    ),
    (
        "a run has no first frame, its number is",
        "SELECT number FROM run WHERE row NOT IN (SELECT row FROM frame)",
    ),
    (
        "a frame that continues a run has the place of another, at row",
        "SELECT row FROM piece WHERE row IN (SELECT row FROM frame)",
    ),
    (
        "a frame continues a run that is not there, at row",
        "SELECT row FROM piece WHERE run NOT IN (SELECT number FROM run)",
    ),
    (
        "a frame continues a run without naming it, before it, or with another time to live, "
        "at row",
        "SELECT p.row FROM piece p JOIN run r ON r.number = p.run JOIN frame f ON f.row = r.row "
        "WHERE p.row < f.row OR p.expires IS NOT f.expires "
        """OR NOT instr(lower(p.json), '"chunk":"' || """
        """substr(f.json, instr(f.json, '"id":"') + 6, 25) || '"')""",
    ),
    (
        "a frame that continues a run is not listed under its topics, at row",
        "SELECT row FROM piece WHERE row NOT IN (SELECT row FROM listed)",
    ),
    (
        "a frame that continues a run is listed under another topic than its run's, at row",
        "SELECT l.row FROM listed l JOIN piece ON piece.row = l.row "
        "JOIN run r ON r.number = piece.run JOIN frame f ON f.row = r.row "
        "JOIN topic t ON t.number = f.topic LEFT JOIN topic p ON p.number = l.topic "
        f"WHERE NOT coalesce(p.name = t.name OR {_IS_ABOVE}, 0)",
    ),
    (
        "frames that continue runs are listed more often than they should be by",
        "SELECT n FROM (SELECT (SELECT count(*) FROM listed) - total(n * (1 + dots)) AS n FROM "
        "(SELECT run, count(*) AS n FROM piece GROUP BY run) JOIN run r ON r.number = run "
        "JOIN frame f ON f.row = r.row "
        f"JOIN (SELECT number, {_DOTS} AS dots FROM topic t) s ON s.number = f.topic) WHERE n != 0",
    ),
    (
        "a frame is listed as one that continues a run, and is none, at row",
        "SELECT row FROM listed WHERE row NOT IN (SELECT row FROM piece)",
    ),
    (
        "a frame's content is neither beside it nor named as a file, at row",
        "SELECT row FROM piece WHERE digest IS NULL AND row NOT IN (SELECT row FROM file) "
        """AND substr(json, instr(json, '"id":"') + 31, 10) = '","hash":"'""",
    ),
    (
        "a run is being written and has ended, its number is",
        "SELECT number FROM run WHERE writer IS NOT NULL "
        "AND number IN (SELECT run FROM piece WHERE ends > 0)",
    ),
]
