"""Where a frame should lie, looked at before the way that finds it for certain (`rows`).

The ids of a millisecond mostly come in even steps, one by one or as a batch takes them. So where
its first and its last frame lie tells where each other one should: that is remembered of some
milliseconds, and costs one statement where the whole way takes a transaction of several
(bench/lookup.py). It is never more than a hint: what lies there is looked at, and whatever is not
just what was expected (or has expired, or is damaged) is left to the whole way.
"""

from __future__ import annotations

from xs.rows import ENDS, LINE, whole_id
from xs.schema import LIVE, ORDER_BITS, ORDER_MAX

TYPE_CHECKING = False
if TYPE_CHECKING:
    import sqlite3

    _Ends = tuple[int, int, int, int]

KEPT = 4096  # milliseconds
_TRIES = 2  # the second from where the first was: steps are even within each batch of one


class Places:
    """What is remembered of one store. From any thread."""

    def __init__(self) -> None:
        # The row and the id of a millisecond's first frame, and of its last; by the row that the
        # first could have.
        self._ends: dict[int, _Ends] = {}

    def frame(self, reader: sqlite3.Connection, value: int, now: int) -> bytes | None:
        """The line of the frame with that id, if it lies where it should."""
        found = self._at(reader, _FRAME, value, now)
        return None if found is None else bytes(found[0][2])

    def next(self, reader: sqlite3.Connection, value: int, now: int) -> bytes | None:
        """The line of the frame after the one with that id, if that lies where it should.

        b"" if there is none after it.
        """
        return _neighbour(self._at(reader, _NEXT, value, now), value, 1)

    def prev(self, reader: sqlite3.Connection, value: int, now: int) -> bytes | None:
        """As `next`, of the frame before it."""
        return _neighbour(self._at(reader, _PREV, value, now), value, -1)

    def _at(
        self, reader: sqlite3.Connection, query: str, value: int, now: int
    ) -> list[tuple[int, int, bytes]] | None:
        """What a query finds from the frame with that id on, if it is where it should be."""
        base = value >> 80 << ORDER_BITS
        ends = self._ends.get(base) or self._look(reader, base)
        if ends is None:
            return None
        low, low_id, high, high_id = ends
        if not low_id <= value <= high_id:
            self._ends.pop(base, None)  # there may be more by now
            return None
        step = (high_id - low_id) / (high - low) if high > low else 1.0
        row, at = low, low_id
        for _ in range(_TRIES):
            row += round((value - at) / step)
            found = reader.execute(query, (min(max(row, low), high), now)).fetchall()
            if not found:
                break
            row, at = found[0][0], whole_id(*found[0])
            if at == value:
                return found
            if at < 0:
                break
        return None

    def _look(self, reader: sqlite3.Connection, base: int) -> _Ends | None:
        """The ends of a millisecond; None where nothing can be computed from them."""
        found = reader.execute(ENDS["frame"], (base, base | ORDER_MAX) * 2).fetchall()
        if not found:
            return None
        low, high = found[0][0], found[-1][0]
        low_id, high_id = (whole_id(*each[:3]) for each in (found[0], found[-1]))
        if low_id < 0 or (low < high) != (low_id < high_id):
            return None  # they are damaged, or out of order
        if len(self._ends) >= KEPT:
            self._ends.clear()
        ends = self._ends[base] = (low, low_id, high, high_id)
        return ends


def _neighbour(
    found: list[tuple[int, int, bytes]] | None, value: int, direction: int
) -> bytes | None:
    if found is None:
        return None
    if len(found) < 2:
        return b""
    at = whole_id(*found[1])
    return bytes(found[1][2]) if at >= 0 and (at - value) * direction > 0 else None


_LIVE = LIVE.replace(":now", "?")
_FROM = f"SELECT {LINE} FROM frame f WHERE f.row"
_FRAME = f"{_FROM} = ? AND {_LIVE}"
_NEXT = f"{_FROM} >= ? AND {_LIVE} ORDER BY f.row LIMIT 2"
_PREV = f"{_FROM} <= ? AND {_LIVE} ORDER BY f.row DESC LIMIT 2"
