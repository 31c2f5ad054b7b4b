"""How fast are scripts: handlers, generators, and a Nushell that appends?

Handlers, in Nushell and as a program (Python): many frames that wait for them (`run-from: start`),
and frames that arrive meanwhile; how long a single frame takes from its append until a follower has
the handler's output. A generator that yields numbers. `.append` at a Nushell prompt.

Rates of handlers are taken from ids of frames, which carry their time: from `.registered`, when the
process is ready, to the last output. All they cause is durable by then.

Floors: the same process with the same runner script, fed from a file, its answers thrown away; so
the start of the process is in neither. For `.append` a bare `http post` of the same Nushell.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any, Optional

from _measure import (
    CONTENT,
    DEADLINE,
    ENVIRON,
    ROOT,
    Client,
    Report,
    Server,
    alternate,
    at_least,
    at_most,
    folder,
    json_line,
    percentile,
    pick,
    populate,
    request,
    seconds,
    server,
)

from xs import frame, ids, nu
from xs.process import Command, command_of

FRAMES = pick(20_000, 5_000)
LIVE_FRAMES = pick(20_000, 5_000)
VALUES = pick(200_000, 20_000)
SINGLE = pick(400, 100)  # appends of which each waits for its output, in a round
APPENDS = pick(200, 50)  # at a Nushell prompt, in a round
ROUNDS = pick(3, 1)


class Kind:
    """A handler that is measured: its script in both languages, and what it aims at."""

    def __init__(
        self, name: str, nushell: str, python: str, unit: str, goal: Optional[int], meta: Any
    ) -> None:
        self.name = name
        self.nushell = nushell.encode()
        self.python = python.encode()
        self.unit = unit
        self.goal = goal
        self.meta = meta

    @property
    def is_stateful(self) -> bool:
        return "stateful" in self.meta


def program(answer: str) -> str:
    """A handler in Python; `answer` is an expression of `frame` and `state`."""
    return (
        f"#!{sys.executable} -ISu\n"
        "import json, sys\n"
        "for line in sys.stdin.buffer:\n"
        "    given = json.loads(line)\n"
        '    frame, state = given["frame"], given.get("state")\n'
        f"    answer = {answer}\n"
        "    sys.stdout.buffer.write(json.dumps(answer).encode() + b'\\n')\n"
        "    sys.stdout.buffer.flush()\n"
    )


# Each says something about the last frame, whose topic is `end`, so that one sees it is through.
KINDS = (
    Kind(
        "answers each frame",
        "{|frame| $frame.id }",
        program('{"out": frame["id"]}'),
        "outputs/s",
        10_000,
        {},
    ),
    Kind(
        "only filters",
        '{|frame| if $frame.topic == "end" { "end" } }',
        program('{"out": "end"} if frame["topic"] == "end" else None'),
        "frames/s",
        30_000,
        {},
    ),
    Kind(
        "counts (stateful)",
        "{|frame, state| {state: ($state + 1)} }",
        program('{"state": state + 1}'),
        "frames/s",
        None,
        {"stateful": True, "initial_state": 0},
    ),
)


class Store:
    """A served store, and requests to it."""

    def __init__(self, running: Server) -> None:
        self.running = running
        self.client = Client(running.socket_path)

    def append(self, topic: str, content: bytes, meta: Any = None) -> None:
        fields = [] if meta is None else [f"xs-meta: {json.dumps(meta)}"]
        self.client.ask(request("POST", f"/append/{topic}", content, *fields))

    def append_many(self, topic: str, count: int) -> None:
        line = json.dumps({"topic": topic, "content": CONTENT.decode()}).encode() + b"\n"
        body = line * count
        self.client.ask(request("POST", "/append", body, "Content-Type: application/x-ndjson"))

    def newest(self, topic: str) -> dict[str, Any]:
        """The newest frame of a topic; {} if there is none."""
        self.client.sock.sendall(request("GET", f"/last/{topic}"))
        answer = self.client.sock.recv(65536)
        if not answer.startswith(b"HTTP/1.1 200"):
            return {}
        return dict(json.loads(answer.split(b"\r\n\r\n", 1)[1]))

    def wait(self, topic: str, frame_id: Optional[str] = None) -> int:
        """Waits until the newest frame of a topic is one that `frame_id` caused; gives its id."""
        until = time.monotonic() + DEADLINE
        while time.monotonic() < until:
            found = self.newest(topic)
            if found and frame_id in (None, found["meta"].get("frame_id")):
                return ids.parse(found["id"])
            time.sleep(0.03)
        raise SystemExit(f"{topic} does not appear")


def seconds_between(first: int, last: int) -> float:
    """Between two frames, by their ids."""
    return (ids.milliseconds(last) - ids.milliseconds(first)) / 1000


class Handlers:
    """Handlers one after the other, each with a name of its own."""

    def __init__(self, store: Store, prefix: str) -> None:
        self._store = store
        self._prefix = prefix
        self._count = 0

    @contextlib.contextmanager
    def registered(self, script: bytes, meta: Any) -> Iterator[tuple[str, int]]:
        """A handler in service: its name, and the id of the frame that says so."""
        self._count += 1
        name = f"{self._prefix}{self._count}"
        self._store.append(f"{name}.register", script, meta)
        yield name, self._store.wait(f"{name}.registered")
        self._store.append(f"{name}.unregister", b"")
        self._store.wait(f"{name}.unregistered")


# Floors


class Process:
    """A script's process as the server starts it, but fed from a file, and heard by nobody."""

    def __init__(self, command: Command, where: str, data: bytes = b"") -> None:
        self._command = command
        self._folder = tempfile.mkdtemp(dir=where)
        for name, text in {**command.files, "input": data}.items():
            with open(os.path.join(self._folder, name), "wb") as file:
                file.write(text)

    def run(self) -> None:
        """From its start to its end."""
        command, given = self._command, os.path.join(self._folder, "input")
        actions = [
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
            (os.POSIX_SPAWN_OPEN, command.input_at or 0, given, os.O_RDONLY, 0),
        ]
        words = [word.replace("{folder}", self._folder) for word in command.words]
        environ = {**ENVIRON, **command.variables}
        pid = os.posix_spawn(words[0], words, environ, file_actions=actions)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if status:
            raise SystemExit(f"{words} ended with {status}")


