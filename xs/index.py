"""The SQLite index: schema, migrations, the one write transaction, ordered scans, expiry.

The only file with SQL. Nothing but SQLite opens `xs.db*`: opening and closing the file by other
means would drop SQLite's locks in this process.

Where a frame lies: its row number is `milliseconds of its id << 15 | order within the millisecond`,
so rows are in order of id by themselves, the id needs no index of its own and times are ranges. Rows
are private to this file; every position outside is an id, resolved in the transaction that uses it.

Finding frames by topic: a frame's row has its topic's number (an index), and for a dotted topic the
table `below` lists it under each wildcard above it: `a.b.c` under `a.*` and `a.b.*`. So a wildcard
costs as much as an exact topic, however many topics it covers.

Finding small content by hash: an index over all digests would put every append on a page of its own
choosing (measured with bench/batch.py: 3 × slower at 300,000 frames). So the index is over (bucket,
digest), a bucket being some thousands of frames appended together: writes stay close, and a look-up
asks each bucket.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Optional

from xs import frame, ids
from xs.errors import Damaged, Full, NotAStore, Unavailable, XsError

ORDER_BITS = 15
ORDER_MAX = (1 << ORDER_BITS) - 1  # frames within one millisecond, less one

PAGE_ROWS = 1000  # frames in one page of a read
LARGE_JSON = 4096  # bytes: a frame above it is read in pages that are bounded in bytes
LARGE_PAGE_BYTES = 1 << 20
BUCKET_FRAMES = 8192  # frames that share a bucket of the digest index
SWEEP_FRAMES = 1000  # expired frames removed in one transaction
READERS_MAX = 4  # idle connections kept; each costs some 170 KB
TOPICS_CACHED = 65536

WRITER_CACHE_KB = 8192
READER_CACHE_KB = 1024
BUSY_MS = 10_000  # how long SQLite waits for another process's transaction

APPLICATION_ID = 0x78735F31  # "xs_1": tells an xs.db from other SQLite files
FORMAT = 1

_SCHEMA_1 = """
CREATE TABLE topic (number INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE);
CREATE TABLE frame (
    row INTEGER PRIMARY KEY,  -- milliseconds << 15 | order
    topic INTEGER NOT NULL,
    bucket INTEGER,  -- with digest: NULL unless content lies here
    digest INTEGER,  -- the first 4 bytes of the content's sha256
    expires INTEGER,  -- milliseconds since 1970
    json TEXT NOT NULL,
    content BLOB
);
CREATE INDEX frame_topic ON frame (topic);
CREATE INDEX frame_digest ON frame (bucket, digest) WHERE bucket IS NOT NULL;
CREATE INDEX frame_expires ON frame (expires) WHERE expires IS NOT NULL;
CREATE TABLE below (prefix INTEGER, row INTEGER, PRIMARY KEY (prefix, row)) WITHOUT ROWID;
CREATE TABLE large (row INTEGER PRIMARY KEY);
CREATE TABLE file (digest BLOB, row INTEGER, PRIMARY KEY (digest, row)) WITHOUT ROWID;
CREATE TABLE pin (digest BLOB PRIMARY KEY, created INTEGER NOT NULL, content BLOB);
CREATE TABLE answered (topic INTEGER, key TEXT, json TEXT NOT NULL, PRIMARY KEY (topic, key))
    WITHOUT ROWID;
