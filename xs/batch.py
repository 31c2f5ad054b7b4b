"""Many events in one body: NDJSON lines in, committed in batches as they come.

Used by POST /append and POST /import. Memory is bounded by one block of the body, one line and one
batch, however long the body is. A line that is wrong is an error of its own; the others count.
"""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Iterable, Iterator
from json.decoder import scanstring  # type: ignore[attr-defined]
from typing import Any, Callable, Union

from xs import frame, ids, meta
from xs.bulk import ALIKE_MIN, Alike, BatchWork, alike, is_plain
from xs.commit import Append
from xs.content import INLINE_MAX, Content, small
from xs.errors import BrokenBody, Invalid, NoMemory, TooLarge, Unavailable, XsError
from xs.imports import Imported, ImportWork
from xs.store import Store
from xs.work import Work

EVERY_LINE = 16 * 1024 * 1024  # bytes of one line at most
BATCH_LINES = 4000  # lines in one batch at most
BATCHES_AHEAD = 2  # batches of one body that may wait while another is committed
ATOMIC_LINES = 100_000  # lines that one transaction takes with ?atomic …
ATOMIC_BYTES = 64 * 1024 * 1024  # … and their bytes
ERRORS_LISTED = 1000  # in a summary; the others are counted

Line = tuple[int, bytes]  # its number, from 1, and its text
May = Callable[[str, str], None]  # raises if on that topic, with that ttl, nothing may be appended
Result = Union[bytes, XsError]  # of one line: a frame's JSON or an error
Outcomes = tuple[list[Line], list[Result]]  # of a batch: its lines, and the result of each


def append_lines(
    store: Store, body: Iterable[bytes], may: May | None = None, *, atomic: bool = False
) -> bytes:
    """Appends an event for each line and answers the summary as JSON.

    `may` is given each topic and ttl, and raises what makes its line an error.
    `atomic`: all lines in one transaction; the first error is raised as it is, and nothing stored.
    A body that breaks off raises `BrokenBody`, which says how many lines are kept.
    """
    if atomic:
        return _append_atomically(store, body, may)
    return _summary("appended", _append_outcomes(store, body, may, ahead=BATCHES_AHEAD))


def append_lines_each(
    store: Store, body: Iterable[bytes], may: May | None = None
) -> Iterator[bytes]:
    """As `append_lines`, but gives one line for each: a frame, or `{"error": …}`.

    If this end takes no more, another one says so, and the body is whole: then its reader knows
    that what is not answered is not stored. Of an answer that breaks off nobody knows.
    """
    try:
        for lines, results in _append_outcomes(store, body, may, ahead=0):
            yield b"".join([_outcome_line(n, result) for (n, _), result in zip(lines, results)])
    except Unavailable as error:
        yield _json({"error": str(error)})


def import_lines(store: Store, body: Iterable[bytes]) -> bytes:
    """Stores a frame for each line as it is and answers the summary as JSON."""

    def work(store: Store, lines: list[Line]) -> Work:
        return ImportWork([parse_imported(store, text) for _, text in lines])

    return _summary("imported", _outcomes(store, body, work, ahead=BATCHES_AHEAD))


def _append_outcomes(
    store: Store, body: Iterable[bytes], may: May | None, *, ahead: int
) -> Iterator[Outcomes]:
    def work(store: Store, lines: list[Line]) -> Work:
        return BatchWork(parse_appends(store, [text for _, text in lines], may))

    return _outcomes(store, body, work, ahead=ahead)


def _outcomes(
    store: Store,
    body: Iterable[bytes],
    work_for: Callable[[Store, list[Line]], Work],
    *,
    ahead: int,
) -> Iterator[Outcomes]:
    """The outcomes of each batch, in order, as they become durable.

    So many batches are read and parsed `ahead` of the one whose outcome is awaited. SQLite works
    without the interpreter's lock meanwhile, and takes all that wait in one transaction: the slower
    the disk, the fewer fsyncs. 0 for a client that may wait for an answer before it sends more.
    """
    under_way: deque[tuple[list[Line], Work, Callable[[], Any]]] = deque()
    kept = 0
    batches = line_batches(body)
    while True:
        stopped: XsError | None = None
        try:
            lines = next(batches, None)
            work = work_for(store, lines or [])
        except BrokenBody as error:
            lines, stopped = None, BrokenBody("the body broke off")
            if error.status == Unavailable.status:  # by this end
                stopped = Unavailable(str(error))
        except MemoryError:
            lines, stopped = None, NoMemory()
        if lines is not None:
            try:
                under_way.append((lines, work, store.start(work)))
            except XsError as error:  # the store is closing
                work.discard()
                lines, stopped = None, error
        while under_way and (lines is None or len(under_way) > ahead):
            done = _collect(*under_way.popleft())
            kept += len(_frames_in(done[1]))
            yield done
        if stopped is not None:
            raise type(stopped)(f"{stopped}: {kept} whole lines of it are kept")
        if lines is None:
            return