def rate_of(count: int, full: Process, empty: Process) -> float:
    """A second, of what one process does and the other, which has nothing to do, does not."""
    return count / (seconds(full.run) - seconds(empty.run))


def lines_of(count: int) -> list[str]:
    return [json_line(n) for n in range(1, count)] + [json_line(count, "end")]


def input_of(kind: Kind, count: int, *, is_nushell: bool) -> bytes:
    """What a handler's process is given: to Nushell the state goes once, ahead of the frames."""
    first = '{"state":0}\n' if kind.is_stateful and is_nushell else ""
    state = ',"state":0' if kind.is_stateful and not is_nushell else ""
    return (first + "".join(f'{{"frame":{line}{state}}}\n' for line in lines_of(count))).encode()


# What is measured


def waiting(report: Report, store: Store, where: str, last: str) -> None:
    """Frames that are there already."""
    handlers = Handlers(store, "w")
    for language in ("Nushell", "Python"):
        for kind in KINDS:
            is_nu = language == "Nushell"
            script = kind.nushell if is_nu else kind.python
            command = nu.handler(script, stateful=kind.is_stateful) if is_nu else command_of(script)
            given = input_of(kind, FRAMES, is_nushell=is_nu)
            full, empty = Process(command, where, given), Process(command, where)

            def rate(kind: Kind = kind, script: bytes = script) -> float:
                meta = {"run-from": "start", "topic": "events,end", **kind.meta}
                with handlers.registered(script, meta) as (name, ready):
                    topic = f"{name}.state" if kind.is_stateful else name
                    return FRAMES / seconds_between(ready, store.wait(topic, last))

            found = alternate(
                ROUNDS, rate, lambda full=full, empty=empty: rate_of(FRAMES, full, empty)
            )
            report.add(
                f"{language}: {kind.name}, {FRAMES:,} wait",
                found.subject,
                kind.unit,
                *([at_least(found.subject, kind.goal, "/s")] if is_nu and kind.goal else []),
                floor=found.floor,
                floor_unit="the process, from a file",
                ratio=found.ratio,
            )


def live(report: Report, store: Store) -> None:
    """Frames that arrive as fast as one connection brings them in."""
    handlers = Handlers(store, "l")
    for language in ("Nushell", "Python"):
        kind = KINDS[0]
        script = kind.nushell if language == "Nushell" else kind.python
        goals = [10_000] if language == "Nushell" else []

        def with_handler(script: bytes = script) -> float:
            with handlers.registered(script, {"topic": "live"}) as (name, _):
                started = time.perf_counter()
                store.append_many("live", LIVE_FRAMES)
                store.wait(name, store.newest("live")["id"])
                return LIVE_FRAMES / (time.perf_counter() - started)

        def without() -> float:
            started = time.perf_counter()
            store.append_many("live", LIVE_FRAMES)
            return LIVE_FRAMES / (time.perf_counter() - started)

        found = alternate(ROUNDS, with_handler, without)
        report.add(
            f"{language}: {kind.name}, as they come",
            found.subject,
            kind.unit,
            *[at_least(found.subject, goal, "/s") for goal in goals],
            floor=found.floor,
            floor_unit="appends/s, NDJSON, alone",
            ratio=found.ratio,
        )


class Follower:
    """A connection that follows a topic and has caught up."""

    def __init__(self, store: Store, topic: str) -> None:
        self._client = Client(store.running.socket_path)
        self._client.sock.sendall(request("GET", f"/?follow&new&topic={topic}"))
        data = b""
        while b"\r\n\r\n" not in data:
            data += self._client.sock.recv(65536)

    def wait(self, id_text: bytes) -> None:
        """Until a frame comes that has this id, or was caused by the one that has it."""
        data = b""
        while id_text not in data:
            more = self._client.sock.recv(65536)
            if not more:
                raise SystemExit("a follower's answer ended")
            data += more

    def close(self) -> None:
        self._client.close()