CREATE TABLE mark (one INTEGER PRIMARY KEY CHECK (one = 1), id TEXT NOT NULL)
"""

# Each takes the format before it to the next, inside one transaction.
_MIGRATIONS: list[str] = [_SCHEMA_1]

_TABLES_WITH_ROWS = ("frame", "below", "large", "file")
_ID = 'substr(json, instr(json, \'"id":"\') + 6, 25)'
_LIVE = "(f.expires IS NULL OR f.expires > :now)"

FILENAME = "xs.db"


class Stored(NamedTuple):
    """One frame as a row-by-row read gives it."""

    line: bytes
    content: Optional[bytes]
    is_file: bool  # the content is in `cas/`


class Removed(NamedTuple):
    """What is left to do for a removed frame: its line, and its content if that is a file."""

    line: bytes
    file_digest: Optional[bytes]


class NewFrame(NamedTuple):
    """A frame to be stored: `content` inline, or `file_digest` of content that is in `cas/`."""

    id: int
    topic: str
    json: str
    expires: Optional[int]
    digest: Optional[bytes]
    content: Optional[bytes]

    @property
    def is_file(self) -> bool:
        return self.digest is not None and self.content is None


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
            with _translated():
                self._write_connection.close()

    # Reading

    def get(self, value: int, now: int) -> bytes | None:
        """The line of the frame with that id, or None."""
        stored = self.stored(value, now)
        return stored.line if stored else None

    def stored(self, value: int, now: int) -> Stored | None:
        """The frame with that id and its content, or None."""
        with self._reader() as reader:
            return _stored_with_id(reader, value, now)

    def next(self, value: int, patterns: frame.Patterns, now: int) -> bytes | None:
        """The first frame above that id among those selected, or None."""
        with self._reader() as reader:
            return _one(reader, patterns, _floor(reader, value), None, now)

    def prev(self, value: int, patterns: frame.Patterns, now: int) -> bytes | None:
        """The last frame below that id among those selected, or None."""
        with self._reader() as reader:
            return _one(reader, patterns, None, _floor(reader, value - 1), now)

    def first(self, patterns: frame.Patterns, now: int) -> bytes | None:
        with self._reader() as reader:
            return _one(reader, patterns, -1, None, now)

    def last(self, patterns: frame.Patterns, now: int) -> bytes | None:
        with self._reader() as reader:
            return _one(reader, patterns, None, _ROW_MAX, now)

    def start_of_last(
        self, patterns: frame.Patterns, count: int, after: int, until: int | None, now: int
    ) -> int | None:
        """The id of the oldest among the newest `count` selected frames; None if there are none."""
        with self._reader() as reader:
            source = _source(reader, patterns)
            if source is None:
                return None
            low, high = _bounds(reader, after, until)
            row = reader.execute(
                f"SELECT min(row) FROM ({_select(source, 'f.row AS row', descending=True)})",
                {**source.values, "low": low, "high": high, "now": now, "count": count},
            ).fetchone()[0]
            return None if row is None else _id_at(reader, row)

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
            source = _source(reader, patterns)
            if source is None:
                return b"", 0
            low, high = _bounds(reader, after, until)
            count = min(limit, PAGE_ROWS)
            bound = _next_large(reader, low)
            values = {**source.values, "low": low, "now": now, "count": count}
            if bound is None or bound > high:
                return _joined(reader, source, {**values, "high": high})
            page, found = _joined(reader, source, {**values, "high": bound - 1})
            if found:
                return page, found
            return _bounded(reader, source, {**values, "low": bound - 1, "high": high})

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
            source = _source(reader, patterns)
            if source is None:
                return []
            low, high = _bounds(reader, after, until)
            found: list[Stored] = []
            size = 0
            cursor = reader.execute(
                _select(source, "CAST(f.json AS BLOB), f.content, f.bucket"),
                {
                    **source.values,
                    "low": low,
                    "high": high,
                    "now": now,
                    "count": min(limit, PAGE_ROWS),
                },
            )
            for line, content, bucket in cursor:
                found.append(_as_stored(line, content, bucket))
                size += len(line) + len(content or b"")
                if size > LARGE_PAGE_BYTES:
                    break
            cursor.close()
            return found

    def content(self, digest: bytes, now: int) -> bytes | None:
        """Inline content with that digest, of a frame or pinned; None if there is none here."""
        with self._reader() as reader:
            return _inline_content(reader, digest, now)

    def names_file(self, digest: bytes, now: int) -> bool:
        """Whether a frame or a pin names the file with that digest."""
        with self._reader() as reader:
            return _names_file(reader, digest, now)

    def mark(self) -> int:
        """No id above it has been given out, as far as the disk knows."""
        with self._reader() as reader:
            return _mark(reader)

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
            with _translated():
                return int(connection.execute("PRAGMA data_version").fetchone()[0])

        return version

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
        with _translated():
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
            with _translated():
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
        with _translated():
            connection = self._open(mode)
            try:
                for setting in (
                    f"busy_timeout = {BUSY_MS}",
                    f"cache_size = -{cache_kb}",
                    "synchronous = FULL",
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
        with _translated():
            application = connection.execute("PRAGMA application_id").fetchone()[0]
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if application not in (0, APPLICATION_ID) or (application == 0 and tables):
            raise NotAStore(f"not a store: {self._path} is another program's database")
        if version > FORMAT:
            raise NotAStore(
                f"the store at {os.path.dirname(self._path)} has format {version}, and this xs "
                f"knows formats up to {FORMAT}: use a newer xs"
            )
        if version < FORMAT:
            if self._read_only or not (create or application):
                raise NotAStore(f"not a store: {self._path} is empty")
            _migrate(connection, version)


def _migrate(connection: sqlite3.Connection, version: int) -> None:
    with _translated():
        connection.execute("PRAGMA journal_mode = WAL").fetchall()
        connection.execute("BEGIN IMMEDIATE")
        try:
            # Another process may have done it while this one waited.
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            for script in _MIGRATIONS[version:]:
                for statement in script.split(";\n"):
                    connection.execute(statement)
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {FORMAT}")
            connection.execute("COMMIT")
        except BaseException:
            connection.execute("ROLLBACK")
            raise


class Writer:
    """Changes, in transactions. `begin`, then any of the others, then `commit` or `rollback`.

    Frames that were added are gathered and written together by `flush`, which reads and `commit`
    do by themselves: many rows in one statement, because SQLite's calls give up the interpreter's
    lock each time and have to win it back (measured with bench/batch.py).
    """

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._execute = connection.execute
        self._topics: dict[str, int] = {}
        self._prefixes: dict[int, tuple[int, ...]] = {}
        self._frames: list[Any] = []  # flat: seven values a row
        self._below: list[int] = []  # flat: prefix, row
        self._newest_row = -1
        self._bucket = 0
        self._bucket_left = 0
        self._fresh = False

    def begin(self, *, shared: bool) -> None:
        """Starts a transaction. `shared`: another process may have written since the last one."""
        with _translated():
            self._execute("BEGIN IMMEDIATE")
            if shared or not self._fresh:
                try:
                    self._reload()
                except BaseException:
                    self.rollback()
                    raise

    def _reload(self) -> None:
        self._topics.clear()
        self._prefixes.clear()
        row, bucket = self._execute(
            "SELECT (SELECT max(row) FROM frame), "
            "(SELECT max(bucket) FROM frame WHERE bucket IS NOT NULL)"
        ).fetchone()
        self._newest_row = -1 if row is None else row
        self._bucket = bucket or 0
        used = self._execute(
            "SELECT count(*) FROM frame WHERE bucket = ?", (self._bucket,)
        ).fetchone()[0]
        self._bucket_left = BUCKET_FRAMES - used
        self._fresh = True

    def commit(self) -> None:
        """Makes everything since `begin` durable (fsync of the write-ahead log)."""
        self.flush()
        with _translated():
            self._execute("COMMIT")

    def rollback(self) -> None:
        """Undoes everything since `begin`."""
        self._frames.clear()
        self._below.clear()
        self._fresh = False
        if self._connection.in_transaction:
            with _translated():
                self._execute("ROLLBACK")

    def savepoint(self) -> None:
        """Starts a part that `undo` can take back, and `release` ends."""
        self.flush()
        self._execute("SAVEPOINT part")

    def undo(self) -> None:
        self._frames.clear()
        self._below.clear()
        self._execute("ROLLBACK TO part")
        self._execute("RELEASE part")
        self._reload()

    def release(self) -> None:
        self.flush()
        self._execute("RELEASE part")

    def mark(self) -> int:
        """No id above it has been given out."""
        self.flush()
        return _mark(self._connection)

    def raise_mark(self, value: int) -> None:
        """Keeps that id as given out, though no stored frame shows it."""
        self._execute(
            "INSERT INTO mark VALUES (1, :id) ON CONFLICT (one) DO UPDATE "
            "SET id = :id WHERE id < :id",
            {"id": ids.text(value)},
        )

    # Frames

    def append(self, new: NewFrame) -> bool:
        """Adds a frame whose id is above all others; False if its millisecond is full."""
        row = new.id >> 80 << ORDER_BITS
        if row <= self._newest_row:
            row = self._newest_row + 1
            if row >> ORDER_BITS != new.id >> 80:
                return False
        self._newest_row = row
        self._add(row, new)
        return True

    def insert(self, new: NewFrame) -> bool:
        """Adds a frame at its id's place among the others; False if its millisecond is full.

        The id must not be stored yet. Frames of that millisecond move up if they have to.
        """
        self.flush()
        base = new.id >> 80 << ORDER_BITS
        before = _floor(self._connection, new.id)
        after = self._execute(
            "SELECT row FROM frame WHERE row > ? AND row <= ? ORDER BY row LIMIT 1",
            (before, base | ORDER_MAX),
        ).fetchone()
        row = max(before + 1, base)
        if (after is not None and after[0] <= row) or row > base | ORDER_MAX:
            if not self._renumber(base):
                return False
            return self.insert(new)
        self._newest_row = max(self._newest_row, row)
        self._add(row, new)
        self.flush()
        return True

    def _renumber(self, base: int) -> bool:
        """Spreads the frames of a millisecond evenly over its orders; False if it is full."""
        found = self._execute(
            "SELECT row FROM frame WHERE row BETWEEN ? AND ? ORDER BY row",
            (base, base | ORDER_MAX),
        ).fetchall()
        gap = (ORDER_MAX + 1) // (len(found) + 1)
        if gap == 0 or len(found) >= ORDER_MAX:
            return False
        for table in _TABLES_WITH_ROWS:
            # Out of the way first, so that no step meets a row that has yet to move.
            self._execute(
                f"UPDATE {table} SET row = -row WHERE row BETWEEN ? AND ?",
                (base, base | ORDER_MAX),
            )
            for n, (row,) in enumerate(found):
                to = base + gap * n + gap // 2
                self._execute(f"UPDATE {table} SET row = ? WHERE row = ?", (to, -row))
        self._reload()
        return True

    def _add(self, row: int, new: NewFrame) -> None:
        topic = self._topics.get(new.topic)
        if topic is None:
            topic = self._number(new.topic)
        bucket = digest = None
        if new.content is not None and new.digest is not None:
            if self._bucket_left <= 0:
                self._bucket += 1
                self._bucket_left = BUCKET_FRAMES
            self._bucket_left -= 1
            bucket, digest = self._bucket, _short(new.digest)
        self._frames += (row, topic, bucket, digest, new.expires, new.json, new.content)
        for prefix in self._prefixes[topic]:
            self._below += (prefix, row)
        if new.digest is not None and new.content is None:
            self._execute("INSERT INTO file VALUES (?, ?)", (new.digest, row))
        if len(new.json) > LARGE_JSON:
            self._execute("INSERT INTO large VALUES (?)", (row,))

    def _number(self, name: str) -> int:
        """The number of a topic, made if it is new, with its prefixes' numbers."""
        if len(self._topics) >= TOPICS_CACHED:
            self._topics.clear()
            self._prefixes.clear()
        numbers = []
        for each in [*frame.prefixes(name), name]:
            found = self._execute("SELECT number FROM topic WHERE name = ?", (each,)).fetchone()
            if found is None:
                cursor = self._execute("INSERT INTO topic (name) VALUES (?)", (each,))
                numbers.append(int(cursor.lastrowid or 0))
            else:
                numbers.append(found[0])
        topic = numbers.pop()
        self._topics[name] = topic
        self._prefixes[topic] = tuple(numbers)
        return topic

    def flush(self) -> None:
        """Writes what was gathered."""
        if self._frames:
            with _translated():
                frames, self._frames = self._frames, []
                below, self._below = self._below, []
                _insert(self._execute, "frame", 7, frames)
                if below:
                    _insert(self._execute, "below", 2, below)

    def find(self, value: int) -> bytes | None:
        """The line of the frame with that id, expired or not."""
        self.flush()
        row = _row_of(self._connection, value)
        if row is None:
            return None
        return bytes(
            self._execute("SELECT CAST(json AS BLOB) FROM frame WHERE row = ?", (row,)).fetchone()[
                0
            ]
        )

    def last(self, topic: str, now: int) -> bytes | None:
        """The newest frame of a topic, with what this transaction has added."""
        self.flush()
        return _one(self._connection, frozenset((topic,)), None, _ROW_MAX, now)

    def remove(self, value: int) -> Removed | None:
        """Removes the frame with that id; None if there is none."""
        self.flush()
        row = _row_of(self._connection, value)
        return None if row is None else self._remove(row)

    def remove_but(self, topic: str, keep: int, now: int) -> list[Removed]:
        """Removes all but the newest `keep` frames of a topic."""
        self.flush()
        number = self._topics.get(topic) or self._number(topic)
        found = self._execute(
            "SELECT row FROM frame WHERE topic = ? AND row < coalesce((SELECT min(row) FROM "
            "(SELECT row FROM frame f WHERE topic = ? AND (expires IS NULL OR expires > ?) "
            "ORDER BY row DESC LIMIT ?)), 0)",
            (number, number, now, keep),
        ).fetchall()
        return [self._remove(row) for (row,) in found]

    def remove_expired(self, now: int) -> list[Removed]:
        """Removes expired frames, at most SWEEP_FRAMES of them."""
        self.flush()
        found = self._execute(
            "SELECT row FROM frame WHERE expires <= ? LIMIT ?", (now, SWEEP_FRAMES)
        ).fetchall()
        return [self._remove(row) for (row,) in found]

    def _remove(self, row: int) -> Removed:
        topic, bucket, line = self._execute(
            "SELECT topic, bucket, CAST(json AS BLOB) FROM frame WHERE row = ?", (row,)
        ).fetchone()
        if row == self._newest_row:
            # The mark must outlive the frame that showed it.
            self.raise_mark(ids.parse(frame.id_of(line)))
            self._fresh = False
        self._execute("DELETE FROM frame WHERE row = ?", (row,))
        name = frame.topic_of(line)
        if "." in name:
            if topic not in self._prefixes:
                self._number(name)
            for prefix in self._prefixes[topic]:
                self._execute("DELETE FROM below WHERE prefix = ? AND row = ?", (prefix, row))
        if len(line) > LARGE_JSON:
            self._execute("DELETE FROM large WHERE row = ?", (row,))
        digest = _hash_in(line)
        if bucket is not None or digest is None:
            return Removed(line, None)
        self._execute("DELETE FROM file WHERE digest = ? AND row = ?", (digest, row))
        return Removed(line, digest)

    # Content, keys

    def inline_content(self, digest: bytes, now: int) -> bytes | None:
        self.flush()
        return _inline_content(self._connection, digest, now)

    def names_file(self, digest: bytes, now: int) -> bool:
        self.flush()
        return _names_file(self._connection, digest, now)

    def pin(self, digest: bytes, content: bytes | None, now: int) -> None:
        """Keeps content that no frame names: inline, or (None) as a file."""
        self._execute(
            "INSERT INTO pin VALUES (:digest, :now, :content) ON CONFLICT (digest) DO UPDATE "
            "SET created = :now",
            {"digest": digest, "now": now, "content": content},
        )

    def unpin(self, before: int) -> tuple[list[bytes], int, int]:
        """Takes away pins made before a time: digests of files, how many pins, inline bytes."""
        found = self._execute(
            "SELECT digest, content FROM pin WHERE created <= ?", (before,)
        ).fetchall()
        self._execute("DELETE FROM pin WHERE created <= ?", (before,))
        files = [digest for digest, content in found if content is None]
        return files, len(found), sum(len(content or b"") for _, content in found)

    def answer_for(self, topic: str, key: str) -> bytes | None:
        """The line of the frame that this key made on this topic, or None."""
        self.flush()
        number = self._topics.get(topic) or self._number(topic)
        found = self._execute(
            "SELECT CAST(json AS BLOB) FROM answered WHERE topic = ? AND key = ?", (number, key)
        ).fetchone()
        return None if found is None else bytes(found[0])

    def keep_answer(self, topic: str, key: str, json: str) -> None:
        """Remembers the frame that a key made, for as long as the store lives."""
        number = self._topics.get(topic) or self._number(topic)
        self._execute("INSERT INTO answered VALUES (?, ?, ?)", (number, key, json))


