"""The way through rows: positions, selections of topics, pages. Functions over a connection.

A position outside `index` is an id; `floor` makes it a row, in the transaction that uses it. A
selection of topics becomes a `Source`, from which `select` builds the one statement of a scan.

Frames that continue a run lie in a table of their own, `piece`, with rows out of the same order. So
a scan of `frame` alone counts each run once, however long it is, and costs what it costs without
runs. What wants everything merges the two, where there are pieces at all.
"""

from __future__ import annotations

from xs import frame
from xs.records import NamedTuple
from xs.schema import (
    ID,
    LIVE,
    ORDER_BITS,
    ORDER_MAX,
    ROW_MAX,
    TABLES_OF_FRAMES,
    Stored,
    StoredPiece,
    short,
)
from xs.sqlite import lru_cache

TYPE_CHECKING = False
if TYPE_CHECKING:
    import sqlite3
    from typing import Any, Optional

LARGE_PAGE_BYTES = 1 << 20


class Part(NamedTuple):
    """Where some frames `f` are listed: SQL from FROM to WHERE, and the column that orders them."""

    listed: str
    row: str


class Source(NamedTuple):
    """The frames of a selection: the parts that list them, and the values that those name."""

    parts: tuple[Part, ...]
    values: dict[str, Any]
    table: str = "frame"
    is_topic: bool = False  # one topic, and nothing below it


class Run(NamedTuple):
    """A run as it is stored. `expires`, `topic` and `ttl` are its first frame's."""

    number: int
    row: int
    writer: Optional[str]
    key: Optional[str]
    topic: str
    ttl: str
    expires: Optional[int]


_EVERY = Part("frame f WHERE f.row > :low AND f.row <= :high AND " + LIVE, "f.row")
_PIECE_BOUNDS = "{0}.row > :piece_low AND {0}.row <= :piece_high AND " + LIVE
_EVERY_PIECE = Part("piece f WHERE " + _PIECE_BOUNDS.format("f"), "f.row")


def source_of(patterns: frame.Patterns) -> Source | None:
    """Where the frames of a selection are listed; None when it selects no topic at all."""
    if patterns is None:
        return Source((_EVERY,), {})
    if not patterns:
        return None
    ordered = sorted(patterns)
    parts = _parts_of(tuple([pattern.endswith(".*") for pattern in ordered]))
    values = {f"p{n}": pattern for n, pattern in enumerate(ordered)}
    return Source(parts, values, is_topic=len(parts) == 1 and not ordered[0].endswith(".*"))


@lru_cache(maxsize=64)
def _parts_of(are_wildcards: tuple[bool, ...]) -> tuple[Part, ...]:
    """The parts of a selection: they name its patterns :p0, :p1, …"""
    parts = []
    for n, is_wildcard in enumerate(are_wildcards):
        number = f"(SELECT number FROM topic WHERE name = :p{n})"
        if is_wildcard:
            listed = f"below b CROSS JOIN frame f ON f.row = b.row WHERE b.prefix = {number}"
            row = "b.row"
        else:
            listed, row = f"frame f WHERE f.topic = {number}", "f.row"
        parts.append(Part(f"{listed} AND {row} > :low AND {row} <= :high AND {LIVE}", row))
    return tuple(parts)


def pieces_of(
    reader: sqlite3.Connection, patterns: frame.Patterns, after: int, until: int | None
) -> tuple[Source, int] | None:
    """Where the pieces of a selection between two ids are listed, and the row of the first of them.

    None when there is none: then `frame` has everything.
    """
    # In a store without pieces this is all that a page pays for them.
    if reader.execute("SELECT 1 FROM piece LIMIT 1").fetchone() is None:
        return None
    low = floor(reader, after, "piece")
    high = ROW_MAX if until is None else floor(reader, until, "piece")
    values: dict[str, Any] = {"piece_low": low, "piece_high": high}
    if patterns is None:
        query = "SELECT min(row) FROM piece WHERE row > ? AND row <= ?"
        first = reader.execute(query, (low, high)).fetchone()[0]
        return None if first is None else (Source((_EVERY_PIECE,), values, "piece"), first)
    parts = []
    firsts = []
    for n, pattern in enumerate(sorted(patterns)):
        first = reader.execute(
            "SELECT min(l.row) FROM topic t CROSS JOIN listed l ON l.topic = t.number "
            "WHERE t.name = ? AND l.row > ? AND l.row <= ?",
            (pattern, low, high),
        ).fetchone()[0]
        if first is not None:
            firsts.append(first)
            listed = (
                "listed l CROSS JOIN piece f ON f.row = l.row WHERE l.topic = "
                f"(SELECT number FROM topic WHERE name = :t{n}) "
                f"AND {_PIECE_BOUNDS.format('l')}"
            )
            parts.append(Part(listed, "l.row"))
            values[f"t{n}"] = pattern
    return (Source(tuple(parts), values, "piece"), min(firsts)) if parts else None


