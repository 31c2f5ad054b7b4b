"""The heads of HTTP/1.1 as pure functions over bytes, in and out (RFC 9110, RFC 9112).

There is one strategy. A reader takes a bytearray and either consumes what it reads from its front
and returns it, or raises `Refusal`, or returns None for "more data" (what has come stays in the
buffer, and the reader is called again with more behind it). After a `Refusal` the connection has no
known position any more: it is answered and closed.

How a message is cut into pieces on its way never changes what is read from it: what is refused of
a part is refused, in the same words, of the whole. So the checks are in the order of the bytes.

Where the RFCs let a recipient choose between repair and refusal, this file refuses: a message that
two programs may read in two ways is how requests are smuggled (RFC 9112 §11.2).

No sockets, no clock, and no imports: the command line starts through this file.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

# Limits. What a sender can make us keep is bounded by these and by the caller's `limit` for a head.
HEAD_LIMIT = 65536  # bytes, a head with its empty line; the default of `limit`
REQUEST_LINE_LIMIT = 16384  # bytes; RFC 9112 §3 asks for at least 8000
METHOD_LIMIT = 32  # bytes; the longest registered method has 17 (UPDATEREDIRECTREF)
FIELD_LIMIT = 100  # field lines in a head or a trailer section
EMPTY_LINES_LIMIT = 4  # before a request line (RFC 9112 §2.2: at least one)
LENGTH_DIGITS = 18  # of a Content-Length: below 2**63, so any program after us can count it too

# Character classes, named as the RFCs name them. `x.translate(None, CLASS)` is what is not in it.
DIGIT = b"0123456789"
HEXDIG = DIGIT + b"abcdefABCDEF"
HEX_TO_ZERO = bytes.maketrans(HEXDIG, b"0" * len(HEXDIG))
ALPHA = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
TCHAR = DIGIT + ALPHA + b"!#$%&'*+-.^_`|~"  # RFC 9110 §5.6.2
VCHAR = bytes(range(0x21, 0x7F))  # RFC 5234 B.1
FIELD_VCHAR = b"\t " + VCHAR + bytes(range(0x80, 0x100))  # RFC 9110 §5.5, with the blanks inside
REG_NAME = DIGIT + ALPHA + b"-._~!$&'()*+,;=%"  # RFC 3986 §3.2.2

# The fields that decide how a message is framed and where it goes.
FRAMING = frozenset(("host", "content-length", "transfer-encoding", "connection", "expect"))

REASONS: dict[int, str] = {  # RFC 9110 §15; 428 429 431 511: RFC 6585; 507: RFC 4918 §11.5
    100: "Continue",
    101: "Switching Protocols",
    200: "OK",
    201: "Created",
    202: "Accepted",
    203: "Non-Authoritative Information",
    204: "No Content",
    205: "Reset Content",
    206: "Partial Content",
    300: "Multiple Choices",
    301: "Moved Permanently",
    302: "Found",
    303: "See Other",
    304: "Not Modified",
    307: "Temporary Redirect",
    308: "Permanent Redirect",
    400: "Bad Request",
    401: "Unauthorized",
    402: "Payment Required",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    406: "Not Acceptable",
    407: "Proxy Authentication Required",
    408: "Request Timeout",
    409: "Conflict",
    410: "Gone",
    411: "Length Required",
    412: "Precondition Failed",
    413: "Content Too Large",
    414: "URI Too Long",
    415: "Unsupported Media Type",
    416: "Range Not Satisfiable",
    417: "Expectation Failed",
    421: "Misdirected Request",
    422: "Unprocessable Content",
    426: "Upgrade Required",
    428: "Precondition Required",
    429: "Too Many Requests",
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
    501: "Not Implemented",
    502: "Bad Gateway",
    503: "Service Unavailable",
    504: "Gateway Timeout",
    505: "HTTP Version Not Supported",
    507: "Insufficient Storage",
    511: "Network Authentication Required",
}


class Refusal(Exception):
    """A message that must be refused. `str(refusal)` is one sentence for the one who sent it.

    `status` is what to answer to a request (of a response it says nothing); then close.
    """

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


class _Head:
    """What heads of both directions have: `minor`, `fields`, `length`, `keep_alive`."""

    __slots__ = ("fields", "keep_alive", "length", "minor")

    minor: int  # 1 or 0, of HTTP/1.1 or HTTP/1.0
    fields: list[tuple[str, str]]  # lower-case names, order kept; values trimmed, latin-1
    length: int | None  # bytes of the body; None when only its framing tells
    keep_alive: bool  # the connection may carry another message after this one

    def get(self, name: str, default: str | None = None) -> str | None:
        """The first value of the field `name` (in lower case)."""
        for field, value in self.fields:
            if field == name:
                return value
        return default

    def get_all(self, name: str) -> list[str]:
        """All values of the field `name` (in lower case), in order."""
        return [value for field, value in self.fields if field == name]


class RequestHead(_Head):
    """A request without its body, as `read_request_head` gives it.

    `target` is in origin form, or "*" (RFC 9112 §3.2); `path` and `query` are its two sides, still
    percent-encoded. `length` is None when the body is chunked. `expects_continue`: a body follows
    only after a 100 (Continue), or after some time (RFC 9110 §10.1.1). `block` are its field lines
    as they came; None when the target overrides one of them.
    """

    __slots__ = ("authority", "block", "expects_continue", "method", "path", "query", "target")

    block: bytes | None
    method: str
    target: str
    path: str
    query: str
    authority: str | None  # host[:port]; "" when Host is empty; None: HTTP/1.0 without one
    expects_continue: bool


class ResponseHead(_Head):
    """A response without its body; just one of `length`, `chunked`, `until_close` tells its end."""

    __slots__ = ("chunked", "status", "until_close")

    status: int
    chunked: bool
    until_close: bool


# --- a request's head ---------------------------------------------------------------------------


def read_request_head(
    buffer: bytearray, limit: int = HEAD_LIMIT, like: RequestHead | None = None
) -> RequestHead | None:
    """The next request's head. `limit`, in bytes, bounds it as a whole: 431, 414 for its line.

    `like` is an earlier one: a client mostly sends the same fields with each request, and the same
    bytes are not parsed again (bench/lookup.py).
    """
    if buffer[:1] == b"\r":
        return _request_head_after_empty_lines(buffer, limit)
    line = _request_line(buffer, min(REQUEST_LINE_LIMIT, limit - 4))
    if line is None:
        return None
    head = RequestHead()
    absolute = _parse_request_line(head, line)
    block = take_field_block(buffer, len(line) + 2, limit)
    if block is None:
        return None
    head.block = block if absolute is None else None
    if like is not None and like.block == block and like.minor == head.minor and absolute is None:
        head.fields, head.authority = like.fields, like.authority
        head.length, head.keep_alive = like.length, like.keep_alive
        head.expects_continue = like.expects_continue
        return head
    head.fields = fields_of(block)
    framing = _framing_fields(head.fields)
    head.length = None if _is_chunked(framing, head.minor) else _content_length(framing) or 0
    head.keep_alive = _keeps_alive(framing, head.minor)
    host = _host(framing, head.minor)
    head.authority = host if absolute is None else absolute  # RFC 9112 §3.2.2: Host is ignored
    head.expects_continue = _expects_continue(framing, head.minor) and head.length != 0
    return head


def _request_head_after_empty_lines(buffer: bytearray, limit: int) -> RequestHead | None:
    """RFC 9112 §2.2: a server ignores an empty line before a request line. A few, here."""
    start = 0
    while buffer.startswith(b"\r\n", start):
        start += 2
        if start > 2 * EMPTY_LINES_LIMIT:
            raise Refusal(400, "Too many empty lines come before the request line.")
    rest = buffer[start:]
    if b"\r\n".startswith(bytes(rest[:2])):
        return None  # they stay in the buffer, or a slow client's lines would never be counted
    if rest[:1] == b"\r":
        raise Refusal(400, "A CR without its LF comes before the request line.")
    head = read_request_head(rest, limit)
    if head is not None:
        del buffer[: len(buffer) - len(rest)]
    return head


def _request_line(buffer: bytearray, limit: int) -> bytes | None:
    """The request line when it is there as a whole; bytes that can't begin one are refused."""
    end = buffer.find(b"\r\n", 0, limit + 2)
    line = bytes(buffer[:end] if end >= 0 else buffer[: limit + 2])
    if end < 0 and line.endswith(b"\r"):
        line = line[:-1]  # its LF may be still to come
    if line:
        _check_method(line.partition(b" ")[0])
    wrong = line.translate(None, VCHAR + b" ")  # RFC 9112 §2.2: a bare CR or LF, too
    if wrong[:1] == b"\n":
        raise Refusal(400, "The request line ends with a bare LF: lines end with CR LF.")
    if wrong:
        raise Refusal(400, "The request line has a byte that is not visible ASCII or a space.")
    if end < 0 and len(buffer) >= limit + 2:
        raise Refusal(414, f"The request line has more than {limit} bytes.")
    return line if end >= 0 else None