# Rows, positions and selections

_ROW_MAX = (1 << 63) - 1


class _Part(NamedTuple):
    """Where some frames `f` are listed: SQL from FROM to WHERE, and the column that orders them."""

    listed: str
    row: str


class _Source(NamedTuple):
    """The frames of a selection: the parts that list them, and the numbers that those name."""

    parts: list[_Part]
    values: dict[str, Any]


_EVERY = _Part("frame f WHERE f.row > :low AND f.row <= :high AND " + _LIVE, "f.row")


def _source(reader: sqlite3.Connection, patterns: frame.Patterns) -> _Source | None:
    """Where the frames of a selection are listed; None when no frame can be."""
    if patterns is None:
        return _Source([_EVERY], {})
    parts = []
    values = {}
    for n, pattern in enumerate(sorted(patterns)):
        found = reader.execute("SELECT number FROM topic WHERE name = ?", (pattern,)).fetchone()
        if found is None:
            continue
        values[f"p{n}"] = found[0]
        if pattern.endswith(".*"):
            listed, row = f"below b CROSS JOIN frame f ON f.row = b.row WHERE b.prefix = :p{n}", "b"
        else:
            listed, row = f"frame f WHERE f.topic = :p{n}", "f"
        bounds = f" AND {row}.row > :low AND {row}.row <= :high AND {_LIVE}"
        parts.append(_Part(listed + bounds, f"{row}.row"))
    return _Source(parts, values) if parts else None


