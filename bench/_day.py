"""A day of a store in two minutes: `tools/soak --day [HOURS [SECONDS]]` (see there).

One server whose clock runs fast (`_fast.py`), and on it what a day is made of: followers with
pulses of a minute to an hour, and some that come, are told that they are up to date, and go;
frames that expire after a minute to two hours; a generator that tells the time.

What is looked at: that the pulses are as many as the hours say, at their times by the server's own
clock, none of them drifting; that frames are gone when their time has passed; that memory, open
files and threads do not grow.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import sqlite3
import sys
import tempfile
import threading
import time
from collections.abc import Iterator

import _soak
from _fast import fast
from _soak import NDJSON, RING_FRAMES, Connection, Sample, Server, Wrong, batch, judge, script, told

HOURS, SECONDS = 24.0, 120.0
PULSES = (60, 120, 300, 600, 900, 1800, 3600)  # seconds between two, of three followers each
EACH = 3
TTLS = (60, 600, 3600, 7200)  # seconds
MISSED = 0.2  # of a follower's pulses, at most: what is missed on a busy machine isn't made up for
LATE_SECONDS = 1.5  # of a real clock, for a frame whose time has passed to be gone
SAMPLE_SECONDS = 0.25


class Follower:
    """One with pulses, and when they were sent, in milliseconds of the server's clock."""

    def __init__(self, server: Server, pulse: int) -> None:
        self.pulse = pulse
        self.times: list[int] = []
        self.thresholds = 0
        self.ticks = 0
        self._connection = server.connect()
        target = f"/?follow={pulse * 1000}&topic=tick.recv&with-timestamp"
        self._connection.send("GET", target)
        self._connection.head()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        for block in iter(self._connection.chunk, b""):
            for line in block.splitlines():
                told = json.loads(line)
                if told["topic"] == "xs.pulse":
                    self.times.append(milliseconds(told["timestamp"]))
                self.thresholds += told["topic"] == "xs.threshold"
                self.ticks += told["topic"] == "tick.recv"

    def join(self) -> None:
        self._thread.join(_soak.DEADLINE)
        self._connection.sock.close()
        if self._thread.is_alive():
            raise Wrong("a follower is not ended by the server's end")

    def judge(self, seconds: float) -> None:
        """Raises `Wrong` unless its pulses are those of so many seconds."""
        expected = seconds / self.pulse
        found = len(self.times)
        name = f"with a pulse each {self.pulse} s"
        if self.thresholds != 1:
            raise Wrong(f"{name}: {self.thresholds} thresholds")
        if not expected * (1 - MISSED) - 2 <= found <= expected + 2:
            raise Wrong(f"{name}: {found} pulses in {seconds:.0f} s, and not {expected:.1f}")
        # One alone may be late, as any thread may be, or missed. If that made the next ones late,
        # it would add up: by a pulse or more, and half of them were off by more than half of one.
        step = self.pulse * 1000
        first = min(at - n * step for n, at in enumerate(self.times[:8]))
        late = sum(0.5 < (at - first) / step % 1 < 0.9 for at in self.times)
        if late > 1 + found // 4:
            raise Wrong(f"{name}: {late} of {found} are off by more than half of it")


def milliseconds(timestamp: str) -> int:
    import datetime

    at = datetime.datetime.fromisoformat(timestamp.replace("Z", "+00:00"))
    return round(at.timestamp() * 1000)


class Expiry:
    """Frames that expire, and those that come too late."""

    def __init__(self, server: Server, speed: float, origin: float) -> None:
        self._server = server
        self._speed, self._origin = speed, origin
        self._index = os.path.join(server.root, "xs.db")
        self.appended = 0

    def append(self, connection: Connection, chance: random.Random) -> None:
        ttl = chance.choice(TTLS)
        body = b"x" * chance.choice([10, 20_000])
        connection.ask("POST", f"/append/expires.{ttl}?ttl=time:{ttl * 1000}", body)
        self.appended += 1

    def check(self) -> None:
        """Raises `Wrong` if something is there whose time passed a while ago."""
        before = fast(time.time() - LATE_SECONDS, self._speed, self._origin) * 1000
        with contextlib.closing(sqlite3.connect(self._index)) as index:
            query = "SELECT count(*) FROM frame WHERE expires < ?"
            (count,) = index.execute(query, (int(before),)).fetchone()
        if count:
            raise Wrong(f"{count} frames are there whose time has passed")


def day(hours: float = HOURS, seconds: float = SECONDS) -> Iterator[str]:
    """Runs it; gives what there is to tell, line by line. Raises `Wrong`."""
    speed, origin = hours * 3600 / seconds, time.time()
    launcher = os.path.join(os.path.dirname(os.path.abspath(__file__)), "_fast.py")
    folder = tempfile.mkdtemp(prefix="xs-day-")
    server = Server(folder, [launcher, str(speed), str(origin)])
    try:
        with server.connect() as connection:
            body = batch("load.fill", RING_FRAMES, "forever")
            connection.ask("POST", "/append", body, "Content-Type: " + NDJSON)
            tick = script(f"while sleep {600 / speed:.4f}; do echo tick; done")
            connection.ask("POST", "/append/tick.spawn", tick)
        yield f"{hours:g} hours in {seconds:g} s: a clock that is {speed:.0f} times as fast"
        samples: list[Sample] = []
        followers = [Follower(server, pulse) for pulse in PULSES for _ in range(EACH)]
        started = time.monotonic()
        expiry = Expiry(server, speed, origin)
        visits = live(server, expiry, samples, started + seconds)
        passed = (time.monotonic() - started) * speed
        stopped = server.stop()
        for follower in followers:
            follower.join()
            follower.judge(passed)
        pulses = sum(len(follower.times) for follower in followers)
        expected = sum(EACH * passed / pulse for pulse in PULSES)
        yield f"{pulses} pulses, of {expected:.0f}, to {len(followers)} followers; none drifts"
        yield f"{expiry.appended} frames that expire, each gone in time; {visits} visitors"
        ticks = followers[0].ticks
        if not passed / 600 * 0.8 - 2 <= ticks <= passed / 600 + 1:
            raise Wrong(f"{ticks} of a generator's frames in {passed:.0f} s, one each 600 s")
        yield f"{ticks} frames of a generator"
        yield from judge(samples)
        yield f"stopped in {stopped:.1f} s"
        if server.said():
            raise Wrong(f"the log has: {server.said()[:2000]}")
        _soak.check(server.root)
        yield "checked: the store is whole"
    finally:
        with contextlib.suppress(ProcessLookupError):
            server.process.kill()
        server.process.wait()
        server.log.close()
        shutil.rmtree(folder, ignore_errors=True)


def live(server: Server, expiry: Expiry, samples: list[Sample], end: float) -> int:
    """Appends what expires, lets visitors come and go, and looks, until `end`; how many came."""
    chance = random.Random()
    visits = 0
    with server.connect() as connection:
        while time.monotonic() < end:
            for _ in range(5):
                expiry.append(connection, chance)
            with server.connect() as visitor:
                visitor.send("GET", "/?follow&last=1&topic=load.fill")
                visitor.head()
                told = visitor.chunk()
                while b"xs.threshold" not in told:
                    told += visitor.chunk()
            visits += 1
            expiry.check()
            samples.append(server.sample())
            time.sleep(SAMPLE_SECONDS)
    return visits


if __name__ == "__main__":
    sys.exit(told(day(*map(float, sys.argv[1:]))))
