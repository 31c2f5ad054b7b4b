"""Delivery to followers that have caught up, with real sockets and a real store."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Optional

import pytest
from conftest import DEADLINE, until

from xs import frame, query
from xs.commit import Append
from xs.delivery import Delivery, Follower
from xs.reader import LIVE_BYTES, Reader
from xs.store import Store


class Line:
    """A connection without a server: its client's end is `client`."""

    def __init__(self, *, chunked: bool = False) -> None:
        self.sock, self.client = socket.socketpair()
        self.client.settimeout(DEADLINE)
        self.chunked = chunked
        self.resumed: list[Follower] = []
        self.ended = threading.Event()
        self.dropped = threading.Event()
        self.again = threading.Event()

    def resume(self, follower: Follower) -> None:
        self.resumed.append(follower)
        self.again.set()

    def end_following(self) -> None:
        self.sock.close()
        self.ended.set()

    def drop(self) -> None:
        self.sock.close()
        self.dropped.set()

    def line(self) -> bytes:
        """What comes next, up to a newline."""
        found = b""
        while not found.endswith(b"\n"):
            data = self.client.recv(1)
            if not data:
                raise EOFError(found)
            found += data
        return found


class Desk:
    """A store with its delivery, and the lines that follow it."""

    def __init__(self, folder: str) -> None:
        self.store = Store(folder, exclusive=True, create=True)
        self.delivery = Delivery(self.store)
        self.lines: list[Line] = []

    def follow(
        self,
        topics: Optional[str] = None,
        *,
        chunked: bool = False,
        sse: bool = False,
        park: bool = True,
        **options: object,
    ) -> tuple[Line, Follower]:
        line = Line(chunked=chunked)
        self.lines.append(line)
        patterns = None if topics is None else frame.parse_patterns(topics)
        wanted = query.ReadOptions(follow=True, patterns=patterns, **{"new": True, **options})  # type: ignore[arg-type]
        follower = Follower(line, Reader(self.store, wanted, sse=sse))
        if park:
            while not self.delivery.park(follower):
                entries = self.store.bus.after(follower.reader.position)
                assert entries is not None
                line.sock.sendall(follower.framed(follower.reader.live(entries) or b"\n"))
        return line, follower

    def append(self, topic: str, ttl: str = "forever", meta: str = "null") -> bytes:
        return self.store.append(Append(topic, None, meta, ttl)) + b"\n"

    def close(self) -> None:
        self.delivery.stop()
        self.store.close()
        for line in self.lines:
            line.client.close()
            line.sock.close()


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    found = Desk(str(tmp_path / "store"))
    yield found
    found.close()


def test_a_parked_follower_gets_each_frame_as_it_comes(desk: Desk) -> None:
    line, _ = desk.follow()
    for n in range(20):
        assert desk.append("t", meta=str(n)) == line.line()


def test_each_kind_of_follower_gets_its_own_form(desk: Desk) -> None:
    plain, chunks = desk.follow()[0], desk.follow(chunked=True)[0]
    events = desk.follow(sse=True)[0]
    stamped = desk.follow(with_timestamp=True)[0]
    made = desk.append("t")
    assert plain.line() == made
    assert chunks.line() == b"%x\r\n" % len(made)
    assert chunks.line() == made and chunks.line() == b"\r\n"
    assert events.line() == b"id: %s\n" % json.loads(made)["id"].encode()
    assert events.line() == b"data: " + made and events.line() == b"\n"
    assert list(json.loads(stamped.line()))[-1] == "timestamp"


def test_overlapping_patterns_give_each_frame_once_and_in_order(desk: Desk) -> None:
    wants = {
        "*": lambda t: True,
        "a": lambda t: t == "a",
        "a.*": lambda t: t.startswith("a."),
        "a.*,a.b,a.b.*": lambda t: t.startswith("a."),
        "b,a": lambda t: t in ("a", "b"),
        "a,a.b.c,a.b.*": lambda t: t == "a" or t.startswith("a.b."),
        "c": lambda t: False,
    }
    lines = {topics: [desk.follow(topics)[0] for _ in range(2)] for topics in wants}
    topics = ["a", "a.b", "a.b.c", "b", "ab", "a.bc", "a.b.c.d"] * 3
    made = [(topic, desk.append(topic)) for topic in topics]
    end = desk.append("z")
    for text, wanted in wants.items():
        for line in lines[text]:
            for topic, data in made:
                if wanted(topic):
                    assert line.line() == data
            if text == "*":
                assert line.line() == end
            line.client.setblocking(False)
            with pytest.raises(BlockingIOError):
                line.client.recv(1)


def test_who_has_something_to_read_yet_is_not_parked(desk: Desk) -> None:
    parked, _ = desk.follow()
    late, follower = desk.follow(park=False)
    made = desk.append("t")
    assert parked.line() == made  # so it was dispatched
    until(lambda: not desk.delivery.park(follower))
    entries = desk.store.bus.after(follower.reader.position)
    assert entries is not None and follower.reader.live(entries) == made
    assert desk.delivery.park(follower)
    assert desk.append("t") == late.line()


