"""A walk through the stored frames of a selection, page by page.

SQLite joins the lines of a page itself, so that Python handles one value (bench/replay.py: 2 × the
frames a second that rows give).

A position is an id. Where the last page ended is remembered as a row, and looked at again in the
transaction that uses it: that saves a page the way to its beginning (bench/replay.py).
"""

from __future__ import annotations

from xs import frame, sums
from xs.errors import Damaged
from xs.records import NamedTuple
from xs.rows import LINE, as_stored, ceiling, damage, floor, id_at, id_in
from xs.scan import Part, Source, merged, pieces_of, select, source_of
from xs.schema import FIRST_ROWS, LIVE, PAGE_BYTES, PAGE_ROWS, ROW_MAX, Stored
from xs.sqlite import lru_cache

TYPE_CHECKING = False
if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable
    from typing import Any, Optional

    from xs.connections import Reading

    # Frames, a line each with its newline; how many; in which row the last lies, if it is known.
    _Page = tuple[bytes, int, Optional[int]]


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


class Walk:
    """The stored frames of a selection, page by page, from one thread at a time.

    Without `chunks` frames that continue a run are left out.
    """

    def __init__(
        self, reading: Callable[[], Reading], patterns: frame.Patterns, *, chunks: bool
    ) -> None:
        self._reading = reading
        self._patterns = patterns
        self._chunks = chunks
        self._source = source_of(patterns)
        self._rows: dict[int, int] = {}  # where the frames with some ids were
        self._most = FIRST_ROWS  # frames in the next page

    def page(self, after: int, until: int | None, limit: int, now: int) -> tuple[bytes, int]:
        """The next selected frames above `after`: their lines, each with its newline, and how many.

        At most PAGE_ROWS and `limit` frames, and as many as come to PAGE_BYTES if they are like
        those of the page before. No frames means that there are none (now). A page ends before a
        damaged frame; one that would begin with it raises `Damaged`.
        """
        lines, count = self._page(after, until, min(limit, self._most, PAGE_ROWS), now)
        if count:
            self._most = max(1, count * PAGE_BYTES // len(lines))
        return lines, count

    def _page(self, after: int, until: int | None, most: int, now: int) -> tuple[bytes, int]:
        source = self._source
        with self._reading() as reader:
            pieces = self._pieces(reader, after, until)
            if source is None and pieces is None:
                return b"", 0
            asked = Asked(after, until, self._patterns)
            values = self._values(reader, asked, most, now)
            if source is not None:
                lines, count = self._page_of_frames(reader, source, asked, values, pieces)
                if count or pieces is None:
                    return lines, count
            assert pieces is not None
            values.update(pieces[0].values)
            rows = merged(source, pieces[0], "sum, json")
            return _bounded_page(reader, f"SELECT {LINE} FROM ({rows}) f", asked, values)[:2]

    def rows(self, after: int, until: int | None, limit: int, now: int) -> list[Stored]:
        """As `page`, frame by frame and with inline content; the list is bounded in bytes.

        It ends before a damaged frame; one that would begin with it raises `Damaged`.
        """
        source = self._source
        with self._reading() as reader:
            pieces = self._pieces(reader, after, until)
            if source is None and pieces is None:
                return []
            asked = Asked(after, until, self._patterns)
            values = self._values(reader, asked, min(limit, PAGE_ROWS), now)
            if source is not None:
                rows = select(source, f"{LINE}, f.content, f.digest")
            if pieces is not None:
                values.update(pieces[0].values)
                rows = merged(source, pieces[0], "sum, json, content, digest")
                rows = f"SELECT {LINE}, f.content, f.digest FROM ({rows}) f"
            return _bounded_rows(reader, rows, asked, values)

    def _pieces(
        self, reader: sqlite3.Connection, after: int, until: int | None
    ) -> tuple[Source, int] | None:
        return pieces_of(reader, self._patterns, after, until) if self._chunks else None

    def _values(
        self, reader: sqlite3.Connection, asked: Asked, most: int, now: int
    ) -> dict[str, Any]:
        """What statements name: between which rows, how many frames, and of which topics."""
        low = self._row_of(reader, asked.after, floor)
        high = ROW_MAX if asked.until is None else self._row_of(reader, asked.until, ceiling)
        self._rows = {asked.after: low}
        if asked.until is not None:
            self._rows[asked.until] = high
        values = {"low": low, "high": high, "now": now, "count": most}
        if self._source is not None:
            values.update(self._source.values)
        return values

    def _row_of(
        self,
        reader: sqlite3.Connection,
        value: int,
        place: Callable[[sqlite3.Connection, int], int],
    ) -> int:
        """The row of an id: of the frame that has it, if that is where it was, or by its place."""
        row = self._rows.get(value)
        if row is not None:
            try:
                if id_at(reader, row) == value:
                    return row
            except Damaged:
                pass  # the way to its place tells what that means
        return place(reader, value)

    def _page_of_frames(
        self,
        reader: sqlite3.Connection,
        source: Source,
        asked: Asked,
        values: dict[str, Any],
        pieces: tuple[Source, int] | None,
    ) -> tuple[bytes, int]:
        """The frames of a page that come before the first piece."""
        if pieces is not None:
            values = {**values, "high": min(values["high"], pieces[1] - 1)}
        large, newest = _next_large(reader, values["low"])
        bound = min(large, values["high"] + 1)
        small = {**values, "high": ROW_MAX if bound > newest else bound - 1}
        lines, count, row = _dense_page(reader, source, asked, small)
        if not count:
            lines, count, row = _joined_page(reader, source, asked, small)
        if row is not None:
            self._rows[id_in(lines[lines.rfind(b"\n", 0, -1) + 1 :])] = row
        if count or bound > values["high"]:
            return lines, count
        values = {**values, "low": bound - 1}
        return _bounded_page(reader, select(source, LINE), asked, values)[:2]


_NOTHING: _Page = (b"", 0, None)


def _dense_page(
    reader: sqlite3.Connection, source: Source, asked: Asked, values: dict[str, Any]
) -> _Page:
    """As `_joined_page`, for a topic that has a good share of the frames there; else empty.

    Going through all frames then takes less than looking up each one that the topic's index names
    (bench/replay.py: a quarter). How dense the topic is, its next few frames tell: each page asks,
    since from one to the next others may have become many.
    """
    if not source.is_topic or values["count"] < _SAMPLE:
        return _NOTHING
    topic, first, last, frames, among = reader.execute(_DENSITY, values).fetchone()
    if frames < _SAMPLE or among > _SAMPLE * _DENSE:
        return _NOTHING
    # Not much further than a page of that density goes: it may get thinner.
    far = last + (last - first) * (values["count"] // _SAMPLE)
    values = {**values, "high": min(far, values["high"]), "topic": topic}
    return _joined_page(reader, _AMONG_ALL, asked, values)


_SAMPLE = 50  # frames
_DENSE = 3  # times as many frames in all
_DENSITY = (
    "SELECT topic, first, last, frames, (SELECT count(*) FROM (SELECT 1 FROM frame "
    f"WHERE row >= first AND row <= last LIMIT {_SAMPLE * _DENSE + 1})) FROM "
    "(SELECT topic, min(row) AS first, max(row) AS last, count(*) AS frames FROM "
    "(SELECT topic, row FROM frame WHERE topic = (SELECT number FROM topic WHERE name = :p0) "
    f"AND row > :low AND row <= :high ORDER BY row LIMIT {_SAMPLE}))"
)
_AMONG_ALL = Source(
    (
        Part(  # `+`: not by way of the topic's index, which `rows` takes
            f"frame f WHERE f.row > :low AND f.row <= :high AND +f.topic = :topic AND {LIVE}",
            "f.row",
            "frame f WHERE f.topic = :topic AND f.row > :low AND f.row <= :high",
        ),
    ),
    {},
)


def _next_large(reader: sqlite3.Connection, low: int) -> tuple[int, int]:
    """The rows of the next large frame above one (ROW_MAX: none is), and of the newest frame."""
    large, newest = reader.execute(
        "SELECT (SELECT min(row) FROM large WHERE row > ?), (SELECT max(row) FROM frame)", (low,)
    ).fetchone()
    return ROW_MAX if large is None else int(large), -1 if newest is None else int(newest)


def _joined_page(
    reader: sqlite3.Connection, source: Source, asked: Asked, values: dict[str, Any]
) -> _Page:
    """A page that SQLite joins. It is held to the sums of its lines all at once.

    That its order and its topics are right is looked at where it begins and ends: it is that in
    which SQLite goes through the one table or index that lists the frames.
    """
    row = None
    asked_for = values
    if len(source.parts) == 1 and reader.execute(_EXPIRED, values).fetchone() is None:
        # A LIMIT takes a query of its own inside the one that joins them, which hands over each
        # row: that costs more than to find the last row first (bench/replay.py: a seventh).
        last, whole, rest = _up_to_last(source.parts[0], values["high"] == ROW_MAX)
        found = reader.execute(last, values).fetchone()
        if found is None:
            statement = rest
        else:
            statement = whole
            row = found[0]
            values = {**values, "high": row}
    else:
        statement = _joined(f"({select(source, 'f.json AS json, f.sum AS sum')}) f")
    page, total, count = reader.execute(statement, values).fetchone()
    if page is not None and total is not None:  # as columns of damaged rows may not have them
        page += b"\n"  # in SQL it would take four times as long (bench/replay.py)
        if count <= values["count"] and sums.agree(page, total, count):
            start, end = page[: page.index(b"\n")], page[page.rfind(b"\n", 0, -1) + 1 :]
            first, newest = id_in(start), id_in(end)
            if asked.fits(first, start, asked.after) and asked.fits(newest, end, first - 1):
                return page, count, row
    # That nothing came is no proof that nothing is left: rows may be listed of which none is there.
    return _bounded_page(reader, select(source, LINE), asked, asked_for)


_EXPIRED = "SELECT 1 FROM frame WHERE expires <= :now LIMIT 1"  # by way of its index


@lru_cache(maxsize=64)
def _up_to_last(part: Part, is_endless: bool) -> tuple[str, str, str]:
    """Three statements, for a part where nothing has expired.

    One finds the row of the last frame: the last of :count above :low. Two join frames: all :count
    of them, up to there, and those up to :high, if there are fewer. Where :high is none, not to
    look at it with each row there is a twentieth (bench/replay.py).
    """
    rows = part.rows.replace(f" AND {part.row} <= :high", "") if is_endless else part.rows
    last = f"SELECT {part.row} FROM {rows} ORDER BY {part.row} LIMIT 1 OFFSET :count - 1"
    listed = part.listed.replace(f" AND {LIVE}", "")
    return last, _joined(listed, ":count"), _joined(listed)


def _joined(rows: str, count: str = "count(*)") -> str:
    """A statement that joins the lines of rows `f`, adds up their sums, and counts them.

    Each row is some 140 ns, so that little things tell (bench/replay.py). Newlines are given as
    they are, since SQLite would call `char(10)` for each: an eighth. A count that is known: a
    twentieth. And `%` is a shorter way through SQLite than `&`: another.
    """
    return (
        "SELECT CAST(group_concat(f.json, '\n') AS BLOB), "
        f"sum(f.sum % {sums.LOW}), {count} FROM {rows}"
    )


def _bounded_page(
    reader: sqlite3.Connection, statement: str, asked: Asked, values: dict[str, Any]
) -> _Page:
    """A page that is bounded in bytes, taken row by row from a statement that gives LINE.

    It ends before a damaged frame; one that would begin with it raises `Damaged`.
    """
    lines = [stored.line for stored in _bounded_rows(reader, statement, asked, values)]
    return (b"\n".join(lines) + b"\n", len(lines), None) if lines else _NOTHING


def _bounded_rows(
    reader: sqlite3.Connection, statement: str, asked: Asked, values: dict[str, Any]
) -> list[Stored]:
    """As `_bounded_page`, frame by frame; after LINE may come content and digest."""
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
        if size > PAGE_BYTES:
            break
    cursor.close()
    return found
