"""The API's routes that look after a store, or run something: what few requests are for.

Each is a handler of `api`'s table, which loads them with the first request that wants one.
"""

from __future__ import annotations

from xs import ids
from xs.errors import Forbidden, Invalid, NotFound, TooLarge, XsError
from xs.messages import (
    BYTES,
    JSON,
    NDJSON,
    TEXT,
    Answer,
    Request,
    decode,
    error_answer,
    kind_of,
    of_frame,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from xs.commit import Append
    from xs.scripts import Scripts
    from xs.store import Store
    from xs.work import Work


def import_(store: Store, request: Request, _: str) -> Answer:
    from xs.batch import EVERY_LINE, import_lines, parse_imported
    from xs.imports import ImportWork

    request.options()
    kind = kind_of(request)
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
        return error_answer(result) if isinstance(result, XsError) else of_frame(result + b"\n")

    return Answer(200, work=ImportWork([parse_imported(store, body)]), finish=finish)


def go_on(store: Store, request: Request, append: Append, step: str) -> Answer:
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
    found = of_frame(result.line + b"\n") if result.line else Answer(204)
    if result.first is not None and result.last is not None:
        found.fields.append(("xs-run", f"{ids.text(result.first)} {ids.text(result.last)}"))
    return found


def check(store: Store, request: Request, _: str) -> Answer:
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


def gc(store: Store, request: Request, _: str) -> Answer:
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


def eval_(store: Store, request: Request, _: str) -> Answer:
    return _evaluate(request, None)


def pipe(store: Store, request: Request, rest: str) -> Answer:
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


def ps(store: Store, request: Request, _: str) -> Answer:
    request.options()
    found = _scripts(request).status()
    return Answer(200, NDJSON, b"".join([_compact(each) for each in found]))


def stores(store: Store, request: Request, _: str) -> Answer:
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
