"""The SQLite schema of a store, its migrations, and SQLite's errors as ours.

`index` reads, `writer` changes, `rows` and `scan` find the way; what all of them must agree on is
here. docs/architecture.md tells what each table is for.
"""

from __future__ import annotations

import time

from xs import sqlite, sums
from xs.errors import Damaged, DiskError, Full, NotAStore, Unavailable, XsError
from xs.records import NamedTuple
from xs.system import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    import sqlite3
    from typing import Optional

FILENAME = "xs.db"
REPAIRED_FILENAME = FILENAME + ".new"  # made by a repair, which has yet to give it its name
PART_FILENAME = FILENAME + ".part"  # a first copy by a backup that is not whole yet
APPLICATION_ID = 0x78735F31  # "xs_1": tells an xs.db from other SQLite files
FORMAT = 5

_USE_LOG_SECONDS = 10.0  # for others who are just looking at a store that is being made

ORDER_BITS = 15  # of a row: the order of a frame within its millisecond
ORDER_MAX = (1 << ORDER_BITS) - 1
ROW_MAX = (1 << 63) - 1
LARGE_JSON = 4096  # bytes: a frame above it is read in pages that are bounded in bytes
FIRST_ROWS = 250  # frames in the first page of a read, whose bytes nobody knows
PAGE_ROWS = 1500  # frames in one page of a read, at most …
PAGE_BYTES = 1 << 20  # … and their bytes: exactly where frames are large, else about that

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

# A checksum of each frame's JSON. It lies before what may be long, where reading it costs nothing
# more; so the tables are made anew, and what was theirs is room for new frames.
_SCHEMA_SUMS = """
ALTER TABLE frame RENAME TO old_frame;
CREATE TABLE frame (
    row INTEGER PRIMARY KEY,  -- milliseconds << 15 | order
    topic INTEGER NOT NULL,
    digest INTEGER,  -- bucket << 32 | 4 bytes of sha256; NULL unless content lies here
    sum INTEGER NOT NULL,  -- Adler-32 of the JSON's bytes
    json TEXT NOT NULL,
    content BLOB,
    expires INTEGER  -- milliseconds since 1970
);
INSERT INTO frame SELECT row, topic, digest, sum_of(CAST(json AS BLOB)), json, content, expires
    FROM old_frame ORDER BY row;
DROP TABLE old_frame;
CREATE INDEX frame_topic ON frame (topic);
CREATE INDEX frame_digest ON frame (digest) WHERE digest IS NOT NULL;
CREATE INDEX frame_expires ON frame (expires) WHERE expires IS NOT NULL;
ALTER TABLE piece RENAME TO old_piece;
CREATE TABLE piece (
    row INTEGER PRIMARY KEY,  -- as that of a frame, and never that of one
    run INTEGER NOT NULL,
    ends INTEGER NOT NULL,  -- 0: more is to come; 1: the content is whole; 2: it broke off
    digest INTEGER,
    sum INTEGER NOT NULL,
    json TEXT NOT NULL,
    content BLOB,
    expires INTEGER  -- that of the run's first frame
);
INSERT INTO piece SELECT row, run, ends, digest, sum_of(CAST(json AS BLOB)), json, content, expires
    FROM old_piece ORDER BY row;
DROP TABLE old_piece;
CREATE INDEX piece_run ON piece (run);
CREATE INDEX piece_end ON piece (run) WHERE ends > 0;
CREATE INDEX piece_digest ON piece (digest) WHERE digest IS NOT NULL;
ALTER TABLE answered RENAME TO old_answered;
CREATE TABLE answered (
    topic INTEGER,
    key TEXT,
    sum INTEGER NOT NULL,  -- Adler-32 of the key and the JSON, one after the other
    json TEXT NOT NULL,
    PRIMARY KEY (topic, key)
) WITHOUT ROWID;
INSERT INTO answered SELECT topic, key, sum_of(CAST(key || json AS BLOB)), json FROM old_answered;
DROP TABLE old_answered
"""

# How many pieces each run has, up to the one that ends it: from the table, and not from what lists
# them. Runs without an end are not among them.
PIECES = (
    "SELECT p.run AS number, count(*) AS pieces FROM piece AS p NOT INDEXED JOIN "
    "(SELECT run, min(row) AS last FROM piece NOT INDEXED WHERE ends > 0 GROUP BY run) e "
    "ON e.run = p.run AND p.row <= e.last GROUP BY p.run"
)

# A run tells how many pieces it has, so that none is missed without notice.
_SCHEMA_PIECES = f"""
ALTER TABLE run RENAME TO old_run;
CREATE TABLE run (
    number INTEGER PRIMARY KEY,
    row INTEGER NOT NULL UNIQUE,  -- of its first frame
    writer TEXT,  -- whose it is while it is being written; NULL: nobody's here
    key TEXT,  -- the idempotency key that made it
    pieces INTEGER  -- up to the one that ends it; NULL while none does
);
INSERT INTO run SELECT r.number, r.row, r.writer, r.key, c.pieces
    FROM old_run r LEFT JOIN ({PIECES}) c ON c.number = r.number ORDER BY r.number;
DROP TABLE old_run;
CREATE INDEX run_writer ON run (writer) WHERE writer IS NOT NULL
"""

