"""Frames that go: removed, expired, or more than their topic keeps. Changes to the index, by its
writer, in the transaction that it has begun.
"""

from __future__ import annotations

from xs import frame, ids
from xs.errors import Damaged
from xs.records import NamedTuple
from xs.rows import LINE, damage, held, id_at, line_at, row_of
from xs.schema import LARGE_JSON, ORDER_BITS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Optional

    from xs.writer import Writer


class Removed(NamedTuple):
    """What is left to do for a removed frame: its line, and its content if that is a file.

    `pieces`, if it began a run: digests of the files that the rest of it named.
    """

    line: bytes
    file_digest: Optional[bytes]
    pieces: Optional[list[bytes]] = None


def remove(writer: Writer, value: int) -> Removed | None:
    """Removes the frame with that id; None if there is none. Raises `Damaged`."""
    writer.flush()
    row = row_of(writer.connection, value)
    return None if row is None else _remove(writer, row)


def remove_but(writer: Writer, topic: str, keep: int, now: int) -> list[Removed]:
    """Removes all but the newest `keep` frames of a topic, as far as they are whole."""
    writer.flush()
    number = writer.number(topic)
    found = writer.execute(
        "SELECT row FROM frame WHERE topic = ? AND row < coalesce((SELECT min(row) FROM "
        "(SELECT row FROM frame f WHERE topic = ? AND (expires IS NULL OR expires > ?) "
        "ORDER BY row DESC LIMIT ?)), 0)",
        (number, number, now, keep),
    ).fetchall()
    return remove_whole(writer, found)


def remove_whole(writer: Writer, rows: list[tuple[int]]) -> list[Removed]:
    """Removes frames, but none that is damaged: it may not be one of those at all."""
    removed = []
    for (row,) in rows:
        try:
            removed.append(_remove(writer, row))
        except Damaged:
            pass  # xs check names it
    return removed


def _remove(writer: Writer, row: int) -> Removed:
    """Removes a frame, and what continues it. Raises `Damaged` before it does."""
    line = line_at(writer.connection, "frame", row)
    listed, expires = writer.execute(
        "SELECT digest, expires FROM frame WHERE row = ?", (row,)
    ).fetchone()
    if expires != frame.expiry(frame.ttl_of(line), row >> ORDER_BITS):
        raise damage(writer.connection, row)
    value = ids.parse(frame.id_of(line))
    name = frame.topic_of(line)
    run = None
    if frame.may_begin_run(line):
        run = writer.execute(
            "SELECT number, writer IS NOT NULL, key FROM run WHERE row = ?", (row,)
        ).fetchone()
    newest = row
    files: list[tuple[int, bytes]] = []
    if run is not None:
        last, files = _pieces_of(writer, run[0], value)
        newest = max(row, last)
    # Nothing that is damaged goes: what is read is read before the first change.
    if newest == writer.newest_row:
        writer.outlive(value if newest == row else id_at(writer.connection, newest, "piece"))
    writer.execute("DELETE FROM frame WHERE row = ?", (row,))
    if "." in name:
        for prefix in writer.prefixes(name):
            writer.execute("DELETE FROM below WHERE prefix = ? AND row = ?", (prefix, row))
    if len(line) > LARGE_JSON:
        writer.execute("DELETE FROM large WHERE row = ?", (row,))
    digest = _digest_in(line) if listed is None else None
    if digest is not None:
        writer.execute("DELETE FROM file WHERE digest = ? AND row = ?", (digest, row))
    if run is None:
        return Removed(line, digest)
    number, is_being_written, key = run
    if is_being_written and key is not None:
        # The content was never whole: as when it breaks off, the key is free again.
        writer.forget_answer(name, key)
    _remove_pieces(writer, number, name, files)
    return Removed(line, digest, [each for _, each in files])


def _pieces_of(writer: Writer, number: int, first: int) -> tuple[int, list[tuple[int, bytes]]]:
    """The last row of a run's pieces (-1: none), and row and digest of each file that they name.

    Raises `Damaged` unless all of them are what was stored.
    """
    from xs.pieces import continues  # here: few frames begin a run

    last = -1
    files = []
    as_we_write_it = f'"chunk":"{ids.text(first)}"'.encode()
    for ends, listed, row, *stored in writer.execute(
        f"SELECT f.ends, f.digest, {LINE} FROM piece f WHERE f.run = ?", (number,)
    ):
        line = held(writer.connection, row, *stored)
        if as_we_write_it not in line and not continues(line, ends, first):
            raise damage(writer.connection, row)
        digest = _digest_in(line) if listed is None else None
        if digest is not None:
            files.append((row, digest))
        last = max(last, row)
    return last, files


def _remove_pieces(writer: Writer, number: int, topic: str, files: list[tuple[int, bytes]]) -> None:
    """Removes the rest of a run."""
    for row, digest in files:
        writer.execute("DELETE FROM file WHERE digest = ? AND row = ?", (digest, row))
    of_run = "row IN (SELECT row FROM piece WHERE run = ?)"
    for each in (writer.number(topic), *writer.prefixes(topic)):
        writer.execute(f"DELETE FROM listed WHERE topic = ? AND {of_run}", (each, number))
    writer.execute(f"DELETE FROM large WHERE {of_run}", (number,))
    writer.execute("DELETE FROM piece WHERE run = ?", (number,))
    writer.execute("DELETE FROM run WHERE number = ?", (number,))


def _digest_in(line: bytes) -> bytes | None:
    text = frame.hash_text(line)
    return None if text is None else frame.parse_integrity(text)
