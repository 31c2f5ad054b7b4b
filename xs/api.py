"""The HTTP API as functions: a request in, an answer out (docs/protocol.md, HTTP API).

Knows the store, the routes and the statuses, and no sockets: `httpd` puts it on connections, and
`local` calls it in the same process when no server has the store. There a command starts with it:
so what only writing needs, or only reading more than a frame, is loaded when the first request
comes to it (`_load_writing`, `_load_reading`). What few requests need is imported by their routes,
and the routes that few want are `operations`. A server has all of that from its start (`load`).
"""

from __future__ import annotations

from xs import frame, ids
from xs.errors import Invalid, MethodNotAllowed, NoMemory, NotFound, XsError
from xs.messages import (
    BYTES,
    EVENTS,
    JSON,
    NDJSON,
    TEXT,
    Answer,
    Request,
    decode,
    error_answer,
    need_ndjson,
    of_frame,
    parse_expected,
    parse_key,
)
from xs.store import Store

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import Any

    from xs.commit import Append
    from xs.content import Content, small, take
    from xs.query import ReadOptions, parse_count, parse_flag, parse_read_options
    from xs.reader import Form, Reader, write, write_parts
    from xs.rights import Rights
    from xs.work import AppendWork, PinWork, RemoveWork, Work

    Handler = Callable[[Store, Request, str], Answer]
    _Handlers = dict[str, Handler]
else:
    AppendWork = Reader = None  # not loaded yet


def answer(store: Store, request: Request) -> Answer:
    """The answer to a request; errors are answers too."""
    try:
        return _route(store, request)
    except XsError as error:
        return error_answer(error)
    except MemoryError:
        return error_answer(NoMemory())


# Routes


def _load_writing() -> None:
    global Append, AppendWork, PinWork, RemoveWork, small, take
    from xs.commit import Append
    from xs.content import small, take
    from xs.work import AppendWork, PinWork, RemoveWork


def _load_reading() -> None:
    global Form, ReadOptions, Reader, parse_count, parse_flag, parse_read_options
    global write, write_parts
    from xs.query import ReadOptions, parse_count, parse_flag, parse_read_options
    from xs.reader import Form, Reader, write, write_parts


def load() -> None:
    """Loads what any route may need: later there may be no descriptor left, or no disk."""
    import zlib  # noqa: F401  # for `sums`

    from xs import (  # noqa: F401
        alike,
        batch,
        check,
        chunked,
        garbage,
        operations,
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
    known = _ROUTES.get(decode(word))
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


_STARTS = ("after", "last-id", "from", "new", "tail", "last")  # where a reader may begin


def _stream(store: Store, request: Request, parameters: list[tuple[str, str]]) -> Answer:
    if Reader is None:
        _load_reading()
    sse = _accepts_events(request)
    resume = request.get("last-event-id") if sse else None
    if resume:
        # A browser that reconnects repeats the first request: where it was counts, not its start.
        parameters = [p for p in parameters if p[0] not in _STARTS]
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
    line = store.get(value)
    data = write(form, store, line)
    if data:
        return of_frame(data)
    return Answer(200, JSON, blocks=_begun(write_parts(form, store, line)))


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
    purpose = request.options("for").get("for")
    if purpose not in (None, "import"):
        raise Invalid(f"for={purpose[:64]!r}: import is the only thing that content can be for")
    content = _taken_in(store, request)
    if content is None:
        raise Invalid("the body is empty: POST /cas stores the bytes of its body")
    hash_ = content.hash
    work = PinWork(content, for_import=purpose is not None)
    return _when_done(work, lambda _: Answer(200, TEXT, hash_.encode()))


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
    ttl = store.check_ttl(frame.parse_ttl(given["ttl"])) if "ttl" in given else frame.FOREVER
    if request.rights is not None:
        request.rights.check_append(topic, ttl)
    if_last = parse_expected(given["if-last"]) if "if-last" in given else None
    meta = _meta(request.get("xs-meta"))
    key = parse_key(request.get("idempotency-key"))
    step = request.get("xs-run")
    if step is not None or "chunked" in given:
        append = Append(topic, None, meta, ttl, if_last, key)
        if step is not None:
            from xs.operations import go_on

            return go_on(store, request, append, step)
        if _flag(given, "chunked"):
            from xs import chunked

            return of_frame(chunked.append(store, append, request.body) + b"\n")
    content = _taken_in(store, request)
    work = AppendWork(Append(topic, content, meta, ttl, if_last, key))
    return Answer(200, work=work, finish=_appended)


def _meta(value: str | None) -> str:
    if value is None:
        return "null"
    from xs.meta import of_field  # here: most appends have none

    return of_field(value)


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


def _appended(work: Work) -> Answer:
    if work.error is not None:
        return error_answer(work.error)
    return of_frame(work.result + b"\n")


def _append_lines(store: Store, request: Request, _: str) -> Answer:
    from xs.batch import append_lines, append_lines_each

    need_ndjson(request, "POST /append takes one event a line; for one event POST /append/TOPIC")
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


def _version(store: Store, request: Request, _: str) -> Answer:
    from xs.version import VERSION

    request.options()
    return Answer(200, JSON, f'{{"version":"{VERSION}"}}\n'.encode())


def _later(name: str) -> Handler:
    """A handler of `operations`, which most commands on the files end without."""

    def handle(store: Store, request: Request, rest: str) -> Answer:
        from xs import operations

        found: Answer = getattr(operations, name)(store, request, rest)
        return found

    return handle


# A path's first word → what it does by itself, and with one more part behind it.
_ROUTES: dict[str, tuple[_Handlers, _Handlers]] = {
    "": ({"GET": _read}, {}),
    "append": ({"POST": _append_lines}, {"POST": _append}),
    "cas": ({"POST": _put_content}, {"GET": _cas}),
    "check": ({"POST": _later("check")}, {}),
    "content": ({}, {"GET": _content}),
    "eval": ({"POST": _later("eval_")}, {}),
    "first": ({"GET": _first}, {"GET": _first}),
    "gc": ({"POST": _later("gc")}, {}),
    "head": ({}, {"GET": _last}),
    "import": ({"POST": _later("import_")}, {}),
    "last": ({"GET": _last}, {"GET": _last}),
    "next": ({}, {"GET": _next}),
    "pipe": ({}, {"POST": _later("pipe")}),
    "prev": ({}, {"GET": _prev}),
    "ps": ({"GET": _later("ps")}, {}),
    "store": ({}, {}),  # a store's own API is behind it: see `httpd`
    "stores": ({"GET": _later("stores")}, {}),
    "stream": ({}, {"GET": _read_topic, "POST": _append}),
    "version": ({"GET": _version}, {}),
}
_BY_ID_OR_TOPIC: tuple[_Handlers, _Handlers] = (
    {},
    {"GET": _get, "DELETE": _remove, "POST": _append},
)


# Parts of requests


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


def _frame_or_none(line: bytes | None, none: str) -> Answer:
    if line is None:
        raise NotFound(none)
    return of_frame(line + b"\n")


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
