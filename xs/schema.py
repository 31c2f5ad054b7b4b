"""The SQLite schema of a store, its migrations, and SQLite's errors as ours.

`index` reads, `writer` changes, `scan` finds the way through rows; what all three must agree on is
here. docs/architecture.md tells what each table is for.
"""

from __future__ import annotations

import os
import time

from xs import fault, sqlite
from xs.errors import Damaged, DiskError, Full, NotAStore, Unavailable, XsError
from xs.records import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    import sqlite3
    from typing import Optional

FILENAME = "xs.db"
APPLICATION_ID = 0x78735F31  # "xs_1": tells an xs.db from other SQLite files
FORMAT = 3

_USE_LOG_SECONDS = 10.0  # for others who are just looking at a store that is being made

ORDER_BITS = 15  # of a row: the order of a frame within its millisecond
ORDER_MAX = (1 << ORDER_BITS) - 1
ROW_MAX = (1 << 63) - 1
LARGE_JSON = 4096  # bytes: a frame above it is read in pages that are bounded in bytes

_SCHEMA_1 = """
CREATE TABLE topic (number INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE);
CREATE TABLE frame (
    row INTEGER PRIMARY KEY,  -- milliseconds << 15 | order
    topic INTEGER NOT NULL,
    digest INTEGER,  -- bucket << 32 | 4 bytes of sha256; NULL unless content lies here
    json TEXT NOT NULL,
    content BLOB,
    expires INTEGER  -- milliseconds since 1970
);
CREATE INDEX frame_topic ON frame (topic);
CREATE INDEX frame_digest ON frame (digest) WHERE digest IS NOT NULL;
CREATE INDEX frame_expires ON frame (expires) WHERE expires IS NOT NULL;
CREATE TABLE below (prefix INTEGER, row INTEGER, PRIMARY KEY (prefix, row)) WITHOUT ROWID;
CREATE TABLE large (row INTEGER PRIMARY KEY);
CREATE TABLE file (digest BLOB, row INTEGER, PRIMARY KEY (digest, row)) WITHOUT ROWID;
CREATE TABLE pin (digest BLOB PRIMARY KEY, created INTEGER NOT NULL, content BLOB);
CREATE TABLE answered (topic INTEGER, key TEXT, json TEXT NOT NULL, PRIMARY KEY (topic, key))
    WITHOUT ROWID;
CREATE TABLE mark (one INTEGER PRIMARY KEY CHECK (one = 1), id TEXT NOT NULL)
"""

# What the runtime knows of its scripts. The index finds the few topics that tell of them, however
# many others there are.
_SCHEMA_SCRIPTS = """
CREATE TABLE script (
    kind TEXT,  -- generator or handler; in a root also store; in a copy backup
    name TEXT,
    source TEXT,  -- the id of the frame that it came with
    active INTEGER NOT NULL,  -- whether it is in service
    position TEXT NOT NULL,  -- the id of the last frame that it has been given, or has finished
    state TEXT,  -- JSON
    PRIMARY KEY (kind, name, source)
) WITHOUT ROWID;
CREATE INDEX topic_script ON topic (name) WHERE
    substr(name, -6) = '.spawn' OR substr(name, -10) = '.terminate'
    OR substr(name, -9) = '.register' OR substr(name, -11) = '.unregister'
"""
IS_SCRIPT_TOPIC = _SCHEMA_SCRIPTS.partition(" WHERE\n")[2].strip()

# Content that came in pieces: the frame that begins a run lies in `frame`, those that continue it
# in `piece`, so that whatever counts a run once never meets them.
_SCHEMA_RUNS = """
CREATE TABLE run (
    number INTEGER PRIMARY KEY,
    row INTEGER NOT NULL UNIQUE,  -- of its first frame
    writer TEXT,  -- whose it is while it is being written; NULL: nobody's here
    key TEXT  -- the idempotency key that made it
);
CREATE INDEX run_writer ON run (writer) WHERE writer IS NOT NULL;
CREATE TABLE piece (
    row INTEGER PRIMARY KEY,  -- as that of a frame, and never that of one
    run INTEGER NOT NULL,
    ends INTEGER NOT NULL,  -- 0: more is to come; 1: the content is whole; 2: it broke off
    digest INTEGER,
    json TEXT NOT NULL,
    content BLOB,
    expires INTEGER  -- that of the run's first frame
);
CREATE INDEX piece_run ON piece (run);
CREATE INDEX piece_end ON piece (run) WHERE ends > 0;
CREATE INDEX piece_digest ON piece (digest) WHERE digest IS NOT NULL;
CREATE TABLE listed (topic INTEGER, row INTEGER, PRIMARY KEY (topic, row)) WITHOUT ROWID
"""

