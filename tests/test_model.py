"""A random mix of operations, from threads and processes at once, against a plain model in memory.

Workers write to one store: through its server, directly on its files, and in the process that has
it for itself. Each keeps a log of what it was answered. When they rest, the logs put together say
what the store must have; then every way of reading must give just that.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import ROOT, XS, environment, start_server
from stores import problems, together

import xs
from xs import frame, ids
from xs.client import Client
from xs.errors import Conflict, XsError
from xs.local import Local
from xs.store import Store

TOPICS = ["a", "a.b", "a.b.c", "a.c", "a.b.c.d", "b", "b.x.y", "c-1.z_2"]
PATTERNS = [
    None, "*", "a", "a.*", "a.b.*", "b,a.b", "a.*,a.b.*,a.b.c", "nothing.*", "b.x.*,c-1.*",
    "w0ver.*", "w1les.*,a", "a,*",
]  # fmt: skip
OPERATIONS = 100  # of each worker, in each phase
NDJSON = ("content-type", "application/x-ndjson")


class Opened(Store):
    """A store that is open from the start, where `Local` wants to be asked."""

    def open(self) -> None:
        """It is."""

    def leave(self) -> None:
        """It stays open: others use it."""


class InProcess(Local):
    """The API on a store that this process has for itself."""

    def __init__(self, store: Opened) -> None:
        self._opened = store

    def _used(self) -> Any:
        return self._opened

    def close(self) -> None:
        """As `Opened.leave`."""


class Known(NamedTuple):
    """What the model knows of a frame; content as text."""

    topic: str
    meta: Any
    ttl: str
    content: Any


class Worker:
    """Does random operations, and keeps what must come of them."""

    def __init__(self, client: Client, name: str, seed: str) -> None:
        self.client = client
        self.name = name
        self.random = random.Random(seed)
        self.frames: dict[str, Known] = {}
        self.kept: list[str] = []  # ids of the frames with last:n, on a topic of its own
        self.number = 0

    def work(self, count: int) -> dict[str, Known]:
        acts = [
            *[self.append] * 6, *[self.append_each] * 2, self.append_atomic, self.fail_atomic,
            *[self.remove] * 3, *[self.keep_last] * 2, *[self.import_old] * 2, self.expire,
            self.condition, self.retry, *[self.read] * 2,
        ]  # fmt: skip
        for _ in range(count):
            self.random.choice(acts)()
        return self.frames

    def text(self) -> str:
        self.number += 1
        text = f"{self.name} {self.number} ü "
        kind = self.random.random()
        return text * (3000 if kind < 0.03 else 100 if kind < 0.2 else 1)

    def event(self, topic: str | None = None) -> dict[str, Any]:
        found: dict[str, Any] = {"topic": topic or self.random.choice(TOPICS)}
        if self.random.random() < 0.7:
            found["content"] = self.text()
        if self.random.random() < 0.5:
            size = self.random.choice([1, 1, 10, 5000, 100_000 if self.number % 9 == 0 else 4096])
            found["meta"] = {"n": self.number, "pad": "x" * size, "w": self.name}
        return found

    def note(self, id_text: str, event: dict[str, Any]) -> None:
        assert id_text not in self.frames
        self.frames[id_text] = Known(
            event["topic"], event.get("meta"), event.get("ttl", "forever"), event.get("content")
        )

    def append(self) -> None:
        event = self.event()
        topic, content = event["topic"], event.get("content")
        made = self.client.append(topic, content, meta=event.get("meta"))
        self.note(made.id, event)

    def append_each(self) -> None:
        events = [self.event() for _ in range(self.random.randrange(1, 40))]
        body = b"".join([json.dumps(event).encode() + b"\n" for event in events])
        answer = self.client._transport.request("POST", "/append?each", [NDJSON], body).read()
        lines = answer.splitlines()
        assert len(lines) == len(events), answer[-500:]
        for event, line in zip(events, lines):
            self.note(frame.id_of(line), event)

    def append_atomic(self) -> None:
        topic = f"{self.name}.atomic"
        events = [self.event(topic) for _ in range(self.random.randrange(1, 20))]
        summary = self.client.append_many(events, atomic=True)
        made = list(self.client.cat(topic=topic, from_=summary["first"], until=summary["last"]))
        assert len(made) == len(events)
        for each, event in zip(made, events):
            self.note(each.id, event)

    def fail_atomic(self) -> None:
        events = [self.event() for _ in range(5)] + [{"topic": "a", "if_last": ids.text(1)}]
        try:
            self.client.append_many(events, atomic=True)
        except XsError:
            return
        raise AssertionError("a batch that must fail was taken")

    def remove(self) -> None:
        if self.frames:
            id_text = self.random.choice(list(self.frames))
            if id_text in self.kept:
                self.kept.remove(id_text)
            del self.frames[id_text]
            assert self.client.remove(id_text)
            assert not self.client.remove(id_text)

    def keep_last(self) -> None:
        event = {**self.event(f"{self.name}.last"), "ttl": f"last:{self.random.randrange(1, 6)}"}
        made = self.client.append(
            event["topic"], event.get("content"), meta=event.get("meta"), ttl=event["ttl"]
        )
        self.note(made.id, event)
        self.kept.append(made.id)
        keep = int(event["ttl"][5:])
        for gone in self.kept[:-keep]:
            del self.frames[gone]
        del self.kept[:-keep]

    def import_old(self) -> None:
        frames = []
        for _ in range(self.random.randrange(1, 15)):
            back = self.random.choice([0, 1, 5, 1000, 86_400_000])
            ms = time.time_ns() // 1_000_000 - self.random.randrange(back + 1)
            value = ids.first_of(ms) | self.random.getrandbits(self.random.choice([20, 79]))
            event = self.event()
            content = event.get("content")
            data = None if content is None else content.encode()
            hash_ = None if data is None else frame.integrity(_sha256(data))
            frames.append({**event, "id": ids.text(value), "hash": hash_})
        summary = self.send(frames)
        assert (summary["imported"], summary["errors"]) == (len(frames), [])
        for each in frames:
            self.note(each["id"], each)

    def send(self, frames: list[dict[str, Any]]) -> dict[str, Any]:
        return self.client.import_(frames)

    def expire(self) -> None:
        self.client.append(self.random.choice(TOPICS), self.text(), ttl="time:1")

    def condition(self) -> None:
        topic = f"{self.name}.condition"
        newest = self.client.last(topic)
        event = self.event(topic)
        expected = "none" if newest is None else newest.id
        made = self.client.append(
            topic, event.get("content"), meta=event.get("meta"), if_last=expected
        )
        self.note(made.id, event)
        try:
            self.client.append(topic, "never", if_last=expected)
        except Conflict as conflict:
            assert conflict.frame is not None and made.id.encode() in conflict.frame
        else:
            raise AssertionError("a condition that does not hold was taken")

    def retry(self) -> None:
        event = self.event()
        key = f"{self.name} {self.random.random()}"
        for attempt in range(2):
            made = self.client.append(
                event["topic"], event.get("content"), meta=event.get("meta"), key=key
            )
            if attempt == 0:
                self.note(made.id, event)
            assert made.id in self.frames

    def read(self) -> None:
        start = self.random.choice(list(self.frames) or [None])
        seen = [each.id for each in self.client.cat(after=start, limit=500)]
        assert seen == sorted(set(seen))
        assert start is None or start < seen[0] if seen else True
        if start is not None:
            got = self.client.get(start)
            assert got is not None and got.topic == self.frames[start].topic


def _sha256(data: bytes) -> bytes:
    import hashlib

    return hashlib.sha256(data).digest()


class Reads:
    """Every way of reading, against the model."""

    def __init__(self, client: Client, model: dict[str, Known], seed: str) -> None:
        self.client = client
        self.model = model
        self.ids = sorted(model)
        self.random = random.Random(seed)

    def check_everything(self) -> None:
        given = list(self.client.cat(with_content=True))
        assert [each.id for each in given] == self.ids
        for each in given:
            known = self.model[each.id]
            assert (each.topic, each.meta, each.ttl) == known[:3]
            assert each.content == known.content, each.id
        for each in self.random.sample(given, 20):
            assert self.client.get(each.id) == each._replace(content=None)
            if each.hash is not None:
                assert self.client.content(each.id).decode() == each.content
                assert self.client.cas(each.hash).decode() == each.content

    def place(self) -> str:
        """An id that is stored, or is not."""
        value = ids.parse(self.random.choice(self.ids))
        return ids.text(value + self.random.choice([0, 0, 0, 1, -1, 1 << 32, 1 << 80, -(1 << 80)]))

    def selected(self, topic: str | None) -> list[str]:
        patterns = None if topic is None else frame.parse_patterns(topic)
        return [each for each in self.ids if frame.matches(patterns, self.model[each].topic)]

    def check_one(self) -> None:
        topic = self.random.choice(PATTERNS)
        expected = self.selected(topic)
        options: dict[str, Any] = {}
        start = self.random.choice([None, "after", "from_"])
        if start is not None:
            options[start] = place = self.place()
            expected = [i for i in expected if i > place or (start == "from_" and i == place)]
        if self.random.random() < 0.4:
            options["until"] = place = self.place()
            expected = [i for i in expected if i <= place]
        if self.random.random() < 0.4:
            options["last"] = count = self.random.choice([1, 2, 10, 1500])
            expected = expected[-count:]
        if self.random.random() < 0.4:
            options["limit"] = count = self.random.choice([1, 2, 10, 1500])
            expected = expected[:count]
        options["with_content"] = self.random.random() < 0.1
        found = [each.id for each in self.client.cat(topic=topic, **options)]
        assert found == expected, (topic, options)

    def check_ends(self) -> None:
        topic = self.random.choice([each for each in PATTERNS if each != "a,*"])
        expected = self.selected(topic)
        first, last = self.client.first(topic), self.client.last(topic)
        assert (first and first.id) == (expected[0] if expected else None)
        assert (last and last.id) == (expected[-1] if expected else None)
        assert [each.id for each in self.client.first(topic, 5)] == expected[:5]
        assert [each.id for each in self.client.last(topic, 5)] == expected[-5:]
        place = self.place()
        after = self.client.next(place, topic)
        before = self.client.prev(place, topic)
        assert (after and after.id) == next((i for i in expected if i > place), None)
        assert (before and before.id) == next((i for i in reversed(expected) if i < place), None)

    def check_new(self) -> None:
        """What a `new` reader is given is what comes after it began."""
        reader = self.client.cat(follow=True, new=True, limit=2, topic="a.*,b")
        made = [self.client.append(t, "new") for t in ("a.new", "c", "b")]
        assert [each.id for each in reader] == [made[0].id, made[2].id]
        for each in made:
            self.client.remove(each)

    def check(self, count: int) -> None:
        self.check_everything()
        for _ in range(count):
            self.check_one()
            self.check_ends()


def in_process_of_its_own(addr: str, name: str, seed: str, count: int) -> dict[str, Known]:
    program = "import sys, test_model; test_model.main(*sys.argv[1:])"
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    done = subprocess.run(
        [sys.executable, "-c", program, addr, name, seed, str(count)],
        capture_output=True,
        env=environment(PYTHONPATH=path),
        timeout=100,
    )
    assert done.returncode == 0, done.stderr.decode()
    return {i: Known(*known) for i, known in json.loads(done.stdout).items()}


def main(addr: str, name: str, seed: str, count: str) -> None:
    """A worker in a process of its own; prints its log."""
    with xs.open(addr) as client:
        print(json.dumps(Worker(client, name, seed).work(int(count))))


def by_commands(addr: str, name: str, count: int) -> dict[str, Known]:
    """A worker that is a shell's: each operation is a command."""
    found = {}

    def run(*words: str, stdin: bytes = b"") -> bytes:
        done = subprocess.run(
            [*XS, words[0], addr, *words[1:]],
            input=stdin,
            capture_output=True,
            env=environment(),
            timeout=60,
        )
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout

    for n in range(count):
        content = f"{name} {n}"
        made = json.loads(run("append", f"{name}.cmd", "--meta", "[1]", stdin=content.encode()))
        found[made["id"]] = Known(f"{name}.cmd", [1], "forever", content)
        lines = [f"{name} {n} {k}" for k in range(20)]
        body = "\n".join(lines).encode()
        summary = json.loads(run("append", f"{name}.lines", "--lines", stdin=body))
        made_lines = run(
            "cat", "--from", summary["first"], "--until", summary["last"], "-T", f"{name}.*",
        ).splitlines()  # fmt: skip
        for line, text in zip(made_lines, lines):
            found[frame.id_of(line)] = Known(f"{name}.lines", None, "forever", text)
        gone = frame.id_of(made_lines[n % 20])
        run("remove", gone)
        del found[gone]
    return found