# Each takes the format before it to the next, inside one transaction.
_MIGRATIONS: list[str] = [_SCHEMA_1, _SCHEMA_SCRIPTS, _SCHEMA_RUNS, _SCHEMA_SUMS, _SCHEMA_PIECES]

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


def uri(path: str, mode: str, *, locks: bool = True) -> str:
    """The address of a database for SQLite, to be opened in `mode`: ro, rw or rwc.

    Without `locks` it is for who sees to it himself that nobody writes meanwhile (`still`).
    """
    name = os.path.abspath(path).replace("%", "%25").replace("?", "%3f").replace("#", "%23")
    if not name.isascii():  # nor need it be UTF-8, which text for SQLite has to be
        name = "".join(chr(b) if b < 128 else f"%{b:02x}" for b in os.fsencode(name))
    # `//`: no authority, as which a name with two slashes of its own would be taken.
    return f"file://{name}?mode={mode}{'' if locks else '&immutable=1'}"


def migrate(connection: sqlite3.Connection) -> None:
    """Brings a database, which may be new, to today's format."""
    from xs import fault  # here: who only reads has no need of it

    with translated():
        fault.at("migration.before-log")
        _use_log(connection)
        add_sum_of(connection)
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


def add_sum_of(connection: sqlite3.Connection) -> None:
    """Gives SQL on that connection `sum_of`, the sum of a frame's JSON as a blob."""

    def sum_of(line: object) -> int | None:
        return sums.of(line) if isinstance(line, bytes) else None

    connection.create_function("sum_of", 1, sum_of)


def check_tables(connection: sqlite3.Connection) -> None:
    """Raises `Damaged` unless all tables and indexes are declared as they should be.

    SQLite takes a declaration at its word, and one that is damaged may still mean something.
    """
    for name in wrongly_declared(connection):
        raise Damaged(f"the index is damaged: {name} is not declared as it should be")


def wrongly_declared(connection: sqlite3.Connection) -> dict[str, str]:
    """Tables and indexes that are not declared as they should be, and how they should."""
    found = connection.execute("SELECT name, sql FROM sqlite_master").fetchall()
    declared = dict(found)
    expected: dict[str, str] = {}  # what a later format makes anew is as that has it
    for script in _MIGRATIONS:
        for statement in script.lstrip().split(";\n"):
            words = statement.split(" ", 3)
            if words[0] == "CREATE":
                expected[words[2]] = statement
    wrong = {}
    for name, statement in expected.items():
        sql = declared.get(name)
        # Mostly it is word for word what it would be now; an older xs may have had other comments.
        if sql != statement and (type(sql) is not str or _bare(sql) != _bare(statement)):
            wrong[name] = statement
    return wrong


def _bare(statement: str) -> str:
    """SQL without comments and line breaks."""
    return " ".join(" ".join(line.partition("--")[0] for line in statement.split("\n")).split())


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


def sum_of_answer(key: str, line: bytes) -> int:
    """What is kept beside a key and the line that it was answered with."""
    return sums.of(key.encode() + line)


def is_answer(key: object, line: object, total: object) -> bool:
    """Whether a key and its answer are what was kept. A damaged row may have values of any type."""
    return type(key) is str and type(line) is bytes and total == sum_of_answer(key, line)


def described(row: int, topic: str | None) -> str:
    """A frame in words, by what its row tells without its JSON."""
    return f"a frame of {time_of(row)} on {topic or 'a topic that is not known'}"


def time_of(row: int) -> str:
    """When a frame with that row was appended, for people."""
    seconds = min(max(row >> ORDER_BITS, 0) / 1000, 253_402_300_799)  # the end of the year 9999
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))


class _Translated:
    """A class, not a generator: an append goes through it four times (bench/append.py)."""

    __slots__ = ()

    def __enter__(self) -> None: ...

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, sqlite.Error):
            if "user-defined function" in str(error):
                raise KeyboardInterrupt from error  # Ctrl-C: `sum_of` raises nothing by itself
            raise _as_error(error) from error
        if isinstance(error, UnicodeDecodeError):
            raise Damaged("the index is damaged: there is a text in it that is none") from error


_TRANSLATED = _Translated()


def translated() -> _Translated:
    """A block in which SQLite's errors become ours, each in one sentence."""
    return _TRANSLATED


def is_of_sqlite(error: XsError) -> bool:
    """Whether SQLite failed amid something: what it had done of that by then is in the transaction.

    Any other error is raised before there is a change.
    """
    return isinstance(error.__cause__, sqlite.Error)


def _as_error(error: sqlite3.Error) -> XsError:
    text = str(error)
    if "full" in text:
        return Full("the disk is full: nothing of this request was stored")
    if "not a database" in text:
        return NotAStore("not a store: xs.db is not an SQLite database")
    if "malformed" in text or "corrupt" in text or "decode to UTF-8" in text:
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
