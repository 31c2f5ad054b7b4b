"""Changes to the index, in transactions.

Frames that were added are gathered and written together: many rows in one statement, because
SQLite's calls give up the interpreter's lock each time and have to win it back (measured with
bench/batch.py).
"""

from __future__ import annotations

from xs import fault, frame, ids, sums
from xs.errors import Damaged
from xs.records import NamedTuple
from xs.rows import (
    damage,
    floor,
    id_at,
    inline_content,
    line_at,
    located,
    mark_of,
    names_file,
    newest_id,
    newest_row,
    row_of,
)
from xs.schema import (
    BROKEN,
    GOES_ON,
    LARGE_JSON,
    ORDER_BITS,
    ORDER_MAX,
    TABLES_OF_FRAMES,
    TABLES_WITH_ROWS,
    Script,
    short,
    sum_of_answer,
    translated,
)
from xs.sqlite import VERSION, lru_cache

TYPE_CHECKING = False
if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable, Iterator
    from typing import Any, Optional

    from xs.pieces import Run

BUCKET_FRAMES = 8192  # frames that share a bucket of the digest index
SWEEP_FRAMES = 1000  # expired frames removed in one transaction
TOPICS_CACHED = 65536


class Removed(NamedTuple):
    """What is left to do for a removed frame: its line, and its content if that is a file.

    `pieces`, if it began a run: digests of the files that the rest of it named.
    """

    line: bytes
    file_digest: Optional[bytes]
    pieces: Optional[list[bytes]] = None


class NewFrame(NamedTuple):
    """A frame to be stored: its JSON as text and as bytes; `content` inline, or None.

    `digest` without `content` is that of a file in `cas/`.
    """

    id: int
    topic: str
    json: str
    line: bytes
    expires: Optional[int]
    digest: Optional[bytes]
    content: Optional[bytes]

    @property
    def is_file(self) -> bool:
        return self.digest is not None and self.content is None


