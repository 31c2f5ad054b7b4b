"""Many events in one request, as lines of JSON: `append --lines`, `append --json`, `import`.

Lines go out as standard input gives them, one block after the other, so that neither a slow source
waits for anything, nor a long one needs memory. What is wrong with a line, the store says, by its
number; it is looked into here only to wrap it up as an event, or to name a topic in it.
"""

from __future__ import annotations

import os

from xs import errors, stdio
from xs.frame import check_client_topic, parse_ttl
from xs.request import NDJSON, ask
from xs.terminal import Progress

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from xs.arguments import Arguments


def append(arguments: Arguments, topic: str | None) -> None:
    """Each line of standard input is an event. Prints the summary; raises for refused lines."""
    _check(arguments, topic)
    with Progress("lines", source=0) as progress:
        body: Iterable[bytes] = _counted(stdio.blocks_of(), progress)
        if arguments.has("lines"):
            frame = event_frame(topic or "", arguments.get("meta"), arguments.get("ttl"))
            body = lines_as_events(body, *frame)
        elif topic is not None:
            body = with_topic(body, topic)
        send(arguments, "/append", body, progress)


def _check(arguments: Arguments, topic: str | None) -> None:
    ways = [f"--{way}" for way in ("lines", "json", "chunked") if arguments.has(way)]
    if len(ways) > 1:
        raise errors.Usage(f"{' and '.join(ways)} can't go together: give one of them")
    how = "--lines" if arguments.has("lines") else "--json"
    for name in ("if-last", "key") if how == "--lines" else ("meta", "ttl", "if-last", "key"):
        if arguments.has(name):
            where = "one event alone" if how == "--lines" else "a line's own JSON"
            raise errors.Usage(f"--{name} can't go with {how}: it belongs to {where}")
    if how == "--lines" and topic is None:
        raise errors.Usage("TOPIC is missing: xs append ADDR TOPIC --lines")
    # What is the same for all lines, the store would say of each; on a pipe that stays open, late.
    if topic is not None:
        check_client_topic(topic)
    parse_ttl(arguments.get("ttl"))


def import_frames(arguments: Arguments, source: str) -> None:
    """Each line of a file is a frame, stored as it is; `-` is standard input."""
    descriptor = 0 if source == "-" else os.open(source, os.O_RDONLY)
    try:
        with Progress("frames", source=descriptor) as progress:
            body = _counted(stdio.blocks_of(descriptor), progress)
            send(arguments, "/import", body, progress)
    finally:
        if descriptor:
            os.close(descriptor)


def send(arguments: Arguments, target: str, body: Iterable[bytes], progress: Progress) -> None:
    """Sends lines and prints the summary. Raises `Invalid` if some have errors."""
    transport = arguments.open(create=True)
    try:
        summary = ask(transport, "POST", target, [NDJSON], body).read()
    finally:
        transport.close()
        progress.end()
    stdio.show_text([summary])
    if b'"errors":[]' in summary:
        return
    import json

    try:
        found = json.loads(summary)
        first = found["errors"][0]
        what = f"line {first['line']}: {first['error']}"
        number = len(found["errors"]) + found.get("errors_unlisted", 0)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        raise errors.BrokenBody("the answer is not a summary of lines as xs gives it") from None
    count = "1 line has an error" if number == 1 else f"{number} lines have errors"
    raise errors.Invalid(f"{count}; {what}")


# Lines as events


def event_frame(topic: str, meta: str | None, ttl: str | None) -> tuple[str, str]:
    """What stands before and after the content in each event's line of JSON."""
    import json

    from xs.meta import compact_meta

    parts = ['{"topic":' + json.dumps(topic)]
    if meta is not None:
        parts.append('"meta":' + compact_meta(meta))  # in one line
    if ttl is not None:
        parts.append('"ttl":' + json.dumps(ttl))
    return ",".join(parts) + ",", "}\n"


def lines_as_events(blocks: Iterable[bytes], before: str, after: str) -> Iterator[bytes]:
    """NDJSON of one event for each line in `blocks`, each block's as soon as it came.

    `before` and `after` stand around the content. A last line without newline counts. All lines
    of a block are encoded in a few calls: over a million a second, far more than a store takes.
    """
    for lines in _whole_lines(blocks):
        yield _events(lines.removesuffix(b"\n"), before, after)


def _events(lines: bytes, before: str, after: str) -> bytes:
    try:
        text = lines.decode("utf-8")
    except UnicodeDecodeError:
        if b"\n" in lines:  # only those lines that aren't text need the other form
            return b"".join(_events(line, before, after) for line in lines.split(b"\n"))
        import binascii

        encoded = binascii.b2a_base64(lines, newline=False).decode("ascii")
        return f'{before}"content_base64":"{encoded}"{after}'.encode()
    before += '"content":'
    quoted = map(_encoder(), text.split("\n"))
    return (before + (after + before).join(quoted) + after).encode("utf-8")


def _encoder() -> Callable[[str], str]:
    """What makes a JSON string of a str."""
    try:
        from _json import encode_basestring  # in CPython, without the 7 ms of `json`
    except ImportError:
        from json.encoder import encode_basestring
    return encode_basestring


# Lines of JSON


def with_topic(blocks: Iterable[bytes], topic: str) -> Iterator[bytes]:
    """The lines of JSON in `blocks`; those that name no topic get that one."""
    import json

    named = b'{"topic":' + json.dumps(topic).encode()
    for lines in _whole_lines(blocks):
        yield b"".join(_name_topic(line, named) for line in lines.splitlines(keepends=True))


def _name_topic(line: bytes, named: bytes) -> bytes:
    import json

    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return line  # the store says what is wrong with it, and which line it is
    if not isinstance(event, dict) or "topic" in event:
        return line
    inner = line.lstrip()[1:]
    return named + (b"," if event else b"") + inner


# Blocks


def _whole_lines(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes cut where lines end; the last block may end without a newline."""
    unfinished: list[bytes] = []
    for block in blocks:
        end = block.rfind(b"\n") + 1
        if not end:
            unfinished.append(block)
            continue
        lines = b"".join([*unfinished, block[:end]])
        unfinished = [block[end:]]
        yield lines
    last = b"".join(unfinished)
    if last:
        yield last


def _counted(blocks: Iterable[bytes], progress: Progress) -> Iterator[bytes]:
    for block in blocks:
        yield block
        progress.add(block.count(b"\n"))
