"""What a person at a terminal sees: data made harmless, mildly coloured; how far a command is.

Data that goes to a pipe or a file is never changed; what a log quotes is made harmless there, too.
"""

from __future__ import annotations

import codecs
import os
import re
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from typing import TypeVar

    _Kind = TypeVar("_Kind", bound="_Line")

_KEY = "\x1b[36m"  # cyan, for the keys of JSON
_PLAIN = "\x1b[0m"
_CLEAR_LINE = "\r\x1b[K"
_COLOURED_MAX = 1 << 20  # characters of a line that is waited for, to be coloured as a whole
_PROGRESS_EVERY = 0.1  # seconds between two writings of a progress line

# What could steer a terminal or disguise text: C0 (less tab and newline), DEL, C1 (some terminals
# take U+009B for ESC [), marks of direction (CVE-2021-42574), and separators that break a line.
_UNSAFE = [
    *(n for n in range(0x20) if n not in (0x09, 0x0A)),
    *range(0x7F, 0xA0),
    *(0x061C, 0x200E, 0x200F, 0x2028, 0x2029, 0xFEFF),
    *range(0x202A, 0x202F),
    *range(0x2066, 0x206A),
    *range(0xFFF9, 0xFFFC),
]
_VISIBLE = {n: f"\\u{n:04x}" for n in _UNSAFE}  # in a JSON string that is still the same string

_STRING = re.compile(r'("(?:[^"\\]|\\.)*")(\s*:)?')


def is_terminal(descriptor: int) -> bool:
    """Whether a person is at the other end of that file descriptor."""
    try:
        return os.isatty(descriptor)
    except OSError:
        return False


def wants_colour(environ: Mapping[str, str]) -> bool:
    """Whether to colour what a terminal is shown: XS_COLOR first, then NO_COLOR, then TERM."""
    asked = environ.get("XS_COLOR")
    if asked in ("always", "never"):
        return asked == "always"
    return not environ.get("NO_COLOR") and environ.get("TERM") != "dumb"


def harmless(text: str) -> str:
    r"""`text` with each character that could steer the terminal written out.

    >>> harmless("a\x1b[2Jb\u202e\n")
    'a\\u001b[2Jb\\u202e\n'
    """
    return text.translate(_VISIBLE)


def harmless_name(text: str) -> str:
    r"""The same for text that is no JSON: a byte of a name that isn't UTF-8 is `\xff`."""
    return harmless(text).translate({0xDC00 + n: f"\\x{n:02x}" for n in range(0x80, 0x100)})


def coloured(line: str) -> str:
    """A line of JSON with its keys coloured; any other text is left as it is."""
    return _STRING.sub(_colour_key, line) if line.startswith(("{", "[")) else line


def _colour_key(match: re.Match[str]) -> str:
    return f"{_KEY}{match[1]}{_PLAIN}{match[2]}" if match[2] else match[1]


def shown(blocks: Iterable[bytes], *, colour: bool = False) -> Iterator[bytes]:
    """`blocks` as a terminal may have them, each as soon as it came.

    Text is made harmless, bytes that aren't UTF-8 are written out as `\\xff`. A character that is
    cut by the end of a block waits for the next one; with `colour`, so does a line, unless it is
    long.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
    rest = ""
    for block in blocks:
        text = rest + harmless(decoder.decode(block))
        rest = ""
        if colour:
            text, newline, rest = text.rpartition("\n")
            text = "\n".join(coloured(line) for line in text.split("\n")) + newline
            if len(rest) > _COLOURED_MAX:
                text, rest = text + rest, ""
        if text:
            yield text.encode("utf-8", "backslashreplace")
    text = rest + harmless(decoder.decode(b"", True))
    if text:
        yield (coloured(text) if colour else text).encode("utf-8", "backslashreplace")


class _Line:
    """One line on standard error, if that is a terminal; it goes away at the end."""

    __slots__ = ("_shown",)

    def __init__(self) -> None:
        self._shown = False

    def end(self) -> None:
        """Takes the line away."""
        if self._shown:
            self._shown = False
            _say(_CLEAR_LINE)

    def __enter__(self: _Kind) -> _Kind:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


class Progress(_Line):
    """How far a command is.

    Nothing is said where what is counted comes from a terminal, by the descriptor `source`:
    somebody types there.
    """

    __slots__ = ("_begun", "_count", "_next", "_noun", "_visible")

    def __init__(self, noun: str, source: int = -1) -> None:
        super().__init__()
        self._noun = noun
        self._count = 0
        self._begun = time.monotonic()
        self._next = self._begun + _PROGRESS_EVERY
        self._visible = is_terminal(2) and not is_terminal(source)

    def add(self, count: int) -> None:
        """So many more are done."""
        self._count += count
        if not self._visible:
            return
        now = time.monotonic()
        if now >= self._next:
            self._next = now + _PROGRESS_EVERY
            self._shown = True
            rate = self._count / (now - self._begun)
            noun = self._noun if self._count != 1 else self._noun[:-1]
            _say(f"{_CLEAR_LINE}{self._count:,} {noun}, {rate:,.0f}/s")


class Notice(_Line):
    """What a command is at, until there is more to be said."""

    __slots__ = ()

    def __init__(self, text: str) -> None:
        super().__init__()
        self._shown = is_terminal(2)
        if self._shown:
            _say(harmless(text))


def _say(text: str) -> None:
    # A terminal that has gone away is no reason to stop the work.
    try:
        os.write(2, text.encode())
    except OSError:
        return
