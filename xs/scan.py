"""The way through rows: selections of topics, and pages of them. Functions over a connection.

A selection of topics becomes a `Source`, from which `select` builds the one statement of a scan.

Frames that continue a run lie in a table of their own, `piece`, with rows out of the same order. So
a scan of `frame` alone counts each run once, however long it is, and costs what it costs without
runs. What wants everything merges the two, where there are pieces at all.
"""

from __future__ import annotations

from xs import frame, sums
from xs.errors import Damaged
from xs.records import NamedTuple
from xs.rows import LINE, as_stored, ceiling, damage, floor, id_in, is_whole, whole_id
from xs.schema import LIVE, ROW_MAX, Stored
from xs.sqlite import lru_cache

TYPE_CHECKING = False
if TYPE_CHECKING:
    import sqlite3
    from typing import Any, Optional

LARGE_PAGE_BYTES = 1 << 20


class Part(NamedTuple):
    """Where some frames `f` are listed: SQL from FROM to WHERE, and the column that orders them.

    `rows`: the same for their rows alone, expired or not.
    """

    listed: str
    row: str
    rows: str = ""


class Source(NamedTuple):
    """The frames of a selection: the parts that list them, and the values that those name."""

    parts: tuple[Part, ...]
    values: dict[str, Any]
    table: str = "frame"
    is_topic: bool = False  # one topic, and nothing below it


