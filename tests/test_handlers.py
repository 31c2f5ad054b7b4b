"""Handlers, clause by clause: what they are given, what comes of it, how they fail and come back.

With real processes, in this process's own server. Kills of a server are in test_exactly_once.py.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import nu_path
from handling import Raw, Stream, program
from scripting import movable_nu
from stores import Gate

from xs import frame, handlers, ids, runner
from xs.commit import Append
from xs.content import INLINE_MAX
from xs.errors import Invalid
from xs.handlers import ERROR_CHARACTERS, EffectsWork, parse_registration
from xs.imports import Imported, ImportWork
from xs.intake import AHEAD_SECONDS
from xs.pipes import LINE_BYTES
from xs.reader import CONTENT_INLINE_MAX
from xs.schema import Script
from xs.work import RemoveWork


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stream]:
    """One stream for all the handlers that do not disturb others."""
    running = Stream(str(tmp_path_factory.mktemp("handlers") / "store"))
    yield running
    running.close()


@pytest.fixture
def stream(store_dir: str) -> Iterator[Stream]:
    """A stream of a test's own."""
    running = Stream(store_dir)
    yield running
    running.close()


# ---- What a closure returns --------------------------------------------------------------------

OUTPUTS: list[tuple[str, list[Any]]] = [
    ("null", []),
    ("", []),
    ('"text"', ["text"]),
    ('"zwölf\\n\\t\\"\\u{1F980}"', ['zwölf\n\t"🦀']),
    ("0x[00 ff 80]", [b"\x00\xff\x80"]),
    ("42", ["42"]),
    ("1.0", ["1.0"]),
    ("0", ["0"]),
    ("false", ["false"]),
    ('""', [None]),
    ("{a: 1, b: [x y]}", ['{"a":1,"b":["x","y"]}']),
    ("{}", ["{}"]),
    ("[]", []),
    ("[null null]", []),
    ("[a null 2 [3 4] {c: 5}]", ["a", "2", "[3,4]", '{"c":5}']),
    ("[[a]; [1] [2]]", ['{"a":1}', '{"a":2}']),
    ("1..3", ["1", "2", "3"]),
    ("1..3 | each {|n| $n * 2 }", ["2", "4", "6"]),
    ("[0x[01 fe] 0x[02]]", [b"\x01\xfe", "\x02"]),
    ("{a: 0x[01], b: [0x[02]]}", ['{"a":[1],"b":[[2]]}']),
    ("2024-01-02T03:04:05Z | format date '%F'", ["2024-01-02"]),
    ("[1..3 5sec]", ["[1,2,3]", "5000000000"]),
    ("{ttl: 1sec, other: 1}", ['{"ttl":1000000000,"other":1}']),
    ("^echo from outside", ["from outside"]),
    ("if true { return early }; late", ["early"]),
    ("$frame.meta.n + 1", ["8"]),
    ("$frame.topic", ["in.{name}"]),
    ("{topic: $frame.topic, text: x}", ['{"topic":"in.{name}","text":"x"}']),
]


@pytest.mark.parametrize(("closure", "expected"), OUTPUTS, ids=[text for text, _ in OUTPUTS])
def test_what_a_stateless_closure_returns_is_its_output(
    shared: Stream, closure: str, expected: list[Any]
) -> None:
    name = f"out{next(numbers)}"
    shared.register(name, f"{{|frame| {closure} }}", topic=f"in.{name}")
    value = shared.add(f"in.{name}", meta={"n": 7})
    shared.finish(name, value)
    found = shared.frames(name)
    assert [each.content for each in found] == [
        each.replace("{name}", name) if isinstance(each, str) else each for each in expected
    ]
    for each in found:
        assert each.meta["frame_id"] == value
        assert each.ttl == "forever"
        assert (each.hash is None) == (each.content is None)


DIRECTED: list[tuple[str, str, Any, str, Any]] = [
    # the closure's value, and topic, meta, ttl and content of what comes of it
    ("{content: c}", "{name}", {}, "forever", "c"),
    ("{content: {a: 1}, topic: {name}.other}", "{name}.other", {}, "forever", '{"a":1}'),
    ("{content: c, meta: {k: 1, m: null}}", "{name}", {"k": 1, "m": None}, "forever", "c"),
    ("{content: c, ttl: 'last:3'}", "{name}", {}, "last:3", "c"),
    ("{content: c, ttl: 3600000}", "{name}", {}, "time:3600000", "c"),
    ("{content: c, ttl: 1day}", "{name}", {}, "time:86400000", "c"),
    ("{content: null, ttl: 1day}", "{name}", {}, "time:86400000", None),
    ("{content: 0x[fe ff], ttl: 1day}", "{name}", {}, "time:86400000", b"\xfe\xff"),
    ("{content: 1..3}", "{name}", {}, "forever", "[1,2,3]"),
    ("{content: c, ttl: null, meta: null, topic: null}", "{name}", {}, "forever", "c"),
    ("{content: null, topic: {name}.other}", "{name}.other", {}, "forever", None),
    ("{content: ''}", "{name}", {}, "forever", None),
    ("{content: false}", "{name}", {}, "forever", "false"),
    ("{content: 0}", "{name}", {}, "forever", "0"),
    ("{content: [1 2]}", "{name}", {}, "forever", "[1,2]"),
    ("{content: 0x[fe ff], topic: {name}.other}", "{name}.other", {}, "forever", b"\xfe\xff"),
    ("{content: c, meta: {handler_id: mine, frame_id: mine}}", "{name}", {}, "forever", "c"),
    ("{content: c, other: 1}", "{name}", {}, "forever", '{"content":"c","other":1}'),
    ("{topic: {name}.other}", "{name}", {}, "forever", '{"topic":"{name}.other"}'),
]


def test_an_output_that_json_has_no_type_for_is_as_an_append_has_it(shared: Stream) -> None:
    values = ["2024-01-02T03:04:05Z", "('a*' | into glob)", "$.a.b", "1..3"]
    for value in values:
        name = f"untyped{next(numbers)}"
        closure = f"""{{|frame| let value = {value}
            $value | .append {name}.appended
            [{{content: $value}} $value]
        }}"""
        shared.register(name, closure, topic=f"in.{name}")
        shared.add(f"in.{name}")
        (appended,) = shared.wait_for(f"{name}.appended", 1)
        assert [each.content for each in shared.wait_for(name, 2)] == [appended.content] * 2


def test_a_time_alone_is_json_as_it_is_in_a_list(shared: Stream) -> None:
    name = f"time{next(numbers)}"
    shared.register(name, "{|frame| 2024-01-02T03:04:05Z }", topic=f"in.{name}")
    shared.add(f"in.{name}")
    (found,) = shared.wait_for(name, 1)
    assert json.loads(found.content).startswith("2024-01-02")


@pytest.mark.parametrize(
    ("value", "topic", "meta", "ttl", "content"), DIRECTED, ids=[each[0] for each in DIRECTED]
)
def test_a_record_with_content_says_where_it_goes_and_how(
    shared: Stream, value: str, topic: str, meta: Any, ttl: str, content: Any
) -> None:
    name = f"directed{next(numbers)}"
    closure = value.replace("{name}", name)
    source = shared.register(name, f"{{|frame| [{closure} last] }}", topic=f"in.{name}")
    cause = shared.add(f"in.{name}")
    found = shared.wait_for(f"{name},{name}.other", 2)[0]
    assert found.topic == topic.replace("{name}", name)
    assert found.meta == {**meta, "handler_id": source, "frame_id": cause}
    assert found.ttl == ttl
    if isinstance(content, str):
        content = content.replace("{name}", name)
    assert found.content == content


def test_a_large_output_is_stored_whole(shared: Stream) -> None:
    closure = '{|frame| ["a" "b"] | each {|each| $each | fill -c $each -w 100000 } }'
    shared.register("large", closure, topic="in.large")
    shared.add("in.large")
    found = shared.wait_for("large", 2)
    assert [each.content for each in found] == ["a" * 100_000, "b" * 100_000]


WRONG = [
    ("{content: c, topic: 'not a topic'}", "not a topic: 'not a topic'"),
    ("{content: c, topic: xs.start}", "belongs to the runtime"),
    ("{content: c, topic: 5}", "topic is text, not 5"),
    ("{content: c, meta: 5}", "meta of a handler's frame is a record, not 5"),
    ("{content: c, ttl: soon}", "not a ttl: 'soon'"),
    ("[{content: c} {content: c, ttl: soon}]", "not a ttl: 'soon'"),
    ("{|| 1}", "closure"),
]


def test_what_was_taken_in_for_an_output_that_can_not_be_is_not_left_behind(
    stream: Stream,
) -> None:
    closure = """{|frame|
        let large = ('x' | fill -c x -w 50000)
        [{content: $large, ttl: $frame.meta.ttl} {content: $'($large)y', meta: $frame.meta.meta}]
    }"""
    wrong = [("forever", 5), ("ephemeral", {}), ("soon", {})]
    for n, (ttl, meta) in enumerate(wrong):
        stream.register(f"n{n}", closure, topic=f"in.{n}")
        stream.add(f"in.{n}", meta={"ttl": ttl, "meta": meta})
        assert stream.unregistered(f"n{n}")["error"]
    stream.register("fine", closure, topic="in")
    stream.add("in", meta={"ttl": "forever", "meta": {}})
    stream.wait_for("fine", 2)
    files = [path.name for path in Path(stream.directory, "cas").rglob("*") if path.is_file()]
    assert len(files) == 2, files


@pytest.mark.parametrize(("value", "error"), WRONG, ids=[each[0] for each in WRONG])
def test_an_output_that_can_not_be_ends_the_handler_and_nothing_of_it_is_kept(
    shared: Stream, value: str, error: str
) -> None:
    name = f"wrong{next(numbers)}"
    closure = f"{{|frame| if $frame.meta.n == 2 {{ {value} }} else {{ $frame.meta.n }} }}"
    source = shared.register(name, closure, topic=f"in.{name}")
    causes = shared.add_all((f"in.{name}", b"", {"n": n}) for n in range(4))
    told = shared.unregistered(name)
    assert error in told["error"], told
    assert (told["handler_id"], told["frame_id"]) == (source, causes[2])
    assert shared.contents(name) == ["0", "1"]


