"""The way through rows: positions, selections of topics, pages. Functions over a connection.

A position outside `index` is an id; `floor` makes it a row, in the transaction that uses it. A
selection of topics becomes a `Source`, from which `select` builds the one statement of a scan.
"""

from __future__ import annotations

import sqlite3

from xs import frame
from xs.records import NamedTuple
from xs.schema import ID, LIVE, ORDER_BITS, ORDER_MAX, ROW_MAX, Stored, short

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

LARGE_PAGE_BYTES = 1 << 20


class Part(NamedTuple):
    """Where some frames `f` are listed: SQL from FROM to WHERE, and the column that orders them."""

    listed: str
    row: str


class Source(NamedTuple):
    """The frames of a selection: the parts that list them, and the numbers that those name."""

    parts: list[Part]
    values: dict[str, Any]


_EVERY = Part("frame f WHERE f.row > :low AND f.row <= :high AND " + LIVE, "f.row")


def source_of(reader: sqlite3.Connection, patterns: frame.Patterns) -> Source | None:
    """Where the frames of a selection are listed; None when no frame can be."""
    if patterns is None:
        return Source([_EVERY], {})
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
        bounds = f" AND {row}.row > :low AND {row}.row <= :high AND {LIVE}"
        parts.append(Part(listed + bounds, f"{row}.row"))
    return Source(parts, values) if parts else None


def select(source: Source, columns: str, *, descending: bool = False) -> str:
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


def joined_page(
    reader: sqlite3.Connection, source: Source, values: dict[str, Any]
) -> tuple[bytes, int]:
    """A page that SQLite joins."""
    page, count = reader.execute(
        "SELECT CAST(group_concat(json, char(10)) || char(10) AS BLOB), count(*) "
        f"FROM ({select(source, 'f.json AS json')})",
        values,
    ).fetchone()
    return (page, count) if count else (b"", 0)


def bounded_page(
    reader: sqlite3.Connection, source: Source, values: dict[str, Any]
) -> tuple[bytes, int]:
    """A page that is bounded in bytes, taken row by row."""
    lines: list[bytes] = []
    size = 0
    cursor = reader.execute(select(source, "CAST(f.json AS BLOB)"), values)
    for (line,) in cursor:
        lines.append(line)
        size += len(line)
        if size > LARGE_PAGE_BYTES:
            break
    cursor.close()
    return (b"\n".join(lines) + b"\n" if lines else b""), len(lines)


def one(
    reader: sqlite3.Connection,
    patterns: frame.Patterns,
    after_row: int | None,
    until_row: int | None,
    now: int,
) -> bytes | None:
    """The first selected frame after a row, or the last one up to a row."""
    source = source_of(reader, patterns)
    if source is None:
        return None
    values = {
        **source.values,
        "low": -1 if after_row is None else after_row,
        "high": ROW_MAX if until_row is None else until_row,
        "now": now,
        "count": 1,
    }
    found = reader.execute(
        select(source, "CAST(f.json AS BLOB)", descending=after_row is None), values
    ).fetchone()
    return None if found is None else bytes(found[0])


def bounds(reader: sqlite3.Connection, after: int, until: int | None) -> tuple[int, int]:
    return floor(reader, after), ROW_MAX if until is None else floor(reader, until)


def floor(reader: sqlite3.Connection, value: int) -> int:
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
        f"SELECT row, {ID} FROM frame WHERE row > ? AND row <= ? ORDER BY row DESC LIMIT 1",
        (low, high),
    ).fetchone()
    return None if found is None else (found[0], int(found[1], 36))


def row_of(reader: sqlite3.Connection, value: int) -> int | None:
    row = floor(reader, value)
    if row < 0:
        return None
    return row if id_at(reader, row) == value else None


def id_at(reader: sqlite3.Connection, row: int) -> int:
    found = reader.execute(f"SELECT {ID} FROM frame WHERE row = ?", (row,)).fetchone()
    return -1 if found is None else int(found[0], 36)


def stored_with_id(reader: sqlite3.Connection, value: int, now: int) -> Stored | None:
    row = row_of(reader, value)
    if row is None:
        return None
    found = reader.execute(
        "SELECT CAST(f.json AS BLOB), f.content, f.digest FROM frame f "
        f"WHERE f.row = :row AND {LIVE}",
        {"row": row, "now": now},
    ).fetchone()
    return None if found is None else as_stored(*found)


def as_stored(line: bytes, content: bytes | None, digest: int | None) -> Stored:
    return Stored(line, content, digest is None and frame.hash_text(line) is not None)


def mark_of(reader: sqlite3.Connection) -> int:
    kept = reader.execute("SELECT id FROM mark").fetchone()
    newest = reader.execute(f"SELECT {ID} FROM frame ORDER BY row DESC LIMIT 1").fetchone()
    return max(int(found[0], 36) if found else 0 for found in (kept, newest))


def next_large(reader: sqlite3.Connection, low: int) -> int | None:
    found = reader.execute("SELECT min(row) FROM large WHERE row > ?", (low,)).fetchone()[0]
    return None if found is None else int(found)


def inline_content(reader: sqlite3.Connection, digest: bytes, now: int) -> bytes | None:
    pinned = reader.execute("SELECT content FROM pin WHERE digest = ?", (digest,)).fetchone()
    if pinned is not None and pinned[0] is not None:
        return bytes(pinned[0])
    # Newest bucket first: what was just appended is what is mostly asked for.
    newest = reader.execute("SELECT max(digest) FROM frame WHERE digest IS NOT NULL").fetchone()[0]
    expected = frame.integrity(digest)
    while newest is not None:
        bucket = newest >> 32 << 32
        for line, content in reader.execute(
            "SELECT CAST(f.json AS BLOB), f.content FROM frame f "
            f"WHERE f.digest = :digest AND {LIVE}",
            {"digest": bucket | short(digest), "now": now},
        ):
            if frame.hash_text(line) == expected:  # four bytes may agree by chance
                return bytes(content)
        newest = reader.execute(
            "SELECT max(digest) FROM frame WHERE digest IS NOT NULL AND digest < ?", (bucket,)
        ).fetchone()[0]
    return None


def names_file(reader: sqlite3.Connection, digest: bytes, now: int) -> bool:
    return (
        reader.execute(
            "SELECT 1 FROM file x CROSS JOIN frame f ON f.row = x.row "
            f"WHERE x.digest = :digest AND {LIVE} "
            "UNION ALL SELECT 1 FROM pin WHERE digest = :digest AND content IS NULL LIMIT 1",
            {"digest": digest, "now": now},
        ).fetchone()
        is not None
    )
