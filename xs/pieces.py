"""Runs as they are stored: the first frame of each, and the pieces that continue it.

Functions over a connection that read, and by the index's writer, in its transaction, changes. How a
reading of everything meets the pieces among other frames is in `scan`.
"""

from __future__ import annotations

from xs import frame, ids
from xs.errors import Damaged
from xs.records import NamedTuple
from xs.rows import LINE, as_stored, damage, floor, held, id_at, row_of
from xs.schema import BROKEN, GOES_ON, LARGE_JSON, PAGE_BYTES, WHOLE, StoredPiece, translated

TYPE_CHECKING = False
if TYPE_CHECKING:
    import sqlite3
    from typing import Any, Optional

    from xs.writer import NewFrame, Writer


class Run(NamedTuple):
    """A run as it is stored. `expires`, `topic` and `ttl` are its first frame's.

    `pieces` is how many it has, up to the one that ends it; None while none does.
    """

    number: int
    row: int
    writer: Optional[str]
    key: Optional[str]
    pieces: Optional[int]
    topic: str
    ttl: str
    expires: Optional[int]


def run_at(reader: sqlite3.Connection, row: int) -> Run | None:
    """The run whose first frame is at that row, expired or not; None if it begins none."""
    found = reader.execute(
        f"SELECT r.number, r.writer, r.key, r.pieces, f.expires, {LINE} "
        "FROM run r CROSS JOIN frame f ON f.row = r.row WHERE r.row = ?",
        (row,),
    ).fetchone()
    if found is None:
        return None
    number, writer, key, pieces, expires, *stored = found
    line = held(reader, *stored)
    return Run(number, row, writer, key, pieces, frame.topic_of(line), frame.ttl_of(line), expires)


def run_of(reader: sqlite3.Connection, first: int) -> Run | None:
    """As `run_at`, by the first frame's id."""
    row = row_of(reader, first)
    return None if row is None else run_at(reader, row)


def begins_run(reader: sqlite3.Connection, first: int) -> bool:
    """Whether the frame with that id is the first of a run. Raises `Damaged` if that lacks some."""
    row = row_of(reader, first)
    if row is None:
        return False
    run = run_at(reader, row)
    if run is None:
        # What just looks like the first frame of a run is rare: so it costs little not to trust an
        # index with this.
        query = "SELECT 1 FROM run NOT INDEXED WHERE row = ?"
        if reader.execute(query, (row,)).fetchone() is not None:
            raise lacking(first)
        return False
    if run.pieces is not None and run.pieces != count_of(reader, run.number):
        raise lacking(first)
    return True


def count_of(reader: sqlite3.Connection, number: int) -> int:
    """How many pieces of a run are listed, up to the one that ends it; 0 while none does."""
    found: int = reader.execute(
        # A column that is not in the index: what that lists has to be there.
        "SELECT count(digest IS NULL) FROM piece WHERE run = :number AND "
        "row > (SELECT row FROM run WHERE number = :number) AND "
        "row <= (SELECT min(row) FROM piece WHERE run = :number AND ends > 0)",
        {"number": number},
    ).fetchone()[0]
    return found


def lacking(first: int) -> Damaged:
    """What to say of a run of which pieces are missing."""
    return Damaged(
        f"the content {ids.text(first)} is damaged: not all of its pieces are found: xs check "
        "says more"
    )


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
            value, stored = as_stored(reader, *columns)
            if value <= last or not continues(stored.line, ends, first):
                raise damage(reader, columns[0])
        except Damaged:
            if not found:
                raise
            break
        last = value
        found.append(StoredPiece(last, stored, ends))
        size += len(stored.line) + len(stored.content or b"")
        if ends or size > PAGE_BYTES:
            break
    cursor.close()
    return found


def end_of(reader: sqlite3.Connection, number: int) -> int | None:
    """The id of the piece that ends a run, which is the first that says so; None if none does."""
    row = reader.execute(
        "SELECT min(row) FROM piece WHERE run = ? AND ends > 0", (number,)
    ).fetchone()[0]
    return None if row is None else id_at(reader, row, "piece")


# Changes


def make_run(writer: Writer, row: int, owner: str | None, key: str | None) -> None:
    """The frame at that row begins a run, which `owner` will go on with; nobody (None) may."""
    writer.execute("INSERT INTO run (row, writer, key) VALUES (?, ?, ?)", (row, owner, key))


def find_run(writer: Writer, first: int) -> Run | None:
    """The run whose first frame has that id, expired or not; None if it begins none."""
    writer.flush()
    return run_of(writer.connection, first)


def run_made_of(writer: Writer, first: int) -> Run:
    """The run that the frame with that id, which is there, begins from now on."""
    writer.flush()
    row = row_of(writer.connection, first)
    assert row is not None
    make_run(writer, row, None, None)
    found = run_at(writer.connection, row)
    assert found is not None
    return found


def add_piece(writer: Writer, row: int, new: NewFrame, run: Run, ends: int) -> None:
    """Adds a frame, at a row that was found for it, that continues a run; `ends` says how."""
    digest = None
    if new.content is not None and new.digest is not None:
        digest = writer.listed(new.digest)
    topics = (writer.number(new.topic), *writer.prefixes(new.topic))
    stored = new.as_stored()
    with translated():
        writer.execute(
            "INSERT INTO piece VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (row, run.number, ends, digest, *stored, new.expires),
        )
        for number in topics:
            writer.execute("INSERT INTO listed VALUES (?, ?)", (number, row))
        if new.is_file:
            writer.execute("INSERT INTO file VALUES (?, ?)", (new.digest, row))
        if len(new.line) > LARGE_JSON:
            writer.execute("INSERT INTO large VALUES (?)", (row,))


def run_written_by(writer: Writer, owner: str) -> int | None:
    """The id of the first frame of the run that `owner` has begun and not ended."""
    writer.flush()
    found = writer.execute("SELECT row FROM run WHERE writer = ?", (owner,)).fetchone()
    return None if found is None else id_at(writer.connection, found[0])


def last_of_run(writer: Writer, first: int) -> int | None:
    """The id of a run's last frame so far; None if there is no such run."""
    run = find_run(writer, first)
    if run is None:
        return None
    row = writer.execute("SELECT max(row) FROM piece WHERE run = ?", (run.number,)).fetchone()[0]
    return first if row is None else id_at(writer.connection, row, "piece")


def how_it_ended(writer: Writer, first: int) -> int:
    """GOES_ON while a run has no end, else how its first piece that ends it does."""
    run = find_run(writer, first)
    found = None
    if run is not None:
        found = writer.execute(
            "SELECT ends FROM piece WHERE run = ? AND ends > 0 ORDER BY row LIMIT 1",
            (run.number,),
        ).fetchone()
    return GOES_ON if found is None else int(found[0])


def count_pieces(writer: Writer, run: Run) -> None:
    """Keeps how many pieces a run has that has an end, so that readers know when they miss one.

    Without an end it is none, which is kept as NULL.
    """
    count = count_of(writer.connection, run.number) or None
    writer.execute("UPDATE run SET pieces = ? WHERE number = ?", (count, run.number))


def end_writing(writer: Writer, run: Run, ends: int) -> None:
    """Nobody goes on with a run. A key that made one which broke off is free again."""
    writer.execute("UPDATE run SET writer = NULL WHERE number = ?", (run.number,))
    count_pieces(writer, run)
    if ends == BROKEN and run.key is not None:
        writer.forget_answer(run.topic, run.key)