def test_who_is_ahead_of_the_delivery_gets_nothing_twice(desk: Desk) -> None:
    """A reader may have taken from the bus what the delivery has yet to send."""
    for _ in range(200):
        line, follower = desk.follow(park=False)
        expected = [desk.append("t")]
        entries = desk.store.bus.after(follower.reader.position)
        assert entries is not None and follower.reader.live(entries) == expected[0]
        while not desk.delivery.park(follower):
            assert not desk.store.bus.after(follower.reader.position)
        assert desk.append("t") == line.line()
        line.client.close()
        assert line.dropped.wait(DEADLINE)


def test_a_slow_follower_gets_the_rest_of_its_bytes_and_what_it_missed(desk: Desk) -> None:
    slow, follower = desk.follow(chunked=True)
    quick, _ = desk.follow()
    slow.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    sent = []
    meta = '"' + "m" * 20_000 + '"'
    while not slow.again.is_set():
        sent.append(desk.append("t", meta=meta))
        assert quick.line() == sent[-1]
    assert slow.resumed == [follower] and not follower.is_parked
    sent.append(desk.append("t"))
    assert quick.line() == sent[-1]  # the others go on meanwhile

    def go_on() -> None:
        slow.sock.setblocking(True)
        slow.sock.sendall(bytes(follower.unsent))
        entries = desk.store.bus.after(follower.reader.position)
        assert entries is not None
        slow.sock.sendall(follower.framed(follower.reader.live(entries)))
        assert desk.delivery.park(follower)

    thread = threading.Thread(target=go_on)
    thread.start()
    got = b""
    for _ in sent:
        size = int(slow.line(), 16)
        data = b""
        while len(data) < size + 2:
            data += slow.client.recv(size + 2 - len(data))
        got += data[:-2]
    assert got == b"".join(sent)
    thread.join(DEADLINE)
    desk.append("t")
    assert int(slow.line(), 16) > 0


@pytest.mark.parametrize("limit", [None, 9])
def test_a_large_content_is_left_to_a_thread_of_who_wants_it(
    desk: Desk, limit: Optional[int]
) -> None:
    """One thread sends to all: it makes a bounded amount for one after the other."""
    wants, follower = desk.follow(with_content=True, limit=limit)
    plain, _ = desk.follow()
    made = desk.append("t")
    assert wants.line() == plain.line() == made
    large = desk.store.append(Append("t", desk.store.cas.take([b"x" * (LIVE_BYTES + 1)]))) + b"\n"
    assert plain.line() == large
    assert wants.again.wait(DEADLINE)
    assert wants.resumed == [follower] and not follower.is_parked
    assert not follower.unsent  # nothing of it was made
    last = desk.append("t")
    reader = follower.reader
    missed = reader.missed()
    if missed is None:  # the thread that sends to all has not looked at it for this one alone
        assert reader.coming() == b""
        missed = reader.missed()
    assert missed is not None
    parts = list(missed)
    assert json.loads(b"".join(parts))["content"] == "x" * (LIVE_BYTES + 1)
    assert max(map(len, parts)) <= LIVE_BYTES
    assert reader.missed() is None and reader.coming() == last and reader.coming() is None
    assert plain.line() == last


@pytest.mark.parametrize("with_content", [False, True])
def test_a_follower_that_has_fallen_behind_reads_a_bounded_amount_at_a_time(
    desk: Desk, with_content: bool
) -> None:
    _, follower = desk.follow(with_content=with_content, park=False)
    size, count = 100_000, 30
    content = None if with_content else "m" * size
    made = []
    for _ in range(count):
        taken = desk.store.cas.take([b"x" * size]) if with_content else None
        made.append(desk.store.append(Append("t", taken, json.dumps(content))))
    blocks = []
    while (block := follower.reader.coming()) is not None:
        assert len(block) < LIVE_BYTES + size + 1000
        blocks.append(block)
    found = [json.loads(line)["id"] for line in b"".join(blocks).splitlines()]
    assert found == [json.loads(line)["id"] for line in made]


def test_limit_ends_a_follower_after_its_last_frame(desk: Desk) -> None:
    line, _ = desk.follow("a", limit=2)
    other, _ = desk.follow("a")
    made = [desk.append(topic) for topic in ("b", "a", "b", "a", "a")]
    assert [line.line(), line.line()] == [made[1], made[3]]
    assert line.ended.wait(DEADLINE)
    assert line.client.recv(1) == b""
    assert [other.line() for _ in range(3)] == [made[1], made[3], made[4]]


@pytest.mark.parametrize("pulse", [None, 3_600_000])
def test_until_ends_a_follower_when_its_time_has_passed(desk: Desk, pulse: Optional[int]) -> None:
    bound = (desk.store.clock() + 60 << 80) - 1
    line, _ = desk.follow("a", until=bound, pulse=pulse)
    made = desk.append("a")
    assert line.line() == made
    assert line.ended.wait(DEADLINE)
    assert line.client.recv(1) == b""


def test_ephemeral_frames_are_delivered(desk: Desk) -> None:
    line, _ = desk.follow()
    assert desk.append("t", ttl="ephemeral") == line.line()


