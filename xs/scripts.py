"""The scripts of a store: which are to run, by what is on the stream, and a runner for each.

`<name>.spawn` and `<name>.register` put a script in service, `<name>.terminate` and
`<name>.unregister` take it out. When a server starts, only the newest of each name counts; from
then on each event on these topics is an order, and orders of one name are carried out one after
the other, by its runner. A chunked content is one event, its first frame: its further ones are no
orders.
"""

from __future__ import annotations

import collections
import contextlib
import os
import threading
import time

from xs import frame, ids, threads, times
from xs.errors import Unavailable, XsError
from xs.evaluation import Evaluation
from xs.frame import Entry
from xs.generators import Generator, name_of, terminated
from xs.handlers import Handler
from xs.log import WARNING, log_of
from xs.process import Processes, short_name
from xs.runner import RESTART_SECONDS, Context, Order, Runner
from xs.store import Store

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Optional

FOLDER = "run"
FOLDER_BYTES = 98  # of the store's path; a longer one's socket has none that every system takes
SCRIPTS_MAX = 500  # in service or being started, in one store; above it: an order is refused
EVALUATIONS_MAX = 64  # scripts run for requests at once, in one store; above it: 503
_LONGEST_SUFFIX = len(".unregistered")

_SPAWN, _TERMINATE, _REGISTER, _UNREGISTER = ".spawn", ".terminate", ".register", ".unregister"
SUFFIXES = (_SPAWN, _TERMINATE, _REGISTER, _UNREGISTER)
_KINDS: dict[str, type[Runner]] = {Generator.kind: Generator, Handler.kind: Handler}


