"""The HTTP API as functions: a request in, an answer out (docs/protocol.md, HTTP API).

Knows the store, the routes and the statuses, and no sockets: `httpd` puts it on connections, and
`local` calls it in the same process when no server has the store. There a command starts with it:
so what only writing needs, or only reading more than a frame, is loaded when the first request
comes to it (`_load_writing`, `_load_reading`). What few requests need is imported by their routes.
A server has all of that from its start (`load`).
"""

from __future__ import annotations

from xs import frame, ids
from xs.errors import (
    Conflict,
    Forbidden,
    Invalid,
    MethodNotAllowed,
    NoMemory,
    NotFound,
    TooLarge,
    XsError,
)
from xs.store import Store

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import Any, Optional

    from xs.commit import Append
    from xs.content import Content, small, take
    from xs.query import ReadOptions, parse_count, parse_flag, parse_read_options
    from xs.reader import Form, Reader, write
    from xs.rights import Rights
    from xs.scripts import Scripts
    from xs.work import AppendWork, PinWork, RemoveWork, Work

    Fields = list[tuple[str, str]]
    Handler = Callable[[Store, "Request", str], "Answer"]
    _Handlers = dict[str, Handler]
else:
    AppendWork = Reader = None  # not loaded yet

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


def answer(store: Store, request: Request) -> Answer:
    """The answer to a request; errors are answers too."""
    try:
        return _route(store, request)
    except XsError as error:
        return error_answer(error)
    except MemoryError:
        return error_answer(NoMemory())


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


# Routes


def _load_writing() -> None:
    global Append, AppendWork, PinWork, RemoveWork, small, take
    from xs.commit import Append
    from xs.content import small, take
    from xs.work import AppendWork, PinWork, RemoveWork


def _load_reading() -> None:
    global Form, ReadOptions, Reader, parse_count, parse_flag, parse_read_options, write
    from xs.query import ReadOptions, parse_count, parse_flag, parse_read_options
    from xs.reader import Form, Reader, write


def load() -> None:
    """Loads what any route may need: later there may be no descriptor left, or no disk."""
    import zlib  # noqa: F401  # for `sums`

    from xs import (  # noqa: F401
        alike,
        batch,
        check,
        chunked,
        garbage,
        places,
        process,
        removal,
        walk,
    )

    _load_writing()
    _load_reading()


METHODS = frozenset({"GET", "HEAD", "POST", "DELETE", "PUT", "PATCH", "OPTIONS", "TRACE"})


def _route(store: Store, request: Request) -> Answer:
    path = request.path
    word, slash, rest = path[1:].partition("/")
    known = _ROUTES.get(word)
    if known is None:
        if slash:
            raise NotFound(f"no such path: {path[:128]}")
        known, rest = _BY_ID_OR_TOPIC, word
    handlers = known[1] if slash or known is _BY_ID_OR_TOPIC else known[0]
    if not handlers:
        wanted = "" if slash or not any(known) else f": it is /{word}/… with something behind"
        raise NotFound(f"no such path: {path[:128]}{wanted}")
    method = "GET" if request.method == "HEAD" else request.method
    handler = handlers.get(method)
    if handler is None:
        allow = ", ".join(sorted({*handlers, "HEAD"} if "GET" in handlers else handlers))
        if request.method not in METHODS:
            raise _NotImplemented(f"unknown method: {request.method[:32]}; this path has {allow}")
        raise MethodNotAllowed(f"{request.method} is not for {path[:128]}: use {allow}", allow)
    if request.rights is not None and not request.rights.admin:
        _check_rights(request, request.rights, handler)
    return handler(store, request, rest)


def _check_rights(request: Request, rights: Rights, handler: Handler) -> None:
    """Raises `Forbidden` for what a request may not do. On which topics is looked at later."""
    if handler in (_append, _append_lines, _put_content):
        rights.check_append()
    elif request.method in ("GET", "HEAD"):
        if handler is not _version:
            rights.check_read()
    else:
        rights.check_admin(f"{request.method} {request.path[:128]}")


class _NotImplemented(XsError):
    status = 501


def _read(store: Store, request: Request, _: str) -> Answer:
    return _stream(store, request, request.parameters())


def _read_topic(store: Store, request: Request, rest: str) -> Answer:
    parameters = request.parameters()
    if any(name == "topic" for name, _ in parameters):
        raise Invalid("topic is in the path already: leave the parameter out")
    return _stream(store, request, [*parameters, ("topic", decode(rest))])