def _check_method(start: bytes) -> None:
    """RFC 9112 §3.1, RFC 9110 §9.1; `start` may be the beginning of one."""
    if not start or start[: METHOD_LIMIT + 1].translate(None, TCHAR):
        raise Refusal(400, "What was sent does not begin with an HTTP method.")
    if len(start) > METHOD_LIMIT:  # RFC 9112 §3: longer than any method here
        raise Refusal(501, f"A method has at most {METHOD_LIMIT} bytes.")


def _parse_request_line(head: RequestHead, line: bytes) -> str | None:
    """Fills in what the line says; returns the authority of an absolute-form target."""
    parts = line.decode("ascii").split(" ")
    if len(parts) != 3:  # RFC 9112 §3: method SP request-target SP HTTP-version
        raise Refusal(400, "A request line is a method, a target and a version, one space between.")
    head.method, target, version = parts
    head.minor = _minor(version)
    if head.method == "CONNECT":  # RFC 9112 §3.2.3: the authority form is for proxies
        raise Refusal(501, "CONNECT is for proxies, and this is none.")
    authority = None
    if "#" in target:  # RFC 9112 §3.2: a target has no fragment
        raise Refusal(400, "The request target has a '#': write it as %23.")
    if not _has_whole_percents(target):
        raise Refusal(400, "The request target has a '%' that two hexadecimal digits don't follow.")
    if not target.startswith("/") and not (target == "*" and head.method == "OPTIONS"):
        authority, target = _origin_form(head.method, target)
    head.target = target
    head.path, _, head.query = target.partition("?")
    return authority