def _select(source: _Source, columns: str, *, descending: bool = False) -> str:
    """SQL for columns of the frames `f` between :low and :high, in order, at most :count."""
    order = "DESC LIMIT :count" if descending else "LIMIT :count"
    if len(source.parts) == 1:
        (part,) = source.parts
        return f"SELECT {columns} FROM {part.listed} ORDER BY {part.row} {order}"
    # Each part gives at most :count, in its own order, so that none is read to its end.
    rows = " UNION ".join(
        f"SELECT row FROM (SELECT {part.row} AS row FROM {part.listed} ORDER BY {part.row} {order})"
        for part in source.parts
    )
    return (
        f"SELECT {columns} FROM ({rows} ORDER BY row {order}) s "
        f"CROSS JOIN frame f ON f.row = s.row ORDER BY s.row {order}"
    )


def _joined(
    reader: sqlite3.Connection, source: _Source, values: dict[str, Any]
) -> tuple[bytes, int]:
    """A page that SQLite joins."""
    page, count = reader.execute(
        "SELECT CAST(group_concat(json, char(10)) || char(10) AS BLOB), count(*) "
        f"FROM ({_select(source, 'f.json AS json')})",
        values,
    ).fetchone()
    return (page, count) if count else (b"", 0)


def _bounded(
    reader: sqlite3.Connection, source: _Source, values: dict[str, Any]
) -> tuple[bytes, int]:
    """A page that is bounded in bytes, taken row by row."""
    lines: list[bytes] = []
    size = 0
    cursor = reader.execute(_select(source, "CAST(f.json AS BLOB)"), values)
    for (line,) in cursor:
        lines.append(line)
        size += len(line)
        if size > LARGE_PAGE_BYTES:
            break
    cursor.close()
    return (b"\n".join(lines) + b"\n" if lines else b""), len(lines)


