"""What the API is told and what it gives: a request and its answer, as values, and their parts.

No sockets, and no routes: `api` has those. Where a part of a request can't be read, the error says
what was given and what would be right.
"""

from __future__ import annotations

from xs import frame, ids
from xs.errors import Conflict, Invalid, MethodNotAllowed, XsError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import Any, Optional

    from xs.reader import Reader
    from xs.rights import Rights
    from xs.scripts import Scripts
    from xs.work import Work

    Fields = list[tuple[str, str]]

NDJSON = "application/x-ndjson"
JSON = "application/json"
TEXT = "text/plain; charset=utf-8"
BYTES = "application/octet-stream"
EVENTS = "text/event-stream"


class Request:
    """What a handler is told: `path` and `query` still percent-encoded, names of fields lower case.

    `body` gives the body's blocks as they arrive and raises `BrokenBody` if it breaks off.
    `scripts` are those of the server that is asked; None if it has none, or there is no server.
    `stores` are the other stores of that server, if it is the root store that is asked, else None.
    `is_wanted` tells whether the client is still there. `will_run` is called before a script is run
    for it: the client may lose the right to that while it waits.
    """

    __slots__ = (
        "body",
        "fields",
        "is_wanted",
        "method",
        "path",
        "query",
        "rights",
        "scripts",
        "stores",
        "will_run",
    )

    def __init__(
        self, method: str, path: str, query: str, fields: Fields, body: Iterable[bytes] = ()
    ) -> None:
        self.method = method
        self.path = path
        self.query = query
        self.fields = fields
        self.body = body
        self.scripts: Scripts | None = None
        self.stores: Any = None
        self.is_wanted: Callable[[], bool] = lambda: True
        self.will_run: Callable[[], None] = lambda: None
        self.rights: Rights | None = None  # the owner's: everything

    def get(self, name: str) -> str | None:
        """The value of a field that may come once. Raises `Invalid` if it comes twice."""
        found = None
        for each, value in self.fields:
            if each == name:
                if found is not None:
                    raise Invalid(f"the header {name} is given twice")
                found = value
        return found

    def parameters(self) -> list[tuple[str, str]]:
        """Names and values of the query, decoded; `+` stands for itself (RFC 3986)."""
        if not self.query:
            return []
        pairs = []
        for part in self.query.split("&"):
            if part:
                name, _, value = part.partition("=")
                pairs.append((decode(name), decode(value)))
        return pairs

    def options(self, *allowed: str) -> dict[str, str]:
        """The query as a dictionary. Raises `Invalid` for one not allowed, or given twice."""
        found: dict[str, str] = {}
        for name, value in self.parameters():
            if name not in allowed:
                known = f"; here one can give: {', '.join(allowed)}" if allowed else ""
                raise Invalid(f"unknown parameter: {name[:64]!r}{known}")
            if name in found:
                raise Invalid(f"{name} is given twice")
            found[name] = value
        return found


class Answer:
    """What goes back. The body is one of `body`, `blocks` (`length` if it is known) and `reader`.

    With `work` the answer depends on what a commit will do: `finish(work)` gives the real one once
    it is done.
    """

    __slots__ = ("blocks", "body", "fields", "finish", "length", "reader", "status", "work")

    def __init__(
        self,
        status: int,
        kind: str | None = None,
        body: bytes = b"",
        *,
        blocks: Iterator[bytes] | None = None,
        length: int | None = None,
        reader: Reader | None = None,
        work: Work | None = None,
        finish: Callable[[Work], Answer] | None = None,
    ) -> None:
        self.status = status
        self.fields: Fields = [] if kind is None else [("content-type", kind)]
        self.body = body
        self.blocks = blocks
        self.length = length
        self.reader = reader
        self.work = work
        self.finish = finish


def of_frame(line: bytes) -> Answer:
    """An answer that is a frame's line."""
    return Answer(200, JSON, line)


def error_answer(error: XsError) -> Answer:
    """An error as an answer: one sentence, or the newest frame when `if-last` did not hold."""
    if isinstance(error, Conflict) and error.frame is not None:
        found = Answer(error.status, JSON, error.frame + b"\n")
        found.fields.append(("xs-error", str(error).encode("ascii", "replace").decode()))
        return found
    found = Answer(error.status, TEXT, f"{error}\n".encode("utf-8", "replace"))
    if isinstance(error, MethodNotAllowed):
        found.fields.append(("allow", error.allow))
    if error.status == 401:
        found.fields.append(("www-authenticate", 'Bearer realm="xs"'))
    return found


# Parts of requests


def decode(text: str) -> str:
    """Percent-decoded UTF-8. Raises `Invalid` for bytes that are no UTF-8."""
    if "%" not in text:
        return text
    import binascii

    pieces = text.encode("latin-1").split(b"%")
    data = [pieces[0]]
    for piece in pieces[1:]:
        try:
            if not piece:
                raise binascii.Error
            data.append(binascii.a2b_hex(piece[:2]) + piece[2:])
        except binascii.Error:
            raise Invalid(f"broken percent-encoding: {text[:64]!r}") from None
    decoded = b"".join(data)
    try:
        return decoded.decode()
    except UnicodeDecodeError:
        shown = decoded[:64].decode(errors="backslashreplace")
        raise Invalid(f"not UTF-8: '{shown}'") from None


def parse_key(value: Optional[str]) -> str | None:
    """An idempotency key, as a field has it: UTF-8, read as Latin-1."""
    if value is None:
        return None
    key = value.encode("latin-1")
    if not 1 <= len(key) <= frame.KEY_MAX:
        raise Invalid(f"the idempotency key has 1 to {frame.KEY_MAX} bytes")
    try:
        return key.decode()
    except UnicodeDecodeError:
        raise Invalid("the idempotency key is not UTF-8") from None


def parse_expected(value: str) -> str:
    """What `if-last` expects: an id, or none."""
    if value == "none":
        return value
    if not ids.is_id(value):
        raise Invalid(f"if-last={value[:64]!r}: use the id of the topic's newest frame, or none")
    return value.lower()


def kind_of(request: Request) -> str:
    """The type of a request's body, without its parameters."""
    return (request.get("content-type") or "").split(";")[0].strip().lower()


def need_ndjson(request: Request, sentence: str) -> None:
    """Raises `Invalid` for a body of another type; the sentence says what would be right."""
    kind = kind_of(request)
    if kind != NDJSON:
        raise Invalid(f"the content type is {kind or 'missing'}, not {NDJSON}: {sentence}")