def _minor(version: str) -> int:
    """RFC 9112 §2.3, RFC 9110 §2.5 and §15.6.6."""
    if version == "HTTP/1.1":
        return 1
    if version == "HTTP/1.0":
        return 0
    major, dot, minor = version[5:].partition(".")
    digits = len(major) == len(minor) == 1 and (major + minor).isdigit()
    if version.startswith("HTTP/") and dot and digits:
        raise Refusal(505, "This server speaks HTTP/1.1 and HTTP/1.0.")
    raise Refusal(400, "A request line ends with its version, HTTP/1.1.")


def _has_whole_percents(text: str) -> bool:
    """RFC 3986 §2.1: a percent sign is followed by two hexadecimal digits."""
    if "%" not in text:
        return True
    zeros = text.encode("latin-1").translate(HEX_TO_ZERO)
    return zeros.count(b"%00") == zeros.count(b"%")


def _origin_form(method: str, target: str) -> tuple[str, str]:
    """(authority, target in origin form) of a target in absolute form (RFC 9112 §3.2.2)."""
    scheme, mark, rest = target.partition("://")
    if not mark or scheme.lower() not in ("http", "https"):
        raise Refusal(400, "A request target begins with '/', or with http:// and a host.")
    authority = rest.partition("?")[0].partition("/")[0]
    if "@" in authority:  # RFC 9110 §4.2.4
        raise Refusal(400, "The request target has user information before its host.")
    if authority[:1] in ("", ":") or not _is_authority(authority):  # RFC 9110 §4.2.1: not empty
        raise Refusal(400, "The request target has no host[:port] after its scheme.")
    target = rest[len(authority) :]
    if not target and method == "OPTIONS":  # RFC 9112 §3.2.4
        return authority, "*"
    return authority, target if target.startswith("/") else "/" + target


