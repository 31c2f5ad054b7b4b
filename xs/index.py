"""The SQLite index of a store: everything that is read from it.

Behind it lie the modules with SQL: `schema` (what is there), `rows` (single ones), `scan` (the way
through them), `walk` (page by page), `pieces` (runs), and `connections`, which open the database;
`writer` changes it.

Where a frame lies: its row is `milliseconds of its id << 15 | order within the millisecond`, so
rows are in order of id by themselves, the id needs no index of its own and times are ranges. Rows
are private to these files; every position outside is an id, resolved in the transaction that uses
it.

Finding frames by topic: a frame's row has its topic's number (an index), and for a dotted topic the
table `below` lists it under each wildcard above it: `a.b.c` under `a.*` and `a.b.*`. So a wildcard
costs as much as an exact topic, however many topics it covers.

Finding small content by hash: an index over all digests would put every append on a page of its own
choosing (on a trial 3 × slower at 300,000 frames). So the index is over a number that begins with a
bucket, some thousands of frames that were appended together, and goes on with the digest: writes
stay close, and a look-up asks each bucket.
"""

from __future__ import annotations

from xs import frame
from xs.connections import Reading
from xs.errors import Damaged
from xs.rows import (
    bounds,
    id_at,
    inline_content,
    line_with_id,
    mark_of,
    names_file,
    newest_id,
    row_of,
    stored_with_id,
)
from xs.scan import (
    merged,
    newest_of,
    one,
    pieces_of,
    select,
    source_of,
)
from xs.schema import IS_SCRIPT_TOPIC, Script, Stored, StoredPiece, translated

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from xs.connections import Connections
    from xs.pieces import Run
    from xs.places import Places
    from xs.walk import Walk