# ---- State -------------------------------------------------------------------------------------


def test_a_state_goes_from_each_frame_to_the_next(shared: Stream) -> None:
    closure = "{|frame, sum| let sum = $sum + $frame.meta.n; {state: $sum, out: $'now ($sum)'} }"
    source = shared.register("sum", closure, topic="in.sum", stateful=True, initial_state=100)
    causes = shared.add_all(("in.sum", b"", {"n": n}) for n in (1, 2, 3))
    assert [each.content for each in shared.wait_for("sum", 3)] == ["now 101", "now 103", "now 106"]
    (state,) = shared.frames("sum.state")
    assert (state.content, state.ttl) == ("106", "last:1")
    assert state.meta == {"handler_id": source, "frame_id": causes[-1]}


def test_the_state_is_null_to_begin_with_and_one_frame_at_a_time_is_its_newest(
    shared: Stream,
) -> None:
    closure = "{|frame, state| {state: ($state | append $frame.meta.n)} }"
    shared.register("list", closure, topic="in.list", stateful=True)
    for n in range(5):
        cause = shared.add("in.list", meta={"n": n})
        shared.finish("list", cause)
        assert shared.state("list") == list(range(n + 1))
    assert shared.frames("list") == []


KEPT = [
    # what the closure returns while the state is 5, and the state and output that follow
    ("null", 5, []),
    ("{}", 5, []),
    ("{out: o}", 5, ["o"]),
    ("{out: null}", 5, []),
    ("{state: 6}", 6, []),
    ("{state: null}", None, []),
    ("{state: false, out: [a b]}", False, ["a", "b"]),
    ("{out: {content: c, topic: {name}}, state: 0}", 0, ["c"]),
]


@pytest.mark.parametrize(("value", "state", "out"), KEPT, ids=[each[0] for each in KEPT])
def test_what_a_stateful_closure_leaves_out_stays_as_it_was(
    shared: Stream, value: str, state: Any, out: list[Any]
) -> None:
    name = f"kept{next(numbers)}"
    value = value.replace("{name}", name)
    end = "{out: {was: $state}}"
    closure = f"{{|frame, state| if $frame.meta.last {{ {end} }} else {{ {value} }} }}"
    shared.register(name, closure, topic=f"in.{name}", stateful=True, initial_state=5)
    shared.add_all([(f"in.{name}", b"", {"last": False}), (f"in.{name}", b"", {"last": True})])
    found = shared.wait_for(name, len(out) + 1)
    assert [each.content for each in found] == [*out, json.dumps({"was": state}).replace(" ", "")]


@pytest.mark.parametrize("value", ["5", "'text'", "[1 2]", "{state: 1, output: 2}", "{count: 1}"])
def test_any_other_value_of_a_stateful_closure_is_an_error(shared: Stream, value: str) -> None:
    name = f"other{next(numbers)}"
    closure = f"{{|frame, state| if $frame.meta.n > 0 {{ {value} }} else {{ {{out: fine}} }} }}"
    shared.register(name, closure, topic=f"in.{name}", stateful=True)
    causes = shared.add_all((f"in.{name}", b"", {"n": n}) for n in range(2))
    told = shared.unregistered(name)
    assert "returns {state?, out?} or null" in told["error"]
    assert told["frame_id"] == causes[1]
    assert shared.contents(name) == ["fine"]


def test_a_state_is_the_same_before_and_after_a_restart(stream: Stream) -> None:
    closure = """{|frame, state|
        let seen = ($state | default {} | describe)
        {state: {when: 2024-01-02T03:04:05Z, size: 1kb, took: 2sec, f: 1.0, big: 9007199254740993},
         out: $seen}
    }"""
    stream.register("types", closure, topic="in", stateful=True)
    stream.add_all([("in",), ("in",)])
    stream.wait_for("types", 2)
    stream.kill("types")
    stream.add("in")
    stream.wait_for("types", 3)
    stream.restart()
    stream.add("in")
    stream.wait_for("types", 4)
    first, *later = stream.contents("types")
    assert first.startswith("record")
    assert len(set(later)) == 1, later
    assert "when: string" in later[0]
    assert stream.state("types")["big"] == 9007199254740993


def test_a_large_state_is_kept(stream: Stream) -> None:
    closure = "{|frame, state| {state: ($state + ('x' | fill -c x -w 50000))} }"
    stream.register("big", closure, topic="in", stateful=True, initial_state="")
    stream.add_all([("in",)] * 4)
    stream.wait(lambda: len(stream.state("big") or "") == 200_000, "the state grows")
    stream.restart()
    stream.add("in")
    stream.wait(lambda: len(stream.state("big") or "") == 250_000, "the state grows on")


# ---- What it is given --------------------------------------------------------------------------

SEE = "{|frame| $frame.meta.n? | default none }"


def test_a_handler_runs_from_its_registration_on(stream: Stream) -> None:
    stream.add_all(("in", b"", {"n": n}) for n in range(3))
    # Those of the same commit as the registration, and after it, are its own already.
    stream.add_all([("in", b"", {"n": 3}), ("tail.register", SEE, {"topic": "in"})]
                   + [("in", b"", {"n": n}) for n in range(4, 8)])  # fmt: skip
    stream.wait_for("tail", 4)
    stream.add("in", meta={"n": 8})
    stream.wait_for("tail", 5)
    assert stream.contents("tail") == ["4", "5", "6", "7", "8"]


def test_a_handler_runs_from_the_start(stream: Stream) -> None:
    stream.add_all(("in", b"", {"n": n}) for n in range(3))
    stream.register("all", SEE, topic="in", run_from="start")
    stream.add("in", meta={"n": 3})
    stream.wait_for("all", 4)
    assert stream.contents("all") == ["0", "1", "2", "3"]


def test_a_handler_runs_from_an_id(stream: Stream) -> None:
    values = stream.add_all(("in", b"", {"n": n}) for n in range(5))
    stream.register("after", SEE, topic="in", run_from=values[2])
    stream.register("upper", SEE, topic="in", run_from=values[3].upper())
    future = ids.text(ids.parse(values[-1]) + (1 << 110))
    stream.register("never", SEE, topic="in", run_from=future)
    stream.add("in", meta={"n": 5})
    stream.wait_for("after", 3)
    stream.wait_for("upper", 2)
    assert stream.contents("after") == ["3", "4", "5"]
    assert stream.contents("upper") == ["4", "5"]
    assert stream.contents("never") == []


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a", ["a"]),
        ("a.*", ["a.b", "a.b.c"]),
        ("a,b.*", ["a", "b.x"]),
        ("a.b.c", ["a.b.c"]),
        ("nothing.like.it", []),
    ],
)
@pytest.mark.parametrize("run_from", ["start", "tail"])
def test_a_handler_is_given_the_topics_that_it_asks_for(
    stream: Stream, pattern: str, expected: list[str], run_from: str
) -> None:
    events = [(topic,) for topic in ("a", "a.b", "a.b.c", "ab", "b", "b.x")]
    if run_from == "start":
        stream.add_all(events)
    stream.register("some", "{|frame| $frame.topic }", topic=pattern, run_from=run_from)
    if run_from == "tail":
        stream.add_all(events)
    if not expected:
        stream.register("other", "{|frame| $frame.topic }", topic="end")
        stream.add("end")
        stream.wait_for("other", 1)
    stream.wait_for("some", len(expected))
    assert stream.contents("some") == expected


def test_a_handler_of_every_topic_is_given_every_frame(stream: Stream) -> None:
    stream.add("before")
    stream.register("every", "{|frame| $frame.topic }", run_from="start")
    stream.add("after.it")
    stream.wait_for("every", 3)
    assert stream.contents("every") == ["before", "every.register", "after.it"]


def test_a_frame_comes_with_all_that_it_has(stream: Stream) -> None:
    stream.register("whole", "{|frame| $frame | to json --raw }", topic="in")
    given = [
        stream.add("in"),
        stream.add("in", "text", {"a": [1, 2.5, None, {"b": "ü"}]}, "last:5"),
        stream.add("in", meta=[], ttl="time:3600000"),
        stream.add("in", meta="a string"),
    ]
    stream.wait_for("whole", 4)
    stored = {each.id: each for each in stream.frames("in")}
    for text, value in zip(stream.contents("whole"), given):
        assert json.loads(text) == {
            key: getattr(stored[value], key) for key in ("topic", "id", "hash", "meta", "ttl")
        }


CONTENTS = {
    "none": b"",
    "text": 'süß\n\t"\\\u2028\x00 end'.encode(),
    "lines": b"a\r\nb\n",
    "binary": bytes(range(256)),
    "large text": b"0123456789" * 20_000,
    "large binary": bytes(range(256)) * 800,
    "inline at most": b"x" * INLINE_MAX,
    "looks like JSON": b'{"a":1}',
}


@pytest.mark.parametrize("run_from", ["start", "tail"])
def test_a_frame_comes_with_its_content_when_that_was_asked_for(
    stream: Stream, run_from: str
) -> None:
    events = [(f"in.{n}", each, f"out.{n}") for n, each in enumerate(CONTENTS.values())]
    if run_from == "start":
        stream.add_all(events)
    closure = """{|frame|
        {topic: $frame.meta, content: $frame.content?,
         meta: {kind: ($frame.content? | describe)}}
    }"""
    if run_from == "start":
        stream.register("copy", closure, topic="in.*", content=True, run_from="start")
    else:
        stream.register("copy", closure, topic="in.*", content=True)
        stream.add_all(events)
    found = stream.wait_for("out.*", len(CONTENTS))
    for n, (what, data) in enumerate(CONTENTS.items()):
        expected = stream.frames(f"in.{n}")[0]
        assert (found[n].hash, found[n].content) == (expected.hash, expected.content), what
        kind = "nothing" if not data else "binary" if b"\xff" in data else "string"
        assert found[n].meta["kind"] == kind, what


