"""Exactly once: whatever is killed when, each frame has its effects, and has them once.

The oracle is a plain fold in Python over the frames that are stored. What is looked at is the store
itself, between the kills, by whoever runs no server: at each such moment the outputs, the state and
the position of a handler are those of one and the same place in the stream.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Optional

import pytest
from conftest import DEADLINE, XS, answers, environment, until
from handling import Stream, program
from stores import Gate

from xs import frame, ids, query, runner
from xs.client import Client
from xs.commit import Append
from xs.errors import XsError
from xs.frame import Frame
from xs.reader import Reader
from xs.schema import Script
from xs.store import Store
from xs.transport import HttpTransport

ROUNDS = 30
FRAMES = 1200


class Served:
    """A store that a server of its own process serves: killed, and started again."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.log = Path(directory + ".log")
        self.process: Optional[subprocess.Popen[bytes]] = None

    def start(self) -> None:
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [*XS, "serve", self.directory],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment(),
            )
        process, path = self.process, os.path.join(self.directory, "sock")
        until(lambda: process.poll() is not None or answers(path), "the server comes up")
        assert process.poll() is None, self.log.read_text()

    def kill(self, number: int = signal.SIGKILL) -> None:
        if self.process is not None:
            self.process.send_signal(number)
            self.process.wait(DEADLINE)
            self.process = None

    def client(self) -> Client:
        return Client(HttpTransport(("unix", f"{self.directory}/sock"), None, None).open())

    def pids(self) -> list[int]:
        """The pids of the handlers' processes; none where no server answers."""
        try:
            with self.client() as client:
                return [each["pid"] for each in client.ps() if each["pid"] is not None]
        except (OSError, XsError):
            return []

    def kill_handler(self, chance: random.Random) -> None:
        pids = self.pids()
        if pids:
            try:
                os.kill(chance.choice(pids), signal.SIGKILL)
            except ProcessLookupError:
                pass  # it is just being started again

    def check(self) -> None:
        done = subprocess.run(
            [*XS, "check", self.directory],
            capture_output=True,
            env=environment(),
            timeout=DEADLINE * 2,
        )
        assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()


@pytest.fixture
def served(store_dir: str) -> Iterator[Served]:
    running = Served(store_dir)
    yield running
    running.kill()


class Seen(NamedTuple):
    """A store at one moment."""

    frames: list[Frame]
    scripts: dict[str, Script]  # of the registrations, by their ids


def look(directory: str, names: list[str]) -> Seen:
    """All of the store, read from its files in one go."""
    store = Store(directory)
    try:
        options = query.ReadOptions(with_content=True)
        lines = b"".join(Reader(store, options).history()).splitlines()
        scripts = {
            each.source: each for name in names for each in store.index.scripts("handler", name)
        }
        return Seen([Frame.from_json(line) for line in lines], scripts)
    finally:
        store.close()


def wait(seconds: float) -> None:
    """Lets things happen for a while: the moments of kills are what is random here."""
    threading.Event().wait(seconds)


# ---- A counter -----------------------------------------------------------------------------------

COUNT = """{|frame, n|
    $n + 1 | .append $"nu.log" --meta {n: $frame.meta.n}
    {state: ($n + 1), out: $"($frame.meta.n) ($n)"}
}"""

COUNT_IN_PYTHON = """
for given in frames():
    n, m = given["state"], given["frame"]["meta"]["n"]
    logged = {"topic": "python.log", "meta": {"n": m}, "content": n + 1}
    answer({"state": n + 1, "out": f"{m} {n}", "append": [logged]})
"""


class Feeder:
    """Appends numbered frames, in bursts, and each once: a burst that may be stored is sent again
    with the same keys."""

    def __init__(self, served: Served, chance: random.Random) -> None:
        self.allowed = 0
        self.fed = 0
        self._served = served
        self._chance = chance
        self._thread = threading.Thread(target=self._feed, daemon=True)
        self._thread.start()

    def _feed(self) -> None:
        while self.fed < FRAMES:
            count = min(self._chance.choice([1, 1, 2, 5, 30]), self.allowed - self.fed)
            if count <= 0:
                wait(0.002)
                continue
            burst = [
                {"topic": "in", "meta": {"n": n}, "key": f"{n}"}
                for n in range(self.fed, self.fed + count)
            ]
            try:
                with self._served.client() as client:
                    summary = client.append_many(burst)
            except (OSError, XsError):
                wait(0.01)  # the server is dead: it will be back
                continue
            assert summary["errors"] == [], summary
            self.fed += count
            wait(self._chance.random() * 0.02)

    def join(self) -> None:
        self._thread.join(DEADLINE)
        assert not self._thread.is_alive(), "the frames can't be appended"


