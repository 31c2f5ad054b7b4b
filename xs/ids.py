"""SCRU128 ids as integers: their text, their time, and a sequence that only goes up.

An id is 128 bits: 48 of milliseconds since 1970, 48 of counter, 32 of randomness (the SCRU128
specification splits the counter in two halves of 24). As text it has 25 digits of base 36, lower
case; text and number sort alike. Pure: the clock is given, never read.

The `scru128` library is not used for the stream's ids because it starts over when the clock steps
back by more than ten seconds, and the stream's order must survive that; the tests hold this module
to it where both apply.
"""

from __future__ import annotations

from xs.errors import Invalid
from xs.system import os

DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
LENGTH = 25
MAX = (1 << 128) - 1
MAX_MS = (1 << 48) - 1

_COUNTER_MAX = (1 << 48) - 1
_RENEW_HIGH_MS = 1000  # SCRU128: the counter's high half is drawn anew at most once a second
_ENTROPY_POOL = 1024  # numbers of 32 bits that are fetched with one system call

_STEP = 36**7  # between two ids of a run: 36 bits
_LOW = 36**12  # the last 12 digits: 62 bits, so that a run of ids shares the first 13
_ALLOWED = frozenset(DIGITS + DIGITS.upper())


def is_id(text: str) -> bool:
    """Whether `text` has the form of an id, in either case."""
    return len(text) == LENGTH and _ALLOWED.issuperset(text) and text.lower() <= _MAX_TEXT


def parse(text: str) -> int:
    """The number of an id given as text in either case. Raises `Invalid` for anything else."""
    if not is_id(text):
        has_form = len(text) == LENGTH and _ALLOWED.issuperset(text)
        form = "an id has 25 characters of a-z and 0-9"
        why = f"the last one is {_MAX_TEXT}" if has_form else form
        raise Invalid(f"not an id: {text[:64]!r}: {why}")
    return int(text, 36)


def text(value: int) -> str:
    """The 25 lower-case digits of an id."""
    high, low = divmod(value, _LOW)
    high, last = divmod(high, 36)
    return _twelve(high) + DIGITS[last] + _twelve(low)


def milliseconds(value: int) -> int:
    """When the id was made: milliseconds since 1970."""
    return value >> 80


def first_of(ms: int) -> int:
    """The least id of that millisecond."""
    return ms << 80


def last_of(ms: int) -> int:
    """The greatest id of that millisecond."""
    return (ms + 1 << 80) - 1


def _twelve(value: int) -> str:
    """The last 12 digits of a number."""
    pairs = _pairs
    if pairs is None:
        return _twelve_of_few(value)
    value, f = divmod(value, 1296)
    value, e = divmod(value, 1296)
    value, d = divmod(value, 1296)
    value, c = divmod(value, 1296)
    a, b = divmod(value, 1296)
    return pairs[a] + pairs[b] + pairs[c] + pairs[d] + pairs[e] + pairs[f]


def _twelve_of_few(value: int) -> str:
    """The same, digit by digit, for a process that writes few ids, as most commands do."""
    global _few_left
    _few_left -= 1
    if _few_left <= 0:
        _make_pairs()
    digits = ""
    for _ in range(11):
        value, digit = divmod(value, 36)
        digits = DIGITS[digit] + digits
    return DIGITS[value] + digits


def _make_pairs() -> list[str]:
    """All that two digits can be: some 100 µs (bench/start.py)."""
    global _pairs
    _pairs = [a + b for a in DIGITS for b in DIGITS]
    return _pairs


_pairs: list[str] | None = None
_few_left = 16
_MAX_TEXT = "f5lxx1zz5pnorynqglhzmsp33"  # MAX


class Sequence:
    """Ids above a mark, each above the one before, whatever the clock does.

    Not thread-safe: it belongs to whoever holds the store's write lock.
    """

    __slots__ = ("_counter", "_entropy", "_high", "_high_text", "_ms", "_pool", "_renewed")

    def __init__(self, mark: int) -> None:
        """`mark`: the greatest id that may have been given out (0: none)."""
        self._ms = mark >> 80
        self._counter = mark >> 32 & _COUNTER_MAX
        self._renewed = 0
        self._entropy: list[int] = []
        self._pool = 8  # most commands make one id
        self._high = -1
        self._high_text = ""

    def raise_to(self, mark: int) -> None:
        """From now on every id is above `mark` too."""
        if mark >> 32 > (self._ms << 48 | self._counter):
            self._ms = mark >> 80
            self._counter = mark >> 32 & _COUNTER_MAX

    def next(self, now_ms: int) -> int:
        """The next id. It carries the clock's time, or the last id's if the clock is behind it."""
        if now_ms > self._ms:
            self._move_to(now_ms)
        elif self._counter < _COUNTER_MAX:
            self._counter += 1
        else:
            self._move_to(self._ms + 1)
        return self._ms << 80 | self._counter << 32 | self._random()

    def run(self, count: int, now_ms: int) -> tuple[list[int], list[str]]:
        """`count` ids of one millisecond, as numbers and as text: quicker than one by one.

        They share their last 7 digits, drawn anew for each run, and count up in those before: the
        counter goes up by 18 and more from each to the next, as SCRU128 lets a generator do.
        """
        high = self.next(now_ms) // _STEP
        while (high + count + 1) * _STEP >> 80 != self._ms:
            self.skip_millisecond()
            high = self.next(now_ms) // _STEP
        suffix = int.from_bytes(os.urandom(5), "big") % _STEP
        start = (high + 1) * _STEP + suffix
        values = list(range(start, start + count * _STEP, _STEP))
        self._counter = values[-1] >> 32 & _COUNTER_MAX
        pairs = _pairs or _make_pairs()
        end = _twelve(suffix)[-7:]
        texts: list[str] = []
        number = high + 1
        while len(texts) < count:
            head = text(number * _STEP)[:16]
            first = number % 1296
            last = min(1296, first + count - len(texts))
            texts += [head + pair + end for pair in pairs[first:last]]
            number += last - first
        return values, texts

    def skip_millisecond(self) -> None:
        """The next id belongs to a later millisecond than the last one."""
        self._move_to(self._ms + 1)

    def text(self, value: int) -> str:
        """`text(value)`, quicker for ids that follow each other: their first 13 digits are kept."""
        high, low = divmod(value, _LOW)
        if high != self._high:
            self._high_text = text(value)[:13]  # first: there may be no memory for it
            self._high = high
        return self._high_text + _twelve(low)

    def _random(self) -> int:
        """32 random bits."""
        if not self._entropy:
            self._entropy = list(memoryview(os.urandom(4 * self._pool)).cast("I"))
            self._pool = _ENTROPY_POOL
        return self._entropy.pop()

    def _move_to(self, ms: int) -> None:
        if ms > MAX_MS:
            raise OverflowError("the 48 bits of an id's milliseconds are used up")
        fresh = (self._random() << 32 | self._random()) & _COUNTER_MAX
        if ms - self._renewed >= _RENEW_HIGH_MS:
            self._renewed = ms
            self._counter = fresh
        else:
            self._counter = self._counter & 0xFFFFFF000000 | fresh & 0xFFFFFF
        self._ms = ms