def test_very_large_content_is_left_to_its_hash(stream: Stream) -> None:
    stream.register("size", "{|frame| [($frame.content? | describe) ($frame.hash | str length)] }",
                    topic="in", content=True)  # fmt: skip
    stream.add("in", b"x" * CONTENT_INLINE_MAX)
    stream.add("in", b"x" * (CONTENT_INLINE_MAX + 1))
    stream.wait_for("size", 4)
    assert stream.contents("size") == ["string", "51", "nothing", "51"]


def test_without_asking_there_is_no_content(shared: Stream) -> None:
    shared.register("bare", "{|frame| $frame | columns | str join ' ' }", topic="in.bare")
    shared.add("in.bare", "text")
    assert shared.wait_for("bare", 1)[0].content == "topic id hash meta ttl"


def test_a_frame_whose_content_is_damaged_ends_a_handler_that_wants_it(stream: Stream) -> None:
    values = stream.add_all([("in", b"a"), ("in", b"b" * 50_000), ("in", b"c")])
    hash_ = stream.frames("in")[1].hash
    assert hash_ is not None
    digest = frame.parse_integrity(hash_).hex()
    path = Path(stream.directory, "cas", digest[:2], digest[2:])
    whole = path.read_bytes()
    path.write_bytes(b"x" + whole[1:])
    stream.register("wants", "{|frame| $frame.content | str length }", topic="in", content=True,
                    run_from="start")  # fmt: skip
    told = stream.unregistered("wants")
    assert "damaged" in told["error"]
    assert (told["frame_id"], told["position"]) == (values[1], values[0])
    assert stream.contents("wants") == ["1"]
    path.write_bytes(whole)
    # It goes on from where it was, by what the runtime has told.
    stream.register("wants", "{|frame| $frame.content | str length }", topic="in", content=True,
                    run_from=told["position"])  # fmt: skip
    stream.wait_for("wants", 3)
    assert stream.contents("wants") == ["1", "50000", "1"]


def test_a_pulse_comes_as_often_as_it_is_asked_for_and_frames_come_too(stream: Stream) -> None:
    closure = "{|frame| if $frame.topic == xs.pulse { 'pulse' } else { $frame.topic } }"
    stream.register("beat", closure, topic="in", pulse=30)
    began = time.monotonic()
    stream.wait(lambda: len(stream.contents("beat")) >= 5, "five pulses")
    assert time.monotonic() - began >= 0.1
    stream.add("in")
    stream.wait(lambda: "in" in stream.contents("beat"), "a frame among the pulses")
    assert set(stream.contents("beat")) == {"pulse", "in"}


def test_without_asking_there_is_no_pulse_and_no_threshold(shared: Stream) -> None:
    shared.register("quiet", "{|frame| $frame.topic }", topic="xs.pulse,xs.threshold,in.quiet",
                    run_from="start")  # fmt: skip
    shared.add("in.quiet")
    shared.wait_for("quiet", 1)
    assert shared.contents("quiet") == ["in.quiet"]


def test_ephemeral_frames_are_given_live(shared: Stream) -> None:
    shared.register("live", "{|frame| $frame.content }", topic="in.live", content=True)
    values = [shared.add("in.live", f"{n}", ttl="ephemeral" if n % 2 else "forever")
              for n in range(6)]  # fmt: skip
    shared.wait_for("live", 6)
    assert shared.contents("live") == ["0", "1", "2", "3", "4", "5"]
    assert shared.causes("live") == values


def test_outputs_can_be_ephemeral(shared: Stream) -> None:
    shared.register("fleeting", "{|frame| {content: seen, ttl: ephemeral} }", topic="in.fleeting")
    shared.register("listens", "{|frame| $frame.content }", topic="fleeting", content=True)
    shared.add("in.fleeting")
    shared.wait_for("listens", 1)
    assert shared.contents("listens") == ["seen"]
    assert shared.frames("fleeting") == []


def test_frames_that_are_removed_or_expire_before_they_are_reached_are_not_given(
    stream: Stream,
) -> None:
    stream.register("late", SEE, topic="in")
    stream.kill("late", signal.SIGSTOP)
    first = stream.add_all(("in", b"", {"n": n}) for n in range(1000))  # as many as it may be ahead
    stream.wait(lambda: not stream.store.bus.after(ids.parse(first[-1])), "all are published")
    values = stream.add_all(("in", b"", {"n": n}) for n in range(1000, 1005))
    passing = stream.add("in", meta={"n": "expired"}, ttl="time:1")
    stream.store.run(RemoveWork(ids.parse(values[1])))
    stream.store.run(RemoveWork(ids.parse(values[3])))
    expiry = ids.milliseconds(ids.parse(passing)) + 1
    stream.wait(lambda: stream.store.clock() > expiry, "it expires")
    stream.kill("late", signal.SIGCONT)
    stream.add("in", meta={"n": 1005})
    stream.wait(lambda: "1005" in stream.contents("late"), "the last one")
    assert stream.contents("late") == [*map(str, range(1001)), "1002", "1004", "1005"]


def test_a_handler_behind_by_more_than_the_ring_misses_and_repeats_nothing(stream: Stream) -> None:
    stream.register("slow", SEE, topic="in.*")
    stream.kill("slow", signal.SIGSTOP)
    for start in range(0, 12_000, 1000):
        stream.add_all((f"in.{n % 3}", b"", {"n": n}) for n in range(start, start + 1000))
    position = ids.parse(stream.frames("slow.registered")[0].id)
    assert stream.store.bus.after(position) is None, "it is not behind by more than the ring"
    stream.kill("slow", signal.SIGCONT)
    stream.wait(lambda: len(stream.frames("slow")) >= 12_000, "12,000 outputs")
    assert stream.contents("slow") == list(map(str, range(12_000)))


def test_an_import_before_its_place_is_not_given_and_one_ahead_is_once(stream: Stream) -> None:
    stream.register("reads", SEE, topic="in")
    value = ids.parse(stream.add("in", meta={"n": 1}))
    stream.wait_for("reads", 1)
    stream.store.run(ImportWork([
        Imported(value - (1 << 90), "in", None, '{"n":"before"}', "forever"),
        Imported(value + (1 << 95), "in", None, '{"n":"ahead"}', "forever"),
    ]))  # fmt: skip
    stream.wait_for("reads", 2)
    stream.add("in", meta={"n": 2})
    stream.wait_for("reads", 3)
    assert stream.contents("reads") == ["1", "ahead", "2"]


def test_a_stateful_program_is_given_what_is_there_when_it_comes_to_it(
    stream: Stream, tmp_path: Path
) -> None:
    """While it is at one frame, others behind it go, come, and an order comes among them."""
    text = f"""
    import os, time
    for given in frames():
        n = given["frame"]["meta"]["n"]
        if n == 200:
            open({str(tmp_path / "there")!r}, "w").close()
            while not os.path.exists({str(tmp_path / "go")!r}):
                time.sleep(0.005)
        answer({{"state": given["state"] + 1, "out": str(n)}})
    """
    stream.register("reads", program(text), topic="in", stateful=True, initial_state=0)
    found = stream.add_all(("in", b"", {"n": n}) for n in range(300))
    stream.wait((tmp_path / "there").exists, "it is at 200")
    stream.add("other.unregister")  # what comes below it is heard in the stream alone
    for n in range(210, 220):
        stream.store.run(RemoveWork(ids.parse(found[n])))
    stream.store.run(ImportWork([
        Imported(ids.parse(found[230]) + 1, "in", None, '{"n":"imported"}', "forever"),
        Imported(ids.parse(found[250]) + 1, "reads.unregister", None, "null", "forever"),
    ]))  # fmt: skip
    stale = time.monotonic() + AHEAD_SECONDS
    stream.wait(lambda: time.monotonic() > stale, "what it was to be given next is old")
    (tmp_path / "go").touch()
    stream.unregistered("reads")
    wanted = [*range(210), *range(220, 231), "imported", *range(231, 251)]
    assert stream.contents("reads") == [str(n) for n in wanted]
    assert stream.state("reads") == len(wanted)


# ---- .append -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "closure",
    [
        "{|frame| 'a' | .append {name}.a; 'b' | .append {name}.b --meta {k: 1}; null }",
        "{|frame| [a b] | each {|it| $it | .append $'{name}.($it)' --meta {k: 1} } | ignore }",
        "{|frame| [a b] | par-each {|it| $it | .append $'{name}.($it)' --meta {k: 1} }; null }",
        "{|frame| for it in [a b] { $it | .append $'{name}.($it)' --meta {k: 1} } }",
        "{|frame| do { 'a' | .append {name}.a }; try { 'b' | .append {name}.b --meta {k: 1} } }",
    ],
)
def test_what_a_closure_appends_joins_what_the_frame_causes(shared: Stream, closure: str) -> None:
    name = f"appends{next(numbers)}"
    source = shared.register(name, closure.replace("{name}", name), topic=f"in.{name}")
    cause = shared.add(f"in.{name}")
    found = shared.wait_for(f"{name}.a,{name}.b", 2)
    assert sorted(str(each.content) for each in found) == ["a", "b"]
    for each in found:
        assert each.meta == {**({"k": 1} if "k" in each.meta else {}),
                             "handler_id": source, "frame_id": cause}  # fmt: skip
    assert any("k" in each.meta for each in found)


def test_what_is_appended_comes_before_the_output_and_an_append_returns_nothing(
    shared: Stream,
) -> None:
    closure = "{|frame| let got = ('x' | .append order); {got: ($got | describe)} }"
    shared.register("order", closure, topic="in.order")
    shared.add("in.order")
    shared.wait_for("order", 2)
    assert shared.contents("order") == ["x", '{"got":"nothing"}']


def test_every_kind_of_content_can_be_appended(shared: Stream) -> None:
    closure = """{|frame|
        'text' | .append kinds; 0x[ff fe] | .append kinds; {a: 1} | .append kinds
        .append kinds; [1 2] | .append kinds; 5 | .append kinds --ttl last:20
    }"""
    shared.register("kinds", closure, topic="in.kinds")
    shared.add("in.kinds")
    found = shared.wait_for("kinds", 6)
    assert [each.content for each in found] == ["text", b"\xff\xfe", '{"a":1}', None, "[1,2]", "5"]
    assert found[-1].ttl == "last:20"