def _stream(store: Store, request: Request, parameters: list[tuple[str, str]]) -> Answer:
    if Reader is None:
        _load_reading()
    sse = _accepts_events(request)
    resume = request.get("last-event-id") if sse else None
    if resume and not any(name in ("after", "last-id") for name, _ in parameters):
        # A browser that reconnects repeats the first request: where it was counts, not its start.
        parameters = [p for p in parameters if p[0] not in ("from", "new", "tail", "last")]
        parameters.append(("after", resume))
    options = parse_read_options(parameters, store.clock())
    reader = Reader(store, options, sse=sse)
    kind = EVENTS if sse else NDJSON
    if options.follow:
        return Answer(200, kind, reader=reader)
    return Answer(200, kind, blocks=_begun(reader.history()))


def _accepts_events(request: Request) -> bool:
    accept = ",".join([value for name, value in request.fields if name == "accept"])
    for part in accept.lower().split(","):
        kind, *parameters = [each.strip() for each in part.split(";")]
        # RFC 9110 §12.4.2: with a weight of 0 it is not wanted.
        if kind == EVENTS and not any(p[:2] == "q=" and not p[2:].strip("0.") for p in parameters):
            return True
    return False


def _get(store: Store, request: Request, rest: str) -> Answer:
    if Reader is None:
        _load_reading()
    value = ids.parse(decode(rest))
    given = request.options("with-timestamp", "with-content")
    form = Form(False, *(_flag(given, n) for n in _WITH))
    return _frame(write(form, store, store.get(value)))


_WITH = ("with-timestamp", "with-content")


def _remove(store: Store, request: Request, rest: str) -> Answer:
    if AppendWork is None:
        _load_writing()
    request.options()
    return _when_done(RemoveWork(ids.parse(decode(rest))), lambda _: Answer(204))


def _next(store: Store, request: Request, rest: str) -> Answer:
    patterns = _patterns(request.options("topic").get("topic"))
    line = store.index.next(ids.parse(decode(rest)), patterns, store.clock())
    return _frame_or_none(line, f"no frame after {decode(rest)}")


def _prev(store: Store, request: Request, rest: str) -> Answer:
    patterns = _patterns(request.options("topic").get("topic"))
    line = store.index.prev(ids.parse(decode(rest)), patterns, store.clock())
    return _frame_or_none(line, f"no frame before {decode(rest)}")


def _first(store: Store, request: Request, rest: str) -> Answer:
    given = request.options("first", "topic")
    pattern = _one_topic(request, given, rest)
    count = _count(given, "first")
    patterns = _patterns(pattern)
    if count == 1:
        line = store.index.first(patterns, store.clock())
        return _frame_or_none(line, _none_of(pattern))
    options = ReadOptions(patterns=patterns, limit=count, no_chunks=True)
    return _lines_or_none(Reader(store, options), pattern)


def _last(store: Store, request: Request, rest: str) -> Answer:
    given = request.options("last", "topic", "follow")
    pattern = _one_topic(request, given, rest)
    count = _count(given, "last")
    patterns = _patterns(pattern)
    follow = _flag(given, "follow")
    if count == 1 and not follow:
        line = store.index.last(patterns, store.clock())
        return _frame_or_none(line, _none_of(pattern))
    if Reader is None:
        _load_reading()
    options = ReadOptions(patterns=patterns, last=count, follow=follow, no_chunks=True)
    if follow:
        return Answer(200, NDJSON, reader=Reader(store, options, threshold=False))
    return _lines_or_none(Reader(store, options), pattern)


def _cas(store: Store, request: Request, rest: str) -> Answer:
    request.options()
    size, blocks = store.content(decode(rest))
    return Answer(200, BYTES, blocks=blocks, length=size)


def _content(store: Store, request: Request, rest: str) -> Answer:
    request.options()
    from xs import chunked

    size, blocks = chunked.content(store, ids.parse(decode(rest)))
    return Answer(200, BYTES, blocks=blocks, length=size)


def _put_content(store: Store, request: Request, _: str) -> Answer:
    if AppendWork is None:
        _load_writing()
    request.options()
    content = _taken_in(store, request)
    if content is None:
        raise Invalid("the body is empty: POST /cas stores the bytes of its body")
    hash_ = content.hash
    return _when_done(PinWork(content), lambda _: Answer(200, TEXT, hash_.encode()))


