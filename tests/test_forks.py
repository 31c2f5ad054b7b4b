"""A process that has a store open is forked: the child has no part in its parent's locks."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from conftest import DEADLINE, Server, environment

import xs

# What all of these processes begin with. `child` runs a function in a forked process, `told` waits
# for one line of the other, and what fails in a child is told by its status.
_BEGIN = """
import os, sys, traceback
import xs
from xs.errors import Unavailable, XsError
folder = sys.argv[1]

class Line:
    def __init__(self):
        self.source, self.end = os.pipe()
    def tell(self):
        os.write(self.end, b"x")
    def wait(self):
        os.read(self.source, 1)

def child(act):
    number = os.fork()
    if number:
        return number
    try:
        act()
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)

def join(*numbers):
    for number in numbers:
        assert os.waitpid(number, 0)[1] == 0
"""


def run(script: str, folder: str) -> list[str]:
    """Runs a script as a process of its own; the lines that it, and its children, print."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _BEGIN + script, folder],
        capture_output=True,
        env=environment(),
        timeout=DEADLINE * 2,
    )
    assert done.returncode == 0 and not done.stderr, done.stderr.decode()
    return done.stdout.decode().split()


@pytest.mark.parametrize("whose", ["store", "xs.open(folder)"])
@pytest.mark.parametrize("large", [1, 100_000])
def test_what_a_child_appends_is_stored_when_its_parent_closes_the_store(
    store_dir: str, whose: str, large: int
) -> None:
    answered = run(
        f"""
store = xs.open(folder)
store.append("a", "first")
begun, closed = Line(), Line()
def act():
    own = {whose}
    made = [own.append("b", "x")]
    begun.tell()
    closed.wait()
    made += [own.append("b", b"x" * {large}) for _ in range(5)]
    assert [each.id for each in own.cat(topic="b")] == [each.id for each in made]
    print(*[each.id for each in made])
number = child(act)
begun.wait()
store.close()
closed.tell()
join(number)
""",
        store_dir,
    )
    with xs.open(store_dir) as store:
        assert [each.id for each in store.cat(topic="b")] == answered
        assert len(answered) == 6


def test_a_parent_and_its_children_write_to_one_store_with_one_client(store_dir: str) -> None:
    run(
        """
store = xs.open(folder)
store.append("a", "first")
def act():
    for n in range(30):
        store.append("a", f"{os.getpid()} {n}", if_last=None)
numbers = [child(act) for _ in range(3)]
act()
join(*numbers)
act()
store.close()
""",
        store_dir,
    )
    with xs.open(store_dir) as store:
        contents = [each.content for each in store.cat(with_content=True)]
        assert len(contents) == len(set(contents)) + 30 == 151
        done = store._transport.request("POST", "/check").read()
        assert json.loads(done.splitlines()[-1])["problems"] == 0


def test_a_child_that_closes_its_parent_s_client_leaves_the_parent_its_store(
    store_dir: str,
) -> None:
    run(
        """
with xs.open(folder) as store:
    store.append("a", "first")
    join(child(store.close))
    log = os.stat(folder + "/xs.db-wal").st_ino
    store.append("a", "second")
    assert os.stat(folder + "/xs.db-wal").st_ino == log
    assert len(list(store.cat())) == 2
""",
        store_dir,
    )


def test_a_child_of_a_client_of_a_server_is_given_its_own_answers(server: Server) -> None:
    run(
        """
store = xs.open(folder)
store.append("a", "first")
def act():
    for n in range(200):
        meta = [os.getpid(), n]
        assert store.append("a", meta=meta).meta == meta
numbers = [child(act) for _ in range(2)]
act()
join(*numbers)
act()
""",
        server.directory,
    )
    with xs.open(server.directory) as store:
        assert len(list(store.cat(topic="a"))) == 801


def test_a_follower_that_was_begun_before_a_fork_is_the_parent_s(store_dir: str) -> None:
    run(
        """
store = xs.open(folder)
store.append("a", "1")
frames = store.cat(follow=True)
while next(frames).topic != "xs.threshold":
    pass
def act():
    try:
        next(frames)
    except XsError as error:
        assert "before a fork" in str(error), error
    else:
        raise AssertionError
    store.append("a", "2")
join(child(act))
assert store.content(next(frames)) == b"2"
""",
        store_dir,
    )


def test_a_store_that_is_being_read_during_a_fork_is_refused_in_the_child(store_dir: str) -> None:
    run(
        """
store = xs.open(folder)
store.append("a", "1")
def act():
    for append in (lambda: store.append("a", "2"), lambda: xs.open(folder).append("a", "2")):
        try:
            append()
        except Unavailable as error:
            assert "was in use when this process was forked" in str(error), error
        else:
            raise AssertionError
with store._transport._transport._store.index.reading():  # as another thread might just do
    number = child(act)
join(number)
store.append("a", "3")
assert len(list(store.cat())) == 2
""",
        store_dir,
    )