@pytest.mark.parametrize("count", [1, 49, 50, 51, 52, 5000])
def test_any_number_of_frames_can_be_appended(shared: Stream, count: int) -> None:
    name = f"many{next(numbers)}"
    closure = f"{{|frame| 1..{count} | each {{|n| $n | .append {name} }} | ignore }}"
    shared.register(name, closure, topic=f"in.{name}")
    shared.add_all([(f"in.{name}",)] * 2)
    shared.wait_for(name, 2 * count)
    assert shared.contents(name) == [str(n) for n in range(1, count + 1)] * 2


def test_what_a_stateful_closure_appends_joins_its_state(shared: Stream) -> None:
    closure = "{|frame, n| $'at ($n)' | .append steps.at; if $n < 3 { {state: ($n + 1)} } }"
    shared.register("steps", closure, topic="in.steps", stateful=True, initial_state=1)
    shared.add_all([("in.steps",)] * 4)
    shared.wait_for("steps.at", 4)
    assert shared.contents("steps.at") == ["at 1", "at 2", "at 3", "at 3"]
    assert shared.state("steps") == 3


def test_what_was_appended_before_an_error_is_not_kept(shared: Stream) -> None:
    closure = """{|frame, state|
        'a' | .append half.way
        [b] | each {|each| $each | .append half.way } | ignore
        if $frame.meta.n == 1 { error make {msg: 'on purpose'} }
        {state: $frame.meta.n, out: $frame.meta.n}
    }"""
    shared.register("half", closure, topic="in.half", stateful=True)
    shared.add_all(("in.half", b"", {"n": n}) for n in range(3))
    assert "on purpose" in shared.unregistered("half")["error"]
    assert shared.contents("half.way") == ["a", "b"]
    assert shared.contents("half") == ["0"]
    assert shared.state("half") == 0


def test_an_append_that_is_wrong_ends_the_handler(shared: Stream) -> None:
    shared.register("misdirected", "{|frame| 'x' | .append 'no topic' }", topic="in.misdirected")
    shared.add("in.misdirected")
    assert "not a topic: 'no topic'" in shared.unregistered("misdirected")["error"]


# ---- Its own output ----------------------------------------------------------------------------


def test_a_handler_is_never_given_what_a_registration_on_its_topic_has_caused(
    stream: Stream,
) -> None:
    closure = "{|frame, n| {state: ($n + 1), out: [$frame.topic {topic: elsewhere, content: x}]} }"
    stream.register("own", closure, stateful=True, initial_state=0)
    stream.add_all([("in",)] * 3)
    stream.wait_for("own", 3)
    stream.restart()
    stream.add("in")
    stream.wait_for("own", 4)
    # Another registration of that topic, which reads all there is. It is not given what the first
    # has caused, .registered and .unregistered among it, and the first not what it causes.
    stream.register("own", "{|frame| $'again ($frame.topic)' }", run_from="start")
    last = stream.add("in")
    expected = ["own.register", "in", "in", "in", "in", "own.register", "in"]
    stream.finish("own", last)
    stream.wait_for("own", 4 + len(expected))
    assert stream.contents("own")[4:] == [f"again {each}" for each in expected]
    stream.restart()
    last = stream.add("in")
    stream.finish("own", last)
    assert stream.contents("own")[4:] == [f"again {each}" for each in [*expected, "in"]]
    assert len(stream.contents("elsewhere")) == 4


def test_an_imported_registrations_output_is_its_own_too(stream: Stream) -> None:
    """After an export and an import the tables of the runtime know nothing of it."""
    stream.add("x")
    old = ids.text(ids.parse(stream.add("x")) - (1 << 90))
    stream.store.run(ImportWork([
        Imported(ids.parse(old), "own.register", None, "null", "forever"),
        Imported(ids.parse(old) + 1, "own", None, f'{{"handler_id":"{old}"}}', "forever"),
        Imported(ids.parse(old) + 2, "own", None, '{"handler_id":"whatever"}', "forever"),
    ]))  # fmt: skip
    stream.register("own", "{|frame| $frame.id }", topic="own", run_from="start")
    stream.wait_for("own", 3)
    assert stream.contents("own")[2:] == [ids.text(ids.parse(old) + 2)]


def test_two_handlers_that_feed_each_other(stream: Stream) -> None:
    for name, other in (("ping", "pong"), ("pong", "ping")):
        closure = "{|frame| let n = ($frame.content | into int) + 1; if $n <= 40 { $n } }"
        stream.register(name, closure, topic=other, content=True)
    stream.add("ping", "0")
    stream.wait_for("ping,pong", 41)
    assert stream.contents("ping") == [str(n) for n in range(0, 41, 2)]
    assert stream.contents("pong") == [str(n) for n in range(1, 41, 2)]
    assert stream.frames("ping.unregistered,pong.unregistered") == []


FORGED: list[Callable[[str], tuple[Any, ...]]] = [
    lambda source: ("count.registered", b"", {"handler_id": source[::-1]}),
    lambda source: ("count.unregistered", b"", {"handler_id": "0" * 25, "error": "no"}),
    lambda source: ("count.state", b"1000", {"handler_id": "nobody"}),
    lambda source: ("count.state", b"2000"),
    lambda source: ("count", b"", {"handler_id": 5}),
    lambda source: ("count", b"", {"handler_id": None, "frame_id": source}),
    lambda source: ("count", b"", {"handler_id": source.upper() + "x"}),
    lambda source: ("count", b"", [{"handler_id": source}]),
    lambda source: ("count", b"", {"deep": {"handler_id": source}}),
    lambda source: ("count", b"", "handler_id"),
    lambda source: ("count", b"", Raw(f'{{"handler_id":{"9" * 5000}}}')),
]  # fmt: skip


def test_what_is_appended_outside_of_the_closure_joins_what_the_next_frame_causes(
    stream: Stream, tmp_path: Path
) -> None:
    script = f"""
        'before' | .append outside
        {{|frame|
            if $frame.meta.n == 1 {{
                job spawn {{
                    while not ('{tmp_path}/go' | path exists) {{ sleep 1ms }}
                    'job' | .append outside
                    touch '{tmp_path}/done'
                }}
            }}
            $frame.meta.n
        }}"""
    stream.register("name", script, topic="in")
    assert stream.frames("outside") == []
    values = [stream.add("in", meta={"n": n}) for n in range(2)]
    stream.wait_for("name", 2)
    (tmp_path / "go").touch()
    stream.wait((tmp_path / "done").exists, "the job has appended")
    assert stream.contents("outside") == ["before"]
    values.append(stream.add("in", meta={"n": 2}))
    stream.wait_for("name", 3)
    assert stream.contents("outside") == ["before", "job"]
    assert stream.causes("outside") == [values[0], values[2]]


def test_frames_that_look_like_the_runtimes_own_do_not_fool_it(stream: Stream) -> None:
    closure = "{|frame, n| {state: ($n + 1), out: $frame.id} }"
    source = stream.register("count", closure, stateful=True, initial_state=0)
    values = stream.add_all(make(source) for make in FORGED)
    values.append(stream.add("in"))
    stream.wait(lambda: len(stream.causes_of("count", source)) >= len(values), "an output for each")
    assert stream.causes_of("count", source) == values
    stream.restart()
    values.append(stream.add("in"))
    stream.wait(lambda: len(stream.causes_of("count", source)) >= len(values), "one more")
    assert stream.causes_of("count", source) == values
    assert stream.state("count") == len(values), "the state is what it was told"
    # One that names a registration of this very topic counts as its output, whoever made it.
    stream.add("in", meta={"handler_id": source})
    values.append(stream.add("in"))
    stream.finish("count", values[-1])
    assert stream.causes_of("count", source) == values


# ---- Failing -----------------------------------------------------------------------------------


def test_an_error_ends_a_handler_and_what_came_before_it_is_kept(stream: Stream) -> None:
    closure = """{|frame|
        if $frame.meta.n == 1500 { error make {msg: 'not this one'} }
        $frame.meta.n
    }"""
    source = stream.register("fails", closure, topic="in")
    values = stream.add_all(("in", b"", {"n": n}) for n in range(2500))
    told = stream.unregistered("fails")
    assert told["handler_id"] == source
    assert told["frame_id"] == values[1500]
    assert told["position"] == values[1499]
    assert "not this one" in told["error"]
    assert "script.nu:2" in told["error"], "Nushell says where"
    assert stream.contents("fails") == [str(n) for n in range(1500)]
    assert stream.causes("fails") == values[:1500]
    assert not stream.is_running("fails")
    assert any("fails: out of service" in line for line in stream.logged)


def test_a_handler_that_failed_stays_out_after_a_restart(stream: Stream) -> None:
    stream.register("once", "{|frame| error make {msg: 'no'} }", topic="in")
    stream.register("other", "{|frame| 'fine' }", topic="in")
    stream.add("in")
    stream.unregistered("once")
    stream.wait_for("other", 1)
    stream.restart()
    stream.add("in")
    stream.wait_for("other", 2)
    assert len(stream.frames("once.unregistered")) == 1
    assert len(stream.frames("once.registered")) == 1
    assert stream.frames("once") == []
    # The same script again, as a new registration, is a new handler.
    stream.register("once", "{|frame| 'well' }", topic="in")
    stream.add("in")
    assert [each.content for each in stream.wait_for("once", 1)] == ["well"]


@pytest.mark.parametrize("stateful", [False, True])
def test_a_closure_that_exits_ends_its_handler(shared: Stream, stateful: bool) -> None:
    name = f"exits{next(numbers)}"
    value = "{out: $frame.meta.n}" if stateful else "$frame.meta.n"
    closure = f"{{|frame, state?| if $frame.meta.n == 700 {{ exit 3 }}; {value} }}"
    shared.register(name, closure, topic=f"in.{name}", stateful=stateful)
    values = shared.add_all((f"in.{name}", b"", {"n": n}) for n in range(900))
    told = shared.unregistered(name)
    assert told["frame_id"] == values[700]
    assert "its process ended with status" in told["error"]
    assert shared.contents(name) == [str(n) for n in range(700)]


