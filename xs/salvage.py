"""What can still be read of a damaged database, row by row.

Unlike the reads of `index` this goes on behind a page that SQLite can't read, and takes nothing for
granted. What is read here may be wrong all the same: `repair` holds it against its hashes.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
from collections.abc import Iterator, Sequence

from xs import sums
from xs.records import NamedTuple
from xs.schema import (
    FILENAME,
    FORMAT,
    ROW_MAX,
    TABLES_OF_FRAMES,
    Script,
    is_answer,
    translated,
    uri,
    wrongly_declared,
)
from xs.still import when_still

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Optional

# Rows of frames as indexes have them, which lie on other pages than the frames do; each with what
# they are ordered by.
_OTHER_INDEXES = {
    "frame": (
        "SELECT prefix, row FROM below",
        "SELECT digest, row FROM file",
        "SELECT digest, row FROM frame INDEXED BY frame_digest WHERE digest IS NOT NULL",
    ),
    "piece": (
        "SELECT topic, row FROM listed",
        "SELECT digest, row FROM file",
        "SELECT digest, row FROM piece INDEXED BY piece_digest WHERE digest IS NOT NULL",
    ),
}


class Found(NamedTuple):
    """A row that holds a frame. No line: that could not be read. `topic` is from an index.

    `agrees`: whether the row's checksum is its line's; None in formats that had none.
    """

    row: int
    line: Optional[bytes]
    content: Optional[bytes]
    topic: Optional[str]
    agrees: Optional[bool] = None

    @property
    def is_whole(self) -> bool:
        """Whether the line, if there is one, is what was stored, as far as the row can tell."""
        return self.line is not None and self.agrees is not False


class Salvage:
    """A damaged database. Raises `NotAStore` if nothing of it can be read."""

    def __init__(self, folder: str) -> None:
        self.gaps: list[tuple[int, int]] = []  # between two rows: what could not be read, by then
        self.doubts: dict[str, str] = {}  # tables that may have had more than was read, and why
        path = os.path.join(folder, FILENAME)
        with translated():
            self._connection = _connected(path, "ro")
            try:
                self._connection.execute("BEGIN")
                self._connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
                self._has_sums = self._has_column("frame", "sum")
                self._counts_pieces = self._has_column("run", "pieces")
            except BaseException:
                self._connection.close()
                raise
        self._sum = "sum" if self._has_sums else "NULL"

    def _has_column(self, table: str, column: str) -> bool:
        """Whether the database's format has that."""
        columns = self._connection.execute(f"PRAGMA table_info({table})").fetchall()
        return column in [name for _, name, *_ in columns]

    def close(self) -> None:
        self._connection.close()

    def frames(self) -> Iterator[Found]:
        """Every row that the tables of frames, or their indexes, have: those of `frame` first.

        In order as far as they can be read one after the other. A row that only an index has is one
        that could not be read.
        """
        topics = dict(self._rows_of("SELECT number, name FROM topic", "number"))
        names: dict[int, str] = {}
        for number, row in self._rows_of(
            "SELECT topic, row FROM frame INDEXED BY frame_topic", "topic, row"
        ):
            name = topics.get(number)
            if type(row) is int and type(name) is str:
                names[row] = name
        seen: set[int] = set()
        unread = set(names)
        for table in TABLES_OF_FRAMES:
            for query in _OTHER_INDEXES[table]:
                unread.update(row for _, row in self._rows_of(query, "1, 2") if type(row) is int)
            for found in self._scan(table, names):
                seen.add(found.row)
                yield found
            # In a page that is out of order what was passed over may still be found.
            for row in sorted(unread - seen):
                found = self._look_up(table, row, names.get(row))
                if found.line is not None:
                    seen.add(row)
                    yield found
        for row in sorted(unread - seen):
            yield Found(row, None, None, names.get(row))

    def pins(self) -> list[tuple[Any, ...]]:
        """Digest, time and inline content of what POST /cas has put there, if it is that."""
        return self._all_of("pin", "SELECT digest, created, content FROM pin", "rowid")

    def answered(self) -> list[tuple[Any, ...]]:
        """A topic's number, a key, the JSON of the frame that it made, and whether it is that.

        Nobody knows that (None) in formats that had no sums.
        """
        query = f"SELECT topic, key, CAST(json AS BLOB), {self._sum} FROM answered"
        return [
            (topic, key, line, is_answer(key, line, total) if self._has_sums else None)
            for topic, key, line, total in self._all_of("answered", query, "topic, key")
        ]

    def runs(self) -> list[tuple[Any, ...]]:
        """The row of the first frame of each run, and how many pieces it has if it has an end."""
        pieces = "pieces" if self._counts_pieces else "NULL"
        return self._rows_of(f"SELECT row, {pieces} FROM run", "number")

    def scripts(self) -> list[Script]:
        """What is kept of scripts, if it is that."""
        query = "SELECT kind, name, source, active, position, state FROM script"
        return [Script(*row) for row in self._all_of("script", query, "kind, name, source")]

    def marks(self) -> list[tuple[Any, ...]]:
        """An id up to which ids have been given out, if there is one."""
        return self._all_of("mark", "SELECT id FROM mark", "one")

    def _all_of(self, table: str, query: str, order: str) -> list[tuple[Any, ...]]:
        """As `_rows_of`; that the table may have had more is in `doubts` from then on."""
        try:
            said = self._connection.execute(f"PRAGMA integrity_check({table})").fetchone()[0]
        except sqlite3.Error as error:
            said = str(error)
        if said != "ok":
            first = [line for line in str(said).splitlines() if not line.startswith("***")]
            self.doubts[table] = first[0] if first else "it is damaged"
        return self._rows_of(query, order)

    def _rows_of(self, query: str, order: str) -> list[tuple[Any, ...]]:
        """What a query finds, each once: from either end on, if one can't be read amid them."""
        found: dict[tuple[Any, ...], None] = {}
        for end in ("ASC", "DESC"):
            by = ", ".join(f"{column} {end}" for column in order.split(", "))
            count = 0
            try:
                for row in self._connection.execute(f"{query} ORDER BY {by}"):
                    found[row] = None
                    count += 1
                break
            except sqlite3.Error:
                last = self._one(f"{query} ORDER BY {by} LIMIT 1 OFFSET {count}")
                if last is not None:
                    found[last] = None
        return list(found)

    def _one(self, query: str, *values: int) -> tuple[Any, ...] | None:
        """A single row, if it can be read; also one behind which nothing can.

        Python reads a row ahead, and who goes through many loses the last one by that.
        """
        try:
            found: tuple[Any, ...] | None = self._connection.execute(query, values).fetchone()
        except sqlite3.Error:
            return None
        return found

    def _look_up(self, table: str, row: int, topic: str | None) -> Found:
        query = f"SELECT CAST(json AS BLOB), content, {self._sum} FROM {table} WHERE row = ?"
        return self._found(row, self._one(query, row) or (None, None, None), topic)

    def _found(self, row: int, columns: Sequence[Any], topic: str | None) -> Found:
        line, content, total = columns
        if type(line) is not bytes:
            return Found(row, None, None, topic)
        agrees = total == sums.of(line) if self._has_sums else None
        return Found(row, line, content if type(content) is bytes else None, topic, agrees)

    def _scan(self, table: str, names: dict[int, str]) -> Iterator[Found]:
        """The rows of a table in one go, and behind each place that can't be read again."""
        rows = f"FROM {table} NOT INDEXED WHERE row > ? ORDER BY row"
        query = f"SELECT row, CAST(json AS BLOB), content, {self._sum} {rows}"
        at = -1
        while True:
            last = at
            try:
                for row, *columns in self._connection.execute(query, (at,)):
                    last = row
                    yield self._found(row, columns, names.get(row))
                return
            except sqlite3.Error:
                pass
            if last < at:
                return  # a page that is older than its neighbours leads back
            at = last
            following = self._one(f"{query} LIMIT 1", at)
            if following is None:  # perhaps it is there, and what it has can't be read
                try:
                    row = f"SELECT row, NULL, NULL, NULL {rows} LIMIT 1"
                    following = self._connection.execute(row, (at,)).fetchone()
                except sqlite3.Error:
                    beyond = self._beyond(table, at)
                    self.gaps.append((at, ROW_MAX if beyond is None else beyond))
                    if beyond is None:
                        return
                    at = beyond
                    continue
            if following is None or following[0] <= at:
                return
            at = following[0]
            yield self._found(at, following[1:], names.get(at))

    def _beyond(self, table: str, at: int) -> int | None:
        """From where on the table can be read again; None if it can't."""
        step = 1
        while at + step < ROW_MAX and not self._can_read(table, at + step):
            step *= 2
        if at + step >= ROW_MAX:
            return None
        low, high = at + step // 2, at + step
        while high - low > 1:
            middle = (low + high) // 2
            if self._can_read(table, middle):
                high = middle
            else:
                low = middle
        return high

    def _can_read(self, table: str, at: int) -> bool:
        query = f"SELECT row FROM {table} NOT INDEXED WHERE row > ? ORDER BY row LIMIT 1"
        try:
            self._connection.execute(query, (at,)).fetchone()
        except sqlite3.Error:
            return False
        return True


