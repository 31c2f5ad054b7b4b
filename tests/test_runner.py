"""A runner's thread is woken by others, and no wake-up is lost."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from xs.process import Processes
from xs.runner import Context, Runner
from xs.store import Store

DEADLINE = 10.0


class Counting(Runner):
    """Has no process; notes what it has seen asked for."""

    kind = "counting"

    def __init__(self, context: Context) -> None:
        super().__init__(context, "counting")
        self.source = 1
        self.asked = 0
        self.seen = 0

    def step(self) -> None:
        self.seen = self.asked
        self.select(DEADLINE * 2)

    def leave(self) -> None:
        pass


@pytest.fixture
def runner(tmp_path: Path) -> Iterator[Counting]:
    store = Store(str(tmp_path / "store"), exclusive=True, create=True)
    processes = Processes(str(tmp_path / "run"), {})
    running = Counting(Context(store, processes, print, lambda _: False))
    running.start()
    yield running
    running.stop()
    running.join()
    processes.close()
    store.close()


@pytest.fixture
def switching() -> Iterator[None]:
    """Threads that take turns as often as they can, so that what may go wrong does."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_a_runner_that_is_woken_while_it_wakes_up_looks_again(
    runner: Counting, switching: None
) -> None:
    ended = threading.Event()

    def disturb() -> None:
        while not ended.is_set():
            runner.wake()

    others = [threading.Thread(target=disturb) for _ in range(2)]
    for other in others:
        other.start()
    until = time.monotonic() + 2
    while time.monotonic() < until:
        runner.asked += 1
        runner.wake()
    ended.set()
    for other in others:
        other.join()
    runner.asked += 1
    runner.wake()
    deadline = time.monotonic() + DEADLINE
    while runner.seen != runner.asked:
        assert time.monotonic() < deadline, "a wake-up was lost"
        time.sleep(0.001)
