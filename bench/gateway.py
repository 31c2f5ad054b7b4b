"""How many requests from the web does the gateway answer a second, and how soon?

1, 8 and 50 connections, each with one request under way, are this process, in one selector's loop.
Each request is answered with a few bytes, so what is measured is the way through the stream: two
durable appends. Who answers is a handler in Nushell, one in Python (`#!`), or a process that
follows the stream and appends its answers as lines of one long `POST /append?each`. With
`ephemeral` neither the requests nor that process's answers are stored.

Floor: `GET /version` from the store's own socket, an answer that needs no stream.

A page of 1,000 server-sent events: how long it takes from the request to the last of them, when the
handler has all of them ready. Of those that come one by one, how long each takes from its append
until the client has read it; floor: until a follower of the stream has read its frame.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from _measure import (
    DEADLINE,
    Client,
    Crowd,
    Report,
    alternate,
    at_least,
    at_most,
    folder,
    is_whole,
    percentile,
    pick,
    request,
    server,
)

CONNECTIONS = (1, 8, 50)
ROUNDS = 3
SECONDS = pick(0.5, 0.2)
EVENTS = 1000
AT_FIFTY = 2000.0  # requests/s: the goal
AT_ONE = 5.0  # ms, p50: the goal

BODY = "hello from the stream"

NUSHELL = f"""{{|request| {{topic: http.response, content: "{BODY}"}} }}"""
PYTHON = f"""#!{sys.executable} -IS
import sys

answer = '{{"out": {{"topic": "http.response", "content": "{BODY}"}}}}\\n'
for line in sys.stdin:
    sys.stdout.write(answer)
    sys.stdout.flush()
"""


class Handler:
    """Follows the requests of a store, and answers them, for ever."""

    def __init__(self, path: str, ttl: str) -> None:
        self._ttl = ttl
        self._requests = Client(path).sock
        self._answers = Client(path).sock
        self._requests.sendall(request("GET", "/?follow&new&topic=http.request"))
        self._answers.sendall(
            b"POST /append?each HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        self._rest = b""
        while b"\r\n\r\n" not in self._rest:  # from here on it misses none
            self._rest += self._requests.recv(65536)

    def run(self) -> None:
        selector = selectors.DefaultSelector()
        selector.register(self._requests, selectors.EVENT_READ)
        selector.register(self._answers, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                data = key.fileobj.recv(65536)  # type: ignore[union-attr]
                if not data:
                    return
                if key.fileobj is self._requests:
                    self._answer(data)

    def _answer(self, data: bytes) -> None:
        lines = (self._rest + data).split(b"\n")
        self._rest = lines.pop()
        answers = []
        for line in lines:
            if not line.startswith(b'{"topic":"http.request"'):
                continue
            frame = json.loads(line)
            meta = {"frame_id": frame["id"]}
            if frame["meta"]["path"] == "/live":
                continue
            if frame["meta"]["path"] == "/events":
                answers += self._events(meta)
            else:
                answers.append(self._line(meta, BODY))
        if answers:
            body = b"".join(answers)
            self._answers.sendall(b"%x\r\n%b\r\n" % (len(body), body))

    def _line(self, meta: dict[str, object], content: str) -> bytes:
        event = {"topic": "http.response", "meta": meta, "ttl": self._ttl, "content": content}
        return json.dumps(event).encode() + b"\n"

    def _events(self, meta: dict[str, object]) -> Iterator[bytes]:
        headers = {"content-type": "text/event-stream"}
        for n in range(EVENTS):
            more = n < EVENTS - 1
            yield self._line({**meta, "headers": headers, "more": more}, f"data: {n}\n\n")


@contextmanager
def handler(path: str, ttl: str) -> Iterator[None]:
    ready, tells = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        found = Handler(path, ttl)
        os.write(tells, b".")
        found.run()
        os._exit(0)
    os.close(tells)
    if not os.read(ready, 1):
        raise SystemExit("the handler did not start")
    os.close(ready)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGTERM)
        os.waitpid(pid, 0)


def register(path: str, script: str) -> None:
    """Has the store's server run a handler."""
    client = Client(path)
    waits = Client(path)
    waits.sock.sendall(request("GET", "/?follow&new&topic=hello.registered"))
    waits.sock.recv(65536)  # from here on it misses nothing
    meta = 'xs-meta: {"topic":"http.request"}'
    client.ask(request("POST", "/append/hello.register", script.encode(), meta))
    waits.sock.settimeout(DEADLINE)
    if b"hello.registered" not in waits.sock.recv(65536):
        raise SystemExit("the handler did not start")
    client.close()
    waits.close()