def test_an_error_in_what_a_closure_yields_lazily_is_an_error(shared: Stream) -> None:
    closure = """{|frame|
        [1 2 3] | each {|n| if $n == $frame.meta.n { error make {msg: 'in the list'} }; $n }
    }"""
    shared.register("lazy", closure, topic="in.lazy")
    shared.add_all(("in.lazy", b"", {"n": n}) for n in (9, 2, 9))
    assert "in the list" in shared.unregistered("lazy")["error"]
    assert shared.contents("lazy") == ["1", "2", "3"]


def test_an_external_command_that_fails_is_an_error(shared: Stream) -> None:
    shared.register("outside", "{|frame| ^sh -c 'echo why >&2; exit 4'; 1 }", topic="in.outside")
    shared.add("in.outside")
    told = shared.unregistered("outside")
    assert "exit code" in told["error"]
    assert "why" in told["stderr"]
    assert shared.contents("outside") == []


SYNTAX = [
    ("{|frame| ", "script.nu:1"),
    ("{|frame| let = 5 }", "let"),
    ("{|frame| unknown-command-of-nobody-at-all --flag | where }", "where"),
    ("def f [ {|frame| 1 }", ""),
    ("{|frame| continue }", "loop"),
]


@pytest.mark.parametrize(("script", "error"), SYNTAX, ids=[each[0] for each in SYNTAX])
def test_a_syntax_error_is_found_at_registration(shared: Stream, script: str, error: str) -> None:
    name = f"syntax{next(numbers)}"
    found = shared.refused(name, script)
    assert error in found
    assert "Error" in found
    assert shared.frames(f"{name}.registered") == []


def test_what_is_no_closure_is_found_before_anything_of_it_runs(
    shared: Stream, tmp_path: Path
) -> None:
    trace = tmp_path / "it ran"
    run = f"'x' | save --force '{trace}'"
    for n, script in enumerate([f"{run}; 5", f"{run}; 'text'", f"{run}", "{a: 1}", "ls", "[1]"]):
        error = shared.refused(f"none{n}", script)
        assert "closure" in error, error
    assert not trace.exists()


def test_a_byte_order_mark_before_a_closure_is_none_of_it(shared: Stream) -> None:
    shared.register("marked", "\ufeff{|frame| 'seen' }", topic="in.marked")
    shared.add("in.marked")
    assert shared.wait_for("marked", 1)[0].content == "seen"


def test_what_turns_out_to_be_no_closure_is_refused(shared: Stream) -> None:
    assert "not a closure but a int" in shared.refused("variable", "let x: any = 5; $x")


def test_definitions_may_come_before_the_closure(shared: Stream) -> None:
    script = textwrap.dedent(
        """\
        # It answers with a greeting.
        use std/assert
        const GREETING = "hello"
        def greet [who: string] { $"($GREETING), ($who)" }
        let mark = "!"
        {|frame|
            assert equal 1 1
            (greet $frame.meta.who) + $mark
        }
        """
    )
    shared.register("greet", script, topic="in.greet")
    shared.add("in.greet", meta={"who": "Ada"})
    assert shared.wait_for("greet", 1)[0].content == "hello, Ada!"


META: list[tuple[Any, str]] = [
    (5, "the meta of a registration is a record"),
    ({"stateful": 1}, "stateful is true or false, not 1"),
    ({"content": "yes"}, 'content is true or false, not "yes"'),
    ({"topic": 7}, "topic is a pattern"),
    ({"topic": "a b"}, "not a topic pattern: 'a b'"),
    ({"run-from": "head"}, 'run-from is start, tail or the id to start after, not "head"'),
    ({"run-from": 5}, "run-from is"),
    ({"pulse": 1}, "pulse is a number of milliseconds, at least 10: not 1"),
    ({"pulse": "1s"}, "pulse is a number of milliseconds"),
    ({"pulse": True}, "pulse is a number of milliseconds"),
    ({"timeout": 0}, "timeout is a number of milliseconds, at least 1: not 0"),
    ({"timeout": 1.5}, "timeout is a number of milliseconds"),
    (Raw('{"stateful":true,"initial_state":%s}' % ("9" * 5000)), "a value that"),
]


@pytest.mark.parametrize(("meta", "error"), META, ids=[str(each[0])[:40] for each in META])
def test_a_registration_whose_meta_is_wrong_is_refused(
    shared: Stream, meta: Any, error: str
) -> None:
    name = f"meta{next(numbers)}"
    source = shared.add(f"{name}.register", "{|frame| 1 }", meta)
    told = shared.answer_to(source, name)
    assert told.topic == f"{name}.unregistered"
    assert error in told.meta["error"]
    assert told.meta["frame_id"] == source


def test_what_a_registration_may_leave_out() -> None:
    asked = parse_registration(7, None)
    assert asked == parse_registration(
        7,
        {"stateful": None, "content": False, "topic": "*", "run-from": "tail", "pulse": None,
         "timeout": None, "initial_state": None},
    )  # fmt: skip
    assert (asked.start, asked.patterns, asked.state) == (7, None, "null")
    assert parse_registration(7, {"pulse": 10**12, "timeout": 10**12}).pulse == 10**9
    with pytest.raises(Invalid):
        parse_registration(7, {"pulse": 10**13})


def test_times_of_years_are_waited_for(shared: Stream) -> None:
    shared.register("patient", SEE, topic="in.patient", pulse=10**12, timeout=10**12)
    shared.add("in.patient", meta={"n": 1})
    shared.wait_for("patient", 1)


def test_a_registration_without_content_is_refused(shared: Stream) -> None:
    assert "no content" in shared.refused("empty", "")
    assert "no content" in shared.refused("blank", "  \n\t ")


def test_an_ephemeral_or_removed_registration_is_none(stream: Stream) -> None:
    stream.register("stays", SEE, topic="in")
    stream.add("stays.register", "{|frame| 'instead' }", {"topic": "in"}, "ephemeral")
    value = stream.add("in", meta={"n": 1})
    stream.finish("stays", value)
    assert stream.contents("stays") == ["1"]
    assert stream.frames("stays.unregistered") == []


# ---- Time --------------------------------------------------------------------------------------


@pytest.mark.parametrize("stateful", [False, True])
def test_a_closure_that_hangs_is_ended_and_what_came_before_it_is_kept(
    stream: Stream, stateful: bool
) -> None:
    value = "{out: $frame.meta.n}" if stateful else "$frame.meta.n"
    closure = f"{{|frame, state?| if $frame.meta.n == 3 {{ loop {{ sleep 1hr }} }}; {value} }}"
    stream.register("hangs", closure, topic="in", timeout=400, stateful=stateful)
    pid = stream.pid("hangs")
    values = stream.add_all(("in", b"", {"n": n}) for n in range(5))
    began = time.monotonic()
    told = stream.unregistered("hangs")
    assert time.monotonic() - began < 5
    assert "its timeout of 400 ms" in told["error"]
    assert told["frame_id"] == values[3]
    assert stream.contents("hangs") == ["0", "1", "2"]
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_timeout_is_for_each_frame_and_not_for_all_that_wait(stream: Stream) -> None:
    closure = "{|frame| sleep 100ms; $frame.meta.n }"
    stream.register("steady", closure, topic="in", timeout=1500)
    stream.add_all(("in", b"", {"n": n}) for n in range(20))
    stream.wait_for("steady", 20)
    assert stream.frames("steady.unregistered") == []


def test_a_slow_closure_does_not_delay_others(stream: Stream) -> None:
    stream.register("slow", "{|frame| sleep 2sec; 'slow' }", topic="in")
    stream.register("quick", "{|frame| 'quick' }", topic="in")
    stream.add("in")
    stream.wait_for("quick", 1)
    assert stream.frames("slow") == []
    stream.add("other")
    stream.wait_for("slow", 1)


# ---- Standard input, output and error of a closure ---------------------------------------------


def test_what_a_closure_prints_does_no_harm_and_goes_to_the_log(stream: Stream) -> None:
    closure = """{|frame|
        print 'a line' '{"out": "not this"}'; print -n 'no end'; print -e 'an error'
        ^echo outside; ^printf 'no end either'; ^sh -c 'echo deeper; echo wrong >&2'
        $frame.meta.n
    }"""
    stream.register("talks", closure, topic="in")
    stream.add_all(("in", b"", {"n": n}) for n in range(3))
    stream.wait_for("talks", 3)
    assert stream.contents("talks") == ["0", "1", "2"]
    for said in ("a line", "no end", "an error", "outside", "no end either", "deeper", "wrong"):
        assert any(line.startswith("talks: ") and said in line for line in stream.logged), said


def test_a_slip_in_the_meta_of_a_registration_is_named_in_the_log(stream: Stream) -> None:
    meta = {"topci": "in", "note": "topical", "Pulse": 50, "content": True, "contents": 1}
    stream.add("slips.register", "{|frame| null}", meta)
    stream.wait_for("slips.registered", 1)
    said = [line for line in stream.logged if line.startswith("slips: ")]
    assert said == [
        'slips: its meta has "topci": did you mean topic?',
        'slips: its meta has "Pulse": did you mean pulse?',
    ]


def test_external_commands_do_not_eat_what_the_handler_is_to_be_given(stream: Stream) -> None:
    closure = "{|frame| ^cat; let more = (^sh -c 'cat; echo end'); [$frame.meta.n $more] }"
    stream.register("hungry", closure, topic="in")
    stream.add_all(("in", b"", {"n": n}) for n in range(50))
    stream.wait_for("hungry", 100)
    assert stream.contents("hungry") == [each for n in range(50) for each in (str(n), "end")]


# ---- Dying -------------------------------------------------------------------------------------