def test_a_frame_that_was_removed_is_not_delivered_by_who_catches_up(desk: Desk) -> None:
    _, follower = desk.follow(park=False)
    desk.append("t", ttl="last:1", meta="1")
    newest = desk.append("t", ttl="last:1", meta="2")
    entries = desk.store.bus.after(follower.reader.position)
    assert entries is not None and follower.reader.live(entries) == newest


# Pulses


def test_looking_at_until_sends_no_pulse_before_its_time(desk: Desk) -> None:
    started = time.monotonic()
    line, _ = desk.follow("none", until=(desk.store.clock() + 1300 << 80) - 1, pulse=500)
    assert line.ended.wait(DEADLINE)
    most = (time.monotonic() - started) / 0.5
    pulses = b"".join(iter(lambda: line.client.recv(4096), b"")).count(b"xs.pulse")
    assert 2 <= pulses <= most


def test_pulses_keep_in_step_and_make_up_for_nothing(desk: Desk) -> None:
    started = time.monotonic()
    line, follower = desk.follow("none", pulse=20)
    pulse = json.loads(line.line())
    assert pulse["topic"] == "xs.pulse" and pulse["ttl"] == "ephemeral"
    first = follower.due
    for _ in range(10):
        assert json.loads(line.line())["topic"] == "xs.pulse"
    assert time.monotonic() - started >= 0.2
    assert first is not None and follower.due is not None
    steps = (follower.due - first) / 0.02
    assert abs(steps - round(steps)) < 0.001  # no drift


def test_a_pulse_comes_though_the_delivery_has_just_begun_to_wait(desk: Desk) -> None:
    for _ in range(100):
        line, _ = desk.follow("none", pulse=10)
        assert b"xs.pulse" in line.line()
        line.client.close()
        assert line.dropped.wait(DEADLINE)


def test_a_pulse_carries_a_position_to_resume_from(desk: Desk) -> None:
    line, _ = desk.follow("a", pulse=10)
    made = desk.append("b")
    while json.loads(line.line())["id"] < json.loads(made)["id"]:
        pass


def test_pulses_and_frames_share_a_line(desk: Desk) -> None:
    line, _ = desk.follow(pulse=10)
    for _ in range(10):
        made = desk.append("t")
        while (got := line.line()) != made:
            assert b"xs.pulse" in got


def test_followers_that_left_are_not_kept_until_their_pulse(desk: Desk) -> None:
    for _ in range(300):
        line, _ = desk.follow("none", pulse=10**9)
        line.client.close()
        assert line.dropped.wait(DEADLINE)
    assert len(desk.delivery._pulses) < 150


# Clients that go away


def test_a_client_that_goes_away_is_noticed_at_once(desk: Desk) -> None:
    line, follower = desk.follow("none")
    line.client.close()
    assert line.dropped.wait(DEADLINE)
    assert not follower.is_parked


def test_a_client_that_sends_no_more_is_served_until_it_goes_away(desk: Desk) -> None:
    line, _ = desk.follow("t")
    other, _ = desk.follow("none")
    for one in (line, other):
        one.client.shutdown(socket.SHUT_WR)
    for _ in range(3):
        assert desk.append("t") == line.line()
    for one in (line, other):
        one.client.close()
        assert one.dropped.wait(DEADLINE)


def test_what_a_follower_s_client_says_is_passed_over(desk: Desk) -> None:
    line, _ = desk.follow()
    line.client.sendall(b"x" * 100_000)
    assert desk.append("t") == line.line()


def test_content_that_is_damaged_ends_those_who_want_it_and_nobody_else(
    desk: Desk, tmp_path: Path
) -> None:
    content = desk.store.cas.take([os.urandom(100_000)])
    assert content is not None
    wants, _ = desk.follow(with_content=True)
    bounded, _ = desk.follow(with_content=True, limit=5)
    plain, _ = desk.follow()
    with open(content.path or "", "r+b") as file:  # the disk's fault, between its hash and its name
        file.write(b"damaged")
    made = desk.store.append(Append("t", content)) + b"\n"
    assert plain.line() == made
    assert wants.dropped.wait(DEADLINE) and bounded.dropped.wait(DEADLINE)
    assert desk.append("t") == plain.line()
    again, _ = desk.follow(with_content=True)
    assert desk.append("t") == again.line()


# The end


def test_stop_sends_what_is_left_and_ends_everybody(tmp_path: Path) -> None:
    desk = Desk(str(tmp_path / "store"))
    lines = [desk.follow(topics)[0] for topics in (None, "t", "none", "t.*,t")]
    sleeper, _ = desk.follow("none", pulse=10**6)
    made = [desk.append("t") for _ in range(50)]
    desk.delivery.stop()
    for line, expected in zip(lines, (made, made, [], made)):
        assert line.ended.is_set()
        assert [line.line() for _ in expected] == expected
        assert line.client.recv(1) == b""
    assert sleeper.ended.is_set()
    _late, follower = desk.follow(park=False)
    assert not desk.delivery.park(follower)
    desk.store.close()
    for line in desk.lines:
        line.client.close()
        line.sock.close()
