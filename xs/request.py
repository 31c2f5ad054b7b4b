"""Requests as the API spells them: their targets and fields, from a caller's values.

Whoever asks a store for something, over a socket or in this process, writes it by these: text
percent-encoded, meta and keys in a form that a head can hold. Whether a value is right, the API
judges; here is refused only what could not even be sent.
"""

from __future__ import annotations

import os

from xs import errors

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

NDJSON = ("content-type", "application/x-ndjson")  # the field of a body of lines

_UNRESERVED = frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._~")


def quote(text: str) -> str:
    """`text` percent-encoded for one segment of a path or a query's value (RFC 3986 §2.1)."""
    encoded = os.fsencode(text)  # arguments that aren't UTF-8 come as surrogates: their own bytes
    if _UNRESERVED.issuperset(encoded):
        return text
    return "".join(chr(b) if b in _UNRESERVED else f"%{b:02X}" for b in encoded)


def with_query(path: str, parameters: Iterable[tuple[str, object]]) -> str:
    """`path` and those parameters that aren't None: `("last", 3)` becomes `last=3`."""
    query = "&".join(f"{name}={quote(str(v))}" for name, v in parameters if v is not None)
    return f"{path}?{query}" if query else path


def meta_field(text: str) -> tuple[str, str]:
    """The field that carries meta given as JSON text: as it is, or base64 where a head can't."""
    if text.isascii() and text.isprintable():
        return "xs-meta", text
    import binascii

    encoded = text.encode("utf-8", "surrogateescape")
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