def check_counter(seen: Seen, name: str) -> int:
    """Holds a counter to its inputs, as far as it is; answers how far that is."""
    inputs = [each for each in seen.frames if each.topic == "in"]
    assert [each.meta["n"] for each in inputs] == list(range(len(inputs)))
    outputs = [each for each in seen.frames if each.topic == name]
    done = len(outputs)
    assert [each.content for each in outputs] == [f"{n} {n}" for n in range(done)]
    assert [each.meta["frame_id"] for each in outputs] == [each.id for each in inputs[:done]]
    logged = [each for each in seen.frames if each.topic == f"{name}.log"]
    assert [each.content for each in logged] == [f"{n + 1}" for n in range(done)]
    assert [each.meta["n"] for each in logged] == list(range(done))
    states = [each for each in seen.frames if each.topic == f"{name}.state"]
    assert [each.content for each in states] == ([f"{done}"] if done else [])
    registered = {
        each.meta["handler_id"] for each in seen.frames if each.topic == f"{name}.registered"
    }
    assert len(registered) <= 1
    for source in registered:
        script = seen.scripts[source]
        assert script.active
        assert script.state == f"{done}"
        assert script.position == (inputs[done - 1].id if done else "0" * 25)
    assert [each for each in seen.frames if each.topic == f"{name}.unregistered"] == []
    return done


def wait_for_output(served: Served, name: str, n: int) -> None:
    """Waits until a counter has answered the frame with that number."""

    def is_there() -> Optional[bool]:
        with served.client() as client:
            last = client.last(f"{name}.log")
        return (last is not None and last.meta["n"] >= n) or wait(0.01)

    until(is_there, served.log.read_text, DEADLINE * 3)


