"""The way through rows: selections of topics, and the ends of them. Functions over a connection.

A selection of topics becomes a `Source`, from which `select` builds the one statement of a scan.

Frames that continue a run lie in a table of their own, `piece`, with rows out of the same order. So
a scan of `frame` alone counts each run once, however long it is, and costs what it costs without
runs. What wants everything merges the two, where there are pieces at all.
"""

from __future__ import annotations

from xs import frame
from xs.records import NamedTuple
from xs.rows import LINE, ceiling, damage, floor, is_whole, whole_id
from xs.schema import LIVE, ROW_MAX
from xs.sqlite import lru_cache

TYPE_CHECKING = False
if TYPE_CHECKING:
    import sqlite3
    from typing import Any


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
