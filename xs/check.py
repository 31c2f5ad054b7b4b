"""`xs check`: all of a store is looked at: tables, frames, content files.

A check changes nothing, and takes no lock. It is the oracle of the tests as well.
"""

from __future__ import annotations

from xs import frame, ids
from xs.content import checked
from xs.errors import Damaged, DiskError, NotFound, XsError
from xs.pieces import continues
from xs.rows import LINE, is_pin, is_script, is_whole, mark_of
from xs.schema import LARGE_JSON, ORDER_BITS, PAGE_BYTES, PAGE_ROWS, PIECES, Script, is_answer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Optional, Union

    from xs.cas import Cas
    from xs.index import Index

_ALWAYS = -1  # a time before every expiry


def problems(index: Index, cas: Cas) -> Iterator[Union[str, tuple[int, int]]]:
    """Problems, one sentence each, and at the end (frames, contents) that were looked at.

    What can't be read any further is a problem too; the other parts are still looked at.
    """
    counted = {"frames": 0, "contents": 0}
    for part in (
        _of_tables(index),
        _of_frames(index, counted),
        _of_files(index, cas, counted),
        _of_pins(index, counted),
    ):
        try:
            yield from part
        except (Damaged, DiskError) as error:
            yield f"it can't be read further: {error}"
    yield counted["frames"], counted["contents"]


def _of_tables(index: Index) -> Iterator[str]:
    """What SQLite's own check and the cross-checks between tables find wrong."""
    with index.reading() as reader:
        for (text,) in reader.execute("PRAGMA integrity_check(100)"):
            if text != "ok":
                yield f"xs.db: {text}"
        for what, query in CROSS_CHECKS:
            for row in reader.execute(query):
                yield f"{what}: {row[0]}"
        for name, key, total, line in reader.execute(
            "SELECT t.name, a.key, a.sum, CAST(a.json AS BLOB) FROM answered a "
            "LEFT JOIN topic t ON t.number = a.topic"
        ):
            if not is_answer(key, line, total) or frame.topic_of(line) != name:
                yield f"what was answered to the key {key!s} on {name} is damaged"
        for row in reader.execute("SELECT kind, name, source, active, position, state FROM script"):
            if not is_script(Script(*row)):
                yield f"what is kept of the {row[0]!s} {row[1]!s} is damaged"
        try:
            mark_of(reader)
        except Damaged as error:
            yield str(error)


def _of_frames(index: Index, counted: dict[str, int]) -> Iterator[str]:
    """What is wrong with frames, one by one, and with the contents beside them."""
    newest = -1
    for ms, line, content, is_file, agrees in _rows(index):
        counted["frames"] += 1
        name = f"the frame in {line[:100].decode('utf-8', 'replace')}"
        try:
            value = ids.parse(frame.id_of(line))
            name = ids.text(value)
            if not agrees:
                yield f"{name}: is not what was stored, or does not lie where it should"
            if value <= newest or ids.milliseconds(value) != ms:
                yield f"{name}: is out of order"
            newest = max(newest, value)
            fields = frame.Frame.from_json(line)
            frame.check_topic(fields.topic)
            frame.parse_ttl(fields.ttl)
            if fields.hash is not None and not is_file:
                counted["contents"] += 1
                checked(content or b"", fields.hash)
        except (XsError, ValueError, KeyError, TypeError, AttributeError) as error:
            yield f"{name}: {error}"


