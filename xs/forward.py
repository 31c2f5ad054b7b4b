"""Work that can't be committed here, done by the server that has taken the store meanwhile.

What a command was about to write to the files becomes requests; their answers become what the
commit would have given.
"""

from __future__ import annotations

import binascii
import json
from collections.abc import Generator, Iterator
from contextlib import closing, suppress
from typing import Any, Union

from xs import errors, frame, ids
from xs.batch import ERRORS_LISTED
from xs.bulk import BatchWork
from xs.cas import BLOCK
from xs.commit import Append
from xs.content import Content, discard
from xs.imports import Imported, ImportWork
from xs.request import EXPECT, NDJSON, append_request, ask, quote, split_lines
from xs.runsteps import RunResult, RunWork
from xs.transport import HttpTransport
from xs.work import AppendWork, PinWork, RemoveWork, Work

_MAYBE_STORED = "the server went away before it answered: nobody knows whether this line is stored"


def forward(transport: HttpTransport, work: Work) -> Any:
    """Does over the wire what `work` would have done here, and gives what its result would be.

    `is_to_be_repeated` says what to do about an error.
    """
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
        target = "/cas?for=import" if work.for_import else "/cas"
        return _send(transport, target, [], work.content).decode()
    raise _run_again()


def is_to_be_repeated(work: Work, error: errors.XsError) -> bool:
    """Whether work that met this error is still to be done, by the next server or on the files.

    A server that ends, or is busy, says that it has done nothing. Of one that was killed nobody
    knows: then only what may be done twice is done again.
    """
    if isinstance(error, (errors.Lost, errors.BrokenBody)):
        if isinstance(work, AppendWork):
            return work.append.key is not None
        return isinstance(work, (RunWork, ImportWork, PinWork))
    return isinstance(error, errors.Unavailable) and not isinstance(error, errors.Locked)


def _run_again() -> errors.Locked:
    return errors.Locked("a server has taken the store meanwhile: run the command again")


def _send(
    transport: HttpTransport, target: str, fields: list[tuple[str, str]], content: Content | None
) -> bytes:
    # Closed here, also when the server goes away amid it: an exception keeps what it has passed.
    with closing(_blocks(content)) as blocks:
        return ask(transport, "POST", target, [*fields, EXPECT], blocks).read()


def _blocks(content: Content | None) -> Generator[bytes, None, None]:
    if content is None:
        return
    if content.path is None:
        if content.data is None:  # placed by a commit that failed: the server has not got it
            raise _run_again()
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


def _forward_batch(
    transport: HttpTransport, work: BatchWork
) -> list[Union[Append, bytes, errors.XsError]]:
    """The results of all. Raises `Unavailable` if the server ends before: the rest is to be done.

    What it has answered by then is put in the place of what it was asked for. If it was killed it
    may have stored more: then the rest is what it was never sent, and what has a key.
    """
    appends = work.each()
    sent = 0

    def lines() -> Iterator[bytes]:
        nonlocal sent
        for each in appends:
            if isinstance(each, Append):
                sent += 1
                yield _append_line(each)

    answers: list[Union[bytes, errors.XsError]] = []
    maybe_stored = 0
    try:
        for line in split_lines(ask(transport, "POST", "/append?each", [NDJSON, EXPECT], lines())):
            answers += _answer_in(line)
    except (errors.Lost, errors.BrokenBody):
        maybe_stored = sent - len(answers)
    given = iter(answers)
    for n, each in enumerate(appends):
        if not isinstance(each, Append):
            continue
        found = next(given, None)
        if found is None and maybe_stored:
            maybe_stored -= 1
            found = None if each.key is not None else errors.Lost(_MAYBE_STORED)
        if found is not None:
            discard(each.content)
            appends[n] = found
    if any(isinstance(each, Append) for each in appends):
        work.appends = appends
        raise errors.Unavailable("the server ended before it had stored this")
    return appends


def _append_line(append: Append) -> bytes:
    topic, content, meta, ttl, if_last, key = append
    return _line({"topic": topic, "if_last": if_last, "key": key}, meta, ttl, content)


def _line(members: dict[str, str | None], meta: str, ttl: str, content: Content | None) -> bytes:
    """A line that asks for that.

    None that means the same is shorter: so if the one that this command was given was short enough,
    the server takes this one, too.
    """
    members["ttl"] = None if ttl == frame.FOREVER else ttl
    given = {name: value for name, value in members.items() if value is not None}
    parts = [json.dumps(given, separators=(",", ":"), ensure_ascii=False)[:-1].encode()]
    if meta != "null":
        parts.append(b'"meta":' + meta.encode())
    if content is not None:
        data = b"".join(_blocks(content))
        ways = [b'"content_base64":"' + binascii.b2a_base64(data, newline=False) + b'"']
        with suppress(UnicodeDecodeError):
            ways.append(b'"content":' + json.dumps(data.decode(), ensure_ascii=False).encode())
        parts.append(min(ways, key=len))
    return b",".join(parts) + b"}\n"


def _answer_in(line: bytes) -> list[Union[bytes, errors.XsError]]:
    """What a server answers to one line; nothing, if it says only that it takes no more."""
    if not line.startswith(b'{"error":'):
        return [line]
    told = json.loads(line)
    return [errors.Invalid(told["error"])] if "line" in told else []


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
            members = {"topic": each.topic, "id": ids.text(each.id), "hash": each.hash}
            yield _line(members, each.meta, each.ttl, each.content)

    summary = json.loads(ask(transport, "POST", "/import", [NDJSON], lines()).read())
    wrong = {each["line"]: errors.Invalid(each["error"]) for each in summary["errors"]}
    return [
        wrong.get(n)
        or frame.encode(new.topic, ids.text(new.id), new.hash, new.meta, new.ttl).encode()
        for n, new in enumerate(frames, 1)
    ]
