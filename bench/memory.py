"""How much memory does a server take, and does it stay bounded?

Idle, for each follower, while a replay's reader reads nothing, and while large content comes and
goes. The content's speed has a floor of its own: sha256sum, then a copy that is fsynced.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time

from _measure import (
    CONTENT,
    PYTHON,
    Client,
    Report,
    Server,
    alternate,
    at_least,
    at_most,
    discard,
    folder,
    is_whole,
    pick,
    populate,
    request,
    resident,
    seconds,
    server,
)
from follow import allow_sockets, follow

FRAMES = pick(1_000_000, 100_000)
FOLLOWERS = 1000
LARGE = pick(1_000_000_000, 50_000_000)  # bytes
KB, MB = 1e3, 1e6
IDLE, FOLLOWER, STALLED, SPEED = 15.0, 30.0, 8.0, 0.5  # MB, kB, MB, of the floor: the goals


def interpreter(imports: str) -> int:
    """Bytes of an interpreter that has imported some modules and does nothing."""
    code = f"import sys{imports}; print(flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [PYTHON, "-I", "-S", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stdin is not None
        process.stdout.readline()
        size = resident(process.pid)
        process.stdin.close()
    return size


def settled(running: Server) -> int:
    """The memory when it has stopped to grow for half a second."""
    most = running.memory()
    since = time.monotonic()
    while time.monotonic() - since < 0.5:
        time.sleep(0.02)
        now = running.memory()
        if now > most + 65536:
            most, since = now, time.monotonic()
    return most


def idle_and_followers(report: Report, where: str) -> None:
    with server(os.path.join(where, "small")) as running:
        client = Client(running.socket_path)
        client.ask(request("POST", "/append/events", CONTENT))
        idle = settled(running)
        bare, stdlib = interpreter(""), interpreter(", sqlite3, socketserver, json, hashlib")
        for what, floor, goals in (
            ("bare interpreter", bare, [at_most(round((idle - bare) / MB, 1), IDLE, "MB more")]),
            ("that with sqlite3, socketserver, json", stdlib, []),
        ):
            report.add(
                "server, idle",
                idle / MB,
                "MB",
                *goals,
                floor=floor / MB,
                floor_unit=f"MB, {what}",
                ratio=idle / floor,
            )
        readers = follow(running, FOLLOWERS, lambda _: "events")
        parked = settled(running)
        each = (parked - idle) / FOLLOWERS / KB
        goal = at_most(each, FOLLOWER, "kB")
        report.add(f"each of {FOLLOWERS:,} followers", each, "kB a follower", goal)
        client.ask(request("POST", "/append/events", CONTENT))
        readers.wait(FOLLOWERS, time.perf_counter(), [])
        report.add("the same, after a delivery", (settled(running) - idle) / FOLLOWERS / KB, "kB")
        readers.close()
        client.close()


def stalled_reader(report: Report, where: str) -> None:
    path = os.path.join(where, "store")
    populate(path, ("events" for _ in range(FRAMES)))
    ask = request("GET", "/", b"", "Connection: close")
    with server(path) as running:
        before = settled(running)
        clients = []
        for count in (1, 10):
            while len(clients) < count:
                client = Client(running.socket_path)
                client.sock.sendall(ask)
                clients.append(client)
            more = (settled(running) - before) / MB
            if count == 1:
                report.add("a stalled replay", more, "MB more", at_most(more, STALLED, "MB"))
            else:
                report.add(f"{count} stalled in {FRAMES:,} frames", more, "MB more")
        for client in clients:
            client.close()
        size, _ = discard(running.socket_path, ask)
        report.add(
            f"a replay of {FRAMES:,} frames, the most",
            (running.peak_memory() - before) / MB,
            "MB more",
            floor=size / MB,
            floor_unit="MB that were sent",
            ratio=(running.peak_memory() - before) / size,
        )


def large_content(report: Report, where: str) -> None:
    source, copy = os.path.join(where, "large"), os.path.join(where, "copy")
    block = bytes(range(256)) * 4096
    with server(os.path.join(where, "content")) as running:
        before = settled(running)
        hash_ = ""
        number = 0

        def make() -> None:
            """Other bytes each time, so that it is not there already."""
            nonlocal number
            number += 1
            with open(source, "wb") as file:
                file.write(number.to_bytes(8, "big"))
                file.write(block * (LARGE // len(block)))

        def post() -> float:
            nonlocal hash_
            make()
            length = os.path.getsize(source)
            head = request("POST", "/cas").replace(b"Length: 0", b"Length: %d" % length)
            client = Client(running.socket_path)

            def send() -> None:
                nonlocal hash_
                client.sock.sendall(head)
                with open(source, "rb") as file:
                    while True:
                        data = file.read(1 << 20)
                        if not data:
                            break
                        client.sock.sendall(data)
                answer = b""
                while not is_whole(answer):
                    answer += client.sock.recv(65536)
                hash_ = answer.split(b"\r\n\r\n")[1].decode().strip()

            took = seconds(send)
            client.close()
            return length / took / MB

        def floor() -> float:
            make()
            return os.path.getsize(source) / seconds(hash_and_copy) / MB

        def hash_and_copy() -> None:
            subprocess.run([*_sha256sum(), source], stdout=subprocess.DEVNULL, check=True)
            with open(source, "rb") as from_, open(copy, "wb") as to:
                shutil.copyfileobj(from_, to, 1 << 20)
                os.fsync(to.fileno())

        found = alternate(3, post, floor)
        report.add(
            f"POST /cas, {LARGE / MB:,.0f} MB",
            found.subject,
            "MB/s",
            at_least(found.ratio, SPEED),
            floor=found.floor,
            floor_unit="MB/s, sha256sum, then cp + fsync",
            ratio=found.ratio,
        )
        report.add("the same: memory, the most", (running.peak_memory() - before) / MB, "MB more")
        get = request("GET", f"/cas/{hash_}", b"", "Connection: close")
        found = alternate(
            3,
            lambda: LARGE / seconds(lambda: discard(running.socket_path, get)) / MB,
            lambda: (
                LARGE
                / seconds(
                    lambda: subprocess.run(
                        [*_sha256sum(), source], stdout=subprocess.DEVNULL, check=True
                    )
                )
                / MB
            ),
        )
        report.add(
            f"GET /cas, {LARGE / MB:,.0f} MB",
            found.subject,
            "MB/s",
            at_least(found.ratio, SPEED),
            floor=found.floor,
            floor_unit="MB/s, sha256sum",
            ratio=found.ratio,
        )
        report.add("both: memory, the most", (running.peak_memory() - before) / MB, "MB more")


def _sha256sum() -> list[str]:
    return ["sha256sum"] if shutil.which("sha256sum") else ["shasum", "-a", "256"]


def main() -> None:
    allow_sockets()
    report = Report("memory", "A server's memory")
    with folder() as where:
        idle_and_followers(report, where)
        stalled_reader(report, where)
        large_content(report, where)
    report.end()


if __name__ == "__main__":
    main()
