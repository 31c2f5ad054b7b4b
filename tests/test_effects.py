"""Chunked contents that handlers write: piece by piece, over many frames, and over kills.

What else an answer causes is in test_handlers.py and test_exactly_once.py.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import start_server, until
from handling import Stream, program

import xs
from xs import chunked, ids
from xs.commit import Append
from xs.errors import BrokenBody, Invalid
from xs.work import RemoveWork

WRITER = "{|frame| {content: $frame.content?, more: $frame.meta.more} }"
WRITER_IN_PYTHON = """
for given in frames():
    frame = given["frame"]
    answer({"out": {"topic": "parts", "content": frame["content"], "more": frame["meta"]["more"],
                    "meta": {"n": frame["content"]}}})
"""


@pytest.fixture
def stream(store_dir: str) -> Iterator[Stream]:
    running = Stream(store_dir)
    yield running
    running.close()


def feed(stream: Stream, *parts: str, last: bool = True) -> str:
    """Has a handler write these parts, the last of which ends the content; the last frame's id."""
    events = [
        ("in", part, {"more": n + 1 < len(parts) or not last}) for n, part in enumerate(parts)
    ]
    return stream.add_all(events)[-1]


def metas(stream: Stream, topic: str) -> list[Any]:
    """The meta of a topic's frames, without what tells their causes."""
    return [
        {k: v for k, v in each.meta.items() if k not in ("handler_id", "frame_id")}
        for each in stream.frames(topic)
    ]


def content(stream: Stream, first: str) -> bytes:
    """A content as its readers get it, waiting for what is still to come."""
    return b"".join(chunked.content(stream.store, ids.parse(first))[1])


def firsts(stream: Stream, topic: str) -> list[str]:
    return [each.id for each in stream.frames(topic) if "chunk" not in each.meta]


@pytest.mark.parametrize("script", [WRITER, program(WRITER_IN_PYTHON)], ids=["Nushell", "Python"])
def test_a_handler_writes_a_content_over_many_frames(stream: Stream, script: str) -> None:
    topic = "w" if script is WRITER else "parts"
    stream.register("w", script, topic="in", content=True)
    stream.finish("w", feed(stream, "It was ", "a dark ", "night."))
    (first,) = firsts(stream, topic)
    assert content(stream, first) == b"It was a dark night."
    own = {"n": "It was "} if topic == "parts" else {}
    assert metas(stream, topic) == [
        {**own, "more": True},
        {"chunk": first, "more": True},
        {"chunk": first, "more": False},
    ]
    assert stream.causes(topic) == [each.id for each in stream.frames("in")]


def test_it_is_read_while_it_is_written(stream: Stream) -> None:
    stream.register("w", WRITER, topic="in", content=True)
    feed(stream, "one ", last=False)
    stream.wait_for("w", 1)
    blocks = chunked.content(stream.store, ids.parse(firsts(stream, "w")[0]))[1]
    assert next(blocks) == b"one "
    feed(stream, "two", last=False)
    assert next(blocks) == b"two"
    feed(stream, "")
    assert list(blocks) == []


def test_one_answer_may_hold_all_of_it_and_begin_the_next(stream: Stream) -> None:
    parts = "[[content more]; [a true] [b true] [c false] [d false] [e true]]"
    stream.register("w", f"{{|frame| {parts} }}", topic="in")
    stream.finish("w", stream.add("in"))
    found = firsts(stream, "w")
    assert [content(stream, each) for each in found[:2]] == [b"abc", b"d"]
    stream.finish("w", stream.add("in"))  # goes on with the third: e, then a, b and the end, c
    assert content(stream, found[2]) == b"eabc"


def test_contents_on_several_topics_are_apart(stream: Stream) -> None:
    stream.register(
        "w", "{|frame| {topic: $frame.meta.to, content: $frame.meta.is, more: $frame.meta.more} }",
        topic="in",
    )  # fmt: skip
    events = [("a", "1", True), ("b", "x", True), ("a", "2", False), ("b", "y", False)]
    added = [("in", "", {"to": to, "is": part, "more": more}) for to, part, more in events]
    stream.finish("w", stream.add_all(added)[-1])
    found = {topic: content(stream, firsts(stream, topic)[0]) for topic in ("a", "b")}
    assert found == {"a": b"12", "b": b"xy"}


def test_large_pieces_are_cut_and_bytes_are_bytes(stream: Stream) -> None:
    stream.register("w", program("""
        for given in frames():
            text = "\u00fc" * 50_000
            answer({"out": [{"content": text, "more": True},
                            {"content_base64": "AP+A", "more": False}]})
    """), topic="in")  # fmt: skip
    stream.finish("w", stream.add("in"))
    assert content(stream, firsts(stream, "w")[0]) == ("ü" * 50_000).encode() + b"\x00\xff\x80"
    assert len(stream.frames("w")) == 8  # 100,000 bytes in seven, and the last