def _collect(lines: list[Line], work: Work, wait: Callable[[], Any]) -> Outcomes:
    try:
        return lines, wait()
    except BrokenBody:
        raise
    except XsError as error:  # the disk is full: none of the batch is stored
        return lines, [error] * len(lines)


def _summary(verb: str, batches: Iterator[Outcomes]) -> bytes:
    count = 0
    first = last = None
    errors: list[dict[str, Any]] = []
    unlisted = 0
    for lines, results in batches:
        frames = _frames_in(results)
        if len(frames) < len(results):
            wrong = [
                {"line": number, "error": str(result)}
                for (number, _), result in zip(lines, results)
                if isinstance(result, XsError)
            ]
            room = ERRORS_LISTED - len(errors)
            errors += wrong[:room]
            unlisted += max(0, len(wrong) - room)
        if frames:
            count += len(frames)
            first = first or frame.id_of(frames[0])
            last = frames[-1]
    summary: dict[str, Any] = {
        verb: count,
        "first": first,
        "last": None if last is None else frame.id_of(last),
        "errors": errors,
    }
    if unlisted:
        summary["errors_unlisted"] = unlisted
    return _json(summary)


def _frames_in(results: list[Result]) -> list[bytes]:
    return [result for result in results if isinstance(result, bytes)]


def _outcome_line(number: int, result: Result) -> bytes:
    if isinstance(result, XsError):
        return _json({"error": str(result), "line": number})
    return result + b"\n"


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def _append_atomically(store: Store, body: Iterable[bytes], may: May | None) -> bytes:
    lines: list[Line] = []
    size = 0
    for batch in line_batches(body):
        lines += batch
        size += sum([len(text) for _, text in batch])
        if len(lines) > ATOMIC_LINES or size > ATOMIC_BYTES:
            raise TooLarge(
                f"too much for one transaction: at most {ATOMIC_LINES} lines and "
                f"{ATOMIC_BYTES} bytes with atomic"
            )
    appends = parse_appends(store, [text for _, text in lines], may)
    work = BatchWork(appends, atomic=True)
    at = 0
    for append in appends:
        if isinstance(append, XsError):
            work.discard()
            raise type(append)(f"line {lines[at][0]}: {append}; nothing was stored")
        at += len(append.contents) if isinstance(append, Alike) else 1
    return _summary("appended", iter([(lines, store.run(work))]))


# Lines


def line_batches(body: Iterable[bytes]) -> Iterator[list[Line]]:
    """The body's lines, numbered, blank ones left out, in batches that end where a block ends.

    So what has arrived is never held back for what has not. A line over EVERY_LINE is given as
    `TooLarge`'s sentence would have it: as an empty line of its number, which is no JSON.
    """
    number = 0
    rest: list[bytes] = []
    rest_size = 0
    too_long = False
    for block in body:
        end = block.rfind(b"\n")
        if end < 0:
            rest_size += len(block)
            if rest_size > EVERY_LINE:
                rest.clear()
                too_long = True
            else:
                rest.append(block)
            continue
        texts = (b"".join(rest) + block[:end]).split(b"\n")
        if too_long or len(texts[0]) > EVERY_LINE:
            texts[0] = TOO_LONG
        rest, rest_size, too_long = [block[end + 1 :]], len(block) - end - 1, False
        for start in range(0, len(texts), BATCH_LINES):
            part = texts[start : start + BATCH_LINES]
            yield [(number + n, text) for n, text in enumerate(part, 1) if text and text != b"\r"]
            number += len(part)
    text = TOO_LONG if too_long else b"".join(rest)
    if text.strip():
        yield [(number + 1, text)]


TOO_LONG = b"\0"  # stands for a line that was too long to keep


# Lines alike: they begin as the one before, up to the quote that begins their content.
_CONTENT_KEY = re.compile(rb'"content"[ ]?:[ ]?"')
_LAST = ("}", "}\r")  # what may come after the content
_ALIKE_BYTES = 1024 * 1024  # of lines that become one `Alike`: their frames are copied twice
_ALIKE_TRIES = 50  # lines in a row that may be looked at for a beginning, in vain


