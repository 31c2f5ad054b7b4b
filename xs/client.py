"""The Python API: the store's words as methods, and frames as values.

`Client` has append, cat, get, … and works on any transport, so the same calls go to a server or,
with no server, to the store's files. It knows requests and answers, and nothing of how they travel
(`transport`), where to (`address`), or of how a store keeps its frames.
"""

from __future__ import annotations

import os
import sys

from xs import errors
from xs.request import (
    BLOCK,
    NDJSON,
    SMALL,
    append_request,
    ask,
    path_of,
    quote,
    split_lines,
    with_query,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from datetime import datetime
    from typing import Any, BinaryIO, Union, overload

    from xs.frame import Frame
    from xs.request import Body, Fields, Response, Transport

    Content = Union[None, str, bytes, BinaryIO, Iterable[bytes], Iterable[str]]
    Position = Union[Frame, str, datetime]


def _leave_to_parent() -> None:
    store = sys.modules.get("xs.store")
    if store is not None:
        store.leave_to_parent()


# Here, as only who has clients forks: it is 1 % of what a command takes to append.
os.register_at_fork(after_in_child=_leave_to_parent)


class Client:
    """A store, at any address and with or without a server: what `xs.open` gives.

    >>> import xs
    >>> store = xs.open(directory)
    >>> store.append("notes", "first", meta={"tag": "a"}).topic
    'notes'
    >>> newest = store.append("notes", "second")
    >>> [frame.meta for frame in store.cat()]
    [{'tag': 'a'}, None]
    >>> store.content(newest)
    b'second'
    >>> store.last("notes") == newest == store.get(newest.id)
    True
    >>> store.remove(newest)
    True
    >>> store.close()

    Frames come as `xs.Frame`. Where a frame or an id is asked for, either will do. Every method
    raises a subclass of `XsError` whose text is one sentence: `Invalid` for a wrong argument,
    `Unavailable` when the store can't be reached or is busy, … (`xs.errors`). It may be used by
    several threads; an iterator belongs to one.
    """

    __slots__ = ("_transport",)

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def append(
        self,
        topic: str,
        content: Content = None,
        *,
        meta: Any = None,
        ttl: str | int | None = None,
        if_last: Frame | str | None = None,
        key: str | None = None,
        chunked: bool = False,
    ) -> Frame:
        """Appends one frame, and returns it once it is on disk.

        `content` is str (stored as UTF-8), bytes, a file open for reading bytes, or an iterable of
        bytes; the last two are sent as they are read. `meta` is any JSON value. `ttl`: "forever",
        "ephemeral", "time:<ms>" (or the number alone) or "last:<n>". With `if_last` (a frame, an
        id, or "none") it appends only if that is the topic's newest frame, else raises `Conflict`,
        whose `frame` is the newest one as JSON. (None is no condition: `last(topic) or "none"`.)
        The same `key` again on the same topic appends nothing, and returns the frame that it made
        the first time.

        With `chunked` the content can be read while it is still arriving: it is a run of frames,
        each made when a block of `content` has come, and the first of them is returned, at the
        end. (An iterable may then be of str as well.) What an iterable that raises has given before
        is kept, and marked as broken off.
        """
        target, fields = append_request(
            _text(topic, "the topic"),
            meta=None if meta is None else _meta(meta),
            ttl=ttl,
            if_last=None if if_last is None else _id(if_last, 'a frame, its id, or "none"'),
            key=None if key is None else _text(key, "the key"),
            chunked=chunked,
        )
        _check_content(content)
        body = _as_it_comes(content) if chunked else _body(content)
        return self._frame(self._ask("POST", target, fields, body))

    def append_many(
        self, events: Iterable[Mapping[str, Any] | bytes | str], *, atomic: bool = False
    ) -> dict[str, Any]:
        """Appends many, in batches as they come: `{"appended", "first", "last", "errors"}`.

        Each event is a mapping of `topic`, and as needed `content` (str or bytes), `meta`, `ttl`,
        `if_last` and `key`, or such a line of JSON. `errors` holds `{"line", "error"}` of those
        that were refused (line 1 is the first); with `atomic`, one that is refused raises
        `Invalid`, and none is appended.
        """
        target = "/append?atomic=true" if atomic else "/append"
        summary: dict[str, Any] = self._value(self._ask("POST", target, [NDJSON], _many(events)))
        return summary

    def cat(
        self,
        *,
        topic: str | None = None,
        follow: bool | int = False,
        new: bool = False,
        after: Position | None = None,
        from_: Position | None = None,
        until: Position | None = None,
        last: int | None = None,
        limit: int | None = None,
        with_timestamp: bool = False,
        with_content: bool = False,
        no_chunks: bool = False,
    ) -> Iterator[Frame]:
        """The frames of the stream, in order of id, as they are read.

        `topic`: one, `prefix.*`, or several with commas between. `after` (exclusive), `from_` and
        `until` (inclusive) are frames, ids, times (RFC 3339, or a datetime with its zone) or ago
        ("2h"). `last`: the newest n of these. With `follow` it goes on with live frames, after one
        `xs.threshold`, until its iterator is closed; a number asks for an `xs.pulse` that often, in
        ms. `new`: live only. `with_timestamp` and `with_content` fill in those attributes. With
        `no_chunks` a chunked content is its first frame alone.
        """
        pulse = None if follow is False else "true" if follow is True else follow
        parameters = [
            ("follow", pulse),
            ("new", "true" if new else None),
            ("after", None if after is None else _position(after)),
            ("from", None if from_ is None else _position(from_)),
            ("until", None if until is None else _position(until)),
            ("topic", _pattern(topic)),
            ("last", last),
            ("limit", limit),
            ("with-timestamp", "true" if with_timestamp else None),
            ("with-content", "true" if with_content else None),
            ("no-chunks", "true" if no_chunks else None),
        ]
        # Asked here, not in a generator: a wrong argument raises at the call, and what is appended
        # after the call of a `new` reader is read by it.
        return self._frames(self._ask("GET", with_query("/", parameters)))

    def get(self, id: Frame | str) -> Frame | None:
        """The frame with that id, or None."""
        return self._frame_or_none(path_of(_id(id)))

    def next(self, id: Frame | str, topic: str | None = None) -> Frame | None:
        """The frame after that one (of `topic`), or None. The id need not be stored."""
        return self._beside("/next/", id, topic)

    def prev(self, id: Frame | str, topic: str | None = None) -> Frame | None:
        """The frame before that one (of `topic`), or None. The id need not be stored."""
        return self._beside("/prev/", id, topic)

    if TYPE_CHECKING:

        @overload
        def first(self, topic: str | None = None, n: None = None) -> Frame | None: ...
        @overload
        def first(self, topic: str | None = None, *, n: int) -> list[Frame]: ...
        @overload
        def first(self, topic: str | None, n: int) -> list[Frame]: ...

    def first(self, topic: str | None = None, n: int | None = None) -> Frame | list[Frame] | None:
        """The oldest frame (of `topic`) or None; with `n`, a list of the oldest n."""
        return self._end("first", topic, n)

    if TYPE_CHECKING:

        @overload
        def last(self, topic: str | None = None, n: None = None) -> Frame | None: ...
        @overload
        def last(self, topic: str | None = None, *, n: int) -> list[Frame]: ...
        @overload
        def last(self, topic: str | None, n: int) -> list[Frame]: ...

    def last(self, topic: str | None = None, n: int | None = None) -> Frame | list[Frame] | None:
        """The newest frame (of `topic`) or None; with `n`, a list of the newest n, oldest first."""
        return self._end("last", topic, n)

    def head(self, topic: str) -> Frame | None:
        """The newest frame of `topic`, or None."""
        return self._frame_or_none("/head/" + quote(_text(topic, "the topic")))

    def content(self, frame: Frame | str) -> bytes:
        """A frame's content, b"" if it has none. Raises `NotFound` if there is no such frame.

        Of a chunked content, given its first frame, all of it: this waits for what is still to
        come, and raises `BrokenBody` if the writer broke off.
        """
        return b"".join(self.content_blocks(frame))

    def content_blocks(self, frame: Frame | str) -> Iterator[bytes]:
        """A frame's content in blocks, as they arrive: of a chunked content, as it is written."""
        return iter(self._ask("GET", "/content/" + quote(_id(frame))))

    def cas(self, hash: str) -> bytes:
        """The content with that hash. Raises `NotFound` when there is none."""
        return b"".join(self.cas_blocks(hash))

    def cas_blocks(self, hash: str) -> Iterator[bytes]:
        """The content with that hash in blocks, as they arrive."""
        return iter(self._ask("GET", "/cas/" + quote(_text(hash, "the hash"))))

    def cas_post(self, content: Content) -> str:
        """Stores content with no frame, and returns its hash."""
        _check_content(content)
        answer = self._ask("POST", "/cas", (), _body(content))
        return answer.read().decode("ascii", "replace").strip()

    def remove(self, frame: Frame | str) -> bool:
        """Removes a frame; False if there is none with that id."""
        try:
            self._ask("DELETE", path_of(_id(frame))).read()
        except errors.NotFound:
            return False
        return True

    def import_(self, frames: Iterable[Frame | Mapping[str, Any] | bytes | str]) -> dict[str, Any]:
        """Stores frames as they are, ids included, and returns the server's summary.

        Each is a `Frame`, a mapping or a line of JSON. Content must be there already (`cas_post`),
        or come with it, as `cat(with_content=True)` gives it.
        """
        summary: dict[str, Any] = self._value(self._ask("POST", "/import", [NDJSON], _many(frames)))
        return summary

    def version(self) -> str:
        """The version of the server, or of this package when there is no server."""
        return str(self._value(self._ask("GET", "/version"))["version"])

    def close(self) -> None:
        """Closes what is open to the store. Iterators that are in use stay.

        So does the client: what is asked of it later opens the store anew.
        """
        self._transport.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def eval(self, script: str | bytes) -> Any:
        """Runs a script in the server, and returns what it yields.

        That is None, str (also for a number or a boolean, as text), bytes, another JSON value, or
        for a list or a stream an iterator of values as they come. Raises `Failed` with the script's
        own message, or `BrokenBody` while iterating; `Forbidden` where no scripts are run.
        """
        return self._run_script("/eval", script)

    def pipe(self, frame: Frame | str, script: str | bytes) -> Any:
        """As `eval`, with a frame as the script's input."""
        return self._run_script("/pipe/" + quote(_id(frame)), script)

    def ps(self) -> list[dict[str, Any]]:
        """The generators and handlers that are in service.

        Each has `kind`, `name`, `id` (of the frame that it came with), `pid`, `since`, `frames` and
        `error` (the last one).
        """
        return list(self._values(self._ask("GET", "/ps")))

    def _run_script(self, target: str, script: str | bytes) -> Any:
        if not isinstance(script, (str, bytes)):
            raise errors.Invalid(f"a script is text or bytes, not {_shown(script)}")
        response = self._ask("POST", target, (), _encoded(script))
        kind = (response.get("content-type") or "").partition(";")[0]
        if response.status == 204:
            response.read()
            return None
        if kind == "application/x-ndjson":
            return self._values(response)
        data = response.read()
        if kind == "text/plain":
            return data.decode("utf-8")
        if kind != "application/json":
            return data
        import json

        return json.loads(data)

    def _values(self, response: Response) -> Iterator[Any]:
        import json

        try:
            for line in split_lines(response):
                yield json.loads(line)
        finally:
            response.close()

    def _ask(self, method: str, target: str, fields: Fields = (), body: Body = None) -> Response:
        return ask(self._transport, method, target, fields, body)

    def _value(self, response: Response) -> Any:
        import json

        return json.loads(response.read())

    def _frame(self, response: Response) -> Frame:
        from xs.frame import Frame

        return Frame.from_json(response.read())

    def _frame_or_none(self, target: str) -> Frame | None:
        try:
            return self._frame(self._ask("GET", target))
        except errors.NotFound:
            return None

    def _frames(self, response: Response) -> Iterator[Frame]:
        from xs.frame import Frame

        try:
            for line in split_lines(response):
                yield Frame.from_json(line)
        finally:
            response.close()

    def _beside(self, path: str, id: Frame | str, topic: str | None) -> Frame | None:
        parameters = [("topic", _pattern(topic))]
        return self._frame_or_none(with_query(path + quote(_id(id)), parameters))

    def _end(self, which: str, topic: str | None, n: int | None) -> Frame | list[Frame] | None:
        if isinstance(topic, int) and n is None:
            raise errors.Invalid(
                f"the topic is text, not {topic}: {which}(n={topic}) is of all topics"
            )
        topic = _pattern(topic)
        target = f"/{which}/{quote(topic)}" if topic is not None else f"/{which}"
        if n is None:
            return self._frame_or_none(target)
        try:
            return list(self._frames(self._ask("GET", with_query(target, [(which, n)]))))
        except errors.NotFound:
            return []


# What is given, as a request has it


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 64 else f"{text[:64]}…"


def _text(value: object, what: str) -> str:
    if not isinstance(value, str):
        raise errors.Invalid(f"{what} is text, not {_shown(value)}")
    return value


def _pattern(topic: object) -> str | None:
    if topic is not None and not isinstance(topic, str):
        raise errors.Invalid(
            f"the topic is text, not {_shown(topic)}: several go with commas between"
        )
    return topic


def _id(frame: object, wanted: str = "a frame or its id") -> str:
    if isinstance(frame, str):
        return frame
    found = getattr(frame, "id", None)
    if not isinstance(found, str):
        hint = ": was nothing found?" if frame is None else ""
        raise errors.Invalid(f"give {wanted}, not {_shown(frame)}{hint}")
    return found


def _position(at: object) -> str:
    if not isinstance(at, str) and hasattr(at, "isoformat"):
        from datetime import datetime

        if not isinstance(at, datetime) or at.utcoffset() is None:
            raise errors.Invalid(
                f"{_shown(at)} is no time without its zone: give a datetime such as "
                'datetime.now(timezone.utc), or text such as "2026-01-31T09:30:00Z"'
            )
        return at.isoformat()
    return _id(at, "a frame, an id or a time")


def _json(value: object, what: str) -> str:
    import json

    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise errors.Invalid(f"{what} can't be written as JSON: {error}") from None


def _meta(value: object) -> str:
    text = _json(value, "meta")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise errors.Invalid(
                "meta has text that is not UTF-8, as JSON has to be: half of a surrogate pair, "
                "which is also what os.fsdecode makes of other bytes"
            ) from None
    return text


def _check_content(content: object) -> None:
    """Raises `Invalid` for what was not meant as blocks of bytes: a mapping would be its keys."""
    if content is None or isinstance(content, (str, bytes, bytearray, memoryview)):
        return
    has_blocks = hasattr(content, "__iter__") and not hasattr(content, "keys")
    if not (hasattr(content, "read") or has_blocks):
        raise _no_content(content)


def _no_content(value: object) -> errors.Invalid:
    return errors.Invalid(
        f"content is text, bytes, a file or an iterable of bytes, not {_shown(value)}: "
        "give json.dumps of a value, or put it into meta"
    )


def _body(content: Content) -> Body:
    if content is None or isinstance(content, bytes):
        return content
    if isinstance(content, (str, bytearray, memoryview)):
        return _encoded(content)
    if hasattr(content, "read"):
        file: Any = content
        return _only_bytes(iter(lambda: file.read(BLOCK) or None, None))
    return _only_bytes(content)


def _as_it_comes(content: Content) -> Iterator[bytes]:
    if content is None:
        return
    if isinstance(content, (bytes, str, bytearray, memoryview)):
        yield _encoded(content)
        return
    read: Any = getattr(content, "read1", None)  # which gives what is there, and waits for no more
    if read is None and not hasattr(content, "__iter__"):
        read = getattr(content, "read", None)
    for block in content if read is None else iter(lambda: read(BLOCK) or b"", b""):
        yield _encoded(block)


def _encoded(block: object) -> bytes:
    if isinstance(block, str):
        try:
            return block.encode("utf-8")
        except UnicodeEncodeError:
            raise errors.Invalid("text has half of a surrogate pair: give bytes") from None
    (data,) = _only_bytes([block])
    return data


def _only_bytes(blocks: Iterable[Any]) -> Iterator[bytes]:
    for block in blocks:
        if isinstance(block, str):
            raise errors.Invalid("content comes in bytes: open a file in binary mode, encode text")
        if not isinstance(block, (bytes, bytearray, memoryview)):
            raise _no_content(block)
        yield bytes(block)


def _many(given: Iterable[Any]) -> Iterator[bytes]:
    is_one = isinstance(given, (str, bytes)) or hasattr(given, "keys") or hasattr(given, "topic")
    if is_one or not hasattr(given, "__iter__"):
        raise errors.Invalid(
            f"give many, as a list or an iterator, not {_shown(given)}: "
            'the lines of a file are open(path, "rb")'
        )
    return _blocks(given)


def _blocks(given: Iterable[Any]) -> Iterator[bytes]:
    """Lines of JSON, several in a block: each block is a system call and a chunk."""
    lines: list[bytes] = []
    size = 0
    for number, each in enumerate(given, 1):
        line = _line(each, number)
        lines.append(line)
        size += len(line)
        if size >= SMALL:
            yield b"".join(lines)
            lines, size = [], 0
    if lines:
        yield b"".join(lines)


def _line(given: Frame | Mapping[str, Any] | bytes | str, number: int) -> bytes:
    if isinstance(given, bytes):
        return given.rstrip(b"\r\n") + b"\n"
    if isinstance(given, str):
        return given.rstrip("\r\n").encode("utf-8", "surrogatepass") + b"\n"
    if isinstance(given, tuple) and hasattr(given, "topic"):
        names = ("topic", "id", "hash", "meta", "ttl", "content")
        fields = {name: getattr(given, name) for name in names}
    elif not isinstance(given, tuple) and hasattr(given, "keys"):
        fields = dict(given)
    else:
        raise errors.Invalid(
            f'number {number} is neither a mapping such as {{"topic": "notes"}} nor such a line of '
            f"JSON: {_shown(given)}"
        )
    content = fields.get("content")
    if content is None:
        fields.pop("content", None)
    elif isinstance(content, (bytes, bytearray, memoryview)):
        import binascii

        del fields["content"]
        fields["content_base64"] = binascii.b2a_base64(content, newline=False).decode("ascii")
    if "if_last" in fields and fields["if_last"] is not None:
        fields["if_last"] = _id(fields["if_last"], f'a frame, its id, or "none" in number {number}')
    text = _json(fields, f"number {number}")
    try:
        return text.encode() + b"\n"
    except UnicodeEncodeError:
        import json

        # Half of a surrogate pair: as an escape, in which whoever refuses it finds its place.
        return json.dumps(fields).encode() + b"\n"