class Index:
    """What one store's database has, by its connections. From any thread."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections
        self._places: Places | None = None

    def reading(self) -> Reading:
        """A connection inside a read transaction, which ends with the block."""
        return Reading(self._connections)

    # Reading

    def get(self, value: int, now: int) -> bytes | None:
        """The line of the frame with that id, or None."""
        found = self._nearby(lambda places: places.frame, value, now)
        if found is not None:
            return found
        with self.reading() as reader:
            return line_with_id(reader, value, now)

    def stored(self, value: int, now: int) -> Stored | None:
        """The frame with that id and its content, or None."""
        with self.reading() as reader:
            return stored_with_id(reader, value, now)

    def next(self, value: int, patterns: frame.Patterns, now: int) -> bytes | None:
        """The first frame above that id among those selected, or None."""
        found = self._nearby(lambda places: places.next, value, now) if patterns is None else None
        if found is not None:
            return found or None
        with self.reading() as reader:
            return one(reader, patterns, value, None, now)

    def prev(self, value: int, patterns: frame.Patterns, now: int) -> bytes | None:
        """The last frame below that id among those selected, or None."""
        found = self._nearby(lambda places: places.prev, value, now) if patterns is None else None
        if found is not None:
            return found or None
        with self.reading() as reader:
            return one(reader, patterns, None, value, now)

    def first(self, patterns: frame.Patterns, now: int) -> bytes | None:
        return self._one(patterns, -1, None, now)

    def last(self, patterns: frame.Patterns, now: int) -> bytes | None:
        if patterns is not None and len(patterns) == 1 and not self._connections.read_only:
            (topic,) = patterns
            if not topic.endswith(".*"):
                return self._alone(newest_of, topic, now)
        return self._one(patterns, None, None, now)

    def _one(
        self, patterns: frame.Patterns, after: int | None, before: int | None, now: int
    ) -> bytes | None:
        """As `scan.one` at either end: a single statement, which is a transaction by itself."""
        if self._connections.read_only:  # it may have to wait until it can begin
            with self.reading() as reader:
                return one(reader, patterns, after, before, now)
        return self._alone(one, patterns, after, before, now)

    def _nearby(
        self, look: Callable[[Places], Callable[..., bytes | None]], value: int, now: int
    ) -> bytes | None:
        """What one of the ways of `places` finds; None where that is not known without a search."""
        if self._connections.read_only:
            return None
        if self._places is None:
            from xs.places import Places  # which an append needs not

            self._places = Places()
        try:
            return self._alone(look(self._places), value, now)
        except Damaged:  # perhaps elsewhere
            return None

    def _alone(self, read: Callable[..., bytes | None], *asked: Any) -> bytes | None:
        """What `read` finds by statements each of which is a transaction by itself."""
        connection = self._connections.take()
        usable = False
        try:
            found = read(connection, *asked)
            usable = True
            return found
        except Exception:
            try:
                with translated():  # here: only errors have to go through it (bench/lookup.py)
                    raise
            except Damaged as error:
                raise (self._connections.disk_error(error) or error) from error.__cause__
        finally:
            self._connections.give_back(connection, usable=usable)

    def start_of_last(
        self,
        patterns: frame.Patterns,
        count: int,
        after: int,
        until: int | None,
        now: int,
        *,
        chunks: bool = True,
    ) -> int | None:
        """The id of the oldest among the newest `count` selected frames; None if there are none.

        Without `chunks` frames that continue a run don't count.
        """
        with self.reading() as reader:
            source = source_of(patterns)
            pieces = pieces_of(reader, patterns, after, until) if chunks else None
            if source is None and pieces is None:
                return None
            low, high = bounds(reader, after, until)
            values = {"low": low, "high": high, "now": now, "count": count}
            if source is not None:
                values.update(source.values)
                newest = select(source, "f.row AS row", descending=True)
            if pieces is not None:
                values.update(pieces[0].values)
                newest = merged(source, pieces[0], "expires", descending=True)
            row = reader.execute(f"SELECT min(row) FROM ({newest})", values).fetchone()[0]
            return None if row is None else max(id_at(reader, row), id_at(reader, row, "piece"))

    def walk(self, patterns: frame.Patterns, *, chunks: bool = True) -> Walk:
        """The way through the selected frames, for who wants many pages of them."""
        from xs.walk import Walk  # here: a look-up has no need of it

        return Walk(self.reading, patterns, chunks=chunks)

    def content(self, digest: bytes, now: int) -> bytes | None:
        """Inline content with that digest, of a frame or pinned; None if there is none here."""
        with self.reading() as reader:
            return inline_content(reader, digest, now)

    def names_file(self, digest: bytes, now: int) -> bool:
        """Whether a frame or a pin names the file with that digest."""
        with self.reading() as reader:
            return names_file(reader, digest, now)

    def file_digests(self) -> Iterator[bytes]:
        """Digests of all the files that frames or pins name."""
        last = b""
        while True:
            with self.reading() as reader:
                found = reader.execute(
                    "SELECT digest FROM (SELECT digest FROM file UNION "
                    "SELECT digest FROM pin WHERE content IS NULL) WHERE digest > ? "
                    "ORDER BY digest LIMIT 1000",
                    (last,),
                ).fetchall()
            if not found:
                return
            for (digest,) in found:
                if digest <= last:
                    raise Damaged("the index is damaged: digests are out of order")
                last = digest
                yield digest

    def mark(self) -> int:
        """No id above it has been given out, as far as the disk knows."""
        with self.reading() as reader:
            return mark_of(reader)

    def newest(self) -> int:
        """The id of the newest stored frame; -1 if there is none.

        The mark may be above ids that are still to come: a server reserves some for ephemeral
        frames.
        """
        with self.reading() as reader:
            return newest_id(reader)

    def begins_run(self, value: int) -> bool:
        """Whether the frame with that id is the first of a run.

        Raises `Damaged` if the run has ended and lacks some of its pieces.
        """
        from xs.pieces import begins_run

        with self.reading() as reader:
            return begins_run(reader, value)

    def continues_run(self, value: int) -> bool:
        """Whether the frame with that id is a further one of a run, and no event of its own."""
        with self.reading() as reader:
            return row_of(reader, value, "piece") is not None

    def run(self, first: int, after: int, now: int) -> tuple[Run, list[StoredPiece]] | None:
        """A run by its first frame's id, and its next pieces above an id; None if it is none.

        All in one moment: without pieces, and with no writer, nothing more will come.
        """
        from xs.pieces import pieces_after, run_of

        with self.reading() as reader:
            found = run_of(reader, first)
            if found is None or (found.expires is not None and found.expires <= now):
                return None
            return found, pieces_after(reader, first, found.number, after)

    def next_expiry(self) -> int | None:
        """When the next frame expires, in milliseconds since 1970; None if none ever will."""
        with self.reading() as reader:
            found = reader.execute(
                "SELECT min(expires) FROM frame WHERE expires IS NOT NULL"
            ).fetchone()[0]
            return None if found is None else int(found)

    # Scripts

    def script_topics(self) -> list[str]:
        """The topics on which scripts are put in service and out, of frames that ever were."""
        with self.reading() as reader:
            query = f"SELECT name FROM topic INDEXED BY topic_script WHERE {IS_SCRIPT_TOPIC}"
            return [name for (name,) in reader.execute(query)]

    def scripts(self, kind: str, name: str) -> list[Script]:
        """What is kept of all the scripts that this one name has had."""
        with self.reading() as reader:
            query = (
                "SELECT kind, name, source, active, position, state FROM script "
                "WHERE kind = ? AND name = ?"
            )
            return [Script(*row) for row in reader.execute(query, (kind, name))]

    def active_scripts(self, kind: str) -> list[Script]:
        """What is kept of all those of a kind that are in service, in order of their frames."""
        with self.reading() as reader:
            query = (
                "SELECT kind, name, source, active, position, state FROM script "
                "WHERE kind = ? AND active ORDER BY source"
            )
            return [Script(*row) for row in reader.execute(query, (kind,))]