def phase(
    model: dict[str, Known], store_dir: str, clients: Iterator[Client], seed: str, *, files: bool
) -> None:
    """Workers in threads, processes and commands, all at once; the model gets what they did."""
    logs: list[dict[str, Known]] = []
    taken = list(clients)

    def act(n: int) -> None:
        name = f"w{n}{seed[-3:]}"  # what one phase keeps is not the next one's to take
        if n < len(taken):
            logs.append(Worker(taken[n], name, f"{seed} {n}").work(OPERATIONS))
        elif not files:
            return
        elif n < len(taken) + 2:
            logs.append(in_process_of_its_own(store_dir, name, f"{seed} {n}", OPERATIONS))
        else:
            logs.append(by_commands(store_dir, name, 2))

    together(len(taken) + 3, act)
    for log in logs:
        assert not model.keys() & log.keys()
        model.update(log)


@pytest.mark.long
def test_whatever_is_done_at_once_every_read_gives_what_a_plain_model_has(store_dir: str) -> None:
    seed = os.environ.get("XS_TEST_SEED") or f"{random.randrange(10**6)}"
    print(f"to do the same again: XS_TEST_SEED={seed}")
    model: dict[str, Known] = {}

    # A server, and clients of it.
    running = start_server(store_dir)
    try:
        clients = [xs.open(store_dir) for _ in range(4)]
        phase(model, store_dir, iter(clients), f"{seed} server", files=True)
        add_runtime_frames(model, clients[0])
        reads = Reads(clients[0], model, seed)
        reads.check(60)
        reads.check_new()
    finally:
        running.stop()

    # The files, each client by itself.
    clients = [Client(Local(store_dir)) for _ in range(3)]
    add_runtime_frames(model, clients[0])
    phase(model, store_dir, iter(clients), f"{seed} files", files=True)
    reads = Reads(clients[1], model, seed)
    reads.check(60)
    reads.check_new()
    for client in clients:
        client.close()

    # One process that has the store for itself.
    store = Opened(store_dir, exclusive=True)
    store.start_sweeping()
    phase(
        model,
        store_dir,
        iter([Client(InProcess(store)) for _ in range(6)]),
        f"{seed} one",
        files=False,
    )
    reads = Reads(Client(InProcess(store)), model, seed)
    reads.check(100)
    reads.check_new()
    assert problems(store) == []
    store.close()

    print(len(model), "frames")
    check = subprocess.run([*XS, "check", store_dir], capture_output=True, env=environment())
    assert check.returncode == 0, check.stdout.decode() + check.stderr.decode()


def add_runtime_frames(model: dict[str, Known], client: Client) -> None:
    for each in client.cat(topic="xs.*"):
        model[each.id] = Known(each.topic, each.meta, each.ttl or "", None)
