"""What can still be read of a damaged database, row by row.

Unlike the reads of `index` this goes on behind a page that SQLite can't read, and takes nothing for
granted. What is read here may be wrong all the same: `repair` holds it against its hashes.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator

from xs import sums
from xs.records import NamedTuple
from xs.schema import FILENAME, ROW_MAX, TABLES_OF_FRAMES, Script, translated, uri
from xs.still import when_still

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Optional

_PAGE = 1000

# Rows of frames as indexes have them, which lie on other pages than the frames do.
_BY_TOPIC = "SELECT topic, row FROM frame INDEXED BY frame_topic"
_BY_OTHER_INDEXES = (
    "SELECT prefix, row FROM below",
    "SELECT digest, row FROM file",
    "SELECT topic, row FROM listed",
    "SELECT digest, row FROM frame INDEXED BY frame_digest WHERE digest IS NOT NULL",
    "SELECT digest, row FROM piece INDEXED BY piece_digest WHERE digest IS NOT NULL",
)


class Found(NamedTuple):
    """A row that holds a frame. No line: that could not be read. `topic` is from an index.

    `sum` is the checksum that the row has of its line; None in formats that had none.
    """

    row: int
    line: Optional[bytes]
    content: Optional[bytes]
    topic: Optional[str]
    sum: Optional[int] = None

    @property
    def is_whole(self) -> bool:
        """Whether the line, if there is one, is what was stored, as far as the row can tell."""
        return self.line is not None and self.sum in (None, sums.of(self.line))


class Salvage:
    """A damaged database. Raises `NotAStore` if nothing of it can be read."""

    def __init__(self, folder: str) -> None:
        self.gaps: list[tuple[int, int]] = []  # between two rows: what could not be read, by then
        path = os.path.join(folder, FILENAME)
        with translated():
            self._connection = sqlite3.connect(
                uri(path, "ro", locks=when_still(path) is None), uri=True, isolation_level=None
            )
            try:
                self._connection.execute("BEGIN")
                self._connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
                has_sums = self._has_column("frame", "sum")
                self._counts_pieces = self._has_column("run", "pieces")
            except BaseException:
                self._connection.close()
                raise
        self._sum = "sum" if has_sums else "NULL"

    def _has_column(self, table: str, column: str) -> bool:
        """Whether the database's format has that."""
        columns = self._connection.execute(f"PRAGMA table_info({table})").fetchall()
        return column in [name for _, name, *_ in columns]

    def close(self) -> None:
        self._connection.close()

    def frames(self) -> Iterator[Found]:
        """Every row that the tables of frames, or their indexes, have, in order.

        A row that only an index has is one that could not be read.
        """
        topics = dict(self._readable("SELECT number, name FROM topic ORDER BY number"))
        names = {row: topics.get(number) for number, row in self._both_ways(_BY_TOPIC)}
        rows = set(names)
        for query in _BY_OTHER_INDEXES:
            rows.update(row for _, row in self._both_ways(query))
        for table in TABLES_OF_FRAMES:
            rows.update(self._rows(table))
        for row in sorted(rows):
            yield self._found(row, names.get(row))

    def pins(self) -> list[tuple[bytes, int, Optional[bytes]]]:
        """Digest, time and inline content of what POST /cas has put there."""
        return self._readable("SELECT digest, created, content FROM pin")

    def answered(self) -> list[tuple[str, str, bytes, Optional[int]]]:
        """Topic, idempotency key, the JSON of the frame that it made, and the sum of both."""
        return self._readable(
            f"SELECT t.name, a.key, CAST(a.json AS BLOB), {self._sum} "
            "FROM answered a JOIN topic t ON t.number = a.topic"
        )

    def runs(self) -> list[tuple[int, int]]:
        """The row of the first frame of each run that has an end, and how many pieces it has."""
        if not self._counts_pieces:
            return []
        return list(self._both_ways("SELECT row, pieces FROM run WHERE pieces IS NOT NULL"))

    def scripts(self) -> list[Script]:
        """What is kept of scripts."""
        query = "SELECT kind, name, source, active, position, state FROM script"
        return [Script(*row) for row in self._readable(query)]

    def marks(self) -> list[str]:
        """An id up to which ids have been given out, if there is one."""
        return [id_text for (id_text,) in self._readable("SELECT id FROM mark")]

    def _found(self, row: int, topic: str | None) -> Found:
        for table in TABLES_OF_FRAMES:
            query = f"SELECT CAST(json AS BLOB), content, {self._sum} FROM {table} WHERE row = ?"
            try:
                found = self._connection.execute(query, (row,)).fetchone()
            except sqlite3.Error:
                continue
            if found is not None and isinstance(found[0], bytes):
                content = found[1] if isinstance(found[1], bytes) else None
                return Found(row, found[0], content, topic, found[2])
        return Found(row, None, None, topic)

    def _readable(self, query: str) -> list[Any]:
        """The rows up to the first one that can't be read."""
        rows = []
        try:
            for row in self._connection.execute(query):
                rows.append(row)
        except sqlite3.Error:
            pass
        return rows

    def _both_ways(self, query: str) -> Iterator[tuple[int, int]]:
        """What a query finds from either end on, each up to the first row that can't be read."""
        for order in ("", " DESC"):
            yield from self._readable(f"{query} ORDER BY 1{order}, 2{order}")

    def _rows(self, table: str) -> Iterator[int]:
        """The rows of a table, without those on pages that can't be read."""
        at, count = -1, _PAGE
        while True:
            query = f"SELECT row FROM {table} NOT INDEXED WHERE row > ? ORDER BY row LIMIT ?"
            found: list[int] = []
            failed = False
            try:
                for (row,) in self._connection.execute(query, (at, count)):
                    found.append(row)
            except sqlite3.Error:
                failed = True
            yield from found
            if found and found[-1] <= at:
                return  # a page that is older than its neighbours leads back
            at = found[-1] if found else at
            if not failed:
                if not found:
                    return
            elif count > 1:
                count = 1  # a row is read ahead: the last one that can be is lost with that
            else:
                beyond = self._beyond(table, at)
                self.gaps.append((at, ROW_MAX if beyond is None else beyond))
                if beyond is None:
                    return
                at, count = beyond, _PAGE

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

    def pins(self) -> list[Any]:
        return self._merged("pins", 1)

    def answered(self) -> list[Any]:
        return self._merged("answered", 2)

    def runs(self) -> list[tuple[int, int]]:
        return self._merged("runs", 1)

    def scripts(self) -> list[Script]:
        return self._merged("scripts", 3)

    def marks(self) -> list[str]:
        return [*self._older.marks(), *self._newer.marks()]

    def _merged(self, what: str, key: int) -> list[Any]:
        """Rows of both, by their first `key` columns; the newer one's where both have one."""
        both = [*getattr(self._older, what)(), *getattr(self._newer, what)()]
        return list({row[:key]: row for row in both}.values())