def _one(
    reader: sqlite3.Connection,
    patterns: frame.Patterns,
    after_row: int | None,
    until_row: int | None,
    now: int,
) -> bytes | None:
    """The first selected frame after a row, or the last one up to a row."""
    source = _source(reader, patterns)
    if source is None:
        return None
    values = {
        **source.values,
        "low": -1 if after_row is None else after_row,
        "high": _ROW_MAX if until_row is None else until_row,
        "now": now,
        "count": 1,
    }
    found = reader.execute(
        _select(source, "CAST(f.json AS BLOB)", descending=after_row is None), values
    ).fetchone()
    return None if found is None else bytes(found[0])


def _bounds(reader: sqlite3.Connection, after: int, until: int | None) -> tuple[int, int]:
    return _floor(reader, after), _ROW_MAX if until is None else _floor(reader, until)


def _floor(reader: sqlite3.Connection, value: int) -> int:
    """The row below or at which all ids are at most `value`, and above which all are greater."""
    if value < 0:
        return -1
    base = value >> 80 << ORDER_BITS
    low = base - 1
    found = _last_up_to(reader, low, base | ORDER_MAX)
    if found is None:
        return low
    high, high_id = found
    if high_id <= value:
        return high
    # Ids of one millisecond mostly count up one by one: the first guess is where it would be then.
    guess = high - ((high_id >> 32) - (value >> 32))
    while high - low > 1:
        if not low < guess < high:
            guess = (low + high) // 2
        found = _last_up_to(reader, low, guess)
        if found is None or found[1] < value:
            low = guess
        elif found[1] == value:
            return found[0]
        else:
            high = found[0]
        guess = (low + high) // 2
    return low