def _is_authority(text: str) -> bool:
    """uri-host [ ":" port ]: RFC 9110 §7.2, RFC 3986 §3.2.2 (but no IPvFuture) and §3.2.3."""
    if text[:1] == "[":
        address, bracket, port = text[1:].partition("]")
        if not bracket or port[:1] not in ("", ":") or address.count(":") < 2:
            return False
        return not (address.encode("latin-1").translate(None, HEXDIG + b":.") or _no_port(port[1:]))
    host, _, port = text.partition(":")
    if host.encode("latin-1").translate(None, REG_NAME) or not _has_whole_percents(host):
        return False
    return not _no_port(port)


def _no_port(text: str) -> bool:
    return bool(text.encode("latin-1").translate(None, DIGIT))


def _host(framing: dict[str, list[str]], minor: int) -> str | None:
    """The Host field (RFC 9112 §3.2): one in HTTP/1.1, at most one in HTTP/1.0."""
    hosts = framing.get("host")
    if hosts is None:
        if minor:
            raise Refusal(400, "A request of HTTP/1.1 has a Host field, and this one has none.")
        return None
    if len(hosts) > 1:
        raise Refusal(400, "A request has one Host field, and this one has several.")
    if not _is_authority(hosts[0]):
        raise Refusal(400, "The Host field is not host[:port].")
    return hosts[0]


def _expects_continue(framing: dict[str, list[str]], minor: int) -> bool:
    """RFC 9110 §10.1.1; from HTTP/1.0 it is ignored."""
    if not minor or "expect" not in framing:
        return False
    if any(value.lower() != "100-continue" for value in framing["expect"]):
        raise Refusal(417, "The only expectation that can be met is 100-continue.")
    return True


# --- fields, of requests, responses and trailer sections ----------------------------------------


def take_field_block(buffer: bytearray, start: int, limit: int) -> bytes | None:
    """Consumes a head or trailer section: its field lines, from `start` on, without the last CRLF.

    Nothing is remembered between calls, so a slow sender's bytes are searched again with each of
    its pieces, in C, `limit` bytes at most: measured, 2 µs for each KiB that is there.
    """
    end = buffer.find(b"\r\n\r\n", max(start - 2, 0), limit)  # `start - 2`: there may be no fields
    if end >= 0:
        block = bytes(buffer[start:end])
        _check_field_bytes(block)
        del buffer[: end + 4]
        return block
    block = bytes(buffer[start:limit])
    _check_field_bytes(block[:-1] if block.endswith(b"\r") else block)  # its LF may come
    if len(buffer) >= limit:
        raise Refusal(431, f"The header fields are over the limit of {limit} bytes.")
    return None


def _check_field_bytes(block: bytes) -> None:
    """RFC 9110 §5.5: no NUL, no control characters. RFC 9112 §2.2: CR and LF only as CRLF."""
    if block.translate(None, FIELD_VCHAR) != b"\r\n" * block.count(b"\r\n"):
        raise Refusal(400, "A header field has a control character, or a CR or LF that is alone.")


def fields_of(block: bytes) -> list[tuple[str, str]]:
    """RFC 9112 §5: field-name ":" OWS field-value OWS, each on its line."""
    if not block:
        return []
    lines = block.split(b"\r\n")
    if len(lines) > FIELD_LIMIT:
        raise Refusal(431, f"There are more than {FIELD_LIMIT} header fields.")
    fields = []
    for line in lines:
        name, colon, value = line.partition(b":")
        if not colon or not name or name.translate(None, TCHAR):
            raise _bad_field_line(line)
        fields.append((name.lower().decode("ascii"), value.strip(b" \t").decode("latin-1")))
    return fields