_EVERY_ROW = "frame f WHERE f.row > :low AND f.row <= :high"
_EVERY = Part(f"{_EVERY_ROW} AND {LIVE}", "f.row", _EVERY_ROW)
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
            found = f"WHERE b.prefix = {number} AND b.row > :low AND b.row <= :high"
            listed = f"below b CROSS JOIN frame f ON f.row = b.row {found} AND {LIVE}"
            parts.append(Part(listed, "b.row", f"below b {found}"))
        else:
            rows = f"frame f WHERE f.topic = {number} AND f.row > :low AND f.row <= :high"
            parts.append(Part(f"{rows} AND {LIVE}", "f.row", rows))
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
    topic, first, last, frames, among = reader.execute(_DENSITY, values).fetchone()
    if frames < _SAMPLE or among > _SAMPLE * _DENSE:
        return b"", 0
    # Not much further than a page of that density goes: it may get thinner.
    far = last + (last - first) * (values["count"] // _SAMPLE)
    among_all = Source((_AMONG_ALL,), {})
    values = {**values, "high": min(far, values["high"]), "topic": topic}
    return joined_page(reader, among_all, asked, values)


_SAMPLE = 50  # frames
_DENSE = 3  # times as many frames in all
_DENSITY = (
    "SELECT topic, first, last, frames, (SELECT count(*) FROM (SELECT 1 FROM frame "
    f"WHERE row >= first AND row <= last LIMIT {_SAMPLE * _DENSE + 1})) FROM "
    "(SELECT topic, min(row) AS first, max(row) AS last, count(*) AS frames FROM "
    "(SELECT topic, row FROM frame WHERE topic = (SELECT number FROM topic WHERE name = :p0) "
    f"AND row > :low AND row <= :high ORDER BY row LIMIT {_SAMPLE}))"
)
_AMONG_ALL = Part(  # `+`: not by way of the topic's index, which `rows` takes
    f"frame f WHERE f.row > :low AND f.row <= :high AND +f.topic = :topic AND {LIVE}",
    "f.row",
    "frame f WHERE f.topic = :topic AND f.row > :low AND f.row <= :high",
)


class Asked(NamedTuple):
    """What frames of a page are to be: above an id, at most another one, and of which topics."""

    after: int
    until: Optional[int]
    patterns: frame.Patterns

    def fits(self, value: int, line: bytes, after: int) -> bool:
        """Whether a frame may come next behind that id: if not, what lists it is damaged."""
        return (
            after < value
            and (self.until is None or value <= self.until)
            and (self.patterns is None or frame.matches(self.patterns, frame.topic_of(line)))
        )


def next_large(reader: sqlite3.Connection, low: int) -> tuple[int, int]:
    """The rows of the next large frame above one (ROW_MAX: none is), and of the newest frame."""
    large, newest = reader.execute(
        "SELECT (SELECT min(row) FROM large WHERE row > ?), (SELECT max(row) FROM frame)", (low,)
    ).fetchone()
    return ROW_MAX if large is None else int(large), -1 if newest is None else int(newest)


def joined_page(
    reader: sqlite3.Connection, source: Source, asked: Asked, values: dict[str, Any]
) -> tuple[bytes, int]:
    """A page that SQLite joins. It is held to the sums of its lines all at once.

    That its order and its topics are right is looked at where it begins and ends: it is that in
    which SQLite goes through the one table or index that lists the frames.
    """
    expired = reader.execute(_EXPIRED, values).fetchone() is not None
    if len(source.parts) == 1 and not expired:
        rows = _up_to_last(source.parts[0], values["high"] == ROW_MAX)
    else:
        rows = f"({select(source, 'f.json AS json, f.sum AS sum')}) f"
    # The newline as it is: SQLite would call `char(10)` for each row (bench/replay.py: an eighth).
    page, count, total = reader.execute(
        "SELECT CAST(group_concat(f.json, '\n') || '\n' AS BLOB), count(*), "
        f"sum(f.sum & {sums.HALF}) FROM {rows}",
        values,
    ).fetchone()
    has_values = page is not None and total is not None  # as columns of damaged rows may have not
    if has_values and count <= values["count"] and sums.agree(page, total, count):
        first, last = page[: page.index(b"\n")], page[page.rfind(b"\n", 0, -1) + 1 :]
        start, end = id_in(first), id_in(last)
        if asked.fits(start, first, asked.after) and asked.fits(end, last, start - 1):
            return page, count
    # That nothing came is no proof that nothing is left: rows may be listed of which none is there.
    return bounded_page(reader, select(source, LINE), asked, values)


@lru_cache(maxsize=64)
def _up_to_last(part: Part, is_endless: bool) -> str:
    """The frames of a part above :low, at most :count, where none has expired, without a LIMIT.

    A LIMIT takes a query of its own inside the one that joins them, which hands over each row: that
    costs more than to find the last row first (bench/replay.py: a seventh of a page). Where :high
    is none, not to look at it with each row there is a twentieth.
    """
    rows = part.rows.replace(f" AND {part.row} <= :high", "") if is_endless else part.rows
    last = f"SELECT {part.row} FROM {rows} ORDER BY {part.row} LIMIT 1 OFFSET :count - 1"
    return part.listed.replace(f" AND {LIVE}", "").replace(":high", f"ifnull(({last}), :high)")


_EXPIRED = "SELECT 1 FROM frame WHERE expires <= :now LIMIT 1"  # by way of its index


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
            value, stored = as_stored(reader, *columns)
            if not asked.fits(value, stored.line, last):
                raise damage(reader, columns[0])
        except Damaged:
            if not found:
                raise
            break
        last = value
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
    low, high = -1, ROW_MAX
    if after is not None:
        low = floor(reader, after)
    elif before is not None:
        high = ceiling(reader, before - 1)
    if patterns is None and after is not None:
        # What look-ups mostly ask for has a statement of its own, as in `newest_of`: the way by a
        # `Source` takes as long as SQLite (bench/lookup.py). It is read to its end, which ends its
        # transaction.
        rows = reader.execute(_FIRST_ABOVE, (low, now)).fetchall()
    else:
        source = source_of(patterns)
        if source is None:
            return None
        values = {**source.values, "low": low, "high": high, "now": now, "count": 1}
        statement = select(source, LINE, descending=after is None)
        rows = reader.execute(statement, values).fetchall()
    if not rows:
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


def newest_of(reader: sqlite3.Connection, topic: str, now: int) -> bytes | None:
    """The newest frame of a topic."""
    rows = reader.execute(_LAST_OF_TOPIC, (topic, now)).fetchall()
    if not rows:
        return None
    (found,) = rows
    if not is_whole(*found) or frame.topic_of(found[2]) != topic:
        raise damage(reader, found[0])
    return bytes(found[2])


_LIVE = LIVE.replace(":now", "?")
_FIRST_ABOVE = f"SELECT {LINE} FROM frame f WHERE f.row > ? AND {_LIVE} ORDER BY f.row LIMIT 1"
_LAST_OF_TOPIC = (
    f"SELECT {LINE} FROM frame f WHERE f.topic = (SELECT number FROM topic WHERE name = ?) "
    f"AND {_LIVE} ORDER BY f.row DESC LIMIT 1"
)