class Scripts:
    """Keeps a store's scripts running, from `start` to `stop`."""

    def __init__(self, store: Store, log: Callable[[str], None]) -> None:
        self._store = store
        self._log = log_of(log)
        self._held = contextlib.ExitStack()  # what is given back at the end
        folder = os.path.abspath(store.folder)
        if len(os.fsencode(folder)) > FOLDER_BYTES:
            folder = self._held.enter_context(short_name(folder))
        variables = {**os.environ, "XS_ADDR": folder}
        self.processes = Processes(os.path.join(store.folder, FOLDER), variables)
        self._context = Context(store, self.processes, log, self._is_gone)
        self._lock = threading.Lock()  # guards the next; no other lock is taken under it
        self._runners: dict[tuple[str, str], Runner] = {}
        self._stopping = False
        self._folded: collections.deque[tuple[tuple[str, str], Order]] = collections.deque()
        self._evaluations = threading.Semaphore(EVALUATIONS_MAX)
        self._due = threading.Event()
        # From here on, and not from `start` on: an ephemeral order may come in between.
        self._position = store.newest()
        self._watch = store.bus.watch(lambda topic: topic.endswith(SUFFIXES), self._due.set)
        self._thread = threads.Thread(self._main, "xs-scripts")

    def start(self) -> None:
        """Starts what is to run, and follows the stream."""
        self._thread.start()

    def stop(self) -> None:
        """Ends all processes; what they have done is kept."""
        self._stopping = True
        self._due.set()
        self._thread.join()
        self._store.bus.unwatch(self._watch)
        runners = list(self._runners.values())
        for each in runners:
            each.stop()
        for each in runners:
            each.join()
        self.processes.close()
        self._held.close()

    def abandon(self) -> None:
        """Gives back what it has, when it was never started."""
        self._store.bus.unwatch(self._watch)
        self.processes.close()
        self._held.close()

    def status(self) -> list[dict[str, Any]]:
        """What is in service, in order of names (`GET /ps`)."""
        with self._lock:
            found = [runner.status() for runner in self._runners.values()]
        for each in found:
            if each["since"] is not None:
                each["since"] = times.timestamp(int(each["since"] * 1000))
        return sorted(found, key=lambda each: (each["name"], each["kind"]))

    def evaluate(
        self, text: bytes, line: bytes | None, is_wanted: Callable[[], bool]
    ) -> Evaluation:
        """Runs a script for a request; `line` is the frame that is its input, if there is one.

        Raises `Failed` with the script's own message, `NoNushell`, `Invalid`, `Unavailable`.
        """
        if self._stopping:
            raise Unavailable("the server stops")
        if not self._evaluations.acquire(blocking=False):
            raise Unavailable(f"{EVALUATIONS_MAX} scripts are being run already: try again")

        log = self._log.for_script("eval")
        release = self._evaluations.release
        return Evaluation(self.processes, log, text, line, is_wanted, release)

    def _main(self) -> None:
        self._until_done(self._take_over)
        self._until_done(self._fold)
        self._until_done(self._hand_on)
        if not self._stopping:
            threads.keep_on(self._hear)

    def _take_over(self) -> None:
        """Waits until no process of an earlier server is left."""
        self.processes.acquire(lambda: self._stopping)

    def _hear(self) -> bool:
        self._due.wait()
        self._due.clear()
        self._until_done(self._obey_new)
        return self._stopping

    def _until_done(self, act: Callable[[], None]) -> None:
        """Does it, and again when the store could not be read, for want of files for instance.

        What it was in the midst of is an order that was not handed on: it is handed on then.
        """
        while not self._stopping:
            try:
                act()
                return
            except XsError as error:
                self._log(f"scripts wait: {error}", WARNING)
            except OSError as error:
                self._log(f"scripts wait: {error.strerror}", WARNING)
            except (MemoryError, RuntimeError) as error:
                if not threads.is_shortage(error):
                    raise
                self._log("scripts wait: no memory", WARNING)
            time.sleep(RESTART_SECONDS)

    # What the stream says

    def _fold(self) -> None:
        """Finds what is to be in service, by the newest orders of each name.

        Reads the frames of the topics that tell of scripts, and no others: the index knows them.
        """
        self._folded.clear()
        newest: dict[tuple[str, str], list[Optional[Order]]] = {}
        for topic in self._store.index.script_topics():
            for line in self._store.lines(frozenset((topic,)), -1, self._position):
                order = self._order(line)
                if order is not None:
                    key, found = order
                    place = newest.setdefault(key, [None, None])
                    known = place[found.puts]
                    if known is None or found.id > known.id:
                        place[found.puts] = found
        running = {each.name: each for each in self._store.index.active_scripts(Generator.kind)}
        for key, (out, put) in sorted(newest.items()):
            if put is None:
                continue
            if key[0] == Generator.kind and out is not None and out.id > put.id:
                if key[1] in running:  # it was told so when no server ran
                    with contextlib.suppress(XsError):  # a full disk: the next start does it
                        self._store.run(terminated(running[key[1]], put.id))
                continue
            self._folded.append((key, put))
            if out is not None and out.id > put.id:
                # A handler that was told so when no server ran hears it now.
                self._folded.append((key, out))

    def _hand_on(self) -> None:
        while self._folded:
            self._submit(*self._folded[0])
            self._folded.popleft()

    def _obey_new(self) -> None:
        """Hands on the orders that have come since."""
        entries = self._store.bus.after(self._position)
        if entries is None:
            newest = self._store.newest()
            lines = [
                line
                for topic in self._store.index.script_topics()
                for line in self._store.lines(frozenset((topic,)), self._position, newest)
            ]
            lines.sort(key=frame.id_of)
        else:
            newest = entries[-1].id if entries else self._position
            lines = [entry.line for entry in entries if _is_order(entry)]
        for line in lines:
            order = self._order(line)
            if order is not None:
                self._submit(*order)
            self._position = ids.parse(frame.id_of(line))
        self._position = newest

    def _order(self, line: bytes) -> tuple[tuple[str, str], Order] | None:
        """What a frame orders, and whose runner it is for."""
        topic = frame.topic_of(line)
        value = ids.parse(frame.id_of(line))
        if topic.endswith(_SPAWN):
            key = (Generator.kind, name_of(topic, frame.Frame.from_json(line).meta))
        elif topic.endswith(_TERMINATE):
            key = (Generator.kind, topic[: -len(_TERMINATE)])
        elif topic.endswith(_REGISTER):
            key = (Handler.kind, topic[: -len(_REGISTER)])
        else:
            key = (Handler.kind, topic[: -len(_UNREGISTER)])
        if len(key[1]) + _LONGEST_SUFFIX > frame.TOPIC_MAX:
            self._log.for_script(key[1])(f"too long for the name of a {key[0]}", WARNING)
            return None
        return key, Order(topic.endswith((_SPAWN, _REGISTER)), value)

    # Runners

    def _submit(self, key: tuple[str, str], order: Order) -> None:
        """Hands on an order, to a new runner if there is none. By the thread of the scripts."""
        kind, name = key
        with self._lock:
            runner = self._runners.get(key)
            if runner is not None:
                runner.submit(order)
                return
            has_room = len(self._runners) < SCRIPTS_MAX
        kept = self._store.index.scripts(kind, name)
        if not order.puts and not any(script.active for script in kept):
            return  # else there is one that would be put in service at the next start
        if has_room or not order.puts:
            self._start(_KINDS[kind](self._context, name), order)
            return
        reason = f"{SCRIPTS_MAX} scripts are in service already"
        self._log.for_script(name)(f"not started: {reason}", WARNING)
        with contextlib.suppress(XsError):  # it is in the log
            self._store.append(_KINDS[kind].refusal(name, order.id, reason))

    def _start(self, runner: Runner, order: Order) -> None:
        runner.submit(order)
        key = runner.kind, runner.name
        with self._lock:
            self._runners[key] = runner
        try:
            runner.start()
        except BaseException:
            with self._lock:
                del self._runners[key]
            runner.close()
            raise

    def _is_gone(self, runner: Runner) -> bool:
        """Whether a runner without a script may end: no order has come meanwhile."""
        with self._lock:
            if runner.has_orders or self._stopping:
                return False
            del self._runners[runner.kind, runner.name]
            return True


def _is_order(entry: Entry) -> bool:
    return bool(entry.line) and entry.first is None and entry.topic.endswith(SUFFIXES)
