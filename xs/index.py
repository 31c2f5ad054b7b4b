"""The SQLite index of a store: its connections, and everything that is read from it.

The door to the files with SQL: `schema` (what is there), `scan` (the way through rows) and `writer`
(changes). Nothing but SQLite opens `xs.db*`: opening and closing the file by other means would drop
SQLite's locks in this process.

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

import contextlib
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator

from xs import frame
from xs.errors import NotAStore, Unavailable, XsError
from xs.scan import (
    LARGE_PAGE_BYTES,
    as_stored,
    bounded_page,
    bounds,
    floor,
    id_at,
    inline_content,
    joined_page,
    mark_of,
    names_file,
    next_large,
    one,
    select,
    source_of,
    stored_with_id,
)
from xs.schema import (
    APPLICATION_ID,
    FILENAME,
    FORMAT,
    IS_SCRIPT_TOPIC,
    LARGE_JSON,
    ORDER_BITS,
    ROW_MAX,
    Script,
    Stored,
    migrate,
    translated,
)
from xs.writer import Writer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Optional

PAGE_ROWS = 1000  # frames in one page of a read
READERS_MAX = 4  # idle connections kept; each costs some 170 KB
WRITER_CACHE_KB = 8192
READER_CACHE_KB = 1024
CHECKPOINT_PAGES = 4000  # 16 MB of log between two checkpoints (bench/batch.py: + 10 %)
BUSY_MS = 10_000  # how long SQLite waits for another process's transaction


class Unfinished(NotAStore):
    """The database has nothing in it yet: it is just being made, or its making was broken off."""


class Index:
    """One store's database. Reads from any thread; one `Writer` at a time.

    Raises `NotAStore` for a file that is none or is of a newer format.
    """

    def __init__(self, folder: str, *, create: bool = False, read_only: bool = False) -> None:
        self._path = os.path.join(folder, FILENAME)
        self._read_only = read_only
        self._readers: list[sqlite3.Connection] = []
        self._readers_lock = threading.Lock()  # guards the list alone; taken last
        self._closed = False
        self._mode = "ro" if read_only else "rw"
        connection = self._connect("rwc" if create else self._mode, WRITER_CACHE_KB)
        try:
            self._check_format(connection, create=create)
        except BaseException:
            connection.close()
            raise
        if read_only:
            self._readers.append(connection)
        else:
            self._write_connection = connection

    def close(self) -> None:
        """Closes every connection; reads under way in other threads end with `Unavailable`."""
        with self._readers_lock:
            self._closed = True
            readers, self._readers = self._readers, []
        for connection in readers:
            connection.close()
        if not self._read_only:
            with translated():
                self._write_connection.close()

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
            return one(reader, patterns, floor(reader, value), None, now)

    def prev(self, value: int, patterns: frame.Patterns, now: int) -> bytes | None:
        """The last frame below that id among those selected, or None."""
        with self._reader() as reader:
            return one(reader, patterns, None, floor(reader, value - 1), now)

    def first(self, patterns: frame.Patterns, now: int) -> bytes | None:
        with self._reader() as reader:
            return one(reader, patterns, -1, None, now)

    def last(self, patterns: frame.Patterns, now: int) -> bytes | None:
        with self._reader() as reader:
            return one(reader, patterns, None, ROW_MAX, now)

    def start_of_last(
        self, patterns: frame.Patterns, count: int, after: int, until: int | None, now: int
    ) -> int | None:
        """The id of the oldest among the newest `count` selected frames; None if there are none."""
        with self._reader() as reader:
            source = source_of(reader, patterns)
            if source is None:
                return None
            low, high = bounds(reader, after, until)
            row = reader.execute(
                f"SELECT min(row) FROM ({select(source, 'f.row AS row', descending=True)})",
                {**source.values, "low": low, "high": high, "now": now, "count": count},
            ).fetchone()[0]
            return None if row is None else id_at(reader, row)

    def page(
        self,
        after: int,
        until: int | None,
        patterns: frame.Patterns,
        limit: int,
        now: int,
    ) -> tuple[bytes, int]:
        """The next selected frames above `after`: their lines, each with its newline, and how many.

        At most PAGE_ROWS and `limit` frames; bounded in bytes too. No frames means that there are
        none (now). SQLite joins the page itself, so that Python handles one value (measured with
        bench/replay.py: 2 × the frames a second that rows give).
        """
        with self._reader() as reader:
            source = source_of(reader, patterns)
            if source is None:
                return b"", 0
            low, high = bounds(reader, after, until)
            count = min(limit, PAGE_ROWS)
            bound = next_large(reader, low)
            values = {**source.values, "low": low, "now": now, "count": count}
            if bound is None or bound > high:
                return joined_page(reader, source, {**values, "high": high})
            page, found = joined_page(reader, source, {**values, "high": bound - 1})
            if found:
                return page, found
            return bounded_page(reader, source, {**values, "low": bound - 1, "high": high})

    def rows(
        self,
        after: int,
        until: int | None,
        patterns: frame.Patterns,
        limit: int,
        now: int,
    ) -> list[Stored]:
        """As `page`, frame by frame and with inline content; the list is bounded in bytes."""
        with self._reader() as reader:
            source = source_of(reader, patterns)
            if source is None:
                return []
            low, high = bounds(reader, after, until)
            found: list[Stored] = []
            size = 0
            cursor = reader.execute(
                select(source, "CAST(f.json AS BLOB), f.content, f.digest"),
                {
                    **source.values,
                    "low": low,
                    "high": high,
                    "now": now,
                    "count": min(limit, PAGE_ROWS),
                },
            )
            for line, content, digest in cursor:
                found.append(as_stored(line, content, digest))
                size += len(line) + len(content or b"")
                if size > LARGE_PAGE_BYTES:
                    break
            cursor.close()
            return found

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
            row = reader.execute("SELECT max(row) FROM frame").fetchone()[0]
            return -1 if row is None else id_at(reader, row)

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

    def everything(self) -> Iterator[tuple[int, bytes, Optional[bytes], bool]]:
        """Every row in order, also what no read gives: its millisecond, line, content, is a file.

        Unlike the reads it takes no line at its word.
        """
        row = -1
        while True:
            page = []
            size = 0
            with self._reader() as reader:
                cursor = reader.execute(
                    "SELECT row, CAST(json AS BLOB), content, digest IS NULL FROM frame "
                    "WHERE row > ? ORDER BY row LIMIT ?",
                    (row, PAGE_ROWS),
                )
                for row, line, content, not_inline in cursor:
                    page.append((row >> ORDER_BITS, line, content, bool(not_inline)))
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
                yield digest
            last = found[-1][0]

    # Writing

    def writer(self) -> Writer:
        """The one door to changes. The caller sees to it that there is one at a time."""
        return Writer(self._write_connection)

    def checkpoint(self) -> None:
        """Folds the write-ahead log back into the database, as far as readers allow."""
        with translated():
            self._write_connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()

    # Connections

    @contextlib.contextmanager
    def _reader(self) -> Iterator[sqlite3.Connection]:
        """A connection inside a read transaction, which ends with the block."""
        with self._readers_lock:
            if self._closed:
                raise Unavailable("the store is closing")
            connection = self._readers.pop() if self._readers else None
        if connection is None:
            connection = self._connect(self._mode)
        usable = False
        try:
            with translated():
                connection.execute("BEGIN")
                try:
                    yield connection
                finally:
                    connection.execute("COMMIT")
                usable = True
        except XsError:
            usable = True
            raise
        finally:
            with self._readers_lock:
                keep = usable and not self._closed and len(self._readers) < READERS_MAX
                if keep:
                    self._readers.append(connection)
            if not keep:
                connection.close()

    def _connect(self, mode: str, cache_kb: int = READER_CACHE_KB) -> sqlite3.Connection:
        with translated():
            connection = self._open(mode)
            try:
                for setting in (
                    f"busy_timeout = {BUSY_MS}",
                    f"cache_size = -{cache_kb}",
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
        path = os.path.abspath(self._path).replace("%", "%25").replace("?", "%3f")
        uri = f"file:{path.replace('#', '%23')}?mode={mode}"
        if mode == "ro" and not os.access(os.path.dirname(self._path) or ".", os.W_OK):
            wal = self._path + "-wal"
            if not os.path.exists(wal) or os.path.getsize(wal) == 0:
                # Without a log to read, SQLite needs no shared memory, which it could not make.
                uri += "&immutable=1"
        return sqlite3.connect(
            uri, uri=True, isolation_level=None, check_same_thread=False, cached_statements=256
        )

    def _check_format(self, connection: sqlite3.Connection, *, create: bool) -> None:
        with translated():
            connection.execute("BEGIN")  # all three at one moment: it may be just being made
            tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
            application = connection.execute("PRAGMA application_id").fetchone()[0]
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            connection.execute("COMMIT")
        if application not in (0, APPLICATION_ID) or (application == 0 and tables):
            raise NotAStore(f"not a store: {self._path} is another program's database")
        if version > FORMAT:
            raise NotAStore(
                f"the store at {os.path.dirname(self._path)} has format {version}, and this xs "
                f"knows formats up to {FORMAT}: use a newer xs"
            )
        if version < FORMAT:
            if self._read_only or not (create or application):
                raise Unfinished(f"not a store: {self._path} is empty")
            migrate(connection, version)


_CROSS_CHECKS = [
    (
        "a frame is listed under a wildcard without being stored, at row",
        "SELECT row FROM below WHERE row NOT IN (SELECT row FROM frame)",
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
        "content is named for a frame that is not stored, at row",
        "SELECT row FROM file WHERE row NOT IN (SELECT row FROM frame)",
    ),
    (
        "a frame's place does not follow from its JSON's size, at row",
        f"SELECT row FROM frame WHERE (length(CAST(json AS BLOB)) > {LARGE_JSON}) "
        "!= (row IN (SELECT row FROM large))",
    ),
]
