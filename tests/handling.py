"""A stream whose scripts run, in the test's own process, and the words that tests have for it."""

from __future__ import annotations

import json
import os
import signal
import sys
import textwrap
from collections.abc import Callable, Iterable
from typing import Any, Optional, Union

from conftest import until
from stores import problems

from xs import frame, ids, query
from xs.bulk import BatchWork
from xs.commit import Append
from xs.errors import XsError
from xs.frame import Frame
from xs.reader import Reader
from xs.scripts import Scripts
from xs.store import Store


def program(text: str) -> str:
    """A handler in Python: `for given in frames(): … answer(…)`."""
    head = f"#!{sys.executable} -u\n"
    return (
        head
        + textwrap.dedent(
            """\
        import json, sys
        def frames():
            for line in iter(sys.stdin.readline, ""):
                yield json.loads(line)
        def answer(value):
            print(json.dumps(value), flush=True)
        """
        )
        + textwrap.dedent(text)
    )


class Stream:
    """A store that this process serves, with its scripts."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.logged: list[str] = []
        self.start()

    def start(self) -> None:
        self.store = Store(self.directory, exclusive=True, create=True)
        self.scripts = Scripts(self.store, self.logged.append)
        self.scripts.start()

    def offline(self, events: Iterable[tuple[Any, ...]]) -> list[str]:
        """`add_all` while no server runs, between `stop` and `start`."""
        self.store = Store(self.directory)
        try:
            return self.add_all(events)
        finally:
            self.store.close()

    def stop(self) -> None:
        """As a server stops: everything in good order."""
        self.scripts.stop()
        self.store.close()

    def restart(self) -> None:
        self.stop()
        self.start()

    def close(self) -> None:
        """Stops for good, and holds the store to its word."""
        self.scripts.stop()
        found = problems(self.store)
        self.store.close()
        assert found == []

    # Events in

    def add(
        self, topic: str, content: Union[str, bytes] = b"", meta: Any = None, ttl: str = "forever"
    ) -> str:
        """Appends one frame; its id."""
        return frame.id_of(self.store.append(self._append((topic, content, meta, ttl))))

    def add_all(self, events: Iterable[tuple[Any, ...]]) -> list[str]:
        """Appends (topic, content, meta, ttl), the last three as needed, in one commit; their ids.

        An error among them is raised.
        """
        appends = []
        for event in events:
            missing: tuple[Any, ...] = (b"", None, "forever")[len(event) - 1 :]
            appends.append(self._append((*event, *missing)))
        found = []
        for line in self.store.run(BatchWork([*appends])):
            if isinstance(line, XsError):
                raise line
            found.append(frame.id_of(line))
        return found

    def _append(self, event: tuple[Any, ...]) -> Append:
        topic, content, meta, ttl = event
        data = content.encode() if isinstance(content, str) else content
        taken = self.store.cas.take([data]) if data else None
        return Append(topic, taken, meta if isinstance(meta, Raw) else json.dumps(meta), ttl)

    def register(self, name: str, script: str, **meta: Any) -> str:
        """Registers a handler, and waits until it is in service; the registration's id."""
        source = self.add(f"{name}.register", script, options(meta))
        found = self.answer_to(source, name)
        assert found.topic == f"{name}.registered", found
        return source

    def refused(self, name: str, script: str, **meta: Any) -> str:
        """Registers what is no handler, and gives the error that it is refused with."""
        source = self.add(f"{name}.register", script, options(meta))
        found = self.answer_to(source, name)
        assert found.topic == f"{name}.unregistered", found
        return str(found.meta["error"])

    def answer_to(self, source: str, name: str) -> Frame:
        """What the runtime says to a registration."""
        topics = f"{name}.registered,{name}.unregistered"

        def found() -> list[Frame]:
            return [each for each in self.frames(topics) if each.meta["handler_id"] == source]

        return self.wait(found, f"an answer to {name}.register")[0]  # type: ignore[no-any-return]

    # Events out

    def frames(
        self, topic: str = "*", after: Optional[str] = None, *, with_content: bool = True
    ) -> list[Frame]:
        """What is stored, with its content."""
        options = query.ReadOptions(
            patterns=frame.parse_patterns(topic),
            with_content=with_content,
            after=-1 if after is None else ids.parse(after),
        )
        history = b"".join(Reader(self.store, options).history())
        return [Frame.from_json(line) for line in history.splitlines()]

    def contents(self, topic: str) -> list[Any]:
        return [each.content for each in self.frames(topic)]

    def causes(self, topic: str) -> list[str]:
        """The frames that caused those on a topic."""
        return [each.meta["frame_id"] for each in self.frames(topic, with_content=False)]

    def causes_of(self, topic: str, source: str) -> list[str]:
        """As `causes`, of those alone that come from that registration."""
        return [
            each.meta["frame_id"]
            for each in self.frames(topic, with_content=False)
            if isinstance(each.meta, dict) and each.meta.get("handler_id") == source
        ]

    def state(self, name: str) -> Any:
        """A handler's state as the stream has it; None before there is one, or if a newer one came.

        Then the content of the one that was read may be gone with it.
        """
        found = self.frames(f"{name}.state")
        assert len(found) <= 1, found
        return json.loads(found[0].content) if found and found[0].content else None

    def wait(self, is_true: Callable[[], Any], what: str) -> Any:
        return until(is_true, lambda: f"{what}:\n{self.tell()}")

    def wait_for(self, topic: str, count: int) -> list[Frame]:
        """The frames on a topic, once there are so many: they must not be more."""

        def found() -> list[Frame]:
            frames = self.frames(topic)
            return frames if len(frames) >= count else []

        frames = self.wait(found, f"{count} frames on {topic}") if count else self.frames(topic)
        assert len(frames) == count, self.tell()
        return list(frames)

    def wait_past(self, topic: str, count: int) -> None:
        """Waits until there are more than so many frames on a topic."""
        self.wait(lambda: len(self.frames(topic)) > count, f"more than {count} frames on {topic}")

    def answered(self, name: str) -> int:
        """How many frames a handler has answered since it was put in service."""
        return int(next(each["frames"] for each in self.scripts.status() if each["name"] == name))

    def unregistered(self, name: str, count: int = 1) -> dict[str, Any]:
        """The meta of the frame that says that a handler is out of service; the last of so many."""
        return dict(self.wait_for(f"{name}.unregistered", count)[-1].meta)

    def finish(self, name: str, id_text: str) -> None:
        """Waits until a handler has finished that frame, and it is stored that it has."""

        def is_finished() -> bool:
            kept = self.store.index.scripts("handler", name)
            return any(script.position >= id_text for script in kept if script.active)

        self.wait(is_finished, f"{name} has finished {id_text}")
        self.store.run(BatchWork([]))  # the commit before this one has been published by then

    def tell(self) -> str:
        """The newest of the stream and of the log, for a test that fails."""
        newest = [repr(each)[:300] for each in self.frames()[-12:]]
        return "\n".join([*newest, *self.logged[-12:]])

    # Processes

    def pid(self, name: str) -> int:
        """The pid of a handler's process, once it has one."""

        def found() -> Any:
            return next(each["pid"] for each in self.scripts.status() if each["name"] == name)

        return int(self.wait(found, f"{name} has a process"))

    def kill(self, name: str, number: int = signal.SIGKILL) -> int:
        """Kills a handler's process; its pid."""
        pid = self.pid(name)
        os.kill(pid, number)
        return pid

    def is_running(self, name: str) -> bool:
        return any(each["name"] == name for each in self.scripts.status())


class Raw(str):
    """Meta as JSON text."""


def options(meta: dict[str, Any]) -> Any:
    """Meta of a registration, with `_` for `-` in its keys."""
    return {key.replace("run_", "run-"): value for key, value in meta.items()} or None
