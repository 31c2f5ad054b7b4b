"""A store's database at one moment, and its copy in another folder.

`backup` says what else belongs to a store. The first copy is made page by page into a file with
another name, which becomes `xs.db` when it is whole. Later ones bring that up to date, in one
transaction: rows that are gone are deleted, new ones inserted, and the rest is not written again.
Where rows are gone, or are others, the store's tables are looked at as a whole before that stays,
since damage may be what changed them.

A copy says of itself, in a row of the table `script`, of which store it is, up to which id, and
what it had then.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterator
from typing import NamedTuple, Optional

from xs import fault, frame, ids
from xs.check import CROSS_CHECKS
from xs.connections import BUSY_MS, Connections
from xs.content import small
from xs.errors import Damaged, Invalid, Unavailable
from xs.index import Index
from xs.schema import (
    FILENAME,
    ID,
    ORDER_MAX,
    PART_FILENAME,
    TABLES_OF_FRAMES,
    Script,
    add_sum_of,
    described,
    translated,
    uri,
)
from xs.still import is_unchanged, once_settled, when_still

_KIND = "backup"
_LISTED_BY = (("frame", "frame_topic"), ("piece", "piece_run"))  # an index that has all its rows
_CHANGING = ("script", "mark")  # rows of theirs are written again and again


class Snapshot:
    """What the database in `source` has at this moment, to be kept in the folder `copy`.

    Both are open until `close`. The caller sees to it that nobody else writes to the copy.
    """

    def __init__(self, source: str, copy: str) -> None:
        self._source = source
        self._copy = os.path.join(copy, FILENAME)
        self._part = os.path.join(copy, PART_FILENAME)
        self._original = os.path.join(source, FILENAME)
        self._is_first = not os.path.exists(self._copy)
        once_settled(self._original, self._begin)

    def _begin(self) -> None:
        self._still = when_still(self._original)
        # Neither is its main database, so that one may be read-only and the other not.
        self._connection = sqlite3.connect(":memory:", uri=True, isolation_level=None)
        try:
            with translated():
                execute = self._connection.execute
                execute(f"PRAGMA busy_timeout = {BUSY_MS}")
                execute(
                    "ATTACH ? AS store", (uri(self._original, "ro", locks=self._still is None),)
                )
                if not self._is_first:
                    execute("ATTACH ? AS copy", (uri(self._copy, "rw"),))
                    _write_through(self._connection, "copy.")
                execute("BEGIN")
                execute("SELECT count(*) FROM store.sqlite_master").fetchone()  # from here on
        except BaseException:
            self.close()
            raise

    def file_digests(self) -> Iterator[bytes]:
        """Digests of all the content files that belong to it."""
        query = (
            "SELECT digest FROM store.file UNION SELECT digest FROM store.pin WHERE content IS NULL"
        )
        with translated():
            for (digest,) in self._connection.execute(query):
                yield digest

    def lacks_some_of_copy(self, now: int) -> bool:
        """Whether the copy has frames, in whatever order within a millisecond, that are not here.

        Those that have expired by `now` are nobody's loss.
        """
        with translated():
            return any(
                self._connection.execute(
                    f"SELECT EXISTS (SELECT 1 FROM copy.{table} c WHERE "
                    "(c.expires IS NULL OR c.expires > ?) AND NOT EXISTS "
                    f"(SELECT 1 FROM store.{table} s WHERE s.json = c.json AND s.row BETWEEN "
                    f"c.row & ~{ORDER_MAX} AND c.row | {ORDER_MAX}))",
                    (now,),
                ).fetchone()[0]
                for table in TABLES_OF_FRAMES
            )

    def keep(self) -> int:
        """Makes the copy what this is, durably; how many frames it has.

        Its content files are there. Before this returns, the copy is what it was before. Raises
        `Damaged` for a frame that is not what was stored, lest it replace one that is, and
        `Invalid` where another store has come to be in the place of the one that was copied.
        """
        with translated():
            frames = sum(self._checked(table, by) for table, by in _LISTED_BY)
            if self._is_first:
                self._keep_all()
            else:
                self._check_is_same()
                for table in TABLES_OF_FRAMES:
                    self._check_contents(table)
                gone = 0
                for table in self._tables():
                    rows = self._bring_up(table)
                    gone += 0 if table in _CHANGING else rows
                    fault.at("backup.table-done")
                if gone:
                    self._check_nothing_is_lost()
                _sign(self._connection, "copy.", self._source)
                self.check_unchanged()
                fault.at("backup.before-commit")
                self._connection.execute("COMMIT")
                fault.at("backup.committed")
        return frames

    def close(self) -> None:
        self._connection.close()

    def check_unchanged(self) -> None:
        """Raises `Unavailable` if what was read is not of one moment, and may look damaged."""
        if not is_unchanged(self._original, self._still):
            raise Unavailable(f"{self._source} was written to meanwhile: back it up again")

    def _checked(self, table: str, index: str) -> int:
        """How many frames a table has, all of them what was stored, and none lost to a scan."""
        add_sum_of(self._connection)
        count, row = self._connection.execute(
            "SELECT count(*), min(CASE WHEN sum IS NOT sum_of(CAST(json AS BLOB)) THEN row END) "
            f"FROM store.{table} NOT INDEXED"
        ).fetchone()
        if row is not None:
            raise _damaged(f"{described(row, None)} is not what was stored")
        (listed,) = self._connection.execute(
            f"SELECT count(*) FROM store.{table} INDEXED BY {index}"
        ).fetchone()
        if count != listed:
            raise _damaged(f"its index lists {listed} frames, and has {count}")
        return int(count)

    def _check_nothing_is_lost(self) -> None:
        """Rows have gone from the copy, as the store has not got them: were they removed there?

        Damage has the same effect, such as one byte of a page that says how many rows it has.
        """
        (found,) = self._connection.execute("PRAGMA store.integrity_check(1)").fetchone()
        if found != "ok":
            raise _damaged(f"xs.db: {found}")
        for what, query in CROSS_CHECKS:
            # Its tables are the store's: that was attached first.
            for where, *_ in self._connection.execute(query):
                raise _damaged(f"{what}: {where}")

    def _check_is_same(self) -> None:
        """A database that was put there anew, and shares nothing with the copy, is another one.

        One that was restored or repaired is new as well, but has what it had; and one in which
        every frame was replaced since the last time is still the same file.
        """
        (state,) = self._connection.execute(
            "SELECT state FROM copy.script WHERE kind = ?", (_KIND,)
        ).fetchone()
        then = _Signature.of(state).inode
        if then is None or then == _inode(self._source):
            return
        shares_some, is_empty = self._connection.execute(
            "SELECT EXISTS (SELECT 1 FROM copy.frame c CROSS JOIN store.frame s ON s.row = c.row "
            "AND s.json = c.json), NOT EXISTS (SELECT 1 FROM copy.frame)"
        ).fetchone()
        if not (shares_some or is_empty):
            raise Invalid(
                f"the store at {self._source} has none of the frames of this copy: it is another "
                "one than that which was copied, so back it up to a new folder"
            )

    def _check_contents(self, table: str) -> None:
        """Of the rows that are to be written."""
        self._connection.create_function("agrees", 2, _agrees)
        found = self._connection.execute(
            f"SELECT s.row FROM store.{table} s WHERE s.content IS NOT NULL AND NOT EXISTS "
            f"(SELECT 1 FROM copy.{table} c WHERE c.row = s.row AND c.json IS s.json) "
            "AND NOT agrees(CAST(s.json AS BLOB), s.content) LIMIT 1"
        ).fetchone()
        if found is not None:
            raise _damaged(f"the content of {described(found[0], None)} is not what was stored")

    def _keep_all(self) -> None:
        target = sqlite3.connect(uri(self._part, "rw"), uri=True, isolation_level=None)
        try:
            _write_through(target, "")
            self._connection.backup(target, name="store")  # in the transaction that is open here
            fault.at("backup.pages-copied")
            _sign(target, "", self._source)
            fault.at("backup.signed")
        finally:
            target.close()  # folds its log back, if it has one
        if os.path.exists(self._part + "-wal"):
            raise Damaged(f"{self._part} could not be closed in good order: try again")
        self.check_unchanged()
        fault.at("backup.before-rename")
        os.rename(self._part, self._copy)

    def _tables(self) -> list[str]:
        query = "SELECT name FROM store.sqlite_master WHERE type = 'table'"
        return [name for (name,) in self._connection.execute(query)]

    def _bring_up(self, table: str) -> int:
        """Makes a table of the copy what it is here; how many of its rows are no more."""
        # A row's content is what its hash, or its key, says: it needs no comparison.
        columns = [
            (name, key > 0)
            for _, name, _, _, _, key in self._connection.execute(
                f"PRAGMA store.table_info({table})"
            )
            if name != "content"
        ]
        same_key = " AND ".join(f"s.{name} = c.{name}" for name, is_key in columns if is_key)
        same_rest = "".join(f" AND s.{name} IS c.{name}" for name, is_key in columns if not is_key)
        gone = self._connection.execute(
            f"DELETE FROM copy.{table} AS c WHERE NOT EXISTS "
            f"(SELECT 1 FROM store.{table} AS s WHERE {same_key}{same_rest})"
        ).rowcount
        self._connection.execute(
            f"INSERT INTO copy.{table} SELECT s.* FROM store.{table} AS s WHERE NOT EXISTS "
            f"(SELECT 1 FROM copy.{table} AS c WHERE {same_key})"
        )
        return gone


class Copied(NamedTuple):
    """What a copy says of itself, and what has become of it since."""

    source: str  # of which store it is one
    has_grown: bool  # frames were appended to it
    has_changed: bool  # others were imported, or have gone: removed, expired, lost to a repair


def copied_from(folder: str) -> Copied | None:
    """What the store in `folder` is a copy of; None if it is none."""
    connections = Connections(folder)  # an older one is brought up to today's format
    try:
        index = Index(connections)
        found = index.scripts(_KIND, "")
        if not found:
            return None
        then = _Signature.of(found[0].state)
        with index.reading() as reader:
            has_changed = then.sums is not None and then.sums != _sums(reader, "")
        return Copied(then.source, index.mark() > ids.parse(found[0].position), has_changed)
    finally:
        connections.close()


class _Signature(NamedTuple):
    """What a copy says of itself; an older one has told its store's path alone."""

    source: str
    inode: Optional[int] = None  # of the store's database then
    sums: Optional[list[int]] = None  # of the copy's frames then

    @classmethod
    def of(cls, state: str | None) -> _Signature:
        told = json.loads(state or '""')
        return cls(told) if isinstance(told, str) else cls(**told)