def redeclare(folder: str, copy: str) -> bool:
    """Makes a copy of a database whose declarations are damaged, with the right ones.

    One byte of them may cost all that a table has. False where they are right, or where that can't
    be done; what is there of a copy is of no use then.
    """
    path, new = (os.path.join(each, FILENAME) for each in (folder, copy))
    try:
        with contextlib.closing(_connected(path, "ro")) as old:
            if old.execute("PRAGMA user_version").fetchone()[0] != FORMAT:
                return False
            wrong = wrongly_declared(old)
        if wrong:
            for suffix in ("", "-wal"):
                if os.path.exists(path + suffix):
                    shutil.copyfile(path + suffix, new + suffix)
            with contextlib.closing(_connected(new, "rw")) as mended:
                for name, statement in wrong.items():
                    values = (statement, name)
                    mended.execute("UPDATE sqlite_master SET sql = ? WHERE name = ?", values)
    except sqlite3.Error:
        return False
    return bool(wrong)


def _connected(path: str, mode: str) -> sqlite3.Connection:
    connection = sqlite3.connect(
        uri(path, mode, locks=mode == "rw" or when_still(path) is None),
        uri=True,
        isolation_level=None,
    )
    connection.text_factory = _text
    try:
        # A table that would begin behind the file's end keeps nobody from the others so.
        connection.execute("PRAGMA writable_schema = ON")
    except BaseException:
        connection.close()
        raise
    return connection


