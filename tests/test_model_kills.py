"""The random mix of test_model.py while servers are killed, and everything is done until it is.

Workers in threads and processes give each append a key, so that what was not answered can be done
again; what else they do may be done twice. A follower goes on from its position through every
server that dies. At the end the logs put together say what the store must have, and the follower
must have been given each frame that was appended, once, in order.

`XS_MODEL_SECONDS=1200 tools/test tests/test_model_kills.py`, or `tools/soak --model`, goes on for
twenty minutes.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional, TypeVar

import pytest
from conftest import DEADLINE, ROOT, XS, environment, start_server
from test_model import NDJSON, Known, Reads, Worker, add_runtime_frames

import xs
from xs import frame
from xs.client import Client
from xs.errors import BrokenBody, Locked, Unavailable

SECONDS = float(os.environ.get("XS_MODEL_SECONDS", "8"))
KEEP = 20_000  # frames that one worker leaves, so that a long run does not fill the disk
WORKERS = 4

T = TypeVar("T")


class Stubborn(Worker):
    """A worker that does everything again until it is answered."""

    def __init__(self, addr: str, name: str, seed: str) -> None:
        self.addr = addr
        super().__init__(xs.open(addr), name, seed)
        self.imported: set[str] = set()  # a follower may see nothing of these

    def again(self, do: Callable[[Client], T]) -> T:
        deadline = time.monotonic() + DEADLINE * 3
        while True:
            try:
                return do(self.client)
            except (Unavailable, BrokenBody, Locked, OSError) as error:
                assert time.monotonic() < deadline, f"no answer for a minute: {error!r}"
                self.client.close()
                # A server, or the files while there is none.
                self.client = xs.open(self.addr)

    def work_until(self, deadline: float) -> dict[str, Known]:
        acts = [
            *[self.append] * 6, *[self.append_each] * 2, *[self.remove] * 3, *[self.keep_last] * 2,
            *[self.import_old] * 2, self.expire, self.condition, self.read,
        ]  # fmt: skip
        while time.monotonic() < deadline:
            act = self.remove if len(self.frames) > KEEP else self.random.choice(acts)
            act()
        self.client.close()
        return self.frames

    def key(self) -> str:
        return f"{self.name} {self.random.getrandbits(64)}"

    def append(self) -> None:
        self.append_event(self.event())

    def append_event(self, event: dict[str, Any], **more: Any) -> str:
        topic, content, meta, key = (
            event["topic"],
            event.get("content"),
            event.get("meta"),
            self.key(),
        )
        ttl = event.get("ttl")
        made = self.again(
            lambda client: client.append(topic, content, meta=meta, ttl=ttl, key=key, **more)
        )
        self.note(made.id, event)
        return made.id

    def append_each(self) -> None:
        events = [self.event() for _ in range(self.random.randrange(1, 40))]
        body = b"".join(
            json.dumps({**event, "key": self.key()}).encode() + b"\n" for event in events
        )

        def ask(client: Client) -> list[bytes]:
            answer = client._transport.request("POST", "/append?each", [NDJSON], body)
            lines = answer.read().splitlines()
            if len(lines) != len(events) or any(b'"error"' in line[:9] for line in lines):
                raise BrokenBody("a server stopped amid it")
            return lines

        for event, line in zip(events, self.again(ask)):
            self.note(frame.id_of(line), event)

    def remove(self) -> None:
        if self.frames:
            id_text = self.random.choice(list(self.frames))
            if id_text in self.kept:
                self.kept.remove(id_text)
            del self.frames[id_text]
            self.again(lambda client: client.remove(id_text))
            assert self.again(lambda client: client.get(id_text)) is None

    def keep_last(self) -> None:
        keep = self.random.randrange(1, 6)
        event = {**self.event(f"{self.name}.last"), "ttl": f"last:{keep}"}
        self.kept.append(self.append_event(event))
        for gone in self.kept[:-keep]:
            del self.frames[gone]
        del self.kept[:-keep]

    def send(self, frames: list[dict[str, Any]]) -> dict[str, Any]:
        def ask(client: Client) -> dict[str, Any]:
            summary = client.import_(frames)
            if summary["errors"]:
                raise BrokenBody("a server that had taken the files was killed amid it")
            return summary

        self.imported |= {each["id"] for each in frames}
        return self.again(ask)

    def expire(self) -> None:
        text, topic = self.text(), self.event()["topic"]
        self.again(lambda client: client.append(topic, text, ttl="time:1"))

    def condition(self) -> None:
        topic = f"{self.name}.condition"
        newest = self.again(lambda client: client.last(topic))
        self.append_event(self.event(topic), if_last="none" if newest is None else newest.id)

    def read(self) -> None:
        start = self.random.choice(list(self.frames) or [None])
        seen = self.again(lambda client: [each.id for each in client.cat(after=start, limit=500)])
        assert seen == sorted(set(seen))
        if start is not None:
            got = self.again(lambda client: client.get(start))
            assert got is not None and got.topic == self.frames[start].topic


def main(addr: str, name: str, seed: str, seconds: str) -> None:
    """A worker in a process of its own; prints its log, and what of it was imported."""
    worker = Stubborn(addr, name, seed)
    print(json.dumps([worker.work_until(time.monotonic() + float(seconds)), list(worker.imported)]))


def started(addr: str, name: str, seed: str, seconds: float) -> subprocess.Popen[bytes]:
    program = "import sys, test_model_kills; test_model_kills.main(*sys.argv[1:])"
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    return subprocess.Popen(
        [sys.executable, "-c", program, addr, name, seed, str(seconds)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(PYTHONPATH=path),
    )


class Follower:
    """Follows through every server that dies, and the files between them."""

    def __init__(self, addr: str) -> None:
        self.seen: list[str] = []
        self.until: Optional[str] = None  # the last frame that it is to see
        self.failure: Optional[BaseException] = None
        self._addr = addr
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def _follow(self) -> None:
        try:
            while not self._has_seen_all():
                self._read()
        except BaseException as error:
            self.failure = error

    def _has_seen_all(self) -> bool:
        return self.until is not None and bool(self.seen) and self.seen[-1] >= self.until

    def _read(self) -> None:
        position = self.seen[-1] if self.seen else None
        try:
            with xs.open(self._addr) as client:
                for each in client.cat(follow=True, after=position):
                    if each.topic != "xs.threshold":
                        self.seen.append(each.id)
                    if self._has_seen_all():
                        return
        except (Unavailable, BrokenBody, Locked, OSError):
            pass  # its server was killed

    def end(self, until: str) -> None:
        self.until = until
        with xs.open(self._addr) as client:
            client.append("end")  # wakes it, should it have seen that one already
        self._thread.join(DEADLINE * 3)
        assert self.failure is None, self.failure
        assert not self._thread.is_alive(), "the follower has not seen the last frame"


@pytest.mark.long
@pytest.mark.timeout(SECONDS * 2 + 200)
def test_whatever_is_done_while_servers_are_killed_nothing_is_lost_or_doubled(
    store_dir: str,
) -> None:
    seed = os.environ.get("XS_TEST_SEED") or f"{random.randrange(10**6)}"
    print(f"to do the same again: XS_TEST_SEED={seed}")
    chance = random.Random(seed)
    server = start_server(store_dir)
    follower = Follower(store_dir)
    workers = [started(store_dir, f"w{n}", f"{seed} {n}", SECONDS) for n in range(WORKERS)]
    deadline = time.monotonic() + SECONDS
    kills = 0
    while time.monotonic() < deadline:
        threading.Event().wait(chance.uniform(0.05, 1.5))  # the moment of the kill is random
        server.process.kill()
        server.stop()
        kills += 1
        threading.Event().wait(chance.choice([0, 0, 0.2]))  # the files alone, for a while
        server = start_server(store_dir)

    model: dict[str, Known] = {}
    imported: set[str] = set()
    for worker in workers:
        out, err = worker.communicate(timeout=SECONDS + DEADLINE * 3)
        assert worker.returncode == 0, err.decode()
        log, old = json.loads(out)
        assert not model.keys() & log.keys()
        model.update({id_text: Known(*known) for id_text, known in log.items()})
        imported.update(old)
    with xs.open(store_dir) as client:
        last = client.append("end")
        follower.end(last.id)
        for each in client.cat(topic="end"):
            model[each.id] = Known("end", None, "forever", None)
        add_runtime_frames(model, client)
        reads = Reads(client, model, seed)
        reads.check(60)
    assert follower.seen == sorted(set(follower.seen))
    missed = model.keys() - imported - set(follower.seen)
    assert not {id_text for id_text in missed if id_text < last.id}
    server.stop()
    print(kills, "kills,", len(model), "frames")
    check = subprocess.run([*XS, "check", store_dir], capture_output=True, env=environment())
    assert check.returncode == 0, check.stdout.decode() + check.stderr.decode()