def _last_up_to(reader: sqlite3.Connection, low: int, high: int) -> tuple[int, int] | None:
    found = reader.execute(
        f"SELECT row, {_ID} FROM frame WHERE row > ? AND row <= ? ORDER BY row DESC LIMIT 1",
        (low, high),
    ).fetchone()
    return None if found is None else (found[0], int(found[1], 36))


def _row_of(reader: sqlite3.Connection, value: int) -> int | None:
    row = _floor(reader, value)
    if row < 0:
        return None
    return row if _id_at(reader, row) == value else None


def _id_at(reader: sqlite3.Connection, row: int) -> int:
    found = reader.execute(f"SELECT {_ID} FROM frame WHERE row = ?", (row,)).fetchone()
    return -1 if found is None else int(found[0], 36)


def _stored_with_id(reader: sqlite3.Connection, value: int, now: int) -> Stored | None:
    row = _row_of(reader, value)
    if row is None:
        return None
    found = reader.execute(
        "SELECT CAST(f.json AS BLOB), f.content, f.bucket FROM frame f "
        f"WHERE f.row = :row AND {_LIVE}",
        {"row": row, "now": now},
    ).fetchone()
    return None if found is None else _as_stored(*found)


def _as_stored(line: bytes, content: bytes | None, bucket: int | None) -> Stored:
    return Stored(line, content, bucket is None and frame.hash_text(line) is not None)