class Layered:
    """Two states of one database: what can't be read in the newer one comes from the older one.

    With `all_of_it` no page of the newer one is sure to be there, and the older one is asked for
    every row that the newer one does not have; else for those that can't be read, so that what was
    removed stays so.
    """

    def __init__(self, newer: Salvage, older: Salvage, *, all_of_it: bool) -> None:
        self._newer = newer
        self._older = older
        self._all_of_it = all_of_it

    @property
    def gaps(self) -> list[tuple[int, int]]:
        """As of a `Salvage`: those of the newer one."""
        return self._newer.gaps

    def close(self) -> None:
        self._newer.close()
        self._older.close()

    def frames(self) -> Iterator[Found]:
        """Every row of the newer one, then those of the older one that are missing there."""
        missing: dict[int, Found] = {}
        known: set[int] = set()
        for found in self._newer.frames():
            if found.line is None:
                missing[found.row] = found
                continue
            if self._all_of_it:
                known.add(found.row)
            yield found
        if missing or self.gaps or self._all_of_it:
            for found in self._older.frames():
                if found.line is not None and self._is_missing(found.row, missing, known):
                    missing.pop(found.row, None)
                    yield found
        yield from missing.values()

    def _is_missing(self, row: int, missing: dict[int, Found], known: set[int]) -> bool:
        if self._all_of_it:
            return row not in known
        return row in missing or any(start < row <= end for start, end in self.gaps)

    @property
    def doubts(self) -> dict[str, str]:
        """As of a `Salvage`: those of the newer one."""
        return self._newer.doubts

    def pins(self) -> list[Any]:
        return self._merged("pins", 1)

    def answered(self) -> list[Any]:
        return self._merged("answered", 2)

    def runs(self) -> list[Any]:
        return self._merged("runs", 1)

    def scripts(self) -> list[Script]:
        return self._merged("scripts", 3)

    def marks(self) -> list[Any]:
        return [*self._older.marks(), *self._newer.marks()]

    def _merged(self, what: str, key: int) -> list[Any]:
        """Rows of both, by their first `key` columns; the newer one's where both have one."""
        both = [*getattr(self._older, what)(), *getattr(self._newer, what)()]
        return list({row[:key]: row for row in both}.values())


def _text(data: bytes) -> str | bytes:
    """A text as SQLite has it, or its bytes, if it is none any more."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data