def test_a_handler_whose_process_is_killed_goes_on(stream: Stream) -> None:
    closure = "{|frame, n| {state: ($n + 1), out: $'($frame.meta.n) ($n)'} }"
    stream.register("lives", closure, topic="in", stateful=True, initial_state=0)
    for n in range(12):
        if n % 2:
            stream.kill("lives")  # while it rests: it is no frame's fault, however often
        stream.add("in", meta={"n": n})
        stream.wait_for("lives", n + 1)
    assert stream.contents("lives") == [f"{n} {n}" for n in range(12)]
    assert stream.frames("lives.unregistered") == []
    assert len(stream.frames("lives.registered")) == 1
    assert stream.state("lives") == 12


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that die are started again at once."""
    monkeypatch.setattr(runner, "RESTART_SECONDS", 0.02)


@pytest.mark.parametrize("how", ["not found", "not run"])
def test_a_handler_whose_process_is_killed_while_nushell_is_missing_comes_back_with_it(
    stream: Stream, impatient: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, how: str
) -> None:
    real = movable_nu(tmp_path, monkeypatch, is_always_found=how == "not run")
    closure = "{|frame, n| {state: ($n + 1), out: $n} }"
    stream.register("count", closure, topic="in", stateful=True, initial_state=0)
    stream.add("in")
    stream.wait_for("count", 1)
    real.rename(tmp_path / "away")
    stream.kill("count")
    stream.add("in")
    again = "can't be run" if how == "not found" else "ended with status 127"
    stream.wait(lambda: sum(again in line for line in stream.logged) > 5, "it is tried again")
    assert stream.is_running("count")
    (tmp_path / "away").rename(real)
    stream.wait_for("count", 2)
    assert stream.contents("count") == ["0", "1"]
    assert [each.topic for each in stream.frames("count.*")].count("count.registered") == 1
    assert stream.frames("count.unregistered") == []


def test_a_handler_goes_on_with_a_nushell_that_has_moved(
    stream: Stream, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
    (tmp_path / "a" / "nu").symlink_to(nu_path())
    monkeypatch.delenv("XS_NU", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}/a:{tmp_path}/b")
    stream.register("see", SEE, topic="in")
    (tmp_path / "a" / "nu").rename(tmp_path / "b" / "nu")
    stream.kill("see")
    stream.add("in", meta={"n": 1})
    stream.wait_for("see", 1)
    assert stream.frames("see.unregistered") == []


def test_a_process_that_dies_on_a_frame_each_time_has_failed(
    stream: Stream, impatient: None
) -> None:
    closure = """{|frame|
        if $frame.meta.n == 2 { ^sh -c 'echo dying >&2; kill -9 $PPID'; sleep 1hr }
        $frame.meta.n
    }"""
    stream.register("dies", closure, topic="in")
    values = stream.add_all(("in", b"", {"n": n}) for n in range(4))
    told = stream.unregistered("dies")
    assert "ended by signal 9" in told["error"]
    assert told["frame_id"] == values[2]
    assert stream.contents("dies") == ["0", "1"]
    assert sum("dying" in line for line in stream.logged) == 5


def test_a_process_that_dies_now_and_then_has_not_failed(
    stream: Stream, impatient: None, tmp_path: Path
) -> None:
    closure = f"""{{|frame|
        let trace = ('{tmp_path}' | path join $'($frame.meta.n)')
        if not ($trace | path exists) {{ 'x' | save $trace; ^sh -c 'kill -9 $PPID'; sleep 1hr }}
        $frame.meta.n
    }}"""
    stream.register("reborn", closure, topic="in")
    stream.add_all(("in", b"", {"n": n}) for n in range(8))
    stream.wait_for("reborn", 8)
    assert stream.contents("reborn") == [str(n) for n in range(8)]


# ---- Replacing, unregistering, restarting ------------------------------------------------------


def test_a_new_registration_replaces_the_old_one(stream: Stream) -> None:
    old = stream.register("name", "{|frame| 'old' }", topic="in")
    pid = stream.pid("name")
    stream.add("in")
    last = stream.wait_for("name", 1)[0].meta["frame_id"]
    new = stream.register("name", "{|frame| 'new' }", topic="in")
    stream.add("in")
    assert [each.content for each in stream.wait_for("name", 2)] == ["old", "new"]
    assert stream.unregistered("name") == {
        "handler_id": old, "frame_id": new, "position": last
    }  # fmt: skip
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_frames_before_a_registration_are_the_old_ones_and_those_after_it_the_new_ones(
    stream: Stream,
) -> None:
    """In one commit, so that all are there before anybody hears of the order among them."""
    stream.register("name", "{|frame| sleep 1ms; $'0 ($frame.meta.n)' }", topic="in")
    events: list[tuple[Any, ...]] = [("in", b"", {"n": n}) for n in range(50)]
    for turn in (1, 2, 3):
        events.append(("name.register", f"{{|frame| $'{turn} ($frame.meta.n)' }}", {"topic": "in"}))
        events += [("in", b"", {"n": n}) for n in range(turn * 50, turn * 50 + 50)]
    stream.add_all(events)
    stream.wait(lambda: "3 199" in stream.contents("name"), "the last handler has all")
    found = stream.contents("name")
    assert len(found) == len(set(found)), "a frame has effects of two registrations"
    by_turn = {turn: [each[2:] for each in found if each[0] == turn] for turn in "0123"}
    assert by_turn["0"] == [str(n) for n in range(50)]
    assert by_turn["3"] == [str(n) for n in range(150, 200)]
    # Those in between were replaced before they had begun.
    assert len(stream.frames("name.unregistered")) == 3


def test_nothing_behind_an_unregister_is_given(stream: Stream) -> None:
    source = stream.register("name", "{|frame| $frame.meta.n }", topic="in")
    events = [("in", b"", {"n": n}) for n in range(100)]
    values = stream.add_all([*events, ("name.unregister",), *events])
    told = stream.unregistered("name")
    assert told == {"handler_id": source, "frame_id": values[100], "position": values[99]}
    assert stream.contents("name") == [str(n) for n in range(100)]
    stream.add("in", meta={"n": 1})
    stream.restart()
    stream.add("in", meta={"n": 1})
    stream.register("other", SEE, topic="in")
    stream.add("in", meta={"n": 1})
    stream.wait_for("other", 1)
    assert len(stream.contents("name")) == 100
    assert not stream.is_running("name")


@pytest.mark.parametrize("pattern", ["in", "*"])
def test_nothing_behind_an_order_is_given_either_when_it_is_read_from_the_index(
    stream: Stream, pattern: str
) -> None:
    stream.register("name", "{|frame| if $frame.topic == in { $frame.meta.n } }", topic=pattern)
    stream.kill("name", signal.SIGSTOP)
    values = stream.add_all(("in", b"", {"n": n}) for n in range(1500))
    gate = Gate()
    waits = stream.store.start(gate)
    assert gate.entered.wait(10)
    gate.opened.set()
    waits()
    stream.add_all(("other", b"x" * 10_000) for _ in range(900))
    # Only now does anybody hear of it, and a stopped process can't finish what is before it.
    order = stream.add("name.unregister")
    stream.add_all(("in", b"", {"n": n}) for n in range(1500, 3000))
    told = stream.unregistered("name")
    assert told["frame_id"] == order
    assert told["position"] <= values[-1]
    assert all(cause <= values[-1] for cause in stream.causes("name"))


def test_a_registration_in_chunks_is_refused_once_and_its_parts_are_no_orders(
    stream: Stream,
) -> None:
    old = stream.register("name", "{|frame| 'old' }", topic="in")
    run = stream.store.runs.begin(Append("name.register"))
    run.write(b"{|frame| 'a part' }")
    assert run.first is not None
    refused = ids.text(run.first)
    told = stream.answer_to(refused, "name")
    assert told.topic == "name.unregistered"
    assert "a script is one frame" in told.meta["error"]
    stream.register("name", "{|frame| 'new' }", topic="in")
    run.write(b"{|frame| 'another part' }")
    stream.add("in")
    stream.wait_for("name", 1)
    run.end(b"and the last")
    stream.restart()  # now they are read from the index
    assert len(stream.frames("name.register")) == 5
    stream.add("in")
    stream.wait_for("name", 2)
    assert stream.contents("name") == ["new", "new"]
    told = stream.frames("name.unregistered")
    assert [each.meta["handler_id"] for each in told] == [old, refused]


def test_an_unregister_in_chunks_is_one_order_and_its_parts_are_frames_like_others(
    stream: Stream,
) -> None:
    closure = "{|frame| if $frame.topic == 'a.unregister' { $frame.id } }"
    stream.register("a", closure)
    run = stream.store.runs.begin(Append("a.unregister"))
    run.write(b"x")
    assert run.first is not None
    assert stream.unregistered("a")["frame_id"] == ids.text(run.first)
    stream.register("a", closure, run_from="start")
    run.end(b"y")
    stream.finish("a", stream.add("in"))
    assert stream.causes("a") == [each.id for each in stream.frames("a.unregister")]
    assert stream.is_running("a")


@pytest.mark.parametrize("stateful", [False, True])
@pytest.mark.parametrize("kind", ["Nushell", "program"])
def test_an_idle_handler_with_a_topic_leaves_at_once(
    stream: Stream, kind: str, stateful: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And so one does that is idle again, having answered frames amid many that are not for it."""
    monkeypatch.setattr(handlers, "FINISH_SECONDS", 60.0)
    script = "{|frame, state| null }" if stateful else "{|frame| null }"
    if kind == "program":
        script = program("for given in frames(): answer(None)")
    for turn in range(3):
        stream.register("idle", script, topic="in", stateful=stateful)
        stream.add_all([("other",), ("in",), ("other",)] * 30 * turn)
    stream.add("other")
    order = stream.add("idle.unregister")
    assert stream.unregistered("idle", 3)["frame_id"] == order


def test_a_handler_that_hangs_can_be_replaced(stream: Stream) -> None:
    stream.register("stuck", "{|frame| sleep 1hr }", topic="in")
    before = stream.add("in", meta={"n": 1})
    stream.register("stuck", SEE, topic="in", run_from=before)
    stream.add("in", meta={"n": 2})
    assert [each.content for each in stream.wait_for("stuck", 1)] == ["2"]