def test_a_handler_is_not_given_what_it_writes(stream: Stream) -> None:
    stream.register("w", '{|frame| if $frame.topic == "in" {{content: "x", more: false}} }')
    stream.finish("w", stream.add("in"))
    last = stream.add("other")
    stream.finish("w", last)
    assert stream.answered("w") == 2
    assert len(stream.frames("w")) == 2


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ("{content: a, more: 1}", "more is true or false"),
        ("{content: a, more: true, ttl: ephemeral}", "can't be ephemeral"),
        ("{content: a, more: true, meta: {chunk: 1}}", "says by itself what chunk is"),
    ],
)
def test_what_can_not_be_such_a_content_ends_the_handler(
    stream: Stream, record: str, says: str
) -> None:
    stream.register("w", f"{{|frame| {record} }}", topic="in")
    stream.add("in")
    assert says in stream.unregistered("w")["error"]
    assert stream.frames("w") == []


@pytest.mark.parametrize("how", ["unregister", "an error", "another registration"])
def test_who_leaves_service_breaks_off_what_it_was_writing(stream: Stream, how: str) -> None:
    script = "{|frame| if $frame.content? == null { error make {msg: gone} }; " + WRITER[9:]
    stream.register("w", script, topic="in", content=True)
    stream.finish("w", feed(stream, "part", last=False))
    if how == "unregister":
        stream.add("w.unregister")
    elif how == "an error":
        stream.add("in")
    else:
        stream.register("w", WRITER, topic="in", content=True)
    stream.unregistered("w")
    (first,) = firsts(stream, "w")
    with pytest.raises(BrokenBody):
        content(stream, first)
    assert metas(stream, "w")[-1]["error"].startswith("its handler is out of service")
    assert stream.frames("w")[-1].id > stream.frames("w.unregistered")[0].id


def test_nobody_can_go_on_with_it_in_the_handler_s_place(stream: Stream) -> None:
    source = stream.register("w", WRITER, topic="in", content=True)
    stream.finish("w", feed(stream, "part", last=False))
    first = ids.parse(firsts(stream, "w")[0])
    with pytest.raises(Invalid, match="no other process"):
        chunked.go_on(
            stream.store, Append("w"), f"script-{source}.w", first, first, [b"x"],
            ended=False, error_text=None,
        )  # fmt: skip
    stream.finish("w", feed(stream, "."))
    assert content(stream, ids.text(first)) == b"part."


def test_a_content_that_was_removed_is_begun_anew(stream: Stream) -> None:
    stream.register("w", WRITER, topic="in", content=True)
    stream.finish("w", feed(stream, "old", last=False))
    stream.store.run(RemoveWork(ids.parse(firsts(stream, "w")[0])))
    stream.finish("w", feed(stream, "new"))
    (first,) = firsts(stream, "w")
    assert content(stream, first) == b"new"


def test_a_content_whose_time_has_passed_is_begun_anew(stream: Stream) -> None:
    stream.register("w", "{|frame| {content: a, more: true, ttl: 'time:1'} }", topic="in")
    stream.finish("w", stream.add("in"))
    until(lambda: stream.frames("w") == [], "it has expired")
    stream.finish("w", stream.add("in"))
    assert stream.is_running("w")


def test_it_goes_on_after_a_stop_and_while_no_server_runs_it_is_not_broken_off(
    stream: Stream,
) -> None:
    stream.register("w", WRITER, topic="in", content=True)
    stream.finish("w", feed(stream, "before, ", last=False))
    stream.stop()
    stream.offline([("in", "after", {"more": False})])
    stream.start()
    stream.finish("w", stream.frames("in")[-1].id)
    (first,) = firsts(stream, "w")
    assert content(stream, first) == b"before, after"


def test_whenever_the_server_is_killed_each_content_has_each_piece_once(store_dir: str) -> None:
    seed = random.randrange(10**6)
    print("seed:", seed)
    chance = random.Random(seed)
    count, each = 600, 20
    server = start_server(store_dir)
    with xs.open(store_dir) as store:
        meta = {"run-from": "start", "topic": "in", "content": True}
        store.append("w.register", program(WRITER_IN_PYTHON), meta=meta)
    for start in range(0, count, 100):
        with xs.open(store_dir) as store:
            store.append_many(
                {"topic": "in", "content": f"{n}\n", "meta": {"more": (n + 1) % each > 0}}
                for n in range(start, start + 100)
            )
            after = chance.randrange(start, start + 100)
            until(lambda: pieces_of(store) >= after, "so many pieces")  # noqa: B023
            threading.Event().wait(chance.random() * 0.01)
        server.process.kill()
        server.stop()
        server = start_server(store_dir)
    with xs.open(store_dir) as store:
        until(lambda: pieces_of(store) >= count, "all pieces")
        found = [store.content(first) for first in store.cat(topic="parts", no_chunks=True)]
    server.stop()
    numbers = [[int(line) for line in text.split()] for text in found]
    assert numbers == [list(range(n, n + each)) for n in range(0, count, each)]


def pieces_of(store: xs.Client) -> int:
    return sum(1 for _ in store.cat(topic="parts"))