def parse_appends(
    store: Store, lines: list[bytes], may: May | None = None
) -> list[Union[Append, Alike, XsError]]:
    """What the lines ask to append, in their order, or what is wrong with one."""
    found: list[Union[Append, Alike, XsError]] = []
    topics: set[str] = set()  # those that were found right in an earlier line
    beginning, begun = b"", None  # of lines that differ in their content alone
    tries = _ALIKE_TRIES
    at = 0
    while at < len(lines):
        text = lines[at]
        if tries and begun is not None and text.startswith(beginning):
            contents = _contents_alike(lines, at, beginning)
            if len(contents) >= ALIKE_MIN:
                found.append(alike(begun, contents))
            else:
                found += [Append(begun.topic, small(data), begun.meta) for data in contents]
            if contents:
                at += len(contents)
                tries = _ALIKE_TRIES
                continue
        try:
            append = _plain_append(text, topics)
            if append is None:
                append = _parse_append(store, text, may)
                topics.add(append.topic)
            found.append(append)
        except XsError as error:
            found.append(error)
        at += 1
        if tries and at < len(lines):  # does the next one begin as this one?
            tries -= 1
            key = _CONTENT_KEY.search(text)
            if key is not None and lines[at].startswith(text[: key.end()]):
                beginning = text[: key.end()]
                begun = _begun(store, beginning, may)
    return found


_APPEND_KEYS = frozenset(("topic", "meta", "ttl", "content", "content_base64", "if_last", "key"))
_PLAIN_KEYS = frozenset(("topic", "meta", "content", "content_base64"))
_IMPORT_KEYS = frozenset(
    ("topic", "id", "hash", "meta", "ttl", "timestamp", "content", "content_base64")
)


def _begun(store: Store, beginning: bytes, may: May | None) -> Append | None:
    """What every line asks for that begins so, and goes on with a string and `}`; None: who knows.

    It is what the line with an empty string asks for: as a key stands before it, the last quote
    can only begin the content.
    """
    try:
        append = _parse_append(store, beginning + b'"}', may)
    except XsError:
        return None
    return append if is_plain(append) else None


def _contents_alike(lines: list[bytes], at: int, beginning: bytes) -> list[bytes]:
    """The contents of the lines from `at` on that begin so and have nothing else after it.

    Whatever is not quite so is left to `_parse_append`, which knows what to say.
    """
    start = len(beginning.decode())
    contents: list[bytes] = []
    room = _ALIKE_BYTES
    try:
        for n in range(at, len(lines)):
            text = lines[n]
            if not text.startswith(beginning):
                break
            line = text.decode()
            content, end = scanstring(line, start)
            data = content.encode()
            if line[end:] not in _LAST or not 0 < len(data) <= INLINE_MAX:
                break
            contents.append(data)
            room -= len(text)
            if room < 0:
                break
    except ValueError:  # no UTF-8, no JSON, half of a surrogate pair
        pass
    return contents


def _plain_append(text: bytes, topics: set[str]) -> Append | None:
    """The usual line, a known topic and small text, at half the cost of any line; None for others.

    Whatever is not quite so is left to `_parse_append`, which knows what to say.
    """
    try:
        line = text.decode()
        if len(line) > 2 * meta.META_DEPTH:
            meta.check_depth(line, meta.META_DEPTH + 1)
        value, end = _scan(line, 0)
        if end != len(line) or type(value) is not dict or len(value) != 2:
            return None
        if value["topic"] not in topics:
            return None
        data = value["content"].encode()
    except (ValueError, RecursionError, StopIteration, KeyError, TypeError, AttributeError):
        return None
    if not 0 < len(data) <= INLINE_MAX:
        return None
    return Append(value["topic"], small(data))


def _parse_append(store: Store, text: bytes, may: May | None) -> Append:
    value, meta = _members(text, _APPEND_KEYS)
    topic = value.get("topic")
    if not isinstance(topic, str):
        raise Invalid('no topic: a line is {"topic": …, "content": …}')
    frame.check_client_topic(topic)
    if may is not None:
        may(topic, frame.parse_ttl(value.get("ttl")))
    if _PLAIN_KEYS.issuperset(value):
        return Append(topic, _content(store, value), meta)
    ttl = store.check_ttl(frame.parse_ttl(value.get("ttl")))
    if_last, key = _expected(value.get("if_last")), _key(value.get("key"))
    # Last: content that was taken in for a line that is wrong would stay behind.
    return Append(topic, _content(store, value), meta, ttl, if_last, key)


