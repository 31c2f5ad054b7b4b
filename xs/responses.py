"""The API's answers as HTTP responses: heads, and the whole of those that are in memory.

By a field of its own (`xs-version`) a client of ours knows that no other server says that all went
well.
"""

from __future__ import annotations

import time

from xs import http1, messages, times
from xs.version import VERSION

CLOSE = ("connection", "close")
_SIGN = ("xs-version", VERSION)
_JSON_FIELDS = [("content-type", messages.JSON)]

# A second; the Date of answers that are given in it (RFC 9110 §6.6.1); what an append is answered
# with then, but for its length. They are made once a second, and needed with every answer
# (bench/append.py, bench/lookup.py).
_last: tuple[int, str, bytes] = (0, "", b"")


def _this_second() -> tuple[int, str, bytes]:
    global _last
    second = int(time.time())
    last = _last
    if last[0] != second:
        date = times.http_date(second)
        head = http1.response_head(200, [("date", date), *_JSON_FIELDS, _SIGN])
        _last = last = (second, date, head[:-2] + b"content-length: ")
    return last


def signed(found: messages.Answer) -> messages.Fields:
    """The fields of an answer; of one that says that all went well, with the sign."""
    return [*found.fields, _SIGN] if found.status < 300 else list(found.fields)


def head_of(status: int, fields: messages.Fields) -> bytes:
    """A response's head, with its date."""
    return http1.response_head(status, [("date", _this_second()[1]), *fields])


def kept(head: http1.RequestHead, keep: bool) -> messages.Fields:
    """What a response says of whether its connection goes on: what its client wouldn't expect."""
    if not keep:
        return [CLOSE]
    return [] if head.minor else [("connection", "keep-alive")]


def of_frame(line: bytes) -> bytes:
    """The response that has one frame, on a connection that goes on (HTTP/1.1)."""
    return b"%b%d\r\n\r\n%b\n" % (_this_second()[2], len(line) + 1, line)


def whole(head: http1.RequestHead, found: messages.Answer, keep: bool) -> bytes:
    """The response to a request, of an answer whose body is in memory."""
    if keep and head.minor == 1 and found.status == 200 and found.fields == _JSON_FIELDS:
        # What an append is answered with.
        data = b"%b%d\r\n\r\n" % (_this_second()[2], len(found.body))
        return data if head.method == "HEAD" else data + found.body
    fields = signed(found)
    if found.status != 204:
        fields.append(("content-length", str(len(found.body))))
    data = head_of(found.status, [*fields, *kept(head, keep)])
    return data if head.method == "HEAD" else data + found.body