def merged(source: Source | None, pieces: Source, columns: str, *, descending: bool = False) -> str:
    """As `select`, of the frames and pieces of both: columns `row` and those named (without `f.`).

    Each side gives at most :count, in order, so neither is read to its end.
    """
    wanted = "f.row AS row, " + ", ".join(f"f.{name} AS {name}" for name in columns.split(", "))
    sides = " UNION ALL ".join(
        f"SELECT * FROM ({select(side, wanted, descending=descending)})"
        for side in (source, pieces)
        if side is not None
    )
    order = "DESC LIMIT :count" if descending else "LIMIT :count"
    return f"SELECT * FROM ({sides}) ORDER BY row {order}"


def select(source: Source, columns: str, *, descending: bool = False) -> str:
    """SQL for columns of the frames `f` between :low and :high, in order, at most :count."""
    return _select(source.parts, source.table, columns, descending)


@lru_cache(maxsize=256)
def _select(parts: tuple[Part, ...], table: str, columns: str, descending: bool) -> str:
    order = "DESC LIMIT :count" if descending else "LIMIT :count"
    if len(parts) == 1:
        (part,) = parts
        return f"SELECT {columns} FROM {part.listed} ORDER BY {part.row} {order}"
    # Each part gives at most :count, in its own order, so that none is read to its end.
    rows = " UNION ".join(
        f"SELECT row FROM (SELECT {part.row} AS row FROM {part.listed} ORDER BY {part.row} {order})"
        for part in parts
    )
    return (
        f"SELECT {columns} FROM ({rows} ORDER BY row {order}) s "
        f"CROSS JOIN {table} f ON f.row = s.row ORDER BY s.row {order}"
    )


def dense_page(
    reader: sqlite3.Connection, source: Source, values: dict[str, Any]
) -> tuple[bytes, int]:
    """As `joined_page`, for a topic that has a good share of the frames there; else empty.

    Going through all frames then takes less than looking up each one that the topic's index names
    (bench/replay.py: a quarter). How dense the topic is, its next few frames tell.
    """
    if not source.is_topic or values["count"] < _SAMPLE:
        return b"", 0
    first, last, frames, among = reader.execute(_DENSITY, values).fetchone()
    if frames < _SAMPLE or among > _SAMPLE * _DENSE:
        return b"", 0
    # Not much further than a page of that density goes: it may get thinner.
    far = last + (last - first) * (values["count"] // _SAMPLE)
    among_all = Source((_AMONG_ALL,), source.values)
    return joined_page(reader, among_all, {**values, "high": min(far, values["high"])})


_SAMPLE = 50  # frames
_DENSE = 3  # times as many frames in all
_TOPIC = "(SELECT number FROM topic WHERE name = :p0)"
_DENSITY = (
    "SELECT first, last, frames, (SELECT count(*) FROM (SELECT 1 FROM frame "
    f"WHERE row >= first AND row <= last LIMIT {_SAMPLE * _DENSE + 1})) FROM "
    "(SELECT min(row) AS first, max(row) AS last, count(*) AS frames FROM (SELECT row FROM frame "
    f"WHERE topic = {_TOPIC} AND row > :low AND row <= :high ORDER BY row LIMIT {_SAMPLE}))"
)
_AMONG_ALL = Part(
    f"frame f WHERE f.row > :low AND f.row <= :high AND +f.topic = {_TOPIC} AND {LIVE}", "f.row"
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
    reader: sqlite3.Connection, statement: str, values: dict[str, Any]
) -> tuple[bytes, int]:
    """A page that is bounded in bytes, taken row by row from a statement that gives lines."""
    lines: list[bytes] = []
    size = 0
    cursor = reader.execute(statement, values)
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
    source = source_of(patterns)
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
    ).fetchall()  # to the statement's end, which ends its transaction
    return bytes(found[0][0]) if found else None


def bounds(reader: sqlite3.Connection, after: int, until: int | None) -> tuple[int, int]:
    return floor(reader, after), ROW_MAX if until is None else floor(reader, until)


