"""Frames of one topic whose lines have one length: many rows out of a few long values.

To hand a value to SQLite costs as much as to store it, and is done under the interpreter's lock.
Taken apart here, in one statement, rows cost nobody else anything (bench/batch.py).
"""

from __future__ import annotations

from itertools import accumulate

from xs import sums
from xs.schema import short

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

ROWS = 4096  # in one statement

# One number a row: a table of them takes SQLite a third of what counting takes.
_MAKE_NUMBERS = "CREATE TEMP TABLE IF NOT EXISTS number (n INTEGER PRIMARY KEY)"
_FILL_NUMBERS = f"""
INSERT INTO temp.number
WITH RECURSIVE counted(n) AS (SELECT 0 UNION ALL SELECT n + 1 FROM counted WHERE n < {ROWS - 1})
SELECT n FROM counted
"""

_INSERT = """
INSERT INTO frame (row, topic, digest, sum, json, content)
SELECT
    :row + n,
    :topic,
    :bucket | CAST(substr(:digests, 10 * n + 1, 10) AS INTEGER),
    CAST(substr(:sums, 10 * n + 1, 10) AS INTEGER),
    CAST(substr(:lines, :width * n + 1, :width) AS TEXT),
    substr(:contents, {start}, {size})
FROM temp.number WHERE n < :rows
"""
_INSERT_SIZED = _INSERT.format(start=":size * n + 1", size=":size")  # contents of one size, too
_INSERT_ANY = _INSERT.format(
    start="CAST(substr(:starts, 9 * n + 1, 9) AS INTEGER)",
    size="CAST(substr(:sizes, 5 * n + 1, 5) AS INTEGER)",
)


def insert(
    execute: Callable[..., Any],
    row: int,
    topic: int,
    bucket: int,
    lines: Sequence[bytes],
    digests: Sequence[bytes],
    contents: Sequence[bytes],
) -> None:
    """Adds at most ROWS rows to `frame`, from `row` on, with their contents, which are small.

    `topic` is its number; `bucket` that of their digests. There is a transaction.
    """
    execute(_MAKE_NUMBERS)
    if execute("SELECT 1 FROM temp.number LIMIT 1").fetchone() is None:
        execute(_FILL_NUMBERS)  # (again, if the transaction that did so was undone)
    values = {
        "rows": len(lines),
        "row": row,
        "topic": topic,
        "bucket": bucket,
        "digests": _fixed(10, [*map(short, digests)]),
        "sums": _fixed(10, [*map(sums.of, lines)]),
        "width": len(lines[0]),
        "lines": b"".join(lines),
        "contents": b"".join(contents),
    }
    sizes = [*map(len, contents)]
    if sizes.count(sizes[0]) == len(sizes):
        execute(_INSERT_SIZED, {**values, "size": sizes[0]})
    else:
        starts = [*accumulate(sizes, initial=1)][:-1]
        execute(_INSERT_ANY, {**values, "starts": _fixed(9, starts), "sizes": _fixed(5, sizes)})


def _fixed(width: int, numbers: Sequence[int]) -> bytes:
    """The numbers' digits one after the other, `width` characters for each."""
    return (f"%{width}d" * len(numbers) % tuple(numbers)).encode()