def _bad_field_line(line: bytes) -> Refusal:
    name, colon, _ = line.partition(b":")
    if line[:1] in (b" ", b"\t"):  # RFC 9112 §2.2 before the first field, §5.2 (obs-fold) later
        return Refusal(400, "A header field's line begins with white space.")
    if not colon:
        return Refusal(400, "A header field's line has no colon.")
    if name[-1:] in (b" ", b"\t"):  # RFC 9112 §5.1
        return Refusal(400, "A header field has white space between its name and its colon.")
    return Refusal(400, "A header field's name is not a token.")  # RFC 9110 §5.1 and §5.6.2


def _framing_fields(fields: list[tuple[str, str]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, value in fields:
        if name in FRAMING:
            found.setdefault(name, []).append(value)
    return found


def _is_chunked(framing: dict[str, list[str]], minor: int) -> bool:
    """Whether the body is chunked (RFC 9112 §6.1 and §6.3); False without Transfer-Encoding."""
    values = framing.get("transfer-encoding")
    if values is None:
        return False
    if "content-length" in framing:  # RFC 9112 §6.3, 3: allowed to be repaired, but an attack
        raise Refusal(400, "A message has Content-Length or Transfer-Encoding, not both.")
    if not minor:  # RFC 9112 §6.1: framing that a party of HTTP/1.0 does not know
        raise Refusal(400, "A message of HTTP/1.0 has no Transfer-Encoding.")
    codings = [coding.strip(" \t").lower() for coding in ",".join(values).split(",")]
    if codings == ["chunked"]:
        return True
    if codings[-1] != "chunked":  # RFC 9112 §6.3, 4: a MUST, before §6.1's 501 for the unknown
        raise Refusal(400, "The last transfer coding is not chunked, so the body has no end.")
    if codings.count("chunked") > 1 or "" in codings:  # RFC 9112 §6.1: never more than once
        raise Refusal(400, "Transfer-Encoding is not a list that ends with its one chunked.")
    raise Refusal(501, "The only transfer coding that is known here is chunked.")


def _content_length(framing: dict[str, list[str]]) -> int | None:
    """RFC 9110 §8.6: 1*DIGIT, once. None without the field. Identical repeats are refused, too."""
    values = framing.get("content-length")
    if values is None:
        return None
    value = values[0]
    if len(values) > 1 or "," in value:
        raise Refusal(400, "A message has one Content-Length, and this one has several.")
    if not (value.isascii() and value.isdigit()):
        raise Refusal(400, "Content-Length is not a decimal number.")
    if len(value) > LENGTH_DIGITS:
        raise Refusal(413, f"Content-Length has more than {LENGTH_DIGITS} digits.")
    return int(value)


def _keeps_alive(framing: dict[str, list[str]], minor: int) -> bool:
    """RFC 9112 §9.3; the options are case-insensitive (RFC 9110 §7.6.1)."""
    values = framing.get("connection")
    if values is None:
        return minor == 1
    options = [option.strip(" \t").lower() for option in ",".join(values).split(",")]
    return "close" not in options and (minor == 1 or "keep-alive" in options)


# --- what a server sends ------------------------------------------------------------------------


def response_head(status: int, fields: Iterable[tuple[str, str]], minor: int = 1) -> bytes:
    """A response's head; ValueError for what would not be one, so nothing can split a response.

    `minor` is the request's: HTTP/1.0 is never sent a Transfer-Encoding (RFC 9112 §6.1). The
    status line says HTTP/1.1 all the same, the version of this server (RFC 9110 §6.2).
    """
    if not 100 <= status <= 599:  # RFC 9110 §15
        raise ValueError(f"{status} is not a status: one has three digits, from 100 to 599")
    lines = _field_lines(fields)
    if not minor and b"\r\ntransfer-encoding:" in b"\r\n" + lines.lower():
        raise ValueError("a response to HTTP/1.0 has no Transfer-Encoding")
    return b"HTTP/1.1 %d %b\r\n%b\r\n" % (status, REASONS.get(status, "").encode(), lines)


def _field_lines(fields: Iterable[tuple[str, str]]) -> bytes:
    """The lines of `fields`; ValueError for a name that is no token, a value with a CR, LF, …"""
    names = []
    lines = []
    for name, value in fields:
        names.append(name or " ")  # an empty name is no token either
        lines.append(f"{name}: {value}\r\n")
    block = "".join(lines).encode("latin-1")  # UnicodeEncodeError is a ValueError
    if "".join(names).encode("latin-1").translate(None, TCHAR):
        raise ValueError("a field's name is not a token")
    if block.translate(None, FIELD_VCHAR) != b"\r\n" * len(lines):
        raise ValueError("a field's value has a control character")
    return block


# --- the client's side --------------------------------------------------------------------------


def request_head(
    method: str, target: str, authority: str, fields: Iterable[tuple[str, str]]
) -> bytes:
    """A request's head, with `Host: authority` first; ValueError for what would not be one.

    `target` is in origin form and percent-encoded, or "*".
    """
    line = f"{method} {target} HTTP/1.1".encode("latin-1")
    head = RequestHead()
    try:
        if _request_line(bytearray(line + b"\r\n"), REQUEST_LINE_LIMIT) != line:
            raise ValueError("a request line is one line")
        _parse_request_line(head, line)
    except Refusal as refusal:
        raise ValueError(str(refusal)) from None
    if head.target != target or not _is_authority(authority):
        raise ValueError("a request needs a target in origin form and host[:port]")
    lines = _field_lines(fields)
    if b"\r\nhost:" in b"\r\n" + lines.lower():
        raise ValueError("the Host field is made of the authority")
    return b"%b\r\nHost: %b\r\n%b\r\n" % (line, authority.encode("latin-1"), lines)


def read_response_head(buffer: bytearray, method: str) -> ResponseHead | None:
    """The head of the response to `method`; interim ones (1xx) before it are read and dropped."""
    while True:
        if not b"HTTP/1.".startswith(bytes(buffer[:7])):
            raise Refusal(400, "What was sent is not a response of HTTP/1.")
        head = take_field_block(buffer, 0, HEAD_LIMIT)
        if head is None:
            return None
        line, _, block = head.partition(b"\r\n")
        response = ResponseHead()
        response.status, response.minor = _parse_status_line(line)
        response.fields = fields_of(block)
        if response.status >= 200:
            _frame_response(response, method)
            return response
        if response.status == 101:  # RFC 9110 §15.2.2
            raise Refusal(400, "The server switches to a protocol that was not asked for.")


def _parse_status_line(line: bytes) -> tuple[int, int]:
    """HTTP-version SP status-code SP [ reason-phrase ] (RFC 9112 §4) → (status, minor)."""
    version, status, space = line[:8], line[9:12], line[8:9] + line[12:13]
    digits = len(status) == 3 and not status.translate(None, DIGIT)
    if version not in (b"HTTP/1.0", b"HTTP/1.1") or space != b"  " or not digits:
        raise Refusal(400, "What was sent does not begin with a status line.")
    if not 100 <= int(status) <= 599:  # RFC 9110 §15
        raise Refusal(400, "A status is from 100 to 599.")
    return int(status), version[7] - 48


def _frame_response(head: ResponseHead, method: str) -> None:
    """Finds where the body ends (RFC 9112 §6.3)."""
    framing = _framing_fields(head.fields)
    head.chunked = head.until_close = False
    head.keep_alive = _keeps_alive(framing, head.minor)
    if method == "HEAD" or head.status in (204, 304):
        head.length = 0
        return
    head.chunked = _is_chunked(framing, head.minor)
    head.length = _content_length(framing)
    head.until_close = head.length is None and not head.chunked
    head.keep_alive = head.keep_alive and not head.until_close
