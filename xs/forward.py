"""Work that can't be committed here, done by the server that has taken the store meanwhile.

What a command was about to write to the files becomes requests; their answers become what the
commit would have given.
"""

from __future__ import annotations

import binascii
import json
from collections.abc import Generator, Iterator
from contextlib import closing
from typing import Any, Union

from xs import errors, frame, ids
from xs.batch import ERRORS_LISTED
from xs.bulk import BatchWork
from xs.cas import BLOCK
from xs.content import Content
from xs.imports import Imported, ImportWork
from xs.request import NDJSON, append_request, ask, quote
from xs.runsteps import RunResult, RunWork
from xs.transport import HttpTransport
from xs.work import AppendWork, PinWork, RemoveWork, Work


def forward(transport: HttpTransport, work: Work) -> Any:
    """Does over the wire what `work` would have done here, and gives what its result would be."""
    if isinstance(work, AppendWork):
        return _forward_append(transport, work)
    if isinstance(work, BatchWork) and not work.atomic:
        return _forward_batch(transport, work)
    if isinstance(work, ImportWork):
        return _forward_import(transport, work)
    if isinstance(work, RemoveWork):
        return ask(transport, "DELETE", f"/{ids.text(work.id)}").read()
    if isinstance(work, RunWork):
        return _forward_run(transport, work)
    if isinstance(work, PinWork):
        return _send(transport, "/cas", [], work.content).decode()
    raise errors.Unavailable("a server has taken the store meanwhile: run the command again")


def _send(
    transport: HttpTransport, target: str, fields: list[tuple[str, str]], content: Content | None
) -> bytes:
    if content is None:
        return ask(transport, "POST", target, fields).read()
    # Closed here, also when the server goes away amid it: an exception keeps what it has passed.
    with closing(_blocks(content)) as blocks:
        return ask(transport, "POST", target, fields, blocks).read()


def _blocks(content: Content) -> Generator[bytes, None, None]:
    if content.path is None:
        if content.data is None:  # placed by a commit that failed: the server has not got it
            raise errors.Unavailable("a server has taken the store meanwhile: run it again")
        yield content.data
        return
    with open(content.path, "rb") as file:
        while True:
            block = file.read(BLOCK)
            if not block:
                return
            yield block


def _forward_append(transport: HttpTransport, work: AppendWork) -> bytes:
    topic, content, meta, ttl, if_last, key = work.append
    target, fields = append_request(topic, meta=meta, ttl=ttl, if_last=if_last, key=key)
    return _send(transport, target, fields, content).rstrip(b"\n")


def _forward_run(transport: HttpTransport, work: RunWork) -> RunResult:
    topic, _, meta, ttl, if_last, key = work.append
    begins = work.first is None
    target, fields = append_request(
        topic,
        meta=meta if begins else None,
        ttl=ttl if begins else None,
        if_last=if_last if begins else None,
        key=key if begins else None,
    )
    state = "more" if not work.ended else "whole" if work.error_text is None else "broken"
    step = [state, work.writer]
    if work.first is not None and work.last is not None:
        step += [ids.text(work.first), ids.text(work.last), quote(work.error_text or "")]
    fields.append(("xs-run", " ".join(step).strip()))
    body = b"".join([block for content in work.contents for block in _blocks(content)])
    answer = ask(transport, "POST", target, fields, body)
    made = answer.get("xs-run")
    line = answer.read().rstrip(b"\n")
    if made is None:
        return RunResult(line, None, None)
    first, last = made.split(" ")
    return RunResult(line, ids.parse(first), ids.parse(last))


def _forward_batch(transport: HttpTransport, work: BatchWork) -> list[Union[bytes, errors.XsError]]:
    appends = work.each()
    wanted = [each for each in appends if not isinstance(each, errors.XsError)]

    def lines() -> Iterator[bytes]:
        for topic, content, meta, ttl, if_last, key in wanted:
            data = b"" if content is None else b"".join(_blocks(content))
            line = {"topic": topic, "ttl": ttl, "if_last": if_last, "key": key}
            line["content_base64"] = binascii.b2a_base64(data, newline=False).decode()
            yield f'{json.dumps(line)[:-1]},"meta":{meta}}}\n'.encode()

    try:
        answers = ask(transport, "POST", "/append?each", [NDJSON], lines()).read().splitlines()
    except errors.BrokenBody:
        answers = []
    if len(answers) != len(wanted):
        raise errors.Unavailable("the server went away before it answered everything")
    given = iter(answers)
    return [
        each if isinstance(each, errors.XsError) else _line_or_error(next(given))
        for each in appends
    ]


def _line_or_error(line: bytes) -> Union[bytes, errors.XsError]:
    if line.startswith(b'{"error":'):
        return errors.Invalid(json.loads(line)["error"])
    return line


def _forward_import(
    transport: HttpTransport, work: ImportWork
) -> list[Union[bytes, errors.XsError]]:
    wanted = [each for each in work.frames if not isinstance(each, errors.XsError)]
    given: list[Union[bytes, errors.XsError]] = []
    for start in range(0, len(wanted), ERRORS_LISTED):  # so that each error is told
        given += _import_part(transport, wanted[start : start + ERRORS_LISTED])
    rest = iter(given)
    return [each if isinstance(each, errors.XsError) else next(rest) for each in work.frames]


def _import_part(
    transport: HttpTransport, frames: list[Imported]
) -> list[Union[bytes, errors.XsError]]:
    def lines() -> Iterator[bytes]:
        for each in frames:
            line = _line_of(each)
            if each.content is not None:
                data = binascii.b2a_base64(b"".join(_blocks(each.content)), newline=False)
                line = line[:-1] + b',"content_base64":"' + data + b'"}'
            yield line + b"\n"

    summary = json.loads(ask(transport, "POST", "/import", [NDJSON], lines()).read())
    wrong = {each["line"]: errors.Invalid(each["error"]) for each in summary["errors"]}
    return [wrong.get(number) or _line_of(each) for number, each in enumerate(frames, 1)]


def _line_of(new: Imported) -> bytes:
    return frame.encode(new.topic, ids.text(new.id), new.hash, new.meta, new.ttl).encode()
