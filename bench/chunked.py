"""What does a content cost that is read while it is written, and what does it cost the others?

How long a byte takes from its writer to those who read live (beside an append's answer), how fast a
body goes in and comes out in pieces (beside the same body as one content), and whether the newest
event is found as fast behind very many pieces as behind none.
"""

from __future__ import annotations

import os
import selectors
import socket
import statistics
import time

from _measure import (
    CONTENT,
    Client,
    Report,
    Server,
    alternate,
    at_most,
    discard,
    folder,
    percentile,
    pick,
    request,
    seconds,
    server,
)

READERS = (1, 10, 100)
BYTES_SENT = pick(40, 20)  # in each round
ROUNDS = pick(3, 1)
APART = 0.055  # seconds: further than what is gathered
BODY = os.urandom(1 << 20) * pick(128, 16)
PIECES = pick(500_000, 30_000)
CLOSE = "Connection: close"


class Writer:
    """A chunked append under way."""

    def __init__(self, running: Server, topic: str) -> None:
        self._client = Client(running.socket_path)
        head = request("GET", f"/append/{topic}?chunked", b"", "Transfer-Encoding: chunked")
        self._client.sock.sendall(head.replace(b"GET", b"POST", 1))

    def send(self) -> None:
        self._client.sock.sendall(b"1\r\nx\r\n")

    def end(self) -> None:
        self._client.ask(b"0\r\n\r\n")
        self._client.close()


class Readers:
    """Connections that read one content live, in one loop."""

    def __init__(self, running: Server, id_text: str, count: int) -> None:
        self._selector = selectors.DefaultSelector()
        self._socks: list[socket.socket] = []
        for _ in range(count):
            client = Client(running.socket_path)
            client.sock.sendall(request("GET", f"/content/{id_text}"))
            answer = b""
            while not answer.endswith(b"\r\nx\r\n"):
                answer += client.sock.recv(65536)
            self._socks.append(client.sock)
            self._selector.register(client.sock, selectors.EVENT_READ, client.sock)

    def wait(self) -> None:
        """Until each has read something."""
        left = len(self._socks)
        while left:
            for key, _ in self._selector.select():
                if not key.data.recv(65536):
                    raise SystemExit("a reader's answer ended")
                left -= 1

    def close(self) -> None:
        self._selector.close()
        for sock in self._socks:
            sock.close()


def newest(running: Server, topic: str) -> str:
    """The id of the newest event, as soon as there is one."""
    while True:
        client = Client(running.socket_path)
        client.sock.sendall(request("GET", f"/last/{topic}"))
        answer = client.sock.recv(65536)
        client.close()
        if answer.startswith(b"HTTP/1.1 200"):
            return answer.split(b'"id":"')[1][:25].decode()
        time.sleep(0.001)


def live(running: Server, report: Report) -> None:
    for count in READERS:
        topic = f"live{count}"
        writer = Writer(running, topic)
        writer.send()
        readers = Readers(running, newest(running, topic), count)
        appender = Client(running.socket_path)
        append = request("POST", "/append/plain", CONTENT)
        delays: list[float] = []

        def round_of_bytes(
            writer: Writer = writer, readers: Readers = readers, delays: list[float] = delays
        ) -> float:
            taken = []
            for _ in range(BYTES_SENT):
                time.sleep(APART)
                started = time.perf_counter()
                writer.send()
                readers.wait()
                taken.append((time.perf_counter() - started) * 1e3)
            delays += taken
            return statistics.median(taken)

        def round_of_appends(appender: Client = appender, append: bytes = append) -> float:
            taken = []
            for _ in range(BYTES_SENT):
                time.sleep(APART / 5)
                started = time.perf_counter()
                appender.ask(append)
                taken.append((time.perf_counter() - started) * 1e3)
            return statistics.median(taken)

        found = alternate(ROUNDS, round_of_bytes, round_of_appends)
        report.add(
            f"until the last of {count} live readers has a byte, p50",
            found.subject,
            "ms",
            floor=found.floor,
            floor_unit="ms, an append's answer",
            ratio=found.ratio,
        )
        report.add("the same, p99", percentile(delays, 99), "ms")
        readers.close()
        appender.close()
        writer.end()