def requests(report: Report, web: str, api: str, who: str) -> None:
    asks = request("GET", "/hello?a=1", b"", "User-Agent: bench", "Accept: */*")
    floor = request("GET", "/version")
    for count in CONNECTIONS:
        crowd, others = Crowd(web, count), Crowd(api, count)
        delays: list[float] = []
        found = alternate(
            ROUNDS,
            lambda: crowd.rate(asks, SECONDS, delays),  # noqa: B023
            lambda: others.rate(floor, SECONDS),  # noqa: B023
        )
        crowd.close()
        others.close()
        name = f"{count} connections, {who}" if count > 1 else f"1 connection, {who}"
        goals = [at_least(round(found.subject), AT_FIFTY, "requests/s")] if count == 50 else []
        report.add(
            name,
            found.subject,
            "requests/s",
            *goals,
            floor=found.floor,
            floor_unit="requests/s, GET /version",
            ratio=found.ratio,
        )
        middle = percentile(delays, 50)
        report.add(f"{name}: p50", middle, "ms", *[at_most(middle, AT_ONE, "ms")] * (count == 1))
        report.add(f"{name}: p99", percentile(delays, 99), "ms")


def events(report: Report, web: str, ttl: str) -> None:
    """A page of events that are all ready at once."""
    took = []
    for _ in range(pick(5, 1)):
        client = Client(web)
        started = time.perf_counter()
        client.sock.sendall(request("GET", "/events"))
        data = bytearray()
        while not data.endswith(b"0\r\n\r\n"):
            data += client.sock.recv(1 << 20)
        took.append((time.perf_counter() - started) * 1e3)
        assert data.count(b"data: ") == EVENTS
        client.close()
    report.add(f"{EVENTS:,} events of one page, {ttl}", statistics.median(took), "ms")


def live(report: Report, web: str, api: str, ttl: str) -> None:
    """Events of one page that are appended one by one, here."""
    client, follower, writer = Client(web), Client(api), Client(api)
    asked = Client(api)
    for each, topic in ((asked, "http.request"), (follower, "http.response")):
        each.sock.sendall(request("GET", f"/?follow&new&topic={topic}"))
        each.sock.recv(65536)  # from here on it misses nothing
    client.sock.sendall(request("GET", "/live"))
    request_id = asked.sock.recv(65536).decode().partition('"request_id":"')[2][:25]
    selector = selectors.DefaultSelector()
    took: dict[Client, list[float]] = {client: [], follower: []}
    for each in took:
        selector.register(each.sock, selectors.EVENT_READ, each)
    data = request(
        "POST",
        f"/append/http.response?ttl={ttl}",
        b"data: hello\n\n",
        f'xs-meta: {{"request_id":"{request_id}","more":true}}',
    )
    for n in range(pick(1000, 200)):
        started = time.perf_counter()
        writer.sock.sendall(data)
        waiting = {client, follower}
        while waiting:
            for key, _ in selector.select():
                if not key.data.sock.recv(65536):
                    raise SystemExit("an answer broke off")
                if n:  # the first has the head with it
                    took[key.data].append((time.perf_counter() - started) * 1e3)
                waiting.discard(key.data)
        while not is_whole(writer.sock.recv(65536)):
            pass
    for percent in (50, 99):
        found, floor = (percentile(took[each], percent) for each in (client, follower))
        report.add(
            f"an event of a page, {ttl}: p{percent}",
            found,
            "ms",
            floor=floor,
            floor_unit="ms, a follower",
            ratio=found / floor,
        )
    for each in (client, follower, writer, asked):
        each.close()
    selector.close()


def main() -> None:
    report = Report("gateway", "Requests from the web, through the stream and back (Unix sockets)")
    with folder() as where:
        for name, script in (("Nushell", NUSHELL), ("Python", PYTHON)):
            web = f"{where}/{name}.sock"
            with server(f"{where}/{name}", "--http", web) as running:
                register(running.socket_path, script)
                requests(report, web, running.socket_path, f"a handler in {name}")
        for ttl in ("forever", "ephemeral"):
            web, store = f"{where}/{ttl}.sock", f"{where}/{ttl}"
            options = ("--http", web, "--http-ttl", ttl)
            with server(store, *options) as running, handler(running.socket_path, ttl):
                requests(report, web, running.socket_path, f"a follower, {ttl}")
                events(report, web, ttl)
                live(report, web, running.socket_path, ttl)
    report.end()


if __name__ == "__main__":
    main()
