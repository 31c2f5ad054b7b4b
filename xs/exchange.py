"""One HTTP exchange as frames: a request as meta, an answer's meta as a response.

Pure: the clock is given.

What comes from an answer's meta is checked here, before anything of it goes on the wire: it must be
legal HTTP, and it has no say in how the message is framed. `NotHttp` says what is wrong, for the
log: the client is not told.
"""

from __future__ import annotations

import binascii
import json
from typing import Any, Optional

from xs import http1, times
from xs.errors import Invalid
from xs.frame import parse_integrity
from xs.records import NamedTuple

REQUEST = "http.request"
RESPONSE = "http.response"
DISCONNECT = "http.disconnect"

NO_CONTENT = (204, 205, 304)  # RFC 9110 §15.3.5, §15.3.6, §15.4.5


class NotHttp(ValueError):
    """An answer that must not reach the wire. `str` says why, in half a sentence."""


class Response(NamedTuple):
    """What an answer's meta asks for. `fields` are without those that frame the message."""

    status: int
    fields: list[tuple[str, str]]
    length: Optional[int]  # the Content-Length that it gives
    closes: bool  # whether the connection is to be closed after it


class Part(NamedTuple):
    """Which content an answer's frame brings, and whether another frame goes on with the body."""

    more: bool
    hash: Optional[str]  # of content that lies elsewhere; None: the frame's own


class Framed(NamedTuple):
    """A response's head, and how its body follows."""

    head: bytes
    has_body: bool
    is_chunked: bool
    keep: bool  # whether the connection can carry another exchange


# A request as meta


def request_meta(request_id: str, head: http1.RequestHead, remote_ip: Optional[str]) -> str:
    """The meta of `http.request`, as JSON text (docs/protocol.md, HTTP gateway)."""
    fields = [
        (name, _text(value))
        # RFC 9112 §3.2.2: of a target in absolute form the host counts, and not the field.
        if name != "host" or head.authority is None
        else (name, head.authority)
        for name, value in head.fields
    ]
    if head.authority is not None and all(name != "host" for name, _ in fields):
        fields.insert(0, ("host", head.authority))  # HTTP/1.0 needs no field
    meta = {
        "request_id": request_id,
        "method": head.method,
        "path": head.path,
        "query": _grouped(_pairs(head.query)),
        "headers": _grouped(fields),
        "proto": f"HTTP/1.{head.minor}",
        "remote_ip": remote_ip,
    }
    return _ENCODER.encode(meta)


_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


def disconnect_meta(request_id: str) -> str:
    return _ENCODER.encode({"request_id": request_id})


def _grouped(pairs: list[tuple[str, str]]) -> dict[str, Any]:
    """Names and values as an object; the values of a name that repeats are a list, in order."""
    found: dict[str, Any] = dict(pairs)
    if len(found) < len(pairs):
        lists: dict[str, list[str]] = {}
        for name, value in pairs:
            lists.setdefault(name, []).append(value)
        found = {name: values if len(values) > 1 else values[0] for name, values in lists.items()}
    return found


def _pairs(query: str) -> list[tuple[str, str]]:
    """A query's names and values, decoded as a form's are (application/x-www-form-urlencoded)."""
    if not query:
        return []
    pairs = []
    for part in query.split("&"):
        if part:
            name, _, value = part.partition("=")
            pairs.append((_decoded(name), _decoded(value)))
    return pairs


def _decoded(text: str) -> str:
    text = text.replace("+", " ")
    if "%" not in text:
        return text
    first, *rest = text.split("%")  # two hexadecimal digits follow each: `http1` sees to it
    data = first.encode("ascii")
    for part in rest:
        data += binascii.a2b_hex(part[:2]) + part[2:].encode("ascii")
    return data.decode("utf-8", "replace")


def _text(value: str) -> str:
    """A field's value as people wrote it: UTF-8, or Latin-1 where that can't be read as such."""
    if value.isascii():
        return value
    data = value.encode("latin-1")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return value


# An answer's meta as a response