def _mark(reader: sqlite3.Connection) -> int:
    kept = reader.execute("SELECT id FROM mark").fetchone()
    newest = reader.execute(f"SELECT {_ID} FROM frame ORDER BY row DESC LIMIT 1").fetchone()
    return max(int(found[0], 36) if found else 0 for found in (kept, newest))


def _next_large(reader: sqlite3.Connection, low: int) -> int | None:
    found = reader.execute("SELECT min(row) FROM large WHERE row > ?", (low,)).fetchone()[0]
    return None if found is None else int(found)


def _inline_content(reader: sqlite3.Connection, digest: bytes, now: int) -> bytes | None:
    pinned = reader.execute("SELECT content FROM pin WHERE digest = ?", (digest,)).fetchone()
    if pinned is not None and pinned[0] is not None:
        return bytes(pinned[0])
    # Newest bucket first: what was just appended is what is mostly asked for.
    bucket = reader.execute("SELECT max(bucket) FROM frame WHERE bucket IS NOT NULL").fetchone()[0]
    expected = frame.integrity(digest)
    while bucket is not None:
        for line, content in reader.execute(
            "SELECT CAST(f.json AS BLOB), f.content FROM frame f "
            f"WHERE f.bucket = :bucket AND f.digest = :digest AND {_LIVE}",
            {"bucket": bucket, "digest": _short(digest), "now": now},
        ):
            if frame.hash_text(line) == expected:  # four bytes may agree by chance
                return bytes(content)
        bucket = reader.execute(
            "SELECT max(bucket) FROM frame WHERE bucket IS NOT NULL AND bucket < ?", (bucket,)
        ).fetchone()[0]
    return None