def _damaged(why: str) -> Damaged:
    return Damaged(f"there is no backup, as the store is damaged: {why}")


def _inode(folder: str) -> int:
    return os.stat(os.path.join(folder, FILENAME)).st_ino


def _sums(connection: sqlite3.Connection, schema: str) -> list[int]:
    """How many frames there are, and where and what they are, in numbers."""
    found: list[int] = []
    for table in TABLES_OF_FRAMES:
        found += connection.execute(
            f"SELECT count(*), total(row % 1000003), total(sum) FROM {schema}{table}"
        ).fetchone()
    return found


def _agrees(line: object, content: object) -> bool:
    """Whether a content is what a frame's JSON says."""
    if not (isinstance(line, bytes) and isinstance(content, bytes)):
        return False
    return frame.hash_text(line) == small(content).hash


def _write_through(connection: sqlite3.Connection, schema: str) -> None:
    connection.execute(f"PRAGMA {schema}synchronous = FULL")
    connection.execute("PRAGMA fullfsync = ON")
    connection.execute("PRAGMA checkpoint_fullfsync = ON")


def _sign(connection: sqlite3.Connection, schema: str, source: str) -> None:
    newest = connection.execute(
        f"SELECT max(id) FROM (SELECT id FROM {schema}mark UNION ALL "
        + " UNION ALL ".join(
            f"SELECT {ID} FROM (SELECT json FROM {schema}{table} ORDER BY row DESC LIMIT 1)"
            for table in TABLES_OF_FRAMES
        )
        + ")"
    ).fetchone()[0]
    state = _Signature(os.path.abspath(source), _inode(source), _sums(connection, schema))
    row = Script(_KIND, "", "", False, newest or ids.text(0), json.dumps(state._asdict()))
    connection.execute(f"DELETE FROM {schema}script WHERE kind = ?", (_KIND,))
    connection.execute(f"INSERT INTO {schema}script VALUES (?, ?, ?, ?, ?, ?)", row)
