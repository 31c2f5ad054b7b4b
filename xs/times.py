"""Times as people write them, and as the API does: RFC 3339, and how long ago. Pure."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    import re

_UNITS = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000, "w": 604_800_000}
_AGO = r"([0-9]{1,12})(ms|s|m|h|d|w)"
_RFC3339 = (
    r"(\d{4})-(\d\d)-(\d\d)[Tt ](\d\d):(\d\d):(\d\d)(?:\.(\d+))?(?:([Zz])|([+-])(\d\d):(\d\d))"
)


def parse_time(value: str, now_ms: int) -> int | None:
    """Milliseconds since 1970 of an RFC 3339 time, or of `90s`, `2h`, `7d` ago; None if neither."""
    import re  # here: a time is rarely given, and `re` is a third of a command's start

    ago = re.fullmatch(_AGO, value)
    if ago:
        return now_ms - int(ago[1]) * _UNITS[ago[2]]
    parts = re.fullmatch(_RFC3339, value, re.ASCII)
    if not parts:
        return None
    return _rfc3339_ms(parts)


def _rfc3339_ms(parts: re.Match[str]) -> int | None:
    from datetime import datetime, timedelta, timezone

    year, month, day, hour, minute, second = (int(parts[n]) for n in range(1, 7))
    leap = second == 60
    try:
        at = datetime(year, month, day, hour, minute, 59 if leap else second, tzinfo=timezone.utc)
    except ValueError:
        return None
    if parts[9]:
        if int(parts[10]) > 23 or int(parts[11]) > 59:
            return None
        offset = timedelta(hours=int(parts[10]), minutes=int(parts[11]))
        try:
            at += -offset if parts[9] == "+" else offset
        except OverflowError:
            return None
    seconds = (at - datetime(1970, 1, 1, tzinfo=timezone.utc)) // timedelta(seconds=1)
    fraction = int(((parts[7] or "") + "000")[:3])
    return (seconds + leap) * 1000 + fraction


def timestamp(ms: int) -> str:
    """RFC 3339 with milliseconds, UTC: `2026-01-31T09:30:00.000Z`."""
    global _last_second
    second, text = _last_second
    if ms // 1000 != second:
        from time import gmtime, strftime

        text = strftime("%Y-%m-%dT%H:%M:%S", gmtime(ms // 1000))
        _last_second = (ms // 1000, text)
    return f"{text}.{ms % 1000:03d}Z"


_DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


def http_date(second: int) -> str:
    """A time in seconds since 1970 as HTTP has it, whatever the locale (RFC 9110 §5.6.7)."""
    from time import gmtime

    at = gmtime(second)
    day, month = _DAYS[at.tm_wday], _MONTHS[at.tm_mon - 1]
    clock = f"{at.tm_hour:02d}:{at.tm_min:02d}:{at.tm_sec:02d}"
    return f"{day}, {at.tm_mday:02d} {month} {at.tm_year:04d} {clock} GMT"


# Frames that are read one after the other are mostly of one second (bench/replay.py: 1.8 ×).
_last_second = (-1, "1969-12-31T23:59:59")
