"""What a read wants: the parameters of `GET /`, as values. Pure: the clock is given."""

from __future__ import annotations

from xs import ids
from xs.errors import Invalid
from xs.frame import parse_patterns
from xs.records import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Optional

    from xs.frame import Patterns


class ReadOptions(NamedTuple):
    """Which frames a read wants, and how (docs/protocol.md, Reading).

    `after` (exclusive) and `until` (inclusive) are ids as numbers; a time has become the first or
    last id of its millisecond. `pulse` is in milliseconds.
    """

    follow: bool = False
    pulse: Optional[int] = None
    new: bool = False
    after: int = -1
    until: Optional[int] = None
    patterns: Patterns = None
    last: Optional[int] = None
    limit: Optional[int] = None
    with_timestamp: bool = False
    with_content: bool = False
    no_chunks: bool = False


PULSE_MIN, PULSE_MAX = 10, 10**11  # milliseconds
_FLAGS = ("with-timestamp", "with-content", "no-chunks")
_KNOWN = ("follow", "new", "after", "from", "until", "topic", "last", "limit", *_FLAGS)
_READ_NAMES = {"tail": "new", "last-id": "after"}  # the seed's names
_COUNT_MAX = 10**15


def parse_read_options(parameters: list[tuple[str, str]], now_ms: int) -> ReadOptions:
    """The options in a query's decoded names and values. Raises `Invalid`, naming the parameter."""
    given: dict[str, str] = {}
    for raw, value in parameters:
        name = _READ_NAMES.get(raw, raw)
        if name not in _KNOWN:
            known = ", ".join(_KNOWN)
            raise Invalid(f"unknown parameter: {raw[:64]!r}; here one can give: {known}")
        if name in given:
            raise Invalid(f"{raw} is given twice")
        given[name] = value
    options: dict[str, Any] = {}
    for name, value in given.items():
        if name == "follow":
            options["follow"], options["pulse"] = _parse_follow(value)
        elif name == "new":
            options["new"] = parse_flag(name, value)
        elif name in _FLAGS:
            options[name.replace("-", "_")] = parse_flag(name, value)
        elif name == "topic":
            options["patterns"] = parse_patterns(value)
        elif name in ("last", "limit"):
            options[name] = parse_count(name, value)
        elif name == "after":
            options["after"] = _parse_position(name, value, now_ms, end=True)
        elif name == "from":
            start = _parse_position(name, value, now_ms, end=False) - 1
            options["after"] = max(start, options.get("after", -1))
        else:
            options["until"] = _parse_position(name, value, now_ms, end=True)
    if "after" in given and "from" in given:
        raise Invalid("after and from can't go together: give one of them")
    if options.get("new"):
        for name in ("after", "from", "last"):
            if name in given:
                raise Invalid(f"new and {name} can't go together: new has no history")
    return ReadOptions(**options)


def parse_flag(name: str, value: str) -> bool:
    """True for empty, 1, true or yes; false for 0, false or no."""
    if value in ("", "1", "true", "yes"):
        return True
    if value in ("0", "false", "no"):
        return False
    raise Invalid(f"{name}={value[:64]!r}: use {name} or {name}=true, or {name}=false")


def parse_count(name: str, value: str) -> int:
    """A whole number, at least 1."""
    if value.isascii() and value.isdigit() and len(value) <= 16 and 1 <= int(value) <= _COUNT_MAX:
        return int(value)
    raise Invalid(f"{name}={value[:64]!r}: use a whole number from 1 to {_COUNT_MAX}")


def parse_pulse(value: str) -> int:
    """Milliseconds between two pulses."""
    pulse = int(value[:12])
    if PULSE_MIN <= pulse <= PULSE_MAX:
        return pulse
    raise Invalid(f"not a pulse: {value[:64]}: it has {PULSE_MIN} to {PULSE_MAX} ms")


def _parse_follow(value: str) -> tuple[bool, int | None]:
    if value.isascii() and value.isdigit() and value not in ("0", "1"):
        try:
            return True, parse_pulse(value)
        except Invalid as error:
            raise Invalid(f"follow={value[:64]}: {error}") from None
    try:
        return parse_flag("follow", value), None
    except Invalid:
        raise Invalid(
            f"follow={value[:64]!r}: use follow=true, or a number of milliseconds for a pulse"
        ) from None


def _parse_position(name: str, value: str, now_ms: int, *, end: bool) -> int:
    if ids.is_id(value):
        return ids.parse(value)
    from xs.times import parse_time  # here: most reads name no time

    ms = parse_time(value, now_ms)
    if ms is None:
        raise Invalid(
            f"{name}={value[:64]!r}: use an id, a time such as 2026-01-31T09:30:00Z, "
            "or how long ago: 90s, 15m, 2h, 7d"
        )
    ms = min(max(ms, 0), ids.MAX_MS)
    return ids.last_of(ms) if end else ids.first_of(ms)