def test_a_handler_goes_on_where_it_was_when_the_server_starts_again(stream: Stream) -> None:
    closure = "{|frame, n| {state: ($n + 1), out: $'($frame.meta.n) ($n)'} }"
    stream.register("goes", closure, topic="in", stateful=True, initial_state=0)
    stream.add_all(("in", b"", {"n": n}) for n in range(5))
    stream.wait_for("goes", 5)
    stream.stop()
    stream.offline([("in", b"", {"n": n}) for n in range(5, 10)])
    stream.start()
    stream.wait_for("goes", 10)
    stream.restart()
    stream.add("in", meta={"n": 10})
    stream.wait_for("goes", 11)
    assert stream.contents("goes") == [f"{n} {n}" for n in range(11)]
    assert stream.state("goes") == 11
    stream.wait_for("goes.registered", 3)


def test_a_server_that_stops_in_the_middle_goes_on_exactly_there(stream: Stream) -> None:
    closure = "{|frame, n| sleep 2ms; {state: ($n + 1), out: $'($frame.meta.n) ($n)'} }"
    stream.register("goes", closure, topic="in", stateful=True, initial_state=0)
    stream.add_all(("in", b"", {"n": n}) for n in range(600))
    for part in (50, 200, 350):
        stream.wait_past("goes", part)
        stream.restart()
        found = stream.contents("goes")
        assert found == [f"{n} {n}" for n in range(len(found))]
        assert stream.state("goes") == len(found)
    stream.wait_for("goes", 600)
    assert stream.contents("goes") == [f"{n} {n}" for n in range(600)]


def test_orders_that_come_while_no_server_runs_are_carried_out_at_the_next_start(
    stream: Stream,
) -> None:
    old = stream.register("replaced", "{|frame| 'old' }", topic="in")
    gone = stream.register("gone", "{|frame| 'gone' }", topic="in")
    stream.add("in")
    stream.wait_for("replaced,gone", 2)
    stream.stop()
    found = stream.offline([
        ("gone.unregister",),
        ("replaced.register", "{|frame| 'new' }", {"topic": "in"}),
        ("in",),
        ("fresh.register", "{|frame| 'fresh' }", {"topic": "in", "run-from": "start"}),
        ("never.register", "{|frame| 'never' }", {"topic": "in"}),
        ("never.unregister",),
    ])  # fmt: skip
    stream.start()
    stream.wait_for("fresh", 2)
    stream.wait_for("replaced", 2)
    assert stream.contents("replaced") == ["old", "new"]
    told = stream.unregistered("replaced")
    assert (told["handler_id"], told["frame_id"]) == (old, found[1])
    told = stream.unregistered("gone")
    assert (told["handler_id"], told["frame_id"]) == (gone, found[0])
    assert stream.contents("gone") == ["gone"]
    stream.unregistered("never")
    assert old not in [each["id"] for each in stream.scripts.status()]
    stream.restart()
    stream.add("in")
    stream.wait_for("replaced", 3)
    stream.wait_for("fresh", 3)
    assert stream.contents("gone") == ["gone"]
    assert stream.contents("never") == []
    assert len(stream.frames("gone.unregistered,never.unregistered")) == 2