def _rows(index: Index) -> Iterator[tuple[int, bytes, Optional[bytes], bool, bool]]:
    """Every row in order, also what no read gives: damaged ones, and those that have expired.

    Of each its millisecond, line, content, is that a file, does all of the row agree.
    """
    row = -1
    while True:
        page = []
        size = 0
        with index.reading() as reader:
            both = " UNION ALL ".join(
                f"SELECT * FROM (SELECT row, sum, json, content, digest, expires, {ends} "
                f"FROM {table} WHERE row > :row ORDER BY row LIMIT :count)"
                for table, ends in (("frame", "NULL AS ends"), ("piece", "ends"))
            )
            cursor = reader.execute(
                f"SELECT {LINE}, f.content, f.digest IS NULL, f.expires, f.ends "
                f"FROM ({both}) f ORDER BY f.row LIMIT :count",
                {"row": row, "count": PAGE_ROWS},
            )
            last = row
            for row, total, line, content, is_file, expires, ends in cursor:
                if row <= last:
                    raise Damaged(f"the index is damaged: row {row} comes after row {last}")
                last = row
                whole = is_whole(row, total, line)
                if whole and ends is None:
                    whole = expires == frame.expiry(frame.ttl_of(line), row >> ORDER_BITS)
                elif whole:
                    whole = continues(line, ends)
                line = line if isinstance(line, bytes) else b""
                content = content if isinstance(content, bytes) else None
                page.append((row >> ORDER_BITS, line, content, bool(is_file), whole))
                size += len(line) + len(content or b"")
                if size > PAGE_BYTES:
                    break
            cursor.close()
        if not page:
            return
        yield from page


def _of_files(index: Index, cas: Cas, counted: dict[str, int]) -> Iterator[str]:
    """What is wrong with the content files that should be there."""
    for digest in index.file_digests():
        try:
            _read_through(digest, index, cas)
        except XsError as error:
            yield str(error)
        counted["contents"] += 1


def _of_pins(index: Index, counted: dict[str, int]) -> Iterator[str]:
    """What is wrong with contents that were put there without a frame; files are no part of it."""
    with index.reading() as reader:
        for digest, created, content in reader.execute("SELECT digest, created, content FROM pin"):
            if not is_pin(digest, created, content):
                yield "a content that was put there without a frame: its row is damaged"
            elif content is not None:
                counted["contents"] += 1
                try:
                    checked(content, frame.integrity(digest))
                except Damaged as error:
                    yield str(error)


def _read_through(digest: bytes, index: Index, cas: Cas) -> None:
    """Reads a content file to its end. It may have gone since, with the last that named it."""
    try:
        blocks = cas.open(digest)[1]
    except NotFound:
        if not index.names_file(digest, _ALWAYS):
            return
        blocks = cas.open(digest)[1]  # named once more since then, or it is missing indeed
    for _ in blocks:
        pass