def parse_imported(store: Store, text: bytes) -> Union[Imported, XsError]:
    """The frame that a line asks to import, or what is wrong with it."""
    try:
        value, meta = _members(text, _IMPORT_KEYS)
        topic, id_text, hash_ = value.get("topic"), value.get("id"), value.get("hash")
        if not isinstance(topic, str) or not isinstance(id_text, str):
            raise Invalid('no frame: it needs "topic" and "id", and may have hash, meta and ttl')
        frame.check_topic(topic)
        if topic in ("xs.threshold", "xs.pulse"):
            raise Invalid(f"{topic} is never stored: leave such frames out")
        ttl = frame.parse_ttl(value.get("ttl"))
        if ttl == frame.EPHEMERAL:
            raise Invalid(
                "an ephemeral frame is never stored: give it another ttl, or leave it out"
            )
        if hash_ is not None:
            if not isinstance(hash_, str):
                raise Invalid("the hash is not a string")
            frame.parse_integrity(hash_)
        elif value.get("content") or value.get("content_base64"):
            raise Invalid("there is content, and no hash for it")
        # Content last: what was taken in for a line that is wrong would stay behind.
        return Imported(ids.parse(id_text), topic, hash_, meta, ttl, _content(store, value))
    except XsError as error:
        return error


def _members(text: bytes, allowed: frozenset[str]) -> tuple[dict[str, Any], str]:
    """A line's members, and the text of its meta as it was given ("null" for none)."""
    if text == TOO_LONG:
        raise TooLarge(f"the line is too long: at most {EVERY_LINE} bytes")
    try:
        line = text.decode()
        if len(line) > 2 * meta.META_DEPTH:
            meta.check_depth(line, meta.META_DEPTH + 1)
        # Its scanner is what `decode` calls, after a search for blanks that are rarely there.
        value, end = _scan(line, 0) if line[:1] == "{" else (None, -1)
        if end != len(line):
            value = _DECODER.decode(line)
    except UnicodeDecodeError:
        raise Invalid("the line is not UTF-8") from None
    except (ValueError, RecursionError, StopIteration) as error:
        detail = str(error).split(": line", 1)[0][:120]
        if line.startswith("\ufeff"):
            detail = "it begins with a byte order mark (BOM): leave that out"
        raise Invalid(f"the line is not JSON: {detail}") from None
    if type(value) is not dict:
        raise Invalid("the line is not a JSON object")
    if not allowed.issuperset(value):
        unknown = sorted(set(value) - allowed)[0]
        raise Invalid(f"unknown key: {unknown[:64]!r}: known are {', '.join(sorted(allowed))}")
    if value.get("meta") is None:
        return value, "null"
    return value, meta.meta_in(line)


def _integer(digits: str) -> Union[int, float]:
    # Only a ttl is ever used as a number; longer digits would meet CPython's limit on integers.
    return int(digits) if len(digits) < 20 else float(digits)


_DECODER = json.JSONDecoder(parse_int=_integer, parse_constant=meta.refuse_constant)
_scan: Callable[[str, int], tuple[Any, int]] = _DECODER.scan_once  # type: ignore[attr-defined]


def _content(store: Store, value: dict[str, Any]) -> Content | None:
    """The content in a line, taken in."""
    text = value.get("content")
    coded = value.get("content_base64")
    if text is None and coded is None:
        return None
    if text is not None and coded is not None:
        raise Invalid("both content and content_base64 are given: give one")
    if text is not None:
        if not isinstance(text, str):
            raise Invalid(
                "content is not a string: quote it, or put it into meta (bytes: content_base64)"
            )
        try:
            data = text.encode()
        except UnicodeEncodeError:
            raise Invalid("content has half of a surrogate pair") from None
    else:
        data = frame.parse_base64(coded)
    if not data:
        return None
    if len(data) <= INLINE_MAX:
        return small(data)
    return store.cas.take([data])


def _expected(value: object) -> str | None:
    if value is None:
        return None
    if value == "none":
        return "none"
    if isinstance(value, str) and ids.is_id(value):
        return value.lower()
    raise Invalid('if_last is neither an id nor "none"')


def _key(value: object) -> str | None:
    if value is None:
        return None
    if isinstance(value, str):
        try:
            if 1 <= len(value.encode()) <= frame.KEY_MAX:
                return value
        except UnicodeEncodeError:
            pass
    raise Invalid(f"the key is not a string of 1 to {frame.KEY_MAX} bytes")