def floor(reader: sqlite3.Connection, value: int, table: str = "frame") -> int:
    """The row below or at which all ids are at most `value`, and above which all are greater.

    All ids of that table: in the other one, this row may have another place among the ids.
    """
    return _find(reader, value, table)[0]


def row_of(reader: sqlite3.Connection, value: int, table: str = "frame") -> int | None:
    """The row of the frame with that id."""
    row, is_there = _find(reader, value, table)
    return row if is_there else None


def _find(reader: sqlite3.Connection, value: int, table: str) -> tuple[int, bool]:
    """As `floor`; and whether the frame in that row has just this id."""
    if value < 0:
        return -1, False
    base = value >> 80 << ORDER_BITS
    low = base - 1
    ends = reader.execute(_ENDS[table], (base, base | ORDER_MAX) * 2).fetchall()
    if not ends:
        return low, False
    (high, high_text) = ends[1]
    high_id = int(high_text, 36)
    if high_id <= value:
        return high, high_id == value
    low, low_text = ends[0]
    low_id = int(low_text, 36)
    if value <= low_id:
        return (low, True) if value == low_id else (low - 1, False)
    # Ids of one millisecond mostly come in even steps, one by one or as a batch takes them. So the
    # guess is where the id would be then; in turn with the middle, which bounds what it can cost.
    is_even = True
    while high - low > 1:
        share = (value - low_id) / (high_id - low_id) if is_even else 0.5
        guess = min(max(low + round(share * (high - low)), low + 1), high - 1)
        is_even = not is_even
        found = reader.execute(_LAST_UP_TO[table], (low, guess)).fetchone()
        if found is None:
            low = guess
            continue
        found_id = int(found[1], 36)
        if found_id == value:
            return found[0], True
        if found_id < value:
            low, low_id = guess, found_id
        else:
            high, high_id = found[0], found_id
    return low, False


_LAST_UP_TO = {
    table: f"SELECT row, {ID} FROM {table} WHERE row > ? AND row <= ? ORDER BY row DESC LIMIT 1"
    for table in TABLES_OF_FRAMES
}
_ENDS = {  # the first and the last of some rows: two rows, or none
    table: f"SELECT * FROM (SELECT row, {ID} FROM {table} WHERE row >= ? AND row <= ? ORDER BY row "
    f"LIMIT 1) UNION ALL SELECT * FROM (SELECT row, {ID} FROM {table} WHERE row >= ? AND row <= ? "
    "ORDER BY row DESC LIMIT 1)"
    for table in TABLES_OF_FRAMES
}


def id_at(reader: sqlite3.Connection, row: int, table: str = "frame") -> int:
    found = reader.execute(f"SELECT {ID} FROM {table} WHERE row = ?", (row,)).fetchone()
    return -1 if found is None else int(found[0], 36)


def stored_with_id(reader: sqlite3.Connection, value: int, now: int) -> Stored | None:
    for table in TABLES_OF_FRAMES:
        row = row_of(reader, value, table)
        if row is not None:
            found = reader.execute(
                f"SELECT CAST(f.json AS BLOB), f.content, f.digest FROM {table} f "
                f"WHERE f.row = :row AND {LIVE}",
                {"row": row, "now": now},
            ).fetchone()
            return None if found is None else as_stored(*found)
    return None


def as_stored(line: bytes, content: bytes | None, digest: int | None) -> Stored:
    return Stored(line, content, digest is None and frame.hash_text(line) is not None)


def newest_row(reader: sqlite3.Connection) -> int | None:
    """The last row of all, of either table."""
    row = reader.execute(
        "SELECT max(row) FROM (SELECT max(row) AS row FROM frame "
        "UNION ALL SELECT max(row) AS row FROM piece)"
    ).fetchone()[0]
    return None if row is None else int(row)


def newest_id(reader: sqlite3.Connection) -> int:
    """The id of the newest stored frame; -1 if there is none."""
    row = newest_row(reader)
    return -1 if row is None else max(id_at(reader, row), id_at(reader, row, "piece"))


def mark_of(reader: sqlite3.Connection) -> int:
    kept = reader.execute("SELECT id FROM mark").fetchone()
    return max(int(kept[0], 36) if kept else 0, newest_id(reader))


def next_large(reader: sqlite3.Connection, low: int) -> int | None:
    found = reader.execute("SELECT min(row) FROM large WHERE row > ?", (low,)).fetchone()[0]
    return None if found is None else int(found)