def _taken_in(store: Store, request: Request) -> Content | None:
    """The body, taken in whole, unless its length says already that it is too large."""
    length = request.get("content-length")
    store.opened()  # one that can't be opened says so before the body is read
    # A store's folder of files is asked for when there is something for it: `cas` takes its time.
    return take(request.body, int(length or 0), lambda head, rest: store.cas.spill(head, rest))


def _append(store: Store, request: Request, rest: str) -> Answer:
    if AppendWork is None:
        _load_writing()
    topic = frame.check_client_topic(decode(rest))
    given = request.options("ttl", "if-last", "chunked") if request.query else {}
    ttl = frame.parse_ttl(given["ttl"]) if "ttl" in given else frame.FOREVER
    if request.rights is not None:
        request.rights.check_append(topic, ttl)
    if_last = parse_expected(given["if-last"]) if "if-last" in given else None
    meta = parse_meta_field(request.get("xs-meta"))
    key = parse_key(request.get("idempotency-key"))
    step = request.get("xs-run")
    if step is not None or "chunked" in given:
        append = Append(topic, None, meta, ttl, if_last, key)
        if step is not None:
            return _append_step(store, request, append, step)
        if _flag(given, "chunked"):
            from xs import chunked

            return _frame(chunked.append(store, append, request.body) + b"\n")
    content = _taken_in(store, request)
    work = AppendWork(Append(topic, content, meta, ttl, if_last, key))
    return Answer(200, work=work, finish=_appended)


def append_in(found: Answer) -> Append | None:
    """The append that an answer waits for, without its content, if that is small; else None.

    What makes `_append` refuse a request is in its words, whenever it comes: so another one in the
    same words asks for the same.
    """
    if not isinstance(found.work, AppendWork):
        return None
    append = found.work.append
    if append.content is not None and append.content.data is None:
        return None
    try:
        return Append(append[0], None, *append[2:])
    except MemoryError:
        return None


def appended_again(append: Append, body: Iterable[bytes]) -> Answer:
    """The answer to a request in the words of one that asked for `append`.

    The body is small and in memory: it is neither bounded here, nor can it break off.
    """
    try:
        data = b"".join(body)
        content = small(data) if data else None
        work = AppendWork(Append(append[0], content, *append[2:]))
        return Answer(200, work=work, finish=_appended)
    except MemoryError:
        return error_answer(NoMemory())


def _append_step(store: Store, request: Request, append: Append, step: str) -> Answer:
    """For a command on the files that goes on with its run through this server (`forward`).

    `step` is: `more`, `whole` or `broken`; the run's writer; the ids of its first frame and of the
    last one that the command knows of, unless it is to begin; percent-encoded, why it broke off.
    """
    from xs import chunked

    state, writer, first, last, reason = f"{step}    ".split(" ")[:5]
    if state not in ("more", "whole", "broken"):
        raise Invalid(f"xs-run: {step[:64]!r}: that is for commands that go on through a server")
    result = chunked.go_on(
        store,
        append,
        writer,
        ids.parse(first) if first else None,
        ids.parse(last) if last else None,
        request.body,
        ended=state != "more",
        error_text=decode(reason) if state == "broken" else None,
    )
    found = _frame(result.line + b"\n") if result.line else Answer(204)
    if result.first is not None and result.last is not None:
        found.fields.append(("xs-run", f"{ids.text(result.first)} {ids.text(result.last)}"))
    return found


def _appended(work: Work) -> Answer:
    if work.error is not None:
        return error_answer(work.error)
    return _frame(work.result + b"\n")


def _append_lines(store: Store, request: Request, _: str) -> Answer:
    from xs.batch import append_lines, append_lines_each

    _need_ndjson(request, "POST /append takes one event a line; for one event POST /append/TOPIC")
    given = request.options("each", "atomic")
    each = _flag(given, "each")
    atomic = _flag(given, "atomic")
    if each and atomic:
        raise Invalid("each and atomic can't go together: atomic has one answer for all lines")
    rights = request.rights
    may = None if rights is None or rights.admin else rights.check_append
    if each:
        return Answer(200, NDJSON, blocks=append_lines_each(store, request.body, may))
    return Answer(200, JSON, append_lines(store, request.body, may, atomic=atomic))


