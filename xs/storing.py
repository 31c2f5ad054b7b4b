"""`xs store add` and `xs store remove`: a request on the root store's stream, and its answer.

Without a server the request waits on the stream for the next one.
"""

from __future__ import annotations

import json
import os

from xs import address, errors, stdio
from xs.arguments import plain_directory, plain_path
from xs.request import append_request, ask, split_lines, with_query
from xs.transport import HttpTransport

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from xs.arguments import Arguments
    from xs.request import Transport

_PULSE_MS = 1000
_WAIT_PULSES = 60  # so long it may take to open a store


def run(arguments: Arguments) -> int:
    """Asks for it, prints the answer's frame, and gives the exit status."""
    action, *words = arguments.rest
    if action not in ("add", "remove"):
        raise errors.Usage(f"store takes add or remove, not {action!r}")
    if action == "remove" and arguments.has("http"):
        raise errors.Usage("--http goes with xs store add")
    addr, rest = address.split(words, os.environ, 1)
    if len(rest) != 1:
        raise errors.Usage(f"xs store {action} ADDR PATH takes one PATH")
    asked = {"path": _absolute(plain_directory(rest[0]), addr)}
    name, http = arguments.get("name"), arguments.get("http")
    if name is not None:
        asked["name"] = name
    if http is not None:
        asked["http"] = _absolute(http, addr) if address.is_socket_path(http) else http
    transport = address.open_transport(addr)
    try:
        return _ask(transport, action, asked)
    finally:
        transport.close()


def _absolute(path: str, addr: str) -> str:
    """The whole of a path, which the server knows by that alone. Raises `Usage`."""
    plain_path(path)
    if address.is_host(addr) and not os.path.isabs(path):
        raise errors.Usage(f"{path}: give the whole path, as the server at that address has it")
    try:
        path.encode()
    except UnicodeEncodeError:
        shown = path.encode("utf-8", "replace").decode()
        raise errors.Usage(f"{shown} is not UTF-8, as JSON has to be") from None
    return os.path.abspath(path)


def _ask(transport: Transport, action: str, asked: dict[str, str]) -> int:
    try:
        ask(transport, "GET", "/stores").read()
    except errors.NotFound:
        if isinstance(transport, HttpTransport):
            raise errors.Invalid(
                "that is no root store: name the store that xs serve was started with"
            ) from None
        served = False
    else:
        served = True
    meta = json.dumps(asked, ensure_ascii=False)
    target, fields = append_request(f"xs.store.{action}", meta=meta)
    line = ask(transport, "POST", target, fields).read()
    if not served:
        stdio.write(line)
        return 0
    wanted = json.loads(line)["id"]
    answers = {"add": "xs.store.added", "remove": "xs.store.removed"}
    topics = f"{answers[action]},xs.store.error"
    query = [("follow", str(_PULSE_MS)), ("after", wanted), ("topic", topics)]
    response = ask(transport, "GET", with_query("/", query))
    try:
        for line in _within(split_lines(response)):
            frame = json.loads(line)
            meta = frame["meta"]
            if not isinstance(meta, dict) or meta.get("source_id") != wanted:
                continue
            if frame["topic"] == "xs.store.error":
                raise errors.Failed(str(meta.get("reason")))
            stdio.write(line + b"\n")
            return 0
    finally:
        response.close()
    raise errors.Unavailable("the server has not answered: xs stores shows what it serves")


def _within(lines: Iterator[bytes]) -> Iterator[bytes]:
    """What comes until there have been too many pulses."""
    pulses = 0
    for line in lines:
        if line.startswith(b'{"topic":"xs.pulse"'):
            pulses += 1
            if pulses > _WAIT_PULSES:
                return
        elif not line.startswith(b'{"topic":"xs.threshold"'):
            yield line
