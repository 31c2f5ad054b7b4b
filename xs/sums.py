"""Checksums of stored frames. Pure: bytes and numbers.

Content has its hash in its frame; the frame's own JSON has a sum beside it in its row. It is the
Adler-32 of the JSON's bytes, whose low half is additive: 1 and all bytes added up, modulo 65521. So
the lines of a page need not be looked at one by one: the sums of its rows, added up by SQLite, say
what the page as a whole has to add up to. A single byte that is another one is always found.
"""

from __future__ import annotations

from zlib import adler32 as of

__all__ = ["HALF", "agree", "of"]

HALF = 0xFFFF  # what SQL takes of each sum before it adds them up
_BASE = 65521
_NEWLINE = 10


def agree(page: bytes, total: int, count: int) -> bool:
    """Whether a page of `count` lines, each with its newline, is what its lines' sums say.

    `total` is the sum of the low halves of theirs.
    """
    # The page's sum has one 1 in it, where each line's had its own, and newlines, which no line's
    # sum knows of.
    return of(page) & HALF == (total + (_NEWLINE - 1) * count + 1) % _BASE