def _import(store: Store, request: Request, _: str) -> Answer:
    from xs.batch import EVERY_LINE, import_lines, parse_imported
    from xs.imports import ImportWork

    request.options()
    kind = _kind(request)
    if kind == NDJSON:
        return Answer(200, JSON, import_lines(store, request.body))
    body = b""
    for block in request.body:
        body += block
        if len(body) > EVERY_LINE:
            raise TooLarge(f"the frame is too large: at most {EVERY_LINE} bytes")

    def finish(work: Work) -> Answer:
        if work.error is not None:
            return error_answer(work.error)
        (result,) = work.result
        return error_answer(result) if isinstance(result, XsError) else _frame(result + b"\n")

    return Answer(200, work=ImportWork([parse_imported(store, body)]), finish=finish)


def _version(store: Store, request: Request, _: str) -> Answer:
    from xs.version import VERSION

    request.options()
    return Answer(200, JSON, f'{{"version":"{VERSION}"}}\n'.encode())


def _check(store: Store, request: Request, _: str) -> Answer:
    request.options()
    return Answer(200, NDJSON, blocks=_report(store))


def _report(store: Store) -> Iterator[bytes]:
    import json

    problems = 0
    for found in store.check():
        if isinstance(found, str):
            problems += 1
            yield b'{"problem":' + json.dumps(found).encode() + b"}\n"
        else:
            checked = f'{{"frames":{found[0]},"contents":{found[1]}}}'
            yield f'{{"checked":{checked},"problems":{problems}}}\n'.encode()


def _gc(store: Store, request: Request, _: str) -> Answer:
    from xs.garbage import AGE_SECONDS

    age = request.options("age").get("age")
    seconds: float = AGE_SECONDS
    if age is not None:
        from xs.times import parse_time

        ms = parse_time(age, 0)
        if ms is None or ms > 0:
            raise Invalid(f"age={age[:64]!r}: use how long ago, such as 90s, 2h or 7d")
        seconds = -ms / 1000
    removed, size = store.gc(seconds)
    return Answer(200, JSON, f'{{"removed":{removed},"bytes":{size}}}\n'.encode())


def _eval(store: Store, request: Request, _: str) -> Answer:
    return _evaluate(request, None)


def _pipe(store: Store, request: Request, rest: str) -> Answer:
    return _evaluate(request, store.get(ids.parse(decode(rest))))


def _evaluate(request: Request, line: bytes | None) -> Answer:
    from xs.process import SCRIPT_BYTES

    request.options()
    scripts = _scripts(request)
    text = b""
    for block in request.body:
        text += block
        if len(text) > SCRIPT_BYTES:
            raise TooLarge(f"the script is too long: at most {SCRIPT_BYTES} bytes")
    if not text.strip():
        raise Invalid("the body is empty: it is to be a script")
    request.will_run()
    evaluation = scripts.evaluate(text, line, request.is_wanted)
    kind = _EVALUATED[evaluation.kind]
    if kind is None:
        evaluation.close()
        return Answer(204)
    if evaluation.kind in ("text", "json"):
        body = b"".join(evaluation)
        evaluation.close()
        return Answer(200, kind, body)
    return Answer(200, kind, blocks=evaluation)


_EVALUATED = {
    "nothing": None,
    "text": TEXT,
    "long text": TEXT,
    "json": JSON,
    "lines": NDJSON,
    "bytes": BYTES,
}


def _ps(store: Store, request: Request, _: str) -> Answer:
    request.options()
    found = _scripts(request).status()
    return Answer(200, NDJSON, b"".join([_compact(each) for each in found]))


def _stores(store: Store, request: Request, _: str) -> Answer:
    request.options()
    if request.stores is None:
        raise NotFound("no other stores are served here: it takes the root store of xs serve")
    found = request.stores.status()
    return Answer(200, NDJSON, b"".join([_compact(each) for each in found]))


def _compact(value: object) -> bytes:
    import json

    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def _scripts(request: Request) -> Scripts:
    if request.scripts is None:
        raise Forbidden(
            "no scripts are run here: that takes a server (xs serve), without --no-scripts"
        )
    return request.scripts


