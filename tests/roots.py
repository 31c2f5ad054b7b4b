"""A root store with further stores in its process, as tests speak of them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple, Union

from conftest import DEADLINE, Server, open_files, start_server, until
from wire import Wire

ANSWERS = "xs.store.added,xs.store.removed,xs.store.error"

Where = Union[str, int]


class Reply(NamedTuple):
    """What a root store has answered."""

    what: str  # added, removed or error
    meta: dict[str, Any]

    @property
    def reason(self) -> str:
        """The sentence of an error: one line."""
        assert self.what == "error", self
        reason = self.meta["reason"]
        assert isinstance(reason, str) and reason and "\n" not in reason, reason
        return reason


class Root:
    """A server of a root store, and what is asked of it."""

    def __init__(self, directory: str, *options: str) -> None:
        self.directory = directory
        self._options = options
        self.server: Server
        self.start()

    def start(self) -> None:
        self.server = start_server(self.directory, *self._options)

    def stop(self) -> str:
        """Stops it in good order; its log."""
        self.server.process.terminate()
        _, log = self.server.process.communicate(timeout=DEADLINE)
        assert self.server.process.returncode == 0, log.decode()
        return log.decode()

    def kill(self) -> None:
        self.server.process.kill()
        self.server.process.communicate()

    def close(self) -> None:
        """The end of a test, whatever has happened in it."""
        if self.server.process.poll() is None:
            self.kill()

    @property
    def pid(self) -> int:
        return self.server.process.pid

    # Requests about stores

    def request(self, what: str, meta: Any, ttl: str = "forever") -> str:
        """Appends a request; its id."""
        return append(self.directory, f"xs.store.{what}", meta=meta, ttl=ttl)

    def reply_to(self, source: str) -> Reply:
        """The answer to a request, once it is there."""
        with Wire(self.directory) as wire:
            wire.send(follow(f"/?follow&after={source}&topic={ANSWERS}"))
            wire.head()
            while True:
                for line in wire.block().splitlines():
                    frame = json.loads(line)
                    if (frame["meta"] or {}).get("source_id") == source:
                        return Reply(frame["topic"].rpartition(".")[2], frame["meta"])

    def ask(self, what: str, meta: Any) -> Reply:
        return self.reply_to(self.request(what, meta))

    def add(self, path: Union[str, Path], **more: Any) -> dict[str, Any]:
        """Has a store added; the meta of the answer."""
        reply = self.ask("add", {"path": str(path), **more})
        assert reply.what == "added", reply
        return reply.meta

    def remove(self, path: Union[str, Path]) -> dict[str, Any]:
        reply = self.ask("remove", {"path": str(path)})
        assert reply.what == "removed", reply
        return reply.meta

    def stores(self) -> dict[str, dict[str, Any]]:
        """What `GET /stores` lists, by name."""
        with Wire(self.directory) as wire:
            answer = wire.ask("GET", "/stores")
        assert answer.status == 200
        assert answer.fields["content-type"] == "application/x-ndjson"
        return {each["name"]: each for each in map(json.loads, answer.body.splitlines())}

    def wait_for(self, *names: str) -> None:
        """Waits until these are served, or can't be."""

        def are_there() -> bool:
            stores = self.stores()
            return all(
                name in stores and (stores[name]["since"] or stores[name]["error"])
                for name in names
            )

        until(are_there)

    # What it costs

    def descriptors(self) -> int:
        return open_files(self.pid, self.directory)

    def number(self, name: str) -> int:
        """A number in /proc/PID/status, such as Threads, or VmRSS in KiB."""
        text = Path(f"/proc/{self.pid}/status").read_text()
        (line,) = [line for line in text.splitlines() if line.startswith(name + ":")]
        return int(line.split()[1])


def follow(target: str) -> bytes:
    return f"GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()


def append(
    where: Where,
    topic: str,
    content: bytes = b"",
    *,
    meta: Any = None,
    ttl: str = "forever",
    via: str = "",
) -> str:
    """Appends a frame, to the store below the path `via` of that server; its id."""
    with Wire(where) as wire:
        answer = wire.ask(
            "POST", f"{via}/append/{topic}?ttl={ttl}", content, xs_meta=json.dumps(meta)
        )
    assert answer.status == 200, answer
    return str(json.loads(answer.body)["id"])


def frames(where: Where, topic: str = "*", via: str = "") -> list[dict[str, Any]]:
    """The stored frames of a store, with their content."""
    with Wire(where) as wire:
        answer = wire.ask("GET", f"{via}/?topic={topic}&with-content")
    assert answer.status == 200, answer
    return [json.loads(line) for line in answer.body.splitlines()]


def wait_frames(where: Where, topic: str, count: int = 1) -> list[dict[str, Any]]:
    """The frames of a topic, once there are so many."""
    until(lambda: len(frames(where, topic)) >= count)
    return frames(where, topic)


def topics(where: Where, pattern: str = "*", via: str = "") -> list[str]:
    return [frame["topic"] for frame in frames(where, pattern, via)]


def script(*lines: str) -> bytes:
    """A shell script."""
    return "\n".join(["#!/bin/sh", *lines, ""]).encode()


# A handler that answers each frame that it is given with a frame on its own topic.
ECHO = script('while read -r line; do echo \'{"out": "seen"}\'; done')


def web_handler(name: str) -> bytes:
    """A handler for `http.request` that answers each with that text."""
    meta = r'{"frame_id":"\1"}'
    answer = f'{{"append":[{{"topic":"http.response","content":"{name}","meta":{meta}}}]}}'
    return script(f'exec sed -u \'s/.*"id": *"\\([^"]*\\)".*/{answer}/\'')


def is_free(directory: Union[str, Path]) -> bool:
    """Whether no server has the store: its lock can be had at once."""
    import fcntl

    with open(os.path.join(directory, "lock"), "r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True
