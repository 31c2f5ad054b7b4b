"""Changes to the index, in transactions: frames that are added, content, keys, scripts.

Frames that go are `removal`'s, and runs are `pieces`'s: functions of a writer.
"""

from __future__ import annotations

from xs import fault, frame, ids, sums
from xs.errors import Damaged
from xs.records import NamedTuple
from xs.rows import (
    floor,
    id_at,
    inline_content,
    line_at,
    located,
    mark_of,
    names_file,
    newest_id,
    newest_row,
)
from xs.schema import (
    LARGE_JSON,
    ORDER_BITS,
    ORDER_MAX,
    TABLES_OF_FRAMES,
    TABLES_WITH_ROWS,
    Script,
    is_answer,
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

    from xs.content import Content


BUCKET_FRAMES = 8192  # frames that share a bucket of the digest index, more or less
_COUNTED = 64  # one in so many is counted where it is to be found out how many a bucket has
SWEEP_FRAMES = 1000  # expired frames removed in one transaction
TOPICS_CACHED = 65536


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

    def as_stored(self) -> tuple[int, str, bytes | None]:
        """Sum, JSON and content, as they stand in a row."""
        return sums.of(self.line), self.json, self.content


class Writer:
    """Changes, in transactions. `begin`, then any of the others, then `commit` or `rollback`.

    Frames that were added are gathered and written together by `flush`: many rows in one
    statement, because SQLite's calls give up the interpreter's lock each time and have to win it
    back (measured with bench/batch.py). What reads here, and `commit`, flush by themselves;
    `removal` and `pieces`, which go by `execute` and `connection`, do so before they look at
    frames.
    """

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.connection = connection
        self.execute = connection.execute
        self._topics: dict[str, int] = {}
        self._prefixes: dict[int, tuple[int, ...]] = {}
        # To be written, flat: values of one row after those of another.
        self._frames: list[Any] = []
        self._expiring: list[Any] = []
        self._below: list[Any] = []
        self.newest_row = -1
        self._placed = -1  # the last row that was found among others
        self._bucket = 0
        self._bucket_left = 0
        self._fresh = False
        self._version = -1  # of the data, as SQLite counts what other connections commit
        self._others_wrote = False  # since the last transaction that was committed

    def begin(self) -> bool:
        """Starts a transaction; whether another process has written since the last one."""
        if self.connection.in_transaction:  # there was no memory to undo the last one
            self.rollback()
        with translated():
            self.execute("BEGIN IMMEDIATE")
            try:
                version = int(self.execute("PRAGMA data_version").fetchone()[0])
                has_changed = self._others_wrote or version != self._version != -1
                self._others_wrote = has_changed  # until a transaction that knows it is through
                self._version = version
                if has_changed or not self._fresh:
                    self._reload()
            except BaseException:
                self.rollback()
                raise
            return has_changed

    def begins_again(self) -> bool:
        """As `begin`, where all is as the last transaction has left it; False if it is not.

        SQLite's errors are its own here.
        """
        self.execute("BEGIN IMMEDIATE")
        version = self.execute("PRAGMA data_version").fetchone()[0]
        return self._fresh and not self._others_wrote and bool(version == self._version)

    def _reload(self) -> None:
        self._topics.clear()
        self._prefixes.clear()
        row = newest_row(self.connection)
        self.newest_row = -1 if row is None else row
        digests = self.execute(
            "SELECT (SELECT max(digest) FROM frame WHERE digest IS NOT NULL), "
            "(SELECT max(digest) FROM piece WHERE digest IS NOT NULL)"
        ).fetchone()
        self._bucket = max(digest or 0 for digest in digests) >> 32 << 32
        # Digests are random: a part of them tells how many there are, and lies on a page or two.
        # (Unless many frames have the same content, which is there or not, so it counts once.)
        used = self.execute(
            "SELECT (SELECT count(DISTINCT digest) FROM frame WHERE digest BETWEEN :bucket AND :end"
            ") + (SELECT count(DISTINCT digest) FROM piece WHERE digest BETWEEN :bucket AND :end)",
            {"bucket": self._bucket, "end": self._bucket | (1 << 32) // _COUNTED - 1},
        ).fetchone()[0]
        self._bucket_left = BUCKET_FRAMES - used * _COUNTED
        self._fresh = True

    def commit(self) -> None:
        """Makes everything since `begin` durable (fsync of the write-ahead log)."""
        self.flush()
        fault.at("commit.before-fsync")
        with translated():
            self.execute("COMMIT")
        self._others_wrote = False

    def has_committed(self, value: int) -> bool:
        """Whether the frame with that id is durable, whatever `commit` has raised."""
        if self.connection.in_transaction or self._frames or self._expiring or self._below:
            return False  # it was not come to: SQLite may have undone all that was before it
        return self.find(value) is not None

    def rollback(self) -> None:
        """Undoes everything since `begin`."""
        for values in (self._frames, self._expiring, self._below):
            values.clear()
        self._fresh = False
        if self.connection.in_transaction:
            with translated():
                self.execute("ROLLBACK")

    def savepoint(self) -> None:
        """Starts a part that `undo` can take back, and `release` ends."""
        self.flush()
        self.execute("SAVEPOINT part")

    def undo(self) -> None:
        for values in (self._frames, self._expiring, self._below):
            values.clear()
        self.execute("ROLLBACK TO part")
        self.execute("RELEASE part")
        self._reload()

    def release(self) -> None:
        self.flush()
        self.execute("RELEASE part")

    def mark(self) -> int:
        """No id above it has been given out."""
        self.flush()
        return mark_of(self.connection)

    def newest(self) -> int:
        """The id of the newest stored frame; -1 if there is none."""
        self.flush()
        return newest_id(self.connection)

    def raise_mark(self, value: int) -> None:
        """Keeps that id as given out, though no stored frame shows it."""
        self.execute(
            "INSERT INTO mark VALUES (1, :id) ON CONFLICT (one) DO UPDATE "
            "SET id = :id WHERE id < :id",
            {"id": ids.text(value)},
        )

    def outlive(self, value: int) -> None:
        """The frame with that id, the newest, goes: the mark must outlive what showed it."""
        self.raise_mark(value)
        self._fresh = False

    # Frames

    def append(self, new: NewFrame) -> bool:
        """Adds a frame whose id is above all others; False if its millisecond is full."""
        row = self.row_above(new.id)
        if row is None:
            return False
        self.add(row, new)
        return True

    def append_now(
        self, value: int, topic: str, json: str, line: bytes, content: Content | None
    ) -> bool:
        """As `append`, of a frame that stays, with no other to be written: by one statement."""
        row = self.row_above(value)
        if row is None or len(line) > LARGE_JSON:
            return False
        number = self.number(topic)
        digest = data = None
        if content is not None:
            digest, data = self.listed(content.digest), content.data
        self.execute(_INSERT_ONE, (row, number, digest, sums.of(line), json, data))
        for prefix in self._prefixes[number]:
            self.execute("INSERT INTO below VALUES (?, ?)", (prefix, row))
        return True

    def row_above(self, value: int) -> int | None:
        """The row for a frame whose id is above all others; None if its millisecond is full."""
        row = value >> 80 << ORDER_BITS
        if row <= self.newest_row:
            row = self.newest_row + 1
            if row >> ORDER_BITS != value >> 80:
                return None
        self.newest_row = row
        return row

    def room(self, ms: int, count: int) -> int | None:
        """The row of the first of `count` frames appended in that millisecond; None if full."""
        row = max(ms << ORDER_BITS, self.newest_row + 1)
        return row if row + count - 1 <= ms << ORDER_BITS | ORDER_MAX else None

    def append_run(self, row: int, frames: list[tuple[Any, ...]]) -> None:
        """Adds frames (as in `NewFrame`; content inline or none, no expiry) from `row` on."""
        self.newest_row = row + len(frames) - 1
        flat = self._frames
        topics = self._topics
        for _, topic, json, line, _, digest, content in frames:
            number = topics.get(topic)
            if number is None:
                number = self._number(topic)
            listed = None if digest is None else self.listed(digest)
            flat += (row, number, listed, sums.of(line), json, content)
            for prefix in self._prefixes[number]:
                self._below += (prefix, row)
            if len(line) > LARGE_JSON:
                self.execute("INSERT INTO large VALUES (?)", (row,))
            row += 1

    def append_alike(
        self, row: int, topic: str, lines: list[bytes], digests: list[bytes], contents: list[bytes]
    ) -> None:
        """Adds frames of one topic, their lines of one length, content inline, from `row` on."""
        from xs import alike  # here: who appends one frame has no need of it

        self.newest_row = row + len(lines) - 1
        number = self.number(topic)
        with translated():
            start = 0
            while start < len(lines):
                bucket, count = self._bucket_for(min(len(lines) - start, alike.ROWS))
                part = slice(start, start + count)
                alike.insert(
                    self.execute,
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
                self.execute(f"INSERT INTO below {rows}", (prefix, row, self.newest_row))
            if len(lines[0]) > LARGE_JSON:
                added = range(row, self.newest_row + 1)
                _insert(self.execute, "large", 1, [*added])

    def row_among(self, value: int) -> int | None:
        """The row for a frame at its id's place among the others; None if its millisecond is full.

        The id must not be stored yet. Frames of that millisecond move if they have to. Raises
        `Damaged` where they are out of order.
        """
        self.flush()
        before, after = self._around(value)
        if after - before < 2:
            if not self._make_room(value >> 80 << ORDER_BITS, before):
                return None
            before, after = self._around(value)
            if after - before < 2:
                raise Damaged(
                    f"the index is damaged: the frames around the id {ids.text(value)} are out of "
                    "order (xs check says which)"
                )
        # Mostly one comes behind the last one that did; or else, one by one, before it.
        row = after - 1 if after == self._placed else before + 1
        self._placed = row
        self.newest_row = max(self.newest_row, row)
        return row

    def _around(self, value: int) -> tuple[int, int]:
        """The rows between which an id has its place, or those next to its millisecond's."""
        base = value >> 80 << ORDER_BITS
        before, after = base - 1, base + ORDER_MAX + 1
        for table in TABLES_OF_FRAMES:
            # Up to its floor there may be holes: what counts is the last frame there.
            place = floor(self.connection, value, table)
            last, following = self.execute(
                f"SELECT (SELECT max(row) FROM {table} WHERE row BETWEEN :base AND :place), "
                f"(SELECT min(row) FROM {table} WHERE row > max(:place, :base - 1) "
                "AND row <= :end)",
                {"base": base, "place": place, "end": base | ORDER_MAX},
            ).fetchone()
            if last is not None:
                before = max(before, last)
            if following is not None:
                after = min(after, following)
        return before, after

    def _make_room(self, base: int, before: int) -> bool:
        """Moves the frames of a millisecond so that there is room after `before`; False if full.

        A quarter of what is free comes there, as more are likely to follow; the rest is spread
        evenly. So what is imported backwards, one by one, moves them a few times and not each time.
        """
        found = self.execute(
            "SELECT row FROM frame WHERE row BETWEEN :base AND :end UNION ALL "
            "SELECT row FROM piece WHERE row BETWEEN :base AND :end ORDER BY row",
            {"base": base, "end": base | ORDER_MAX},
        ).fetchall()
        free = ORDER_MAX + 1 - len(found)
        if free < 1:
            return False
        room = max(1, free // 4)
        to: dict[int, int] = {}
        for n, (row,) in enumerate(found):
            spread = (free - room) * (n + 1) // (len(found) + 1)
            to[row] = base + n + spread + (room if row > before else 0)
        self._placed = to.get(self._placed, -1)
        self.connection.create_function("moved", 1, to.get)
        for table in TABLES_WITH_ROWS:
            # Out of the way first, below 0, so that no step meets a row that has yet to move.
            self.execute(
                f"UPDATE {table} SET row = ~row WHERE row BETWEEN ? AND ?",
                (base, base | ORDER_MAX),
            )
            self.execute(f"UPDATE {table} SET row = moved(~row) WHERE row < 0")
        self._reload()
        return True

    def add(self, row: int, new: NewFrame) -> None:
        """Adds a frame at a row that was found for it."""
        topic = self._topics.get(new.topic)
        if topic is None:
            topic = self._number(new.topic)
        digest = None
        if new.content is not None and new.digest is not None:
            digest = self.listed(new.digest)
        if new.expires is None:
            self._frames += (row, topic, digest, *new.as_stored())
        else:
            self._expiring += (row, topic, digest, *new.as_stored(), new.expires)
        for prefix in self._prefixes[topic]:
            self._below += (prefix, row)
        if new.digest is not None and new.content is None:
            self.execute("INSERT INTO file VALUES (?, ?)", (new.digest, row))
        if len(new.line) > LARGE_JSON:
            self.execute("INSERT INTO large VALUES (?)", (row,))

    def listed(self, digest: bytes) -> int:
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

    def number(self, name: str) -> int:
        """The number of a topic, which gets one if it is new."""
        return self._topics.get(name) or self._number(name)

    def prefixes(self, name: str) -> tuple[int, ...]:
        """The numbers of the wildcards that a topic is below."""
        return self._prefixes[self.number(name)]

    def _number(self, name: str) -> int:
        """As `number`, with its prefixes' numbers, from the table."""
        if len(self._topics) >= TOPICS_CACHED:
            self._topics.clear()
            self._prefixes.clear()
        numbers = []
        for each in [*frame.prefixes(name), name]:
            found = self.execute("SELECT number FROM topic WHERE name = ?", (each,)).fetchone()
            if found is None:
                cursor = self.execute("INSERT INTO topic (name) VALUES (?)", (each,))
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
                _insert(self.execute, _FRAME, 6, self._frames)
                self._frames.clear()
            if self._expiring:
                columns = "frame (row, topic, digest, sum, json, content, expires)"
                _insert(self.execute, columns, 7, self._expiring)
                self._expiring.clear()
            if self._below:
                _insert(self.execute, "below", 2, self._below)
                self._below.clear()

    def place_of(self, value: int) -> tuple[str, int] | None:
        """The table and the row of the frame with that id, expired or not."""
        self.flush()
        return located(self.connection, value)

    def line_at(self, place: tuple[str, int]) -> bytes:
        return line_at(self.connection, *place)

    def find(self, value: int) -> bytes | None:
        """The line of the frame with that id, expired or not."""
        place = self.place_of(value)
        return None if place is None else self.line_at(place)

    def mend(self, place: tuple[str, int], content: bytes) -> None:
        """Gives a frame that is here its inline content, if it has another."""
        table, row = place
        self.execute(
            f"UPDATE {table} SET content = :content "
            "WHERE row = :row AND digest IS NOT NULL AND content IS NOT :content",
            {"row": row, "content": content},
        )

    def last(self, topic: str, now: int) -> bytes | None:
        """The newest frame of a topic, with what this transaction has added."""
        self.flush()
        from xs.scan import one  # here: most appends don't ask for it

        return one(self.connection, frozenset((topic,)), None, None, now)

    def expired(self, now: int) -> list[tuple[int]]:
        """Rows of frames that have expired, at most SWEEP_FRAMES of them."""
        self.flush()
        query = "SELECT row FROM frame WHERE expires <= ? LIMIT ?"
        return self.execute(query, (now, SWEEP_FRAMES)).fetchall()

    def runs_being_written(self) -> list[tuple[int | None, str]]:
        """The first frame's id of each run that is not ended, and its writer.

        No id where that frame is damaged: such a run is left to a repair, and hinders nobody.
        """
        rows = self.execute("SELECT row, writer FROM run WHERE writer IS NOT NULL").fetchall()
        if rows:
            self.flush()
        found: list[tuple[int | None, str]] = []
        for row, writer in rows:
            try:
                found.append((id_at(self.connection, row), writer))
            except Damaged:
                found.append((None, writer))
        return found

    # Content, keys

    def inline_content(self, digest: bytes, now: int) -> bytes | None:
        self.flush()
        return inline_content(self.connection, digest, now)

    def names_file(self, digest: bytes, now: int) -> bool:
        self.flush()
        return names_file(self.connection, digest, now)

    def pin(self, digest: bytes, content: bytes | None, created: int) -> None:
        """Keeps content that no frame names: inline, or (None) as a file.

        A time below zero is the negative of one: the pin is for an import, and goes with the first
        frame that names the content. Whoever wants it for good has it so, whatever came first.
        """
        self.execute(
            "INSERT INTO pin VALUES (:digest, :created, :content) ON CONFLICT (digest) DO UPDATE "
            "SET created = CASE WHEN created < 0 THEN :created ELSE abs(:created) END, "
            "content = :content",  # what is there may be damaged
            {"digest": digest, "created": created, "content": content},
        )

    def unpin(self, before: int) -> tuple[list[bytes], int, int]:
        """Takes away pins made before a time: digests of files, how many pins, inline bytes."""
        found = self.execute(
            "SELECT digest, content FROM pin WHERE abs(created) <= ?", (before,)
        ).fetchall()
        self.execute("DELETE FROM pin WHERE abs(created) <= ?", (before,))
        files = [digest for digest, content in found if content is None]
        return files, len(found), sum(len(content or b"") for _, content in found)

    def unpin_imported(self, digest: bytes) -> None:
        """Takes away the pin that was made for an import, if there is one."""
        self.execute("DELETE FROM pin WHERE digest = ? AND created < 0", (digest,))

    def answer_for(self, topic: str, key: str) -> bytes | None:
        """The line of the frame that this key made on this topic, or None."""
        self.flush()
        number = self.number(topic)
        found = self.execute(
            "SELECT CAST(json AS BLOB), sum FROM answered WHERE topic = ? AND key = ?",
            (number, key),
        ).fetchone()
        if found is None:
            return None
        if not is_answer(key, *found):
            raise Damaged(f"what was answered to the key {key} on {topic} is damaged")
        return bytes(found[0])

    def keep_answer(self, topic: str, key: str, json: str) -> None:
        """Remembers the frame that a key made, for as long as the store lives."""
        number = self.number(topic)
        kept = (number, key, sum_of_answer(key, json.encode()), json)
        self.execute("INSERT INTO answered VALUES (?, ?, ?, ?)", kept)

    def forget_answer(self, topic: str, key: str) -> None:
        """The key is free again: what it has made broke off, or went, before it was whole."""
        number = self.number(topic)
        self.execute("DELETE FROM answered WHERE topic = ? AND key = ?", (number, key))

    def keep_script(self, script: Script) -> None:
        """Remembers how far a script is."""
        self.execute("INSERT OR REPLACE INTO script VALUES (?, ?, ?, ?, ?, ?)", script)


# Rows in one statement: 7 values each at most, of 999 that a statement may have before SQLite 3.32.
_ROWS_EXACT = 64  # up to so many, whatever their number
_ROWS_MAX = 512 if VERSION >= (3, 32, 0) else 128


@lru_cache(maxsize=256)
def _insert_statement(table: str, width: int, rows: int) -> str:
    row = "(" + ",".join("?" * width) + ")"
    return f"INSERT INTO {table} VALUES " + ",".join([row] * rows)


_FRAME = "frame (row, topic, digest, sum, json, content)"
_INSERT_ONE = _insert_statement(_FRAME, 6, 1)


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