# A path's first word → what it does by itself, and with one more part behind it.
_ROUTES: dict[str, tuple[_Handlers, _Handlers]] = {
    "": ({"GET": _read}, {}),
    "append": ({"POST": _append_lines}, {"POST": _append}),
    "cas": ({"POST": _put_content}, {"GET": _cas}),
    "check": ({"POST": _check}, {}),
    "content": ({}, {"GET": _content}),
    "eval": ({"POST": _eval}, {}),
    "first": ({"GET": _first}, {"GET": _first}),
    "gc": ({"POST": _gc}, {}),
    "head": ({}, {"GET": _last}),
    "import": ({"POST": _import}, {}),
    "last": ({"GET": _last}, {"GET": _last}),
    "next": ({}, {"GET": _next}),
    "pipe": ({}, {"POST": _pipe}),
    "prev": ({}, {"GET": _prev}),
    "ps": ({"GET": _ps}, {}),
    "store": ({}, {}),  # a store's own API is behind it: see `httpd`
    "stores": ({"GET": _stores}, {}),
    "stream": ({}, {"GET": _read_topic, "POST": _append}),
    "version": ({"GET": _version}, {}),
}
_BY_ID_OR_TOPIC: tuple[_Handlers, _Handlers] = (
    {},
    {"GET": _get, "DELETE": _remove, "POST": _append},
)


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
    try:
        return b"".join(data).decode()
    except UnicodeDecodeError:
        raise Invalid(f"not UTF-8 behind the percent-encoding: {text[:64]!r}") from None


def parse_meta_field(value: str | None) -> str:
    """Meta as a header gives it: JSON as it is, or base64 of JSON in UTF-8, tried in that order."""
    if value is None:
        return "null"
    import binascii

    from xs import meta  # here: most appends have none

    try:
        return meta.compact_meta(value.encode("latin-1").decode())
    except UnicodeDecodeError:
        raise Invalid("xs-meta is not UTF-8: send base64 of the JSON instead") from None
    except Invalid as error:
        try:
            text = binascii.a2b_base64(value.encode("latin-1")).decode()
            if not text or binascii.b2a_base64(text.encode()).strip() != value.encode().strip():
                raise error
        except ValueError:
            raise error from None
        return meta.compact_meta(text)


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


def _kind(request: Request) -> str:
    return (request.get("content-type") or "").split(";")[0].strip().lower()


def _need_ndjson(request: Request, sentence: str) -> None:
    kind = _kind(request)
    if kind != NDJSON:
        raise Invalid(f"the content type is {kind or 'missing'}, not {NDJSON}: {sentence}")


def _patterns(text: str | None) -> frame.Patterns:
    return None if text is None else frame.parse_patterns(text)


def _count(given: dict[str, str], name: str) -> int:
    if name not in given:
        return 1
    if Reader is None:
        _load_reading()
    return parse_count(name, given[name])


def _flag(given: dict[str, str], name: str) -> bool:
    if name not in given:
        return False
    if Reader is None:
        _load_reading()
    return parse_flag(name, given[name])


def _one_topic(request: Request, given: dict[str, str], rest: str) -> str | None:
    if not rest:
        if request.path.endswith("/"):  # not the newest of all for who has an empty variable
            raise Invalid(f"a topic is missing: {request.path} goes on with one, or ends before it")
        return given.get("topic")
    if "topic" in given:
        raise Invalid("topic is in the path already: leave the parameter out")
    return decode(rest)


# Parts of answers


def _frame(line: bytes) -> Answer:
    return Answer(200, JSON, line)


def _frame_or_none(line: bytes | None, none: str) -> Answer:
    if line is None:
        raise NotFound(none)
    return _frame(line + b"\n")


def _none_of(pattern: str | None) -> str:
    return "the store has no frames" if pattern is None else f"no frame of {pattern}"


def _lines_or_none(reader: Reader, pattern: str | None) -> Answer:
    blocks = reader.history()
    first = next(blocks, None)
    if first is None:
        raise NotFound(_none_of(pattern))
    return Answer(200, NDJSON, blocks=_after(first, blocks))


def _begun(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """The same blocks, the first of them read already: an error so early can still be a status."""
    first = next(blocks, None)
    return iter(()) if first is None else _after(first, blocks)


def _after(first: bytes, blocks: Iterator[bytes]) -> Iterator[bytes]:
    yield first
    yield from blocks


def _when_done(work: Work, success: Callable[[Any], Answer]) -> Answer:
    def finish(work: Work) -> Answer:
        return success(work.result) if work.error is None else error_answer(work.error)

    return Answer(200, work=work, finish=finish)


def run(store: Store, found: Answer) -> Answer:
    """The real answer of one that depends on a commit, for who can wait for it in this thread."""
    if found.work is None or found.finish is None:
        return found
    try:
        store.run(found.work)
    except XsError as error:
        if found.work.error is None:  # it was not come to: the store can't be opened, or closes
            found.work.error = error
            found.work.discard()
    return found.finish(found.work)
