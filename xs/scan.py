"""The way through rows: positions, selections of topics, pages. Functions over a connection.

A position outside `index` is an id; `floor` makes it a row, in the transaction that uses it. A
selection of topics becomes a `Source`, from which `select` builds the one statement of a scan.

Frames that continue a run lie in a table of their own, `piece`, with rows out of the same order. So
a scan of `frame` alone counts each run once, however long it is, and costs what it costs without
runs. What wants everything merges the two, where there are pieces at all.
"""

from __future__ import annotations

from xs import frame, ids, sums
from xs.errors import Damaged
from xs.records import NamedTuple
from xs.schema import (
    BROKEN,
    GOES_ON,
    LIVE,
    ORDER_BITS,
    ORDER_MAX,
    ROW_MAX,
    TABLES_OF_FRAMES,
    WHOLE,
    Stored,
    StoredPiece,
    described,
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
    high = ROW_MAX if until is None else ceiling(reader, until, "piece")
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
    reader: sqlite3.Connection, source: Source, asked: Asked, values: dict[str, Any]
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
    return joined_page(reader, among_all, asked, {**values, "high": min(far, values["high"])})


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


class Asked(NamedTuple):
    """What frames of a page are to be: above an id, at most another one, and of which topics."""

    after: int
    until: Optional[int]
    patterns: frame.Patterns

    def fits(self, line: bytes, after: int) -> bool:
        """Whether a frame may come next behind that id: if not, what lists it is damaged."""
        value = id_in(line)
        return (
            after < value
            and (self.until is None or value <= self.until)
            and frame.matches(self.patterns, frame.topic_of(line))
        )


def joined_page(
    reader: sqlite3.Connection, source: Source, asked: Asked, values: dict[str, Any]
) -> tuple[bytes, int]:
    """A page that SQLite joins. It is held to the sums of its lines all at once.

    That its order and its topics are right is looked at where it begins and ends.
    """
    page, count, total = reader.execute(
        "SELECT CAST(group_concat(json, char(10)) || char(10) AS BLOB), count(*), "
        f"sum(sum & {sums.HALF}) FROM ({select(source, 'f.json AS json, f.sum AS sum')})",
        values,
    ).fetchone()
    if not count:
        return b"", 0
    if sums.agree(page, total, count):
        first, last = page[: page.index(b"\n")], page[page.rfind(b"\n", 0, -1) + 1 :]
        if asked.fits(first, asked.after) and asked.fits(last, id_in(first) - 1):
            return page, count
    return bounded_page(reader, select(source, LINE), asked, values)


def bounded_page(
    reader: sqlite3.Connection, statement: str, asked: Asked, values: dict[str, Any]
) -> tuple[bytes, int]:
    """A page that is bounded in bytes, taken row by row from a statement that gives LINE.

    It ends before a damaged frame; one that would begin with it raises `Damaged`.
    """
    lines = [stored.line for stored in bounded_rows(reader, statement, asked, values)]
    return (b"\n".join(lines) + b"\n" if lines else b""), len(lines)


def bounded_rows(
    reader: sqlite3.Connection, statement: str, asked: Asked, values: dict[str, Any]
) -> list[Stored]:
    """As `bounded_page`, frame by frame; after LINE may come content and digest."""
    found: list[Stored] = []
    size = 0
    last = asked.after
    cursor = reader.execute(statement, values)
    for columns in cursor:
        try:
            stored = as_stored(reader, *columns)
            if not asked.fits(stored.line, last):
                raise damage(reader, columns[0])
        except Damaged:
            if not found:
                raise
            break
        last = id_in(stored.line)
        found.append(stored)
        size += len(stored.line) + len(stored.content or b"")
        if size > LARGE_PAGE_BYTES:
            break
    cursor.close()
    return found


def one(
    reader: sqlite3.Connection,
    patterns: frame.Patterns,
    after: int | None,
    before: int | None,
    now: int,
) -> bytes | None:
    """The first selected frame after an id, or (None) the last one before an id, or of all."""
    source = source_of(patterns)
    if source is None:
        return None
    low, high = -1, ROW_MAX
    if after is not None:
        low = floor(reader, after)
    elif before is not None:
        high = ceiling(reader, before - 1)
    values = {**source.values, "low": low, "high": high, "now": now, "count": 1}
    rows = reader.execute(select(source, LINE, descending=after is None), values).fetchall()
    if not rows:  # (all of them: to the statement's end, which ends its transaction)
        return None
    (found,) = rows
    value, line = whole_id(*found), found[2]
    if (
        value <= (-1 if after is None else after)
        or (before is not None and value >= before)
        or not (patterns is None or frame.matches(patterns, frame.topic_of(line)))
    ):
        raise damage(reader, found[0])
    return bytes(line)


# What is stored, held to its sum


# What a statement gives for each frame `f` that `held` is to judge.
LINE = "f.row, f.sum, CAST(f.json AS BLOB)"


def whole_id(row: int, total: Any, line: Any) -> int:
    """The id in a row, if that has what was stored, and lies where its id says; else -1.

    A damaged row may have values of any type.
    """
    if type(line) is bytes and sums.of(line) == total:
        value = id_in(line)
        if value >> 80 == row >> ORDER_BITS:
            return value
    return -1


def is_whole(row: int, total: Any, line: Any) -> bool:
    """Whether a row has what was stored, and lies where its id says."""
    return whole_id(row, total, line) >= 0


def held(reader: sqlite3.Connection, row: int, total: Any, line: Any) -> bytes:
    """The line of a row, if it is what was stored. Raises `Damaged`, which names the frame."""
    if is_whole(row, total, line):
        return bytes(line)
    raise damage(reader, row)


def damage(reader: sqlite3.Connection, row: int) -> Damaged:
    """That the frame at that row is damaged, in a sentence that doesn't rely on its JSON."""
    found = reader.execute(
        "SELECT name FROM topic WHERE number IN (SELECT topic FROM frame WHERE row = :row "
        "UNION ALL SELECT f.topic FROM piece p CROSS JOIN run r ON r.number = p.run "
        "CROSS JOIN frame f ON f.row = r.row WHERE p.row = :row)",
        {"row": row},
    ).fetchone()
    return Damaged(
        f"{described(row, None if found is None else found[0])} is damaged: it is not what was "
        "stored (xs check says what else is)"
    )


def line_at(reader: sqlite3.Connection, table: str, row: int) -> bytes:
    """The line at a row that is there, expired or not."""
    found = reader.execute(f"SELECT {LINE} FROM {table} f WHERE f.row = ?", (row,)).fetchone()
    return held(reader, *found)


# Positions


def bounds(reader: sqlite3.Connection, after: int, until: int | None) -> tuple[int, int]:
    """Between which two rows, the first left out, the ids are that are between two ids."""
    return floor(reader, after), ROW_MAX if until is None else ceiling(reader, until)


def floor(reader: sqlite3.Connection, value: int, table: str = "frame") -> int:
    """The row below or at which all ids are at most `value`, and above which all are greater.

    All ids of that table: in the other one, this row may have another place among the ids. A
    damaged frame, whose id is not known, is above the row if it may be.
    """
    return _place(reader, value, table)[0]


def ceiling(reader: sqlite3.Connection, value: int, table: str = "frame") -> int:
    """As `floor`, but a damaged frame is at or below the row if it may be."""
    return _place(reader, value, table)[1]


def _place(reader: sqlite3.Connection, value: int, table: str) -> tuple[int, int, int]:
    """The floor and the ceiling of an id: between them are damaged frames, and mostly none.

    Besides, the last id of its millisecond up to the floor; -1 if there is none.
    """
    try:
        row, at = _search(reader, value, table)
    except Damaged:
        return _place_amid_damage(reader, value, table)
    return row, row, at


def _place_amid_damage(reader: sqlite3.Connection, value: int, table: str) -> tuple[int, int, int]:
    """As `_place`, by a look at each frame of the millisecond."""
    base = value >> 80 << ORDER_BITS
    low = high = base - 1
    at = -1
    for row, total, line in reader.execute(
        f"SELECT {LINE} FROM {table} f WHERE f.row BETWEEN ? AND ? ORDER BY f.row",
        (base, base | ORDER_MAX),
    ):
        found = whole_id(row, total, line)
        if found >= 0:
            if found > value:
                break
            low, at = row, found
        high = row
    return low, high, at


def _search(reader: sqlite3.Connection, value: int, table: str) -> tuple[int, int]:
    """The floor of an id, and the last id up to there. Raises `Damaged` if one on its way is."""
    if value < 0:
        return -1, -1
    base = value >> 80 << ORDER_BITS
    low = base - 1
    end = base | ORDER_MAX
    ends = reader.execute(_ENDS[table], (base, end) * 2).fetchall()
    if not ends:
        return low, -1
    high, high_id = found = _place_and_id(reader, low, end, ends[-1])
    if high_id <= value:
        return found
    low, low_id = _place_and_id(reader, low, end, ends[0])
    if value <= low_id:
        return (low, low_id) if value == low_id else (low - 1, -1)
    # Ids of one millisecond mostly come in even steps, one by one or as a batch takes them. So the
    # guess is where the id would be then; in turn with the middle, which bounds what it can cost.
    is_even = True
    while high - low > 1:
        share = (value - low_id) / (high_id - low_id) if is_even else 0.5
        guess = min(max(low + round(share * (high - low)), low + 1), high - 1)
        is_even = not is_even
        last = reader.execute(_LAST_UP_TO[table], (low, guess)).fetchone()
        if last is None:
            low = guess
            continue
        found = _place_and_id(reader, low, guess, last)
        if found[1] == value:
            return found
        if found[1] < value:
            low, low_id = guess, found[1]
        else:
            high, high_id = found
    return low, low_id


def _place_and_id(
    reader: sqlite3.Connection, low: int, high: int, found: tuple[int, Any, Any]
) -> tuple[int, int]:
    """Row and id of a frame that lies between two rows, as LINE gives it. Raises `Damaged`."""
    row, value = found[0], whole_id(*found)
    if value < 0 or not low < row <= high:  # or the rows are out of order
        raise damage(reader, row)
    return row, value


_LAST_UP_TO = {
    table: f"SELECT {LINE} FROM {table} f WHERE f.row > ? AND f.row <= ? "
    "ORDER BY f.row DESC LIMIT 1"
    for table in TABLES_OF_FRAMES
}
_ENDS = {  # the first and the last of some rows: two rows, or none
    table: f"SELECT * FROM (SELECT {LINE} FROM {table} f WHERE f.row >= ? AND f.row <= ? "
    f"ORDER BY f.row LIMIT 1) UNION ALL SELECT * FROM (SELECT {LINE} FROM {table} f "
    "WHERE f.row >= ? AND f.row <= ? ORDER BY f.row DESC LIMIT 1)"
    for table in TABLES_OF_FRAMES
}


def id_in(line: bytes) -> int:
    """The id in a line that is whole."""
    return int(frame.id_of(line), 36)


def row_of(reader: sqlite3.Connection, value: int, table: str = "frame") -> int | None:
    """The row of the frame with that id. Raises `Damaged` where a damaged one may be it."""
    row, high, at = _place(reader, value, table)
    if at == value:
        return row
    if high > row:
        raise damage(reader, high)
    return None


def located(reader: sqlite3.Connection, value: int) -> tuple[str, int] | None:
    """The table and the row of the frame with that id, expired or not. Raises as `row_of` does."""
    doubt = None
    for table in TABLES_OF_FRAMES:
        try:
            row = row_of(reader, value, table)
        except Damaged as error:  # it may still be in the other one
            doubt = error
        else:
            if row is not None:
                return table, row
    if doubt is not None:
        raise doubt
    return None


def id_at(reader: sqlite3.Connection, row: int, table: str = "frame") -> int:
    """The id of the frame at that row; -1 if there is none."""
    found = reader.execute(f"SELECT {LINE} FROM {table} f WHERE f.row = ?", (row,)).fetchone()
    return -1 if found is None else id_in(held(reader, *found))


def stored_with_id(reader: sqlite3.Connection, value: int, now: int) -> Stored | None:
    found = located(reader, value)
    if found is None:
        return None
    table, row = found
    stored = reader.execute(
        f"SELECT {LINE}, f.content, f.digest FROM {table} f WHERE f.row = :row AND {LIVE}",
        {"row": row, "now": now},
    ).fetchone()
    return None if stored is None else as_stored(reader, *stored)


def as_stored(
    reader: sqlite3.Connection,
    row: int,
    total: Any,
    line: Any,
    content: bytes | None = None,
    digest: int | None = None,
) -> Stored:
    """What a row has. Raises `Damaged`."""
    line = held(reader, row, total, line)
    if not isinstance(content, (bytes, type(None))):
        raise damage(reader, row)
    return Stored(line, content, digest is None and frame.hash_text(line) is not None)


def newest_row(reader: sqlite3.Connection) -> int | None:
    """The last row of all, of either table."""
    row = reader.execute(
        "SELECT max(row) FROM (SELECT max(row) AS row FROM frame "
        "UNION ALL SELECT max(row) AS row FROM piece)"
    ).fetchone()[0]
    return None if row is None else int(row)


def newest_id(reader: sqlite3.Connection) -> int:
    """The id of the newest stored frame; -1 if there is none.

    If that is damaged, the last one that it can have had.
    """
    row = newest_row(reader)
    if row is None:
        return -1
    try:
        return max(id_at(reader, row), id_at(reader, row, "piece"))
    except Damaged:
        return ((row >> ORDER_BITS) + 1 << 80) - 1


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
    doubt = None
    while newest is not None:
        bucket = newest >> 32 << 32
        for row, total, line, content in reader.execute(
            f"SELECT {LINE}, f.content FROM {table} f WHERE f.digest = :digest AND {LIVE}",
            {"digest": bucket | short(digest), "now": now},
        ):
            if not is_whole(row, total, line):
                doubt = damage(reader, row)
            elif frame.hash_text(line) == expected:  # four bytes may agree by chance
                return bytes(content)
        newest = reader.execute(
            f"SELECT max(digest) FROM {table} WHERE digest IS NOT NULL AND digest < ?", (bucket,)
        ).fetchone()[0]
    if doubt is not None:
        raise doubt
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
        f"SELECT r.number, r.writer, r.key, f.expires, {LINE} "
        "FROM run r CROSS JOIN frame f ON f.row = r.row WHERE r.row = ?",
        (row,),
    ).fetchone()
    if found is None:
        return None
    number, writer, key, expires, *stored = found
    line = held(reader, *stored)
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
        "SELECT row FROM run WHERE number = (SELECT run FROM piece WHERE row = ?)", (row,)
    ).fetchone()
    first = -1 if found is None else id_at(reader, found[0])
    return None if first < 0 else first