@pytest.mark.long
@pytest.mark.timeout(300)
def test_a_counter_is_exact_whenever_its_server_and_its_process_are_killed(served: Served) -> None:
    seed = random.randrange(10**6)
    print("seed:", seed)
    chance = random.Random(seed)
    names = ["nu", "python"]
    served.start()
    with served.client() as client:
        meta = {"stateful": True, "initial_state": 0, "run-from": "start", "topic": "in"}
        client.append("nu.register", COUNT, meta=meta)
        client.append("python.register", program(COUNT_IN_PYTHON), meta=meta)
    feeder = Feeder(served, random.Random(seed + 1))
    cut = [0, 0]
    done = 0
    for turn in range(ROUNDS):
        # Somewhere on the way through the frames of this turn, however fast that goes: those of the
        # next one are there too, so that a kill finds who is quick still at work.
        end = FRAMES * (turn + 1) // ROUNDS
        feeder.allowed = min(FRAMES, FRAMES * (turn + 2) // ROUNDS)
        way = sorted(chance.randrange(min(done, end - 1), end) for _ in range(3))
        for n in way[: chance.choice([0, 1, 1, 2])]:
            wait_for_output(served, chance.choice(names), n)
            served.kill_handler(chance)
        wait_for_output(served, chance.choice(names), way[-1])
        wait(chance.random() * 0.02)
        served.kill()
        seen = look(served.directory, names)
        fed = sum(each.topic == "in" for each in seen.frames)
        for n, name in enumerate(names):
            done = check_counter(seen, name)
            cut[n] += 0 < done < fed
        served.start()
    feeder.join()

    with served.client() as client:
        last = client.last("in")
        assert last is not None
        newest = last.id

    def finished() -> bool:
        with served.client() as client:
            lasts = [client.last(name) for name in names]
        return all(last is not None and last.meta["frame_id"] == newest for last in lasts)

    until(finished, served.log.read_text, DEADLINE * 3)
    served.kill(signal.SIGTERM)
    seen = look(served.directory, names)
    assert [check_counter(seen, name) for name in names] == [FRAMES, FRAMES]
    served.check()
    print("killed in the middle:", cut)
    assert min(cut) >= 3, "it was hardly ever killed in the middle: that shows nothing"


# ---- A fold of anything --------------------------------------------------------------------------

FOLD = """{|frame, sum|
    let value = $frame.meta.v
    let next = ($sum * 31 + $value) mod 1000003
    if $value mod 7 == 0 { return null }
    if $value mod 11 == 0 { return {state: $next, out: ($next | fill -a r -c 0 -w 20000)} }
    if $value mod 5 == 0 { return {state: $next} }
    if $value mod 3 == 0 {
        for n in 1..2 { $"($next).($n)" | .append fold.log }
        return {state: $next, out: [$next {topic: b.fold, content: $sum}]}
    }
    {out: $sum, state: $next}
}"""

FOLD_IN_PYTHON = """
for given in frames():
    value, sum = given["frame"]["meta"]["v"], given["state"]
    next = (sum * 31 + value) % 1000003
    if value % 7 == 0:
        answer(None)
    elif value % 11 == 0:
        answer({"state": next, "out": f"{next:020000}"})
    elif value % 5 == 0:
        answer({"state": next})
    elif value % 3 == 0:
        logged = [{"topic": "fold.log", "content": f"{next}.{n}"} for n in (1, 2)]
        out = [next, {"topic": "b.fold", "content": sum}]
        answer({"state": next, "out": out, "append": logged})
    else:
        answer({"out": sum, "state": next})
"""


def folded(values: list[int], sum: int) -> tuple[int, list[tuple[int, str, str]]]:
    """The state after these values, and the outputs: the place of the cause, topic, content."""
    outputs = []
    for n, value in enumerate(values):
        next = (sum * 31 + value) % 1000003
        if value % 7 == 0:
            continue
        if value % 11 == 0:
            outputs.append((n, "fold", f"{next:020000}"))  # large enough for a file of its own
        elif value % 5 == 0:
            pass
        elif value % 3 == 0:
            outputs += [(n, "fold.log", f"{next}.{k}") for k in (1, 2)]
            outputs += [(n, "fold", f"{next}"), (n, "b.fold", f"{sum}")]
        else:
            outputs.append((n, "fold", f"{sum}"))
        sum = next
    return sum, outputs


class Registered(NamedTuple):
    """A registration of the fold, as it was appended."""

    id: str
    after: str  # the id to run from
    patterns: frame.Patterns
    initial: int


def inputs_of(seen: Seen, registered: Registered) -> list[Frame]:
    """The frames that a registration is to be given, by what is stored."""
    # Nothing but these has a value: neither the runtime's frames, nor what a fold has caused.
    return [
        each
        for each in seen.frames
        if frame.matches(registered.patterns, each.topic)
        and each.id > registered.after
        and each.meta is not None
        and "v" in each.meta
    ]


def check_fold(seen: Seen, registered: Registered) -> Optional[int]:
    """Holds one registration to the frames that it was to be given, as far as it says it is.

    Answers how many of them it has not finished; None if it is out of service.
    """
    effects = [
        (each.meta["frame_id"], each.topic, each.content)
        for each in seen.frames
        if isinstance(each.meta, dict) and each.meta.get("handler_id") == registered.id
        and each.topic in ("fold", "fold.log", "b.fold")
    ]  # fmt: skip
    script = seen.scripts.get(registered.id)
    if script is None:
        assert effects == []
        return None
    inputs = inputs_of(seen, registered)
    done = [each for each in inputs if each.id <= script.position]
    state, outputs = folded([each.meta["v"] for each in done], registered.initial)
    assert effects == [(done[n].id, topic, content) for n, topic, content in outputs]
    assert json.loads(script.state or "null") == state
    for each in seen.frames:
        if each.topic == "fold.unregistered" and each.meta["handler_id"] == registered.id:
            assert "error" not in each.meta, each
            assert each.meta["position"] == script.position
            assert not script.active
        if each.topic == "fold.state" and each.meta["handler_id"] == registered.id:
            assert each.content == f"{state}"
    return len(inputs) - len(done) if script.active else None


class Model:
    """What was done to a store with a fold in it, and all its registrations."""

    def __init__(self, served: Served, seed: int) -> None:
        self.served = served
        self.chance = random.Random(seed)
        self.registered: list[Registered] = []
        self.ids: list[str] = []
        self.newest_is_in = False

    def act(self) -> None:
        name = self.chance.choices(
            ["append", "kill_process", "kill_server", "stop_server", "register", "unregister"],
            [12, 3, 3, 1, 2, 1],
        )[0]
        getattr(self, name)()

    def append(self) -> None:
        count = self.chance.choice([1, 1, 3, 10, 100, 400])
        events = [
            {"topic": self.chance.choice(["a", "b.x", "b.y", "c"]), "meta": {"v": self._value()}}
            for _ in range(count)
        ]
        with self.served.client() as client:
            self.ids.append(client.append_many(events)["last"])

    def _value(self) -> int:
        return self.chance.randrange(1000)

    def register(self) -> None:
        start: str = self.chance.choice(["start", "tail", *self.ids[-3:]])
        topic = self.chance.choice(["a", "b.*", "a,b.*", "a,b.x,c"])
        initial = self.chance.randrange(100)
        script = self.chance.choice([FOLD, program(FOLD_IN_PYTHON)])
        meta = {"stateful": True, "initial_state": initial, "run-from": start, "topic": topic}
        with self.served.client() as client:
            made = client.append("fold.register", script, meta=meta)
        after = {"start": "", "tail": made.id}.get(start, start)
        self.registered.append(Registered(made.id, after, frame.parse_patterns(topic), initial))
        self.newest_is_in = True

    def unregister(self) -> None:
        with self.served.client() as client:
            client.append("fold.unregister")
        self.newest_is_in = False

    def kill_process(self) -> None:
        wait(self.chance.random() * 0.1)
        self.served.kill_handler(self.chance)

    def kill_server(self) -> None:
        wait(self.chance.random() * 0.15)
        self._start_again(signal.SIGKILL)

    def stop_server(self) -> None:
        self._start_again(signal.SIGTERM)

    def _start_again(self, number: int) -> None:
        self.served.kill(number)
        self.check()
        self.served.start()

    def check(self) -> list[Optional[int]]:
        seen = look(self.served.directory, ["fold"])
        found = [check_fold(seen, each) for each in self.registered]
        assert (
            all(left is None for left in found[:-1] if len(found) > 1) or number_active(seen) <= 1
        )
        return found


def number_active(seen: Seen) -> int:
    return sum(script.active for script in seen.scripts.values())


@pytest.mark.parametrize("part", range(4))
def test_whatever_is_killed_and_replaced_each_handlers_effects_are_those_of_a_plain_fold(
    served: Served, part: int
) -> None:
    seed = random.randrange(10**6)
    print("seed:", seed)
    model = Model(served, seed)
    served.start()
    model.register()
    for _ in range(40):
        model.act()
    model.register()
    model.append()

    newest = model.registered[-1]

    inputs = inputs_of(look(served.directory, ["fold"]), newest)
    store = Store(served.directory)

    def is_through() -> bool:
        kept = [each for each in store.index.scripts("handler", "fold") if each.source == newest.id]
        return kept != [] and (inputs == [] or kept[0].position >= inputs[-1].id)

    until(is_through, served.log.read_text, DEADLINE * 3)
    store.close()
    served.kill()
    *replaced, left = model.check()
    assert (set(replaced), left) == ({None}, 0)
    served.check()


# ---- A commit under way --------------------------------------------------------------------------

ADD = "{|frame, n| {state: ($n + 1), out: $'($frame.meta.n) ($n)'} }"


@pytest.fixture
def stream(store_dir: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stream]:
    """In this process, so that a commit can be held; what dies is started again at once."""
    monkeypatch.setattr(runner, "RESTART_SECONDS", 0.02)
    running = Stream(store_dir)
    yield running
    running.close()


def held(stream: Stream) -> Gate:
    """Holds the commits from now on, until the gate is opened."""
    gate = Gate()
    threading.Thread(target=stream.store.run, args=(gate,), daemon=True).start()
    assert gate.entered.wait(DEADLINE)
    return gate


def under_way(stream: Stream, events: int) -> Gate:
    """A handler `add` whose effects of so many frames wait for a commit that is held."""
    stream.register("add", ADD, topic="in", stateful=True, initial_state=0)
    stream.kill("add", signal.SIGSTOP)
    stream.add_all(("in", b"", {"n": n}) for n in range(events))
    gate = held(stream)
    stream.kill("add", signal.SIGCONT)
    stream.wait(lambda: stream.answered("add") == events, "all are answered")
    return gate


def finish(stream: Stream, count: int) -> None:
    """… and ends with the effects of so many frames, once each."""
    stream.wait_for("add", count)
    assert stream.contents("add") == [f"{n} {n}" for n in range(count)]
    assert stream.state("add") == count


def test_a_process_that_dies_while_its_effects_are_committed(stream: Stream) -> None:
    gate = under_way(stream, 20)
    stream.kill("add")
    wait(0.05)
    gate.opened.set()
    stream.add("in", meta={"n": 20})
    finish(stream, 21)


def test_a_handler_that_is_taken_out_while_its_effects_are_committed(stream: Stream) -> None:
    gate = under_way(stream, 20)
    order = threading.Thread(target=stream.add, args=("add.unregister",))
    order.start()
    wait(0.05)
    gate.opened.set()
    order.join(DEADLINE)
    told = stream.unregistered("add")
    finish(stream, 20)
    assert told["position"] == stream.frames("in")[-1].id


def test_a_handler_that_is_replaced_while_its_effects_are_committed(stream: Stream) -> None:
    gate = under_way(stream, 20)
    meta = {"topic": "in", "stateful": True, "initial_state": 20}
    order = threading.Thread(target=stream.add, args=("add.register", ADD, meta))
    order.start()
    wait(0.05)
    gate.opened.set()
    order.join(DEADLINE)
    stream.add("in", meta={"n": 20})
    finish(stream, 21)


def test_a_server_that_stops_while_effects_are_committed(stream: Stream) -> None:
    gate = under_way(stream, 20)
    stopping = threading.Thread(target=stream.stop)
    stopping.start()
    wait(0.05)
    gate.opened.set()
    stopping.join(DEADLINE)
    stream.start()
    stream.add("in", meta={"n": 20})
    finish(stream, 21)


def test_a_handler_that_fails_while_effects_before_it_are_committed(stream: Stream) -> None:
    closure = ADD.replace("| {", "| if $n == 30 { error make {msg: 'enough'} }; {")
    stream.register("add", closure, topic="in", stateful=True, initial_state=0)
    stream.kill("add", signal.SIGSTOP)
    values = stream.add_all(("in", b"", {"n": n}) for n in range(40))
    gate = held(stream)
    stream.kill("add", signal.SIGCONT)
    wait(0.2)
    gate.opened.set()
    told = stream.unregistered("add")
    assert "enough" in told["error"]
    assert (told["frame_id"], told["position"]) == (values[30], values[29])
    finish(stream, 30)


@pytest.mark.parametrize("wrong", [0, 1, 10, 19])
def test_a_handler_fails_with_the_one_answer_of_a_commit_that_the_store_refuses(
    stream: Stream, wrong: int
) -> None:
    run = stream.store.runs.begin(Append("foo"))
    run.write(b"somebody writes this")
    assert run.first is not None
    part = f"{{topic: foo, meta: {{chunk: '{ids.text(run.first)}', more: true}}, content: x}}"
    closure = f"""{{|frame, n|
        {{state: ($n + 1), out: (if $frame.meta.n == {wrong} {{ {part} }} else {{ $n }})}}
    }}"""
    stream.register("add", closure, topic="in", stateful=True, initial_state=0)
    stream.kill("add", signal.SIGSTOP)
    values = stream.add_all(("in", b"", {"n": n}) for n in range(20))
    gate = held(stream)
    stream.kill("add", signal.SIGCONT)
    stream.wait(lambda: stream.answered("add") == 20, "all are answered")
    gate.opened.set()
    told = stream.unregistered("add")
    assert "leave chunk out of meta" in told["error"]
    assert told["frame_id"] == values[wrong]
    assert stream.contents("add") == [str(n) for n in range(wrong)]
    if wrong:
        assert told["position"] == values[wrong - 1]
        assert stream.state("add") == wrong
    assert sum("it is started again" in line for line in stream.logged) < 2
    run.end()
    stream.restart()
    stream.register("other", "{|frame| null }")
    assert not stream.is_running("add"), "it is out for good"


def test_an_output_that_can_not_be_taken_in_while_effects_before_it_are_committed(
    stream: Stream,
) -> None:
    """What is large goes to a file, whose folder is gone for a while; then the process starts anew.

    The commit under way is through by then, or what is in it would be done again.
    """
    closure = """{|frame, n|
        let out = $'($frame.meta.n) ($n)'
        {state: ($n + 1), out: (if $n == 15 { 'x' | fill -c x -w 50000 } else { $out })}
    }"""
    stream.register("add", closure, topic="in", stateful=True, initial_state=0)
    folder, away = Path(stream.directory, "cas"), Path(stream.directory, "away")
    stream.kill("add", signal.SIGSTOP)
    stream.add_all(("in", b"", {"n": n}) for n in range(10))
    gate = held(stream)
    stream.kill("add", signal.SIGCONT)
    stream.wait(lambda: stream.answered("add") == 10, "ten are answered")
    more = threading.Thread(
        target=stream.add_all, args=([("in", b"", {"n": n}) for n in range(10, 20)],)
    )
    folder.rename(away)
    folder.touch()
    more.start()
    wait(0.05)
    gate.opened.set()
    more.join(DEADLINE)
    stream.wait(lambda: any("Not a directory" in line for line in stream.logged), "it can't")
    folder.unlink()
    away.rename(folder)
    stream.wait_for("add", 20)
    assert [str(each)[:5] for each in stream.contents("add")] == [
        "xxxxx" if n == 15 else f"{n} {n}" for n in range(20)
    ]
    assert stream.state("add") == 20


# ---- A disk that is full -------------------------------------------------------------------------


def test_a_full_disk_stops_a_handler_and_nothing_is_lost_or_doubled(served: Served) -> None:
    served.start()
    assert served.process is not None
    pid = served.process.pid
    closure = "{|frame, n| {state: ($n + 1), out: ($n | fill -a r -c 0 -w 3000)} }"
    with served.client() as client:
        meta = {"stateful": True, "initial_state": 0, "run-from": "start", "topic": "in"}
        client.append("fat.register", closure, meta=meta)
        until(lambda: client.last("fat.registered"), served.log.read_text)
        size = max(Path(served.directory, name).stat().st_size for name in ("xs.db", "xs.db-wal"))
        unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (size + 2_000_000, resource.RLIM_INFINITY))
        client.append_many([{"topic": "in", "meta": {"n": n}} for n in range(1500)])
        until(lambda: b"disk" in served.log.read_bytes(), served.log.read_text)
        stored = list(client.cat(topic="fat", with_content=True))
        assert [int(each.content) for each in stored] == list(range(len(stored)))
        assert len(stored) < 1500
        resource.prlimit(pid, resource.RLIMIT_FSIZE, unlimited)
        until(lambda: len(list(client.cat(topic="fat"))) >= 1500, served.log.read_text)
    served.kill()
    seen = look(served.directory, ["fat"])
    outputs = [each for each in seen.frames if each.topic == "fat"]
    assert [int(each.content) for each in outputs] == list(range(1500))
    (script,) = seen.scripts.values()
    assert (script.active, script.state) == (True, "1500")
    served.check()


def test_a_process_that_can_not_be_started_for_want_of_files_is_started_later(
    served: Served,
) -> None:
    served.start()
    assert served.process is not None
    pid = served.process.pid
    with served.client() as client:
        meta = {"stateful": True, "initial_state": 0, "run-from": "start", "topic": "in"}
        client.append("add.register", ADD, meta=meta)
        until(lambda: client.last("add.registered"), served.log.read_text)
        (process,) = served.pids()
        before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, before[1]))
        os.kill(process, signal.SIGKILL)
        until(lambda: b"Too many open files" in served.log.read_bytes(), served.log.read_text)
        client.append("in", meta={"n": 0})
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
        client.append("in", meta={"n": 1})
        until(lambda: len(list(client.cat(topic="add"))) >= 2, served.log.read_text)
        outputs = [each.content for each in client.cat(topic="add", with_content=True)]
        assert outputs == ["0 0", "1 1"]
        assert client.last("add.unregistered") is None
