"""Checksums of stored frames. Pure: bytes and numbers.

Content has its hash in its frame; the frame's own JSON has a sum beside it in its row. It is the
Adler-32 of the JSON's bytes, whose low half is additive: 1 and all bytes added up, modulo 65521. So
the lines of a page need not be looked at one by one: the sums of its rows, added up by SQLite, say
what the page as a whole has to add up to. A single byte that is another one is always found.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

LOW = 1 << 16  # a sum's low half is what is left when this divides it; SQL adds those up
_BASE = 65521
_NEWLINE = 10
_FEW = 2048  # bytes: in the time that it takes to load zlib they are gone through without it


def _of_first(data: bytes) -> int:
    """The sum of the first few lines, which may be all that a command meets (RFC 1950 §8.2)."""
    global _left, of
    _left -= len(data)
    if _left < 0:
        from zlib import adler32

        of = adler32
        return adler32(data)
    low = 1 + sum(data)
    high = len(data) + sum([n * byte for n, byte in enumerate(reversed(data), 1)])
    return high % _BASE << 16 | low % _BASE


_left = _FEW
of: Callable[[bytes], int] = _of_first


def agree(page: bytes, total: int, count: int) -> bool:
    """Whether a page of `count` lines, each with its newline, is what its lines' sums say.

    `total` is the sum of the low halves of theirs.
    """
    # The page's sum has one 1 in it, where each line's had its own, and newlines, which no line's
    # sum knows of.
    return of(page) % LOW == (total + (_NEWLINE - 1) * count + 1) % _BASE