class Writer:
    """Changes, in transactions. `begin`, then any of the others, then `commit` or `rollback`.

    Frames that were added are gathered and written together by `flush`, which reads and `commit`
    do by themselves: many rows in one statement, because SQLite's calls give up the interpreter's
    lock each time and have to win it back (measured with bench/batch.py).
    """

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._execute = connection.execute
        self._topics: dict[str, int] = {}
        self._prefixes: dict[int, tuple[int, ...]] = {}
        # To be written, flat: values of one row after those of another.
        self._frames: list[Any] = []
        self._expiring: list[Any] = []
        self._below: list[Any] = []
        self._newest_row = -1
        self._bucket = 0
        self._bucket_left = 0
        self._fresh = False
        self._version = -1  # of the data, as SQLite counts what other connections commit

    def begin(self) -> bool:
        """Starts a transaction; whether another process has written since the last one."""
        if self._connection.in_transaction:  # there was no memory to undo the last one
            self.rollback()
        with translated():
            self._execute("BEGIN IMMEDIATE")
            try:
                version = int(self._execute("PRAGMA data_version").fetchone()[0])
                has_changed = version != self._version != -1
                self._version = version
                if has_changed or not self._fresh:
                    self._reload()
            except BaseException:
                self.rollback()
                raise
            return has_changed

    def _reload(self) -> None:
        self._topics.clear()
        self._prefixes.clear()
        row = newest_row(self._connection)
        self._newest_row = -1 if row is None else row
        digests = self._execute(
            "SELECT (SELECT max(digest) FROM frame WHERE digest IS NOT NULL), "
            "(SELECT max(digest) FROM piece WHERE digest IS NOT NULL)"
        ).fetchone()
        self._bucket = max(digest or 0 for digest in digests) >> 32 << 32
        used = self._execute(
            "SELECT (SELECT count(*) FROM frame WHERE digest >= :bucket) + "
            "(SELECT count(*) FROM piece WHERE digest >= :bucket)",
            {"bucket": self._bucket},
        ).fetchone()[0]
        self._bucket_left = BUCKET_FRAMES - used
        self._fresh = True

    def commit(self) -> None:
        """Makes everything since `begin` durable (fsync of the write-ahead log)."""
        self.flush()
        fault.at("commit.before-fsync")
        with translated():
            self._execute("COMMIT")

    def has_committed(self, value: int) -> bool:
        """Whether the frame with that id is durable, whatever `commit` has raised."""
        if self._connection.in_transaction or self._frames or self._expiring or self._below:
            return False  # it was not come to: SQLite may have undone all that was before it
        return self.find(value) is not None

    def rollback(self) -> None:
        """Undoes everything since `begin`."""
        for values in (self._frames, self._expiring, self._below):
            values.clear()
        self._fresh = False
        if self._connection.in_transaction:
            with translated():
                self._execute("ROLLBACK")

    def savepoint(self) -> None:
        """Starts a part that `undo` can take back, and `release` ends."""
        self.flush()
        self._execute("SAVEPOINT part")

    def undo(self) -> None:
        for values in (self._frames, self._expiring, self._below):
            values.clear()
        self._execute("ROLLBACK TO part")
        self._execute("RELEASE part")
        self._reload()

    def release(self) -> None:
        self.flush()
        self._execute("RELEASE part")

    def mark(self) -> int:
        """No id above it has been given out."""
        self.flush()
        return mark_of(self._connection)

    def newest(self) -> int:
        """The id of the newest stored frame; -1 if there is none."""
        self.flush()
        return newest_id(self._connection)

    def raise_mark(self, value: int) -> None:
        """Keeps that id as given out, though no stored frame shows it."""
        self._execute(
            "INSERT INTO mark VALUES (1, :id) ON CONFLICT (one) DO UPDATE "
            "SET id = :id WHERE id < :id",
            {"id": ids.text(value)},
        )

    # Frames

    def append(self, new: NewFrame, run: Run | None = None, ends: int = 0) -> bool:
        """Adds a frame whose id is above all others; False if its millisecond is full.

        With `run` it continues that, and `ends` says how it ends it.
        """
        row = new.id >> 80 << ORDER_BITS
        if row <= self._newest_row:
            row = self._newest_row + 1
            if row >> ORDER_BITS != new.id >> 80:
                return False
        self._newest_row = row
        if run is None:
            self._add(row, new)
        else:
            self._add_piece(row, new, run, ends)
        return True

    def room(self, ms: int, count: int) -> int | None:
        """The row of the first of `count` frames appended in that millisecond; None if full."""
        row = max(ms << ORDER_BITS, self._newest_row + 1)
        return row if row + count - 1 <= ms << ORDER_BITS | ORDER_MAX else None

    def append_run(self, row: int, frames: list[tuple[Any, ...]]) -> None:
        """Adds frames (as in `NewFrame`; content inline or none, no expiry) from `row` on."""
        self._newest_row = row + len(frames) - 1
        flat = self._frames
        topics = self._topics
        for _, topic, json, line, _, digest, content in frames:
            number = topics.get(topic)
            if number is None:
                number = self._number(topic)
            listed = None if digest is None else self._listed(digest)
            flat += (row, number, listed, sums.of(line), json, content)
            for prefix in self._prefixes[number]:
                self._below += (prefix, row)
            if len(line) > LARGE_JSON:
                self._execute("INSERT INTO large VALUES (?)", (row,))
            row += 1

    def append_alike(
        self, row: int, topic: str, lines: list[bytes], digests: list[bytes], contents: list[bytes]
    ) -> None:
        """Adds frames of one topic, their lines of one length, content inline, from `row` on."""
        from xs import alike  # here: who appends one frame has no need of it

        self._newest_row = row + len(lines) - 1
        number = self._topics.get(topic) or self._number(topic)
        with translated():
            start = 0
            while start < len(lines):
                bucket, count = self._bucket_for(min(len(lines) - start, alike.ROWS))
                part = slice(start, start + count)
                alike.insert(
                    self._execute,
                    row + start,
                    number,
                    bucket,
                    lines[part],
                    digests[part],
                    contents[part],
                )
                start += count
            rows = "SELECT ?, row FROM frame WHERE row BETWEEN ? AND ?"
            for prefix in self._prefixes[number]:
                self._execute(f"INSERT INTO below {rows}", (prefix, row, self._newest_row))
            if len(lines[0]) > LARGE_JSON:
                added = range(row, self._newest_row + 1)
                _insert(self._execute, "large", 1, [*added])

    def insert(self, new: NewFrame, run: Run | None = None, ends: int = 0) -> bool:
        """As `append`, at its id's place among the others. The id must not be stored yet.

        Frames of that millisecond move up if they have to.
        """
        self.flush()
        base = new.id >> 80 << ORDER_BITS
        before = base - 1
        after: int | None = None
        for table in TABLES_OF_FRAMES:
            # Up to its floor there may be holes: what counts is the last frame there.
            place = floor(self._connection, new.id, table)
            last, following = self._execute(
                f"SELECT (SELECT max(row) FROM {table} WHERE row BETWEEN :base AND :place), "
                f"(SELECT min(row) FROM {table} WHERE row > max(:place, :base - 1) "
                "AND row <= :end)",
                {"base": base, "place": place, "end": base | ORDER_MAX},
            ).fetchone()
            if last is not None:
                before = max(before, last)
            if following is not None and (after is None or following < after):
                after = following
        row = before + 1
        if (after is not None and after <= row) or row > base | ORDER_MAX:
            if not self._renumber(base, before):
                return False
            return self.insert(new, run, ends)
        self._newest_row = max(self._newest_row, row)
        if run is None:
            self._add(row, new)
        else:
            self._add_piece(row, new, run, ends)
        self.flush()
        return True

    def _renumber(self, base: int, before: int) -> bool:
        """Moves the frames of a millisecond so that there is room after `before`; False if full.

        They are spread evenly over its orders, or, where so many leave no gaps, to both ends.
        """
        found = self._execute(
            "SELECT row FROM frame WHERE row BETWEEN :base AND :end UNION ALL "
            "SELECT row FROM piece WHERE row BETWEEN :base AND :end ORDER BY row",
            {"base": base, "end": base | ORDER_MAX},
        ).fetchall()
        if len(found) > ORDER_MAX:
            return False
        gap = (ORDER_MAX + 1) // (len(found) + 1)
        to: dict[int, int] = {}
        for n, (row,) in enumerate(found):
            if gap > 1:
                to[row] = base + gap * n + gap // 2
            else:
                to[row] = base + n + (0 if row <= before else ORDER_MAX + 1 - len(found))
        self._connection.create_function("moved", 1, to.get)
        for table in TABLES_WITH_ROWS:
            # Out of the way first, so that no step meets a row that has yet to move.
            self._execute(
                f"UPDATE {table} SET row = -row WHERE row BETWEEN ? AND ?",
                (base, base | ORDER_MAX),
            )
            self._execute(f"UPDATE {table} SET row = moved(-row) WHERE row < 0")
        self._reload()
        return True

    def _add(self, row: int, new: NewFrame) -> None:
        topic = self._topics.get(new.topic)
        if topic is None:
            topic = self._number(new.topic)
        digest = None
        if new.content is not None and new.digest is not None:
            digest = self._listed(new.digest)
        if new.expires is None:
            self._frames += (row, topic, digest, *_as_stored(new))
        else:
            self._expiring += (row, topic, digest, *_as_stored(new), new.expires)
        for prefix in self._prefixes[topic]:
            self._below += (prefix, row)
        if new.digest is not None and new.content is None:
            self._execute("INSERT INTO file VALUES (?, ?)", (new.digest, row))
        if len(new.line) > LARGE_JSON:
            self._execute("INSERT INTO large VALUES (?)", (row,))

    def _add_piece(self, row: int, new: NewFrame, run: Run, ends: int) -> None:
        digest = None
        if new.content is not None and new.digest is not None:
            digest = self._listed(new.digest)
        topic = self._topics.get(new.topic)
        if topic is None:
            topic = self._number(new.topic)
        with translated():
            self._execute(
                "INSERT INTO piece VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (row, run.number, ends, digest, *_as_stored(new), new.expires),
            )
            for number in (topic, *self._prefixes[topic]):
                self._execute("INSERT INTO listed VALUES (?, ?)", (number, row))
            if new.is_file:
                self._execute("INSERT INTO file VALUES (?, ?)", (new.digest, row))
            if len(new.line) > LARGE_JSON:
                self._execute("INSERT INTO large VALUES (?)", (row,))

    def _listed(self, digest: bytes) -> int:
        """What the digest index keeps for one more frame with that content."""
        if self._bucket_left <= 0:
            self._bucket += 1 << 32
            self._bucket_left = BUCKET_FRAMES
        self._bucket_left -= 1
        return self._bucket | short(digest)

    def _bucket_for(self, count: int) -> tuple[int, int]:
        """The bucket for the next frames with content, and how many of them it takes."""
        if self._bucket_left <= 0:
            self._bucket += 1 << 32
            self._bucket_left = BUCKET_FRAMES
        count = min(count, self._bucket_left)
        self._bucket_left -= count
        return self._bucket, count

    def _number(self, name: str) -> int:
        """The number of a topic, made if it is new, with its prefixes' numbers."""
        if len(self._topics) >= TOPICS_CACHED:
            self._topics.clear()
            self._prefixes.clear()
        numbers = []
        for each in [*frame.prefixes(name), name]:
            found = self._execute("SELECT number FROM topic WHERE name = ?", (each,)).fetchone()
            if found is None:
                cursor = self._execute("INSERT INTO topic (name) VALUES (?)", (each,))
                numbers.append(int(cursor.lastrowid or 0))
            else:
                numbers.append(found[0])
        topic = numbers.pop()
        self._topics[name] = topic
        self._prefixes[topic] = tuple(numbers)
        return topic

    def flush(self) -> None:
        """Writes what was gathered."""
        with translated():
            if self._frames:
                columns = "frame (row, topic, digest, sum, json, content)"
                _insert(self._execute, columns, 6, self._frames)
                self._frames.clear()
            if self._expiring:
                columns = "frame (row, topic, digest, sum, json, content, expires)"
                _insert(self._execute, columns, 7, self._expiring)
                self._expiring.clear()
            if self._below:
                _insert(self._execute, "below", 2, self._below)
                self._below.clear()

    def find(self, value: int) -> bytes | None:
        """The line of the frame with that id, expired or not."""
        self.flush()
        found = located(self._connection, value)
        return None if found is None else line_at(self._connection, *found)

    def last(self, topic: str, now: int) -> bytes | None:
        """The newest frame of a topic, with what this transaction has added."""
        self.flush()
        from xs.scan import one  # here: most appends don't ask for it

        return one(self._connection, frozenset((topic,)), None, None, now)

    def remove(self, value: int) -> Removed | None:
        """Removes the frame with that id; None if there is none. Raises `Damaged`."""
        self.flush()
        row = row_of(self._connection, value)
        return None if row is None else self._remove(row)

    def remove_but(self, topic: str, keep: int, now: int) -> list[Removed]:
        """Removes all but the newest `keep` frames of a topic, as far as they are whole."""
        self.flush()
        number = self._topics.get(topic) or self._number(topic)
        found = self._execute(
            "SELECT row FROM frame WHERE topic = ? AND row < coalesce((SELECT min(row) FROM "
            "(SELECT row FROM frame f WHERE topic = ? AND (expires IS NULL OR expires > ?) "
            "ORDER BY row DESC LIMIT ?)), 0)",
            (number, number, now, keep),
        ).fetchall()
        return self._remove_whole(found)

    def remove_expired(self, now: int) -> list[Removed]:
        """Removes expired frames, at most SWEEP_FRAMES of them, as far as they are whole."""
        self.flush()
        found = self._execute(
            "SELECT row FROM frame WHERE expires <= ? LIMIT ?", (now, SWEEP_FRAMES)
        ).fetchall()
        return self._remove_whole(found)

    def _remove_whole(self, rows: list[tuple[int]]) -> list[Removed]:
        """Removes frames, but none that is damaged: it may not be one of those at all."""
        removed = []
        for (row,) in rows:
            try:
                removed.append(self._remove(row))
            except Damaged:
                pass  # xs check names it
        return removed

    def _remove(self, row: int) -> Removed:
        """Removes a frame, and what continues it. Raises `Damaged` before it does."""
        line = line_at(self._connection, "frame", row)
        topic, listed, expires = self._execute(
            "SELECT topic, digest, expires FROM frame WHERE row = ?", (row,)
        ).fetchone()
        if expires != frame.expiry(frame.ttl_of(line), row >> ORDER_BITS):
            raise damage(self._connection, row)
        run = None
        if frame.may_begin_run(line):
            run = self._execute("SELECT number FROM run WHERE row = ?", (row,)).fetchone()
        files = self._files_of_run(run[0]) if run is not None else []
        if row == self._newest_row:
            # The mark must outlive the frame that showed it.
            self.raise_mark(ids.parse(frame.id_of(line)))
            self._fresh = False
        self._execute("DELETE FROM frame WHERE row = ?", (row,))
        name = frame.topic_of(line)
        if "." in name:
            if topic not in self._prefixes:
                self._number(name)
            for prefix in self._prefixes[topic]:
                self._execute("DELETE FROM below WHERE prefix = ? AND row = ?", (prefix, row))
        if len(line) > LARGE_JSON:
            self._execute("DELETE FROM large WHERE row = ?", (row,))
        digest = hash_in(line)
        if listed is not None:
            digest = None
        if digest is not None:
            self._execute("DELETE FROM file WHERE digest = ? AND row = ?", (digest, row))
        if run is not None:
            self._remove_pieces(run[0], name, files)
        pieces = None if run is None else [each for _, each in files]
        return Removed(line, digest, pieces)

    def _files_of_run(self, number: int) -> list[tuple[int, bytes]]:
        """Rows and digests of the files that the pieces of a run name."""
        files = []
        for (row,) in self._execute(
            "SELECT row FROM piece WHERE run = ? AND digest IS NULL", (number,)
        ).fetchall():
            digest = hash_in(line_at(self._connection, "piece", row))
            if digest is not None:
                files.append((row, digest))
        return files

    def _remove_pieces(self, number: int, topic: str, files: list[tuple[int, bytes]]) -> None:
        """Removes the rest of a run."""
        newest = self._execute("SELECT max(row) FROM piece WHERE run = ?", (number,)).fetchone()[0]
        if newest is not None and newest == self._newest_row:
            self.raise_mark(id_at(self._connection, newest, "piece"))
            self._fresh = False
        for row, digest in files:
            self._execute("DELETE FROM file WHERE digest = ? AND row = ?", (digest, row))
        of_run = "row IN (SELECT row FROM piece WHERE run = ?)"
        own = self._topics.get(topic) or self._number(topic)
        for each in (own, *self._prefixes[own]):
            self._execute(f"DELETE FROM listed WHERE topic = ? AND {of_run}", (each, number))
        self._execute(f"DELETE FROM large WHERE {of_run}", (number,))
        self._execute("DELETE FROM piece WHERE run = ?", (number,))
        self._execute("DELETE FROM run WHERE number = ?", (number,))

    # Runs (what most commands don't meet: so `pieces` is imported where one is looked for)

    def begin_run(self, writer: str | None, key: str | None = None) -> None:
        """The frame that was appended last begins a run, which `writer` will go on with."""
        self._make_run(self._newest_row, writer, key)

    def _make_run(self, row: int, writer: str | None, key: str | None) -> None:
        self._execute("INSERT INTO run (row, writer, key) VALUES (?, ?, ?)", (row, writer, key))

    def run(self, first: int) -> Run | None:
        """The run whose first frame has that id, expired or not; None if it begins none."""
        from xs.pieces import run_of

        self.flush()
        return run_of(self._connection, first)

    def run_to_join(self, first: int) -> Run | None:
        """As `run`; a frame that says so in its meta becomes the first of a run with this."""
        from xs.pieces import run_at

        self.flush()
        row = row_of(self._connection, first)
        if row is None:
            return None
        found = run_at(self._connection, row)
        if found is None:
            self._make_run(row, None, None)
            found = run_at(self._connection, row)
        return found

    def run_of_piece(self, value: int) -> int | None:
        """The id of the first frame of the run that the frame with that id continues, or None."""
        from xs.pieces import run_of_piece

        return run_of_piece(self._connection, value)

    def end_of(self, run: Run) -> int | None:
        """The id of the piece that ends a run; None while none does."""
        from xs.pieces import end_of

        return end_of(self._connection, run.number)

    def run_written_by(self, writer: str) -> int | None:
        """The id of the first frame of the run that this writer has begun and not ended."""
        self.flush()
        found = self._execute("SELECT row FROM run WHERE writer = ?", (writer,)).fetchone()
        return None if found is None else id_at(self._connection, found[0])

    def last_of_run(self, first: int) -> int | None:
        """The id of a run's last frame so far; None if there is no such run."""
        run = self.run(first)
        if run is None:
            return None
        row = self._execute("SELECT max(row) FROM piece WHERE run = ?", (run.number,)).fetchone()[0]
        return first if row is None else id_at(self._connection, row, "piece")

    def how_it_ended(self, first: int) -> int:
        """GOES_ON while a run has no end, else how its first piece that ends it does."""
        run = self.run(first)
        found = None
        if run is not None:
            found = self._execute(
                "SELECT ends FROM piece WHERE run = ? AND ends > 0 ORDER BY row LIMIT 1",
                (run.number,),
            ).fetchone()
        return GOES_ON if found is None else int(found[0])

    def runs_being_written(self) -> list[tuple[int, str]]:
        """The first frame's id of each run that is not ended, and its writer."""
        found = self._execute("SELECT row, writer FROM run WHERE writer IS NOT NULL").fetchall()
        if found:
            self.flush()
        return [(id_at(self._connection, row), writer) for row, writer in found]

    def count_pieces(self, run: Run) -> None:
        """Keeps how many pieces a run has that has an end, so that readers know when they miss one.

        Without an end it is none, which is kept as NULL.
        """
        from xs.pieces import count_of

        count = count_of(self._connection, run.number) or None
        self._execute("UPDATE run SET pieces = ? WHERE number = ?", (count, run.number))

    def end_writing(self, run: Run, ends: int) -> None:
        """Nobody goes on with a run. A key that made one which broke off is free again."""
        self._execute("UPDATE run SET writer = NULL WHERE number = ?", (run.number,))
        self.count_pieces(run)
        if ends == BROKEN and run.key is not None:
            number = self._topics.get(run.topic) or self._number(run.topic)
            self._execute("DELETE FROM answered WHERE topic = ? AND key = ?", (number, run.key))

    # Content, keys

    def inline_content(self, digest: bytes, now: int) -> bytes | None:
        self.flush()
        return inline_content(self._connection, digest, now)

    def names_file(self, digest: bytes, now: int) -> bool:
        self.flush()
        return names_file(self._connection, digest, now)

    def pin(self, digest: bytes, content: bytes | None, now: int) -> None:
        """Keeps content that no frame names: inline, or (None) as a file."""
        self._execute(
            "INSERT INTO pin VALUES (:digest, :now, :content) ON CONFLICT (digest) DO UPDATE "
            "SET created = :now",
            {"digest": digest, "now": now, "content": content},
        )

    def unpin(self, before: int) -> tuple[list[bytes], int, int]:
        """Takes away pins made before a time: digests of files, how many pins, inline bytes."""
        found = self._execute(
            "SELECT digest, content FROM pin WHERE created <= ?", (before,)
        ).fetchall()
        self._execute("DELETE FROM pin WHERE created <= ?", (before,))
        files = [digest for digest, content in found if content is None]
        return files, len(found), sum(len(content or b"") for _, content in found)

    def answer_for(self, topic: str, key: str) -> bytes | None:
        """The line of the frame that this key made on this topic, or None."""
        self.flush()
        number = self._topics.get(topic) or self._number(topic)
        found = self._execute(
            "SELECT CAST(json AS BLOB), sum FROM answered WHERE topic = ? AND key = ?",
            (number, key),
        ).fetchone()
        if found is None:
            return None
        if sum_of_answer(key, found[0]) != found[1]:
            raise Damaged(f"what was answered to the key {key} on {topic} is damaged")
        return bytes(found[0])

    def keep_answer(self, topic: str, key: str, json: str) -> None:
        """Remembers the frame that a key made, for as long as the store lives."""
        number = self._topics.get(topic) or self._number(topic)
        kept = (number, key, sum_of_answer(key, json.encode()), json)
        self._execute("INSERT INTO answered VALUES (?, ?, ?, ?)", kept)

    def keep_script(self, script: Script) -> None:
        """Remembers how far a script is."""
        self._execute("INSERT OR REPLACE INTO script VALUES (?, ?, ?, ?, ?, ?)", script)