_OF_EITHER = "(SELECT row FROM frame UNION ALL SELECT row FROM piece)"
# Whether the topic `p` is a wildcard above the topic `t`, and how many there are.
_IS_ABOVE = (
    "(substr(p.name, -2) = '.*' AND "
    "substr(t.name, 1, length(p.name) - 1) = substr(p.name, 1, length(p.name) - 1))"
)
_DOTS = "length(t.name) - length(replace(t.name, '.', ''))"
CROSS_CHECKS = [
    (
        "a frame is listed under a wildcard without being stored, at row",
        "SELECT row FROM below WHERE row NOT IN (SELECT row FROM frame)",
    ),
    (
        "a frame is listed under a wildcard that is not above its topic, at row",
        "SELECT b.row FROM below b JOIN frame f ON f.row = b.row "
        "JOIN topic t ON t.number = f.topic LEFT JOIN topic p ON p.number = b.prefix "
        f"WHERE NOT coalesce({_IS_ABOVE}, 0)",
    ),
    (
        "frames are listed under wildcards more often than they should be by",
        "SELECT n FROM (SELECT (SELECT count(*) FROM below) - total(n * dots) AS n FROM "
        "(SELECT topic, count(*) AS n FROM frame GROUP BY topic) "
        f"JOIN (SELECT number, {_DOTS} AS dots FROM topic t) ON number = topic) WHERE n != 0",
    ),
    (
        "a frame is not listed under the wildcards above its topic, at row",
        "SELECT row FROM frame WHERE topic IN (SELECT number FROM topic WHERE instr(name, '.')) "
        "AND row NOT IN (SELECT row FROM below)",
    ),
    (
        "a frame's content is neither beside it nor named as a file, at row",
        "SELECT row FROM frame WHERE digest IS NULL AND row NOT IN (SELECT row FROM file) "
        """AND substr(json, instr(json, '"id":"') + 31, 10) = '","hash":"'""",
    ),
    (
        "a frame has no topic, at row",
        "SELECT row FROM frame WHERE topic NOT IN (SELECT number FROM topic)",
    ),
    (
        "a frame is listed under another topic than its own, at row",
        "SELECT f.row FROM frame f JOIN topic t ON t.number = f.topic "
        """WHERE substr(f.json, 11, length(t.name) + 8) != t.name || '","id":"'""",
    ),
    (
        "content is named for a frame that is not stored, at row",
        f"SELECT row FROM file WHERE row NOT IN {_OF_EITHER}",
    ),
    (
        "a frame's place does not follow from its JSON's size, at row",
        f"SELECT row FROM frame WHERE (length(CAST(json AS BLOB)) > {LARGE_JSON}) "
        "!= (row IN (SELECT row FROM large))",
    ),
    (
        "a run has no first frame, its number is",
        "SELECT number FROM run WHERE row NOT IN (SELECT row FROM frame)",
    ),
    (
        "a frame that continues a run has the place of another, at row",
        "SELECT row FROM piece WHERE row IN (SELECT row FROM frame)",
    ),
    (
        "a frame continues a run that is not there, at row",
        "SELECT row FROM piece WHERE run NOT IN (SELECT number FROM run)",
    ),
    (
        "a frame continues a run without naming it, before it, or with another time to live, "
        "at row",
        "SELECT p.row FROM piece p JOIN run r ON r.number = p.run JOIN frame f ON f.row = r.row "
        "WHERE p.row < f.row OR p.expires IS NOT f.expires "
        """OR NOT instr(lower(p.json), '"chunk":"' || """
        """substr(f.json, instr(f.json, '"id":"') + 6, 25) || '"')""",
    ),
    (
        "a frame that continues a run is not listed under its topics, at row",
        "SELECT row FROM piece WHERE row NOT IN (SELECT row FROM listed)",
    ),
    (
        "a frame that continues a run is listed under another topic than its run's, at row",
        "SELECT l.row FROM listed l JOIN piece ON piece.row = l.row "
        "JOIN run r ON r.number = piece.run JOIN frame f ON f.row = r.row "
        "JOIN topic t ON t.number = f.topic LEFT JOIN topic p ON p.number = l.topic "
        f"WHERE NOT coalesce(p.name = t.name OR {_IS_ABOVE}, 0)",
    ),
    (
        "frames that continue runs are listed more often than they should be by",
        "SELECT n FROM (SELECT (SELECT count(*) FROM listed) - total(n * (1 + dots)) AS n FROM "
        "(SELECT run, count(*) AS n FROM piece GROUP BY run) JOIN run r ON r.number = run "
        "JOIN frame f ON f.row = r.row "
        f"JOIN (SELECT number, {_DOTS} AS dots FROM topic t) s ON s.number = f.topic) WHERE n != 0",
    ),
    (
        "a frame is listed as one that continues a run, and is none, at row",
        "SELECT row FROM listed WHERE row NOT IN (SELECT row FROM piece)",
    ),
    (
        "a frame's content is neither beside it nor named as a file, at row",
        "SELECT row FROM piece WHERE digest IS NULL AND row NOT IN (SELECT row FROM file) "
        """AND substr(json, instr(json, '"id":"') + 31, 10) = '","hash":"'""",
    ),
    (
        "a run has lost pieces, or its number of them is wrong, its number is",
        f"SELECT r.number FROM run r LEFT JOIN ({PIECES}) c ON c.number = r.number "
        "WHERE r.pieces IS NOT c.pieces",
    ),
    (
        "a run is being written and has ended, its number is",
        "SELECT number FROM run WHERE writer IS NOT NULL "
        "AND number IN (SELECT run FROM piece WHERE ends > 0)",
    ),
]