# Each takes the format before it to the next, inside one transaction.
_MIGRATIONS: list[str] = [_SCHEMA_1, _SCHEMA_SCRIPTS, _SCHEMA_RUNS]

TABLES_WITH_ROWS = ("frame", "below", "large", "file", "run", "piece", "listed")
TABLES_OF_FRAMES = ("frame", "piece")  # no row is in both
ID = 'substr(json, instr(json, \'"id":"\') + 6, 25)'
LIVE = "(f.expires IS NULL OR f.expires > :now)"


# How a piece ends its run.
GOES_ON, WHOLE, BROKEN = 0, 1, 2


class Stored(NamedTuple):
    """One frame as a row-by-row read gives it."""

    line: bytes
    content: Optional[bytes]
    is_file: bool  # the content is in `cas/`


class Script(NamedTuple):
    """What the runtime keeps of one script. Ids are as in frames, `state` is JSON or None."""

    kind: str
    name: str
    source: str
    active: bool
    position: str
    state: Optional[str] = None


class StoredPiece(NamedTuple):
    """A frame that continues a run, and how it ends it."""

    id: int
    stored: Stored
    ends: int


def uri(path: str, mode: str) -> str:
    """The address of a database for SQLite, to be opened in `mode`: ro, rw or rwc."""
    name = os.path.abspath(path).replace("%", "%25").replace("?", "%3f").replace("#", "%23")
    found = f"file:{name}?mode={mode}"
    if mode == "ro" and not os.access(os.path.dirname(path) or ".", os.W_OK):
        wal = path + "-wal"
        if not os.path.exists(wal) or os.path.getsize(wal) == 0:
            # Without a log to read, SQLite needs no shared memory, which it could not make.
            found += "&immutable=1"
    return found


def migrate(connection: sqlite3.Connection, version: int) -> None:
    with translated():
        fault.at("migration.before-log")
        _use_log(connection)
        fault.at("migration.before-steps")
        connection.execute("BEGIN IMMEDIATE")
        try:
            # Another process may have done it while this one waited.
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            for script in _MIGRATIONS[version:]:
                for statement in script.split(";\n"):
                    connection.execute(statement)
                fault.at("migration.step-done")
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {FORMAT}")
            fault.at("migration.before-commit")
            connection.execute("COMMIT")
            fault.at("migration.done")
        except BaseException:
            connection.execute("ROLLBACK")
            raise


def _use_log(connection: sqlite3.Connection) -> None:
    """Sets the journal to WAL. SQLite's own waiting does not cover this change."""
    deadline = time.monotonic() + _USE_LOG_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL").fetchall()
            return
        except sqlite.OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.002)


def short(digest: bytes) -> int:
    """What the digest index keeps of a digest, behind its bucket's number: its first four bytes."""
    return int.from_bytes(digest[:4], "big")


class _Translated:
    """A class, not a generator: an append goes through it four times (bench/append.py)."""

    __slots__ = ()

    def __enter__(self) -> None: ...

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, sqlite.Error):
            raise _as_error(error) from error


_TRANSLATED = _Translated()


def translated() -> _Translated:
    """A block in which SQLite's errors become ours, each in one sentence."""
    return _TRANSLATED


def _as_error(error: sqlite3.Error) -> XsError:
    text = str(error)
    if "full" in text:
        return Full("the disk is full: nothing of this request was stored")
    if "not a database" in text:
        return NotAStore("not a store: xs.db is not an SQLite database")
    if "malformed" in text or "corrupt" in text:
        return Damaged(
            f"the index is damaged: {text} (a copy of a store that was in use may be so: make one "
            "with xs export)"
        )
    if "locked" in text or "busy" in text:
        return Unavailable("another process is writing to the store: try again")
    if "closed" in text:
        return Unavailable("the store is closing")
    if "I/O error" in text:
        return DiskError(f"the index can't be read or written: {text}: it may work again later")
    return Unavailable(f"the index can't be used: {text}")