def _as_stored(new: NewFrame) -> tuple[int, str, bytes | None]:
    """Sum, JSON and content, as they stand in a row."""
    return sums.of(new.line), new.json, new.content


def hash_in(line: bytes) -> bytes | None:
    text = frame.hash_text(line)
    return None if text is None else frame.parse_integrity(text)


# Rows in one statement: 7 values each at most, of 999 that a statement may have before SQLite 3.32.
_ROWS_EXACT = 64  # up to so many, whatever their number
_ROWS_MAX = 512 if VERSION >= (3, 32, 0) else 128


@lru_cache(maxsize=256)
def _insert_statement(table: str, width: int, rows: int) -> str:
    row = "(" + ",".join("?" * width) + ")"
    return f"INSERT INTO {table} VALUES " + ",".join([row] * rows)


def _insert(execute: Callable[..., Any], table: str, width: int, values: list[Any]) -> None:
    """Inserts rows given flat."""
    for start, rows in _parts(len(values) // width):
        part = values[start * width : (start + rows) * width]
        execute(_insert_statement(table, width, rows), part)


def _parts(count: int) -> Iterator[tuple[int, int]]:
    """Where each statement's rows begin, and how many it has.

    A small batch is one statement, which gives up the interpreter's lock once; a large one goes
    powers of two at a time, so that few statements are ever made.
    """
    start = 0
    while start < count:
        left = count - start
        rows = left if left <= _ROWS_EXACT else min(_ROWS_MAX, 1 << left.bit_length() - 1)
        yield start, rows
        start += rows
