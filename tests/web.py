"""A server that answers the web, and handlers that answer through its stream.

A handler here is any program that follows `http.request` and appends `http.response`: a thread with
a client of its own, in the test's process.
"""

from __future__ import annotations

import queue
import re
import select
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Union

from conftest import DEADLINE, XS, Server, environment

import xs
from xs.frame import Frame

Answer = Callable[[xs.Client, Frame], None]


class WebServer(Server):
    """A running `xs serve --http …`; `web` has the addresses that it says it answers at."""

    web: list[str]
    errors: Path

    def port(self, which: int = 0) -> int:
        return int(self.web[which].rpartition(":")[2])

    def log(self) -> str:
        """What the server has said so far on standard error."""
        return self.errors.read_text("utf-8")

    def status_of(self, name: str) -> int:
        """A number in /proc/PID/status, such as VmRSS in KiB."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        line = next(line for line in text.splitlines() if line.startswith(name + ":"))
        return int(line.split()[1])


def start_web(directory: str, *options: str) -> WebServer:
    """Starts `xs serve DIRECTORY --http …`, and returns once it says where it answers."""
    errors = Path(f"{directory}.err")
    process = subprocess.Popen(
        [*XS, "serve", directory, *options],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=errors.open("ab"),
        env=environment(),
    )
    server = WebServer(directory, process)
    server.errors = errors
    try:
        assert process.stdout is not None
        assert is_readable(process.stdout, DEADLINE), "the server says nothing"
        serving, answering = process.stdout.readline(), process.stdout.readline()
        assert serving.startswith(b"serving "), server.log()
        said = re.fullmatch(r"answering the web at (.*)\n", answering.decode())
        assert said, server.log()
    except BaseException:
        process.kill()
        process.communicate()
        raise
    server.web = said[1].split(", ")
    return server


@contextmanager
def web_server(directory: str, *options: str) -> Iterator[WebServer]:
    server = start_web(directory, *options)
    try:
        yield server
    finally:
        server.stop()


class Handler:
    """Follows `http.request` from now on, and calls `answer(client, frame)` for each.

    What `answer` raises is raised by `check`; a handler that the server has left is not a failure.
    """

    def __init__(self, directory: str, answer: Answer, topic: str = "http.request") -> None:
        self.client = xs.open(directory)
        self.seen: queue.Queue[Frame] = queue.Queue()
        self.failure: Union[BaseException, None] = None
        self._answer = answer
        self._frames = self.client.cat(topic=topic, follow=True, new=True)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            for frame in self._frames:
                self.seen.put(frame)
                self._answer(self.client, frame)
        except xs.XsError:
            pass  # the server has gone
        except BaseException as error:
            self.failure = error

    def check(self) -> None:
        if self.failure is not None:
            raise self.failure

    def next(self, seconds: float = DEADLINE) -> Frame:
        """The next request, or whatever it follows."""
        try:
            return self.seen.get(timeout=seconds)
        except queue.Empty:
            self.check()
            raise


def respond(client: xs.Client, to: Frame, content: Any = None, **meta: Any) -> Frame:
    """Answers a request; `ttl` is the frame's, all else is meta."""
    ttl = meta.pop("ttl", None)
    meta.setdefault("request_id", to.meta["request_id"])
    return client.append("http.response", content, meta=meta, ttl=ttl)


def echo(client: xs.Client, frame: Frame) -> None:
    """Answers with the method, the path and the body."""
    body = client.content(frame) if frame.hash else b""
    respond(client, frame, f"{frame.meta['method']} {frame.meta['path']} ".encode() + body)


def nothing(client: xs.Client, frame: Frame) -> None:
    """Leaves the answer to the test, or to nobody."""


def is_readable(file: Any, seconds: float) -> bool:
    """Whether there is something to read within that time. (select.select knows 1,024 files.)"""
    poll = select.poll()
    poll.register(file, select.POLLIN)
    return bool(poll.poll(seconds * 1000))