def single(report: Report, store: Store) -> None:
    """From an append until a follower has what a handler made of it."""
    handlers = Handlers(store, "s")

    def delays(topic: str, output: str) -> list[float]:
        follower = Follower(store, output)
        found = []
        data = request("POST", f"/append/{topic}", CONTENT)
        for _ in range(SINGLE):
            started = time.perf_counter()
            answer = store.client.ask(data)
            follower.wait(frame.id_of(answer).encode())
            found.append((time.perf_counter() - started) * 1e3)
        follower.close()
        return found

    for language in ("Nushell", "Python"):
        script = KINDS[0].nushell if language == "Nushell" else KINDS[0].python
        with handlers.registered(script, {"topic": "single"}) as (name, _):
            every: list[float] = []

            def subject(name: str = name, every: list[float] = every) -> float:
                taken = delays("single", name)
                every.extend(taken)
                return statistics.median(taken)

            found = alternate(ROUNDS, subject, lambda: statistics.median(delays("bare", "bare")))
        report.add(
            f"{language}: append → output delivered, p50",
            found.subject,
            "ms",
            *([at_most(found.subject, 3, "ms")] if language == "Nushell" else []),
            floor=found.floor,
            floor_unit="ms, append → delivered",
            ratio=found.ratio,
        )
        report.add(f"{language}: append → output delivered, p99", percentile(every, 99), "ms")


def generators(report: Report, store: Store, where: str) -> None:
    """A script that yields numbers."""

    def script_of(language: str, count: int) -> bytes:
        if language == "Nushell":
            return f"1..{count} | each {{|n| $n }}".encode()
        return (
            f"#!{sys.executable} -IS\nimport sys\n"
            f"for n in range(1, {count} + 1): sys.stdout.write(f'{{n}}\\n')\n"
        ).encode()

    names = (f"g{n}" for n in range(1000))
    for language, goals in (("Nushell", [20_000]), ("Python", [])):

        def process(count: int, language: str = language) -> Process:
            script = script_of(language, count)
            command = nu.script(script, "none") if language == "Nushell" else command_of(script)
            return Process(command, where)

        def rate(language: str = language) -> float:
            name = next(names)
            store.append(f"{name}.spawn", script_of(language, VALUES))
            started = store.wait(f"{name}.start")
            stopped = store.wait(f"{name}.stop")
            store.append(f"{name}.terminate", b"")
            return VALUES / seconds_between(started, stopped)

        full, empty = process(VALUES), process(1)
        found = alternate(ROUNDS, rate, lambda full=full, empty=empty: rate_of(VALUES, full, empty))
        report.add(
            f"{language}: a generator's values",
            found.subject,
            "frames/s",
            *[at_least(found.subject, goal, "/s") for goal in goals],
            floor=found.floor,
            floor_unit="values/s, the process alone",
            ratio=found.ratio,
        )


def prompt(report: Report, store: Store) -> None:
    """`.append` in a Nushell that runs."""
    ours = '"0123456789" | .append prompt'
    bare = (
        f'http post --unix-socket "{store.running.socket_path}" '
        '"http://localhost/append/prompt" "0123456789"'
    )

    def delays(command: str) -> list[float]:
        text = (
            f"use {ROOT}/xs/xs.nu *\n"
            f"1..{APPENDS + 10} | each {{ let t = (date now); {command} | ignore; "
            "((date now) - $t) / 1ns } | skip 10 | to json --raw"
        )
        done = subprocess.run(
            [nu.find(), "-n", "-c", text],
            stdout=subprocess.PIPE,
            check=True,
            env={**ENVIRON, "XS_ADDR": store.running.path},
        )
        return [each / 1e6 for each in json.loads(done.stdout)]

    every: list[float] = []

    def subject() -> float:
        taken = delays(ours)
        every.extend(taken)
        return statistics.median(taken)

    found = alternate(ROUNDS, subject, lambda: statistics.median(delays(bare)))
    report.add(
        "Nushell: .append at a prompt, p50",
        found.subject,
        "ms",
        at_most(found.subject, 6, "ms"),
        floor=found.floor,
        floor_unit="ms, http post",
        ratio=found.ratio,
    )
    report.add("Nushell: .append at a prompt, p99", percentile(every, 99), "ms")


def main() -> None:
    report = Report("scripts", "Scripts: handlers, generators, .append (100 bytes an event)")
    with folder() as where:
        path = os.path.join(where, "store")
        populate(path, [*("events" for _ in range(FRAMES - 1)), "end"])
        with server(path) as running:
            store = Store(running)
            waiting(report, store, where, store.newest("end")["id"])
            live(report, store)
            single(report, store)
            generators(report, store, where)
            prompt(report, store)
    report.end()


if __name__ == "__main__":
    main()