def _names_file(reader: sqlite3.Connection, digest: bytes, now: int) -> bool:
    return (
        reader.execute(
            "SELECT 1 FROM file x CROSS JOIN frame f ON f.row = x.row "
            f"WHERE x.digest = :digest AND {_LIVE} "
            "UNION ALL SELECT 1 FROM pin WHERE digest = :digest AND content IS NULL LIMIT 1",
            {"digest": digest, "now": now},
        ).fetchone()
        is not None
    )


def _hash_in(line: bytes) -> bytes | None:
    text = frame.hash_text(line)
    return None if text is None else frame.parse_integrity(text)


def _short(digest: bytes) -> int:
    return int.from_bytes(digest[:4], "big", signed=True)


_ROWS_MAX = 64  # rows in one statement: 7 values each, within SQLite's 999 before 3.32
_INSERTS = {
    (table, rows): f"INSERT INTO {table} VALUES "
    + ",".join(["(" + ",".join("?" * width) + ")"] * rows)
    for table, width in (("frame", 7), ("below", 2))
    for rows in (1, 2, 4, 8, 16, 32, _ROWS_MAX)
}


def _insert(execute: Callable[..., Any], table: str, width: int, values: list[Any]) -> None:
    """Inserts rows given flat: powers of two at a time, so that few statements are ever prepared."""
    left = len(values) // width
    start = 0
    rows = _ROWS_MAX
    while left:
        while rows > left:
            rows //= 2
        end = start + rows * width
        execute(_INSERTS[table, rows], values[start:end])
        start = end
        left -= rows


_CROSS_CHECKS = [
    (
        "a frame is missing from its wildcard, or listed under one without being stored, at row",
        "SELECT row FROM below WHERE row NOT IN (SELECT row FROM frame)",
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


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """SQLite's errors as ours, each in one sentence."""
    try:
        yield
    except sqlite3.Error as error:
        raise _as_error(error) from error


def _as_error(error: sqlite3.Error) -> XsError:
    text = str(error)
    if "full" in text:
        return Full("the disk is full: nothing of this request was stored")
    if "not a database" in text:
        return NotAStore("not a store: xs.db is not an SQLite database")
    if "malformed" in text or "corrupt" in text:
        return Damaged(f"the index is damaged: {text}: run xs check")
    if "locked" in text or "busy" in text:
        return Unavailable("another process is writing to the store: try again")
    if "closed" in text:
        return Unavailable("the store is closing")
    return Unavailable(f"the index can't be used: {text}")