def response_of(meta: dict[str, Any]) -> Response:
    """What the first frame of an answer asks for. Raises `NotHttp`."""
    status = meta.get("status")
    if status is None:
        status = 200
    # An interim status (1xx) would have the client wait for another head (RFC 9110 §15.2).
    if type(status) is not int or not 200 <= status <= 599:
        raise NotHttp(f"its status is {_shown(status)}, and not a number from 200 to 599")
    length = None
    closes = False
    fields = []
    for name, value in _given_fields(meta.get("headers")):
        kind = name.lower()
        if kind == "transfer-encoding":
            raise NotHttp("it has a Transfer-Encoding, which is not its to choose")
        if kind == "content-length":
            if length is not None or not (value.isascii() and value.isdigit() and len(value) < 19):
                raise NotHttp(f"its Content-Length is {_shown(value)}")
            length = int(value)
        elif kind == "connection":
            closes = _closes(value) or closes
        else:
            fields.append((name, value))
    return Response(status, fields, length, closes)


def part_of(meta: dict[str, Any], own: Optional[str]) -> Part:
    """What any frame of an answer brings; `own` is the frame's hash. Raises `NotHttp`."""
    more = meta.get("more")
    if more is not None and type(more) is not bool:
        raise NotHttp(f"its more is {_shown(more)}, and neither true nor false")
    hash_ = meta.get("hash")
    if hash_ is not None:
        try:
            parse_integrity(hash_ if isinstance(hash_, str) else "")
        except Invalid:
            raise NotHttp(f"its hash is {_shown(hash_)}") from None
        if own is not None:
            raise NotHttp("it has content of its own, and a hash of other content")
    return Part(bool(more), hash_)


def framed(
    response: Response, size: int, request: http1.RequestHead, now: float, *, more: bool, keep: bool
) -> Framed:
    """The head of a response whose (first) content has `size` bytes. Raises `NotHttp`.

    `more`: further frames carry on the body; `keep`: the connection may be kept if it can be.
    `now` is for its Date, in seconds since 1970 (RFC 9110 §6.6.1).
    """
    status, fields, given, closes = response
    is_head = request.method == "HEAD"
    if status in NO_CONTENT and (size or more):
        raise NotHttp(f"it has content, and a response of status {status} has none")
    if given is not None and more:
        raise NotHttp(f"its Content-Length is {given}, and further frames carry on its body")
    # Of a body that isn't sent the length may be told all the same (RFC 9110 §8.6).
    if given not in (None, size) and (size or not (is_head or status == 304)):
        raise NotHttp(f"its Content-Length is {given}, and its content has {size} bytes")
    fields = list(fields)
    if not any(name.lower() == "date" for name, _ in fields):
        fields.append(("date", times.http_date(int(now))))
    is_chunked = more and request.minor == 1
    keep = keep and not closes and (is_chunked or not more)
    if is_chunked:
        fields.append(("transfer-encoding", "chunked"))
    elif not more and status != 204 and (status != 304 or given is not None):
        fields.append(("content-length", str(size if given is None else given)))
    if not keep:
        fields.append(("connection", "close"))
    elif request.minor == 0:
        fields.append(("connection", "keep-alive"))
    try:
        head = http1.response_head(status, fields, request.minor)
    except ValueError as error:
        raise NotHttp(f"its headers are not HTTP: {_blamed(response.fields)}: {error}") from None
    return Framed(head, not is_head and status not in NO_CONTENT, is_chunked, keep)


def _given_fields(headers: Any) -> list[tuple[str, str]]:
    """Names and values of an answer's headers, text as the bytes of its UTF-8."""
    if headers is None:
        return []
    if not isinstance(headers, dict):
        raise NotHttp(f"its headers are {_shown(headers)}, and not names with their values")
    fields = []
    for name, given in headers.items():
        for value in given if isinstance(given, list) else [given]:
            if not isinstance(value, str):
                raise NotHttp(
                    f"its header {_shown(name)} is {_shown(value)}, "
                    "and neither a string nor a list of strings"
                )
            try:
                fields.append((name, value.encode().decode("latin-1")))
            except UnicodeEncodeError:
                raise NotHttp(f"its header {_shown(name)} has half a character") from None
    return fields


def _closes(value: str) -> bool:
    options = {option.strip(" \t").lower() for option in value.split(",")}
    if not options <= {"close", "keep-alive"}:
        raise NotHttp(f"its Connection is {_shown(value)}: it can ask for close")
    return "close" in options


def _blamed(fields: list[tuple[str, str]]) -> str:
    """The first of the fields that is not one, as the log may show it."""
    for name, value in fields:
        try:
            http1.response_head(200, [(name, value)])
        except ValueError:
            return _shown(name)
    return "headers"


def _shown(value: Any) -> str:
    """A value from an answer in the log: ASCII, in one line, bounded."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:80] + "…"
