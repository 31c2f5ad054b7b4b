"""Requests as the API spells them, from a caller's values, and what became of them.

Whoever asks a store for something, over a socket or in this process, writes it by these: text
percent-encoded, meta and keys in a form that a head can hold. Whether a value is right, the API
judges; here is refused only what could not even be sent. `ask` makes errors of answers that are
some, whatever `Transport` they come by.
"""

from __future__ import annotations

from xs import errors
from xs.system import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import Protocol, Union

    Fields = Iterable[tuple[str, str]]
    Body = Union[None, bytes, Iterable[bytes]]

    class Response(Protocol):
        """An answer: its status, its fields (names in lower case), and its body as it arrives."""

        status: int
        fields: list[tuple[str, str]]

        def get(self, name: str, default: str | None = None) -> str | None: ...
        def __iter__(self) -> Iterator[bytes]: ...
        def read(self) -> bytes: ...
        def close(self) -> None: ...

    class Transport(Protocol):
        """Whatever can take a request to a store: `HttpTransport`, or `local.Local`."""

        def request(
            self, method: str, target: str, fields: Fields = (), body: Body = None
        ) -> Response: ...
        def close(self) -> None: ...


BLOCK = 256 * 1024  # bytes read at once, from the socket and from files
SMALL = 64 * 1024  # a body up to this size goes out with its head in one call
_SENTENCE_MAX = 64 * 1024  # bytes read of an error's sentence, or of a conflict's frame

NDJSON = ("content-type", "application/x-ndjson")  # the field of a body of lines
EXPECT = ("expect", "100-continue")  # that of a body which is sent once the server asks for it

_UNRESERVED = frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._~")


def quote(text: str) -> str:
    """`text` percent-encoded for one segment of a path or a query's value (RFC 3986 §2.1)."""
    try:
        encoded = os.fsencode(text)  # arguments that aren't UTF-8 come as surrogates: their bytes
    except UnicodeEncodeError:
        raise errors.Invalid(f"half of a surrogate pair is no character: {text[:64]!r}") from None
    if _UNRESERVED.issuperset(encoded):
        return text
    return "".join(chr(b) if b in _UNRESERVED else f"%{b:02X}" for b in encoded)


def with_query(path: str, parameters: Iterable[tuple[str, object]]) -> str:
    """`path` and those parameters that aren't None: `("last", 3)` becomes `last=3`."""
    query = "&".join(f"{name}={quote(str(v))}" for name, v in parameters if v is not None)
    return f"{path}?{query}" if query else path


def path_of(id_text: str) -> str:
    """The path of a frame. Raises `Invalid` for what is no id, and would be another path."""
    if len(id_text) != 25 or not (id_text.isascii() and id_text.isalnum()):
        from xs import ids  # here: who asks for a frame has an id

        ids.parse(id_text)
    return "/" + id_text


def meta_field(text: str) -> tuple[str, str]:
    """The field that carries meta given as JSON text: as it is, or base64 where a head can't."""
    if text.isascii() and text.isprintable():
        return "xs-meta", text
    import binascii

    try:
        encoded = text.encode()
    except UnicodeEncodeError:  # an argument with other bytes
        raise errors.Invalid("meta is not UTF-8, as JSON has to be") from None
    return "xs-meta", binascii.b2a_base64(encoded, newline=False).decode("ascii")


def key_field(key: str) -> tuple[str, str]:
    """The field that carries an idempotency key. Raises `Invalid` for what a field can't hold."""
    if not key or key != key.strip() or not all(c.isprintable() for c in key):
        raise errors.Invalid("not a key: give 1 to 255 bytes, without control characters")
    return "idempotency-key", os.fsencode(key).decode("latin-1")


def append_request(
    topic: str,
    *,
    meta: str | None = None,
    ttl: object = None,
    if_last: str | None = None,
    key: str | None = None,
    chunked: bool = False,
) -> tuple[str, list[tuple[str, str]]]:
    """Target and fields of an append; `meta` is JSON text."""
    fields = []
    if meta is not None:
        fields.append(meta_field(meta))
    if key is not None:
        fields.append(key_field(key))
    if not topic:
        raise errors.Invalid("the topic is empty: give one such as notes or notes.add")
    options = [("ttl", ttl), ("if-last", if_last), ("chunked", "true" if chunked else None)]
    return with_query("/append/" + quote(topic), options), fields


# Asking


def ask(
    transport: Transport, method: str, target: str, fields: Fields = (), body: Body = None
) -> Response:
    """The answer to a request. Raises what `error_from` makes of a status of 400 or above."""
    response = transport.request(method, target, fields, body)
    if response.status >= 400:
        raise error_from(response)
    return response


def error_from(response: Response) -> errors.XsError:
    """The error that an answer with a status of 400 or above stands for; reads and ends it."""
    text = bytearray()
    try:
        for block in response:
            text += block
            if len(text) > _SENTENCE_MAX:
                break
    except errors.BrokenBody:
        pass  # half a sentence says more than that it broke off
    finally:
        response.close()
    status = response.status
    kind = (response.get("content-type") or "").partition(";")[0].strip().lower()
    if status == 409 and kind == "application/json":
        frame = bytes(text).strip()
        return errors.Conflict(response.get("xs-error") or _newest_is(frame), frame=frame)
    sentence = text.decode("utf-8", "replace").strip() or f"the server answered {status}"
    if status == 405:
        return errors.MethodNotAllowed(sentence, response.get("allow") or "")
    return _type_of(status)(sentence)


def _type_of(status: int) -> type[errors.XsError]:
    by_status: dict[int, type[errors.XsError]] = {
        400: errors.Invalid,
        401: errors.Unauthorized,
        403: errors.Forbidden,
        404: errors.NotFound,
        409: errors.Conflict,
        413: errors.TooLarge,
        421: errors.Misdirected,
        431: errors.TooLarge,
        501: errors.NoNushell,
        503: errors.Unavailable,
        507: errors.Full,
    }
    return by_status.get(status) or (errors.Invalid if status < 500 else errors.XsError)


def _newest_is(frame: bytes) -> str:
    if frame == b"null":
        return "not appended: the topic has no frame"
    import json

    try:
        newest = json.loads(frame)["id"]
    except (ValueError, TypeError, KeyError, RecursionError):
        newest = "another one"
    return f"not appended: the topic's newest frame is {newest}"


def split_lines(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """The lines in a body that comes in blocks, without their ends; empty ones are left out."""
    begun: list[bytes] = []  # a line of which there is no end yet
    for block in blocks:
        *lines, rest = block.split(b"\n")
        if lines:
            lines[0] = b"".join([*begun, lines[0]])
            begun = []
            for line in lines:
                if line:
                    yield line
        if rest:
            begun.append(rest)
    rest = b"".join(begun)
    if rest.strip():
        yield rest