def whole(running: Server, report: Report) -> None:
    megabytes = len(BODY) / 1e6
    in_pieces = request("POST", "/append/big?chunked", BODY)
    as_one = request("POST", "/append/big", BODY)

    def rate(data: bytes) -> float:
        client = Client(running.socket_path)
        taken = seconds(lambda: client.ask(data))
        client.close()
        return megabytes / taken

    found = alternate(ROUNDS, lambda: rate(in_pieces), lambda: rate(as_one))
    report.add(
        "a fast body, in pieces",
        found.subject,
        "MB/s",
        floor=found.floor,
        floor_unit="MB/s, as one content",
        ratio=found.ratio,
    )
    ids = []
    for data in (in_pieces, as_one):
        client = Client(running.socket_path)
        ids.append(client.ask(data).split(b'"id":"')[1][:25].decode())
        client.close()
    gets = [request("GET", f"/content/{each}", b"", CLOSE) for each in ids]
    found = alternate(
        ROUNDS,
        lambda: megabytes / seconds(lambda: discard(running.socket_path, gets[0])),
        lambda: megabytes / seconds(lambda: discard(running.socket_path, gets[1])),
    )
    report.add(
        "the whole, read later",
        found.subject,
        "MB/s",
        floor=found.floor,
        floor_unit="MB/s, as one content",
        ratio=found.ratio,
    )


def behind_pieces(where: str, report: Report) -> None:
    from xs.commit import Append
    from xs.content import small
    from xs.runsteps import RunWork
    from xs.store import Store

    path = os.path.join(where, "long")
    store = Store(path, exclusive=True, create=True)
    store.append(Append("short.one", small(CONTENT)))
    store.append(Append("long.one", small(CONTENT)))
    run = store.runs.begin(Append("long.run"))
    run.write(b"x")
    pieces = [small(b"x")] * 10_000
    for _ in range(PIECES // len(pieces)):
        work = RunWork(run.append, run.writer, run.first, run.last, pieces)
        run.last = store.run(work).last
    run.end()
    store.close()
    with server(path) as running, server(os.path.join(where, "short")) as other:
        Client(other.socket_path).ask(request("POST", "/append/long.one", CONTENT))
        for target in ("/last/long.one", "/last/long.*", "/last"):
            data = request("GET", target)
            found = alternate(
                ROUNDS,
                lambda data=data: microseconds(running, data),
                lambda data=data: microseconds(other, data),
            )
            report.add(
                f"GET {target}, {PIECES:,} pieces behind it",
                found.subject,
                "µs",
                at_most(found.ratio, 1.5),
                floor=found.floor,
                floor_unit="µs, none",
                ratio=found.ratio,
            )
        everything = request("GET", "/", b"", CLOSE)
        taken = statistics.median(
            seconds(lambda: discard(running.socket_path, everything)) for _ in range(ROUNDS)
        )
        report.add("GET / of all of it", PIECES / taken, "frames/s")
        bare = request("GET", "/?no-chunks", b"", CLOSE)
        first = statistics.median(
            seconds(lambda: discard(running.socket_path, bare)) for _ in range(ROUNDS)
        )
        report.add("GET /?no-chunks of all of it", first * 1e3, "ms")


def microseconds(running: Server, data: bytes) -> float:
    client = Client(running.socket_path)
    taken = [seconds(lambda: client.ask(data)) for _ in range(pick(500, 200))]
    client.close()
    return statistics.median(taken) * 1e6


def main() -> None:
    report = Report("chunked", "Content that is read while it is written")
    with folder() as where:
        with server(os.path.join(where, "store")) as running:
            live(running, report)
            whole(running, report)
        behind_pieces(where, report)
    report.end()


if __name__ == "__main__":
    main()