def continues(line: bytes, ends: Any, first: int | None = None) -> bool:
    """Whether a piece says what its row does: how it ends its run, and (`first`) of which."""
    found = frame.continuation_in(frame.meta_of(line))
    if found is None or (first is not None and found.first != ids.text(first)):
        return False
    said = GOES_ON if found.more else BROKEN if found.has_error else WHOLE
    return bool(said == ends)


def pieces_after(
    reader: sqlite3.Connection, first: int, number: int, after: int
) -> list[StoredPiece]:
    """Pieces of a run above an id, in order, up to its end; bounded in bytes.

    They end before one that is damaged; if that is the first of them, this raises `Damaged`.
    """
    found: list[StoredPiece] = []
    size = 0
    last = after
    cursor = reader.execute(
        f"SELECT f.ends, {LINE}, f.content, f.digest FROM piece f "
        "WHERE f.run = ? AND f.row > ? ORDER BY f.row",
        (number, floor(reader, after, "piece")),
    )
    for ends, *columns in cursor:
        try:
            stored = as_stored(reader, *columns)
            if id_in(stored.line) <= last or not continues(stored.line, ends, first):
                raise damage(reader, columns[0])
        except Damaged:
            if not found:
                raise
            break
        last = id_in(stored.line)
        found.append(StoredPiece(last, stored, ends))
        size += len(stored.line) + len(stored.content or b"")
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