def inline_content(reader: sqlite3.Connection, digest: bytes, now: int) -> bytes | None:
    pinned = reader.execute("SELECT content FROM pin WHERE digest = ?", (digest,)).fetchone()
    if pinned is not None and pinned[0] is not None:
        return bytes(pinned[0])
    for table in TABLES_OF_FRAMES:
        found = _inline_content(reader, digest, now, table)
        if found is not None:
            return found
    return None


def _inline_content(
    reader: sqlite3.Connection, digest: bytes, now: int, table: str
) -> bytes | None:
    # Newest bucket first: what was just appended is what is mostly asked for.
    newest = reader.execute(f"SELECT max(digest) FROM {table} WHERE digest IS NOT NULL").fetchone()[
        0
    ]
    expected = frame.integrity(digest)
    while newest is not None:
        bucket = newest >> 32 << 32
        for line, content in reader.execute(
            f"SELECT CAST(f.json AS BLOB), f.content FROM {table} f "
            f"WHERE f.digest = :digest AND {LIVE}",
            {"digest": bucket | short(digest), "now": now},
        ):
            if frame.hash_text(line) == expected:  # four bytes may agree by chance
                return bytes(content)
        newest = reader.execute(
            f"SELECT max(digest) FROM {table} WHERE digest IS NOT NULL AND digest < ?", (bucket,)
        ).fetchone()[0]
    return None


def names_file(reader: sqlite3.Connection, digest: bytes, now: int) -> bool:
    return (
        reader.execute(
            "SELECT 1 FROM file x CROSS JOIN frame f ON f.row = x.row "
            f"WHERE x.digest = :digest AND {LIVE} "
            "UNION ALL SELECT 1 FROM file x CROSS JOIN piece f ON f.row = x.row "
            f"WHERE x.digest = :digest AND {LIVE} "
            "UNION ALL SELECT 1 FROM pin WHERE digest = :digest AND content IS NULL LIMIT 1",
            {"digest": digest, "now": now},
        ).fetchone()
        is not None
    )


# Runs


def run_at(reader: sqlite3.Connection, row: int) -> Run | None:
    """The run whose first frame is at that row, expired or not; None if it begins none."""
    found = reader.execute(
        "SELECT r.number, r.writer, r.key, CAST(f.json AS BLOB), f.expires "
        "FROM run r CROSS JOIN frame f ON f.row = r.row WHERE r.row = ?",
        (row,),
    ).fetchone()
    if found is None:
        return None
    number, writer, key, line, expires = found
    return Run(number, row, writer, key, frame.topic_of(line), frame.ttl_of(line), expires)


def run_of(reader: sqlite3.Connection, first: int) -> Run | None:
    """As `run_at`, by the first frame's id."""
    row = row_of(reader, first)
    return None if row is None else run_at(reader, row)


def run_of_piece(reader: sqlite3.Connection, value: int) -> int | None:
    """The id of the first frame of the run that the frame with that id continues; None if none."""
    row = row_of(reader, value, "piece")
    if row is None:
        return None
    found = reader.execute(
        f"SELECT (SELECT {ID} FROM frame WHERE frame.row = run.row) FROM run "
        "WHERE number = (SELECT run FROM piece WHERE row = ?)",
        (row,),
    ).fetchone()
    return None if found is None or found[0] is None else int(found[0], 36)


def pieces_after(reader: sqlite3.Connection, number: int, after: int) -> list[StoredPiece]:
    """Pieces of a run above an id, in order, up to its end; bounded in bytes."""
    found = []
    size = 0
    cursor = reader.execute(
        f"SELECT CAST(json AS BLOB), content, digest, ends, {ID} FROM piece "
        "WHERE run = ? AND row > ? ORDER BY row",
        (number, floor(reader, after, "piece")),
    )
    for line, content, digest, ends, id_text in cursor:
        found.append(StoredPiece(int(id_text, 36), as_stored(line, content, digest), ends))
        size += len(line) + len(content or b"")
        if ends or size > LARGE_PAGE_BYTES:
            break
    cursor.close()
    return found


def end_of(reader: sqlite3.Connection, number: int) -> int | None:
    """The id of the piece that ends a run, which is the first that says so; None if none does."""
    row = reader.execute(
        "SELECT min(row) FROM piece WHERE run = ? AND ends > 0", (number,)
    ).fetchone()[0]
    return None if row is None else id_at(reader, row, "piece")
