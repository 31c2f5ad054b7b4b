"""Single rows: held to their sums, found by a place among the ids, by an id, by a content's digest.

A position outside `index` is an id; `floor` makes it a row, in the transaction that uses it.
Functions over a connection.
"""

from __future__ import annotations

from xs import frame, ids, sums
from xs.errors import Damaged
from xs.schema import (
    LIVE,
    ORDER_BITS,
    ORDER_MAX,
    ROW_MAX,
    TABLES_OF_FRAMES,
    Script,
    Stored,
    described,
    short,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    import sqlite3
    from typing import Any

# What is stored, held to its sum


_NONE = type(None)

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


def is_pin(digest: object, created: object, content: object) -> bool:
    """Whether a row of `pin` has what one can have; its content may still be another."""
    is_digest = type(digest) is bytes and len(digest) == 32
    return is_digest and type(created) is int and type(content) in (bytes, _NONE)


def is_script(kept: Script) -> bool:
    """Whether a row of `script` has what one can have: it has no sum."""
    kind, name, source, active, position, state = kept
    are_texts = type(kind) is type(name) is type(source) is type(position) is str
    return are_texts and active in (0, 1) and ids.is_id(position) and type(state) in (str, _NONE)


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
        row, at, _ = _search(reader, value, table)
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


def _search(reader: sqlite3.Connection, value: int, table: str) -> tuple[int, int, Any]:
    """The floor of an id, the last id up to there, and what is stored of that frame, as _FOUND.

    Raises `Damaged` if a frame on its way is.
    """
    if value < 0:
        return -1, -1, None
    base = value >> 80 << ORDER_BITS
    low = base - 1
    end = base | ORDER_MAX
    ends = reader.execute(ENDS[table], (base, end) * 2).fetchall()
    if not ends:
        return low, -1, None
    high, high_id = _place_and_id(reader, low, end, ends[-1])
    if high_id <= value:
        return high, high_id, ends[-1]
    low, low_id = _place_and_id(reader, low, end, ends[0])
    if value <= low_id:
        return (low, low_id, ends[0]) if value == low_id else (low - 1, -1, None)
    at_low = ends[0]
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
            return (*found, last)
        if found[1] < value:
            low, low_id, at_low = guess, found[1], last
        else:
            high, high_id = found
    return low, low_id, at_low


def _place_and_id(
    reader: sqlite3.Connection, low: int, high: int, found: tuple[int, Any, Any, Any]
) -> tuple[int, int]:
    """Row and id of a frame that lies between two rows, as _FOUND gives it. Raises `Damaged`."""
    row, value = found[0], whole_id(*found[:3])
    if value < 0 or not low < row <= high:  # or the rows are out of order
        raise damage(reader, row)
    return row, value


_FOUND = f"{LINE}, f.expires"
_LAST_UP_TO = {
    table: f"SELECT {_FOUND} FROM {table} f WHERE f.row > ? AND f.row <= ? "
    "ORDER BY f.row DESC LIMIT 1"
    for table in TABLES_OF_FRAMES
}
ENDS = {  # the first and the last of some rows: two rows, or none
    table: f"SELECT * FROM (SELECT {_FOUND} FROM {table} f WHERE f.row >= ? AND f.row <= ? "
    f"ORDER BY f.row LIMIT 1) UNION ALL SELECT * FROM (SELECT {_FOUND} FROM {table} f "
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


def line_with_id(reader: sqlite3.Connection, value: int, now: int) -> bytes | None:
    """The line of the frame with that id, which the way to its place has found already."""
    try:
        for table in TABLES_OF_FRAMES:
            _, at, found = _search(reader, value, table)
            if at == value:
                line, expires = found[2:]
                has_expired = isinstance(expires, (int, float)) and expires <= now  # as LIVE has it
                return None if has_expired else bytes(line)
    except Damaged:  # one near it may be, and not this one
        stored = stored_with_id(reader, value, now)
        return None if stored is None else stored.line
    return None


def stored_with_id(reader: sqlite3.Connection, value: int, now: int) -> Stored | None:
    found = located(reader, value)
    if found is None:
        return None
    table, row = found
    stored = reader.execute(_STORED[table], (row, now)).fetchone()
    return None if stored is None else as_stored(reader, *stored)[1]


_STORED = {
    table: f"SELECT {LINE}, f.content, f.digest FROM {table} f WHERE f.row = ? AND "
    + LIVE.replace(":now", "?")
    for table in TABLES_OF_FRAMES
}


def as_stored(
    reader: sqlite3.Connection,
    row: int,
    total: Any,
    line: Any,
    content: bytes | None = None,
    digest: int | None = None,
) -> tuple[int, Stored]:
    """The id of a row's frame, and what the row has. Raises `Damaged`."""
    value = whole_id(row, total, line)
    if value < 0 or not (content is None or isinstance(content, bytes)):
        raise damage(reader, row)
    return value, Stored(line, content, digest is None and frame.hash_text(line) is not None)


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
    """No id above it has been given out. Raises `Damaged`."""
    kept = reader.execute("SELECT id FROM mark").fetchone()
    if kept is not None and not (isinstance(kept[0], str) and ids.is_id(kept[0])):
        raise Damaged("the index is damaged: the mark, the last id that was given out, is no id")
    return max(int(kept[0], 36) if kept else 0, newest_id(reader))


# Content


def inline_content(reader: sqlite3.Connection, digest: bytes, now: int) -> bytes | None:
    """Inline content with that digest, of a frame or pinned. Raises `Damaged` if all of it is."""
    pinned = reader.execute("SELECT content FROM pin WHERE digest = ?", (digest,)).fetchone()
    doubt = None
    if pinned is not None and pinned[0] is not None:
        try:
            return _checked(pinned[0], frame.integrity(digest))
        except Damaged as error:  # a frame may have it, too
            doubt = error
    for table in TABLES_OF_FRAMES:
        found = _inline_content(reader, digest, now, table)
        if found is not None:
            return found
    if doubt is not None:
        raise doubt
    return None


def _checked(content: Any, hash_: str) -> bytes:
    from xs.content import checked  # here: few look content up by its hash

    return checked(content if type(content) is bytes else b"", hash_)


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
                try:
                    return _checked(content, expected)
                except Damaged as error:  # another frame may have it, too
                    doubt = error
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