def test_without_nushell_a_registration_says_how_to_get_it_and_the_next_start_tries_again(
    stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream.register("before", "{|frame| 'before' }", topic="in")
    with monkeypatch.context() as without:
        without.setenv("PATH", "/nowhere")
        without.delenv("XS_NU", raising=False)
        error = stream.refused("closure", "{|frame| 'closure' }", topic="in")
        assert "https://www.nushell.sh" in error
        assert "#!" in error
        stream.register("program", program("for given in frames(): answer({'out': 'program'})"),
                        topic="in")  # fmt: skip
        stream.stop()
        stream.start()
        stream.unregistered("closure", 2)
        stream.unregistered("before", 1)
        stream.add("in")
        stream.wait_for("program", 1)
        stream.stop()
    stream.start()
    stream.add("in")
    stream.wait_for("program", 2)
    stream.wait_for("before", 2)  # what came meanwhile is not lost to the one that was in service
    stream.wait_for("closure", 2)
    assert len(stream.frames("closure.registered")) == 1


# ---- One transaction ---------------------------------------------------------------------------


def test_effects_that_can_not_all_be_stored_are_not_stored_at_all(stream: Stream) -> None:
    script = Script("handler", "x", "0" * 25, True, "1" * 25, "5")
    large = stream.store.cas.take([b"x" * 50_000])
    work = EffectsWork([Append("part"), Append("part", large, ttl="ephemeral")], script)
    with pytest.raises(Invalid):
        stream.store.run(work)
    assert stream.frames("part") == []
    assert stream.store.index.scripts("handler", "x") == []
    assert not list(Path(stream.directory, "cas").glob("new-*")), "its content was left behind"
    stream.store.run(EffectsWork([Append("part")], script))
    assert len(stream.frames("part")) == 1


def test_what_shares_a_commit_with_effects_that_fail_is_stored(stream: Stream) -> None:
    script = Script("handler", "x", "0" * 25, True, "1" * 25, "5")
    large = stream.store.cas.take([b"x" * 50_000])
    gate = Gate()
    held = stream.store.start(gate)
    assert gate.entered.wait(10)
    others = [stream.store.start(EffectsWork([Append("good")], script)) for _ in range(2)]
    bad = stream.store.start(
        EffectsWork([Append("bad"), Append("bad", large, ttl="ephemeral")], script)
    )
    others.append(stream.store.start(EffectsWork([Append("good")], script)))
    gate.opened.set()
    held()
    for wait in others:
        wait()
    with pytest.raises(Invalid):
        bad()
    assert len(stream.frames("good")) == 3
    assert stream.frames("bad") == []


def test_a_commit_that_fails_is_done_again_and_nothing_is_doubled(
    stream: Stream, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder of large content is none for a while, as a disk may be full for a while."""
    closure = "{|frame, n| {state: ($n + 1), out: [$n ('x' | fill -c x -w 50000)]} }"
    stream.register("disk", closure, topic="in", stateful=True, initial_state=0)
    folder = Path(stream.directory, "cas")
    away = Path(stream.directory, "cas-away")
    for turn in range(3):
        folder.rename(away)
        folder.touch()
        stream.add_all([("in",)] * 5)
        stream.wait(lambda: any("Not a directory" in line for line in stream.logged), "it fails")
        stream.logged.clear()
        folder.unlink()
        away.rename(folder)
        stream.wait_for("disk", 10 * (turn + 1))
    assert stream.contents("disk")[::2] == [str(n) for n in range(15)]
    assert stream.state("disk") == 15
    assert not list(folder.glob("new-*"))


# ---- Any language ------------------------------------------------------------------------------


def test_a_handler_in_python(stream: Stream) -> None:
    text = """
    for given in frames():
        assert sorted(given) == ["frame"], given
        n = given["frame"]["meta"]["n"]
        answer({"out": n} if n % 2 else None)
    """
    source = stream.register("odd", program(text), topic="in")
    values = stream.add_all(("in", b"", {"n": n}) for n in range(10))
    found = stream.wait_for("odd", 5)
    assert [each.content for each in found] == ["1", "3", "5", "7", "9"]
    assert [each.meta for each in found] == [
        {"handler_id": source, "frame_id": value} for value in values[1::2]
    ]


def test_a_stateful_handler_in_python(stream: Stream) -> None:
    text = """
    for given in frames():
        counts = given["state"]
        topic = given["frame"]["topic"]
        counts[topic] = counts.get(topic, 0) + 1
        answer({"state": counts})
    """
    stream.register("counts", program(text), topic="a,b", stateful=True, initial_state={})
    stream.add_all([("a",), ("b",), ("a",)] * 30)
    stream.wait(lambda: stream.state("counts") == {"a": 60, "b": 30}, "all are counted")
    stream.restart()
    stream.add("b")
    stream.wait(lambda: stream.state("counts") == {"a": 60, "b": 31}, "one more is counted")


def test_a_stateful_program_finishes_what_is_before_its_end_and_gets_nothing_behind(
    stream: Stream,
) -> None:
    text = """
    for given in frames():
        answer({"state": given["state"] + 1, "out": given["state"]})
    """
    stream.register("counts", program(text), topic="in", stateful=True, initial_state=0)
    stream.add_all([("in",)] * 50 + [("counts.unregister",)] + [("in",)] * 50)
    stream.unregistered("counts")
    assert stream.contents("counts") == [str(n) for n in range(50)]
    assert stream.state("counts") == 50


def test_a_handler_in_sh(stream: Stream) -> None:
    text = r"""#!/bin/sh
n=0
while read -r line; do
    n=$((n + 1))
    echo "{\"out\": \"line $n\"}"
done
"""
    stream.register("sh", text, topic="in")
    stream.add_all([("in",)] * 3)
    stream.wait_for("sh", 3)
    assert stream.contents("sh") == ["line 1", "line 2", "line 3"]


def test_a_stateful_handler_in_sh(stream: Stream) -> None:
    text = r"""#!/bin/sh
while read -r line; do
    n=$(echo "$line" | jq .state)
    echo "{\"state\": $((n + 1)), \"out\": \"was $n\"}"
done
"""
    stream.register("sh", text, topic="in", stateful=True, initial_state=5)
    stream.add_all([("in",)] * 3)
    stream.wait_for("sh", 3)
    assert stream.contents("sh") == ["was 5", "was 6", "was 7"]
    assert stream.state("sh") == 8


def test_all_that_a_line_of_a_program_can_say(stream: Stream) -> None:
    text = """
    import base64
    said = [
        None,
        {},
        {"out": None, "append": None},
        {"out": "text"},
        {"out": ["a", None, {"content": "c", "topic": "to", "meta": {"k": 1}, "ttl": "last:9"}]},
        {"out": {"content_base64": base64.b64encode(b"\\xff\\x00").decode()}},
        {"append": [{"topic": "to"}, {"topic": "to", "content": {"a": 1}, "meta": {"k": 2}}]},
        {"append": [{"topic": "to", "content_base64": "/w=="}], "out": [False, 0, "", [], {}]},
        {"out": "zw\\u00f6lf \\ud83e\\udd80"},
        {"out": 12345678901234567890123456789},
    ]
    for given in frames():
        answer(said.pop(0))
    """
    stream.register("says", program(text), topic="in")
    values = stream.add_all([("in",)] * 10)
    stream.finish("says", values[-1])
    assert stream.contents("says") == [
        "text", "a", b"\xff\x00", "false", "0", None, "[]", "{}", "zwölf 🦀",
        "12345678901234567890123456789",
    ]  # fmt: skip
    found = stream.frames("to")
    assert [each.content for each in found] == ["c", None, '{"a":1}', b"\xff"]
    assert [each.meta.get("k") for each in found] == [1, None, 2, None]


def test_white_space_and_the_order_of_keys_in_a_line_mean_nothing(stream: Stream) -> None:
    text = """
    for given in frames():
        print(' {"append" : [ ], "out":"x" } \\r', flush=True)
        given = next(frames())
        print('\\t null  ', flush=True)
    """
    stream.register("spaced", program(text), topic="in")
    stream.add_all([("in",)] * 4)
    stream.wait_for("spaced", 2)


BAD_LINES = [
    ("print('no JSON')", "not JSON: 'no JSON'"),
    ("print()", "not JSON: ''"),
    ("print('[]')", "an answer is null or"),
    ("print('5')", "an answer is null or"),
    ("print('{\"output\": 1}')", "an answer is null or"),
    ("print('{\"out\": NaN}')", "not JSON"),
    ("print('{\"out\": 1e999}')", "not JSON"),
    ("print('{\"state\": 1e999}')", "registered as stateful"),
    ("print('{\"out\": \"\\\\ud800\"}')", "not JSON"),
    ("print('{\"out\": {\"a\": \"\\\\ud800\"}}')", "not JSON"),
    ("print('{\"out\": ' + '[' * 500 + ']' * 500 + '}')", "nested deeper than 500 levels"),
    ("print('{\"out\": ' + '[' * 100000 + ']' * 100000 + '}')", "nested deeper than 500 levels"),
    ("print('{\"append\": 5}')", "append is a list of records"),
    ("print('{\"append\": [{}]}')", "each of append is a record with topic"),
    ("print('{\"append\": [{\"topic\": \"a\", \"more\": 1}]}')", "each of append is a record"),
    ("print('{\"append\": [{\"topic\": null}, {\"topic\": \"no topic\"}]}')", "not a topic"),
    ("print('{\"out\": {\"content_base64\": \"*\"}}')", "not base64"),
    ("print('{\"out\": {\"content_base64\": 5}}')", "not base64"),
    ("print('{\"out\": {\"content\": \"a\", \"content_base64\": \"YQ==\"}}')", "without content"),
    ("print('{\"error\": \"I give up\"}')", "I give up"),
    ("print('{\"error\": {\"code\": 5}}')", "5"),
    ("print('{\"error\": \"\\\\ud800\"}')", "?"),
    ("print(json.dumps({'error': 'x' * 3000000}))", "x" * ERROR_CHARACTERS),
    ("sys.stdout.buffer.write(b'\\xff\\xfe\\n')", "not JSON"),
    ("sys.exit(7)", "its process ended with status 7"),
    ("sys.exit(0)", "its process ended with status 0"),
    ("raise SystemExit('last words')", "its process ended with status 1"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "error"), BAD_LINES, ids=[each[0][:40] for each in BAD_LINES])
def test_a_line_that_is_wrong_ends_a_program_and_what_came_before_it_is_kept(
    shared: Stream, line: str, error: str
) -> None:
    name = f"bad{next(numbers)}"
    text = f"""
    for given in frames():
        if given["frame"]["meta"]["n"] == 1:
            {line}
            sys.stdout.flush()
            sys.stdin.read()
        answer({{"out": "fine"}})
    """
    shared.register(name, program(text), topic=f"in.{name}")
    values = shared.add_all((f"in.{name}", b"", {"n": n}) for n in range(3))
    told = shared.unregistered(name)
    assert error in told["error"]
    assert (told["frame_id"], told["position"]) == (values[1], values[0])
    assert shared.contents(name) == ["fine"]
    if "last words" in line:
        assert "last words" in told["stderr"]


@pytest.mark.parametrize("value", ['"\\\\ud800"', "1e999", '{"a": [1e999]}', "NaN"])
def test_a_state_that_is_not_quite_json_is_an_error(shared: Stream, value: str) -> None:
    name = f"state{next(numbers)}"
    text = f"""
    for given in frames():
        print('{{"state": {value}}}', flush=True)
    """
    shared.register(name, program(text), topic=f"in.{name}", stateful=True)
    shared.add(f"in.{name}")
    assert "not JSON" in shared.unregistered(name)["error"]


def test_a_line_that_nobody_asked_for_ends_a_program(shared: Stream) -> None:
    text = """
    for given in frames():
        answer({"out": "first"})
        answer({"out": "and another"})
    """
    shared.register("chatty", program(text), topic="in.chatty")
    shared.add("in.chatty")
    assert "no frame asked for" in shared.unregistered("chatty")["error"]
    assert shared.contents("chatty") == ["first"]


def test_a_line_without_an_end_ends_a_program(shared: Stream) -> None:
    text = f"""
    for given in frames():
        sys.stdout.write("x" * {LINE_BYTES + 1_000_000})
        sys.stdout.flush()
        sys.stdin.read()
    """
    shared.register("endless", program(text), topic="in.endless")
    value = shared.add("in.endless")
    told = shared.unregistered("endless")
    assert f"a line of more than {LINE_BYTES} bytes" in told["error"]
    assert told["frame_id"] == value


def test_a_program_that_is_slow_is_waited_for_or_timed_out(stream: Stream) -> None:
    text = """
    import time
    for given in frames():
        time.sleep(given["frame"]["meta"]["n"])
        answer({"out": given["frame"]["meta"]["n"]})
    """
    stream.register("patient", program(text), topic="in")
    stream.register("hurried", program(text), topic="in", timeout=500)
    stream.add_all(("in", b"", {"n": n}) for n in (0, 1.2, 0))
    assert "its timeout of 500 ms" in stream.unregistered("hurried")["error"]
    stream.wait_for("patient", 3)
    assert stream.contents("hurried") == ["0"]


def test_a_program_that_is_killed_goes_on(stream: Stream) -> None:
    text = """
    for given in frames():
        answer({"state": given["state"] + 1, "out": given["state"]})
    """
    stream.register("goes", program(text), topic="in", stateful=True, initial_state=0)
    for n in range(0, 60, 20):
        stream.add_all([("in",)] * 20)
        stream.wait_past("goes", n)
        stream.kill("goes")
        stream.wait_for("goes", n + 20)
    assert stream.contents("goes") == [str(n) for n in range(60)]


@pytest.mark.parametrize(
    ("script", "error"),
    [
        ("#!/no/such/program\n", "no such program: '/no/such/program'"),
        ("#!\n", "no such program"),
        ("#!python3\n", "no such program: 'python3'"),
    ],
)
def test_a_program_that_is_not_there_is_refused(shared: Stream, script: str, error: str) -> None:
    assert error in shared.refused(f"program{next(numbers)}", script)


def test_a_program_with_a_syntax_error_says_so(shared: Stream) -> None:
    shared.add("broken.register", f"#!{sys.executable}\nthis is no Python\n")
    told = shared.unregistered("broken")
    assert "SyntaxError" in told["stderr"]


def test_a_program_is_given_contents_when_it_asks_for_them(stream: Stream) -> None:
    text = """
    for given in frames():
        frame = given["frame"]
        answer({"out": [frame.get("content"), frame.get("content_base64")]})
    """
    stream.register("reads", program(text), topic="in", content=True)
    stream.add("in", "ü\u2028\n")
    stream.add("in", b"\xff" * 30_000)
    stream.wait_for("reads", 2)
    assert stream.contents("reads") == ["ü\u2028\n", base64.b64encode(b"\xff" * 30_000).decode()]


# ---- Many at once ------------------------------------------------------------------------------


def test_many_frames_are_given_ahead_and_answered_in_order(stream: Stream) -> None:
    stream.register("many", SEE, topic="in")
    for start in range(0, 9000, 3000):
        stream.add_all(("in", b"", {"n": n}) for n in range(start, start + 3000))
    stream.wait(lambda: len(stream.frames("many")) >= 9000, "9,000 outputs")
    assert stream.contents("many") == [str(n) for n in range(9000)]
    assert stream.causes("many") == [each.id for each in stream.frames("in")]


def test_frames_that_cause_much_are_committed_in_order(stream: Stream) -> None:
    closure = """{|frame, n|
        {state: ($n + 1), out: (1..3000 | each {|k| $'($frame.meta.n) ($k)' })}
    }"""
    stream.register("much", closure, topic="in", stateful=True, initial_state=0)
    stream.add_all(("in", b"", {"n": n}) for n in range(5))
    stream.wait(lambda: stream.state("much") == 5, "all five are finished")
    assert stream.contents("much") == [f"{n} {k}" for n in range(5) for k in range(1, 3001)]


def test_a_program_that_is_slow_to_read_is_given_all_in_order(stream: Stream) -> None:
    text = """
    import time
    time.sleep(0.5)
    for n, given in enumerate(frames()):
        if n % 10 == 0:
            time.sleep(0.02)
        answer({"out": given["frame"]["meta"]["n"]})
    """
    stream.register("late", program(text), topic="in")
    ballast = "y" * 100_000
    for start in range(0, 60, 10):
        stream.add_all(("in", b"", {"n": n, "b": ballast}) for n in range(start, start + 10))
    stream.wait_for("late", 60)
    assert stream.contents("late") == [str(n) for n in range(60)]


def test_frames_with_much_in_them_are_given_in_order(stream: Stream) -> None:
    stream.register("heavy", "{|frame| $'($frame.meta.n) ($frame.content | str length)' }",
                    topic="in", content=True, run_from="start")  # fmt: skip
    sizes = [(n * 37_777) % 300_000 for n in range(1, 61)]
    for n, size in enumerate(sizes):
        stream.add("in", b"x" * size, {"n": n, "ballast": "y" * (size // 10)})
    stream.wait_for("heavy", 60)
    assert stream.contents("heavy") == [f"{n} {size}" for n, size in enumerate(sizes)]


def _numbers() -> Iterator[int]:
    number = 0
    while True:
        yield number
        number += 1


numbers = _numbers()
