"""What a command loads before it does its work: not more than it needs, and that by any way.

Starting is most of what a command takes (bench/start.py). So each module that a usual command may
load is named here; another one is a decision.
"""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple, Optional

import pytest
from conftest import DEADLINE, Server

from xs import records

ROOT = Path(__file__).resolve().parent.parent
BARE = [sys.executable, "-I", "-S", "-c"]

_EVERY = (
    "__future__ gc xs xs.address xs.arguments xs.cli xs.commands xs.errors xs.request xs.stdio "
)
_EVERY += "xs.system"
_FILES = (
    f"{_EVERY} _collections _functools _sqlite3 xs.api xs.connections xs.frame xs.ids xs.local "
    "xs.messages xs.place xs.records xs.schema xs.sqlite xs.store xs.sums"
)
_SERVER = f"{_EVERY} _socket xs.framing xs.http1 xs.transport"
_INDEX = "xs.index xs.rows xs.scan"
_READING = f"{_INDEX} xs.query xs.reader xs.times xs.walk"
_WRITING = "fcntl itertools _sha2 _sha256 xs.commit xs.committer xs.content xs.group "
_WRITING += "xs.fault xs.lock xs.rows xs.work xs.writer"

FROM_FILES = {
    ("append", "notes"): f"{_FILES} {_WRITING}",
    ("append", "notes", "--ttl", "time:60000"): f"{_FILES} {_WRITING} binascii",
    ("last", "notes"): f"{_FILES} {_INDEX}",
    ("head", "notes"): f"{_FILES} {_INDEX}",
    ("first",): f"{_FILES} {_INDEX}",
    ("cat", "--limit", "1"): f"{_FILES} {_READING}",
    ("cat", "--topic", "notes", "--last", "2"): f"{_FILES} {_READING}",
}

# Runs a command as the program does, and then tells which modules are there.
_RUN = """
import sys
sys.path.insert(0, sys.argv[1])
from xs.cli import run
status = run(sys.argv[2:], is_program=True)
sys.stderr.write(" ".join(sys.modules))
sys.exit(status)
"""


def loaded(*words: str) -> set[str]:
    """What that command loads besides what the interpreter has loaded."""
    done = subprocess.run(
        [*BARE, _RUN, str(ROOT), *words], input=b"content", capture_output=True, timeout=DEADLINE
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(b'{"topic":"notes"'), done.stdout
    before = subprocess.run(
        [*BARE, "import sys; print(*sys.modules)"],
        capture_output=True,
        check=True,
        timeout=DEADLINE,
    )
    return set(done.stderr.decode().split()) - set(before.stdout.decode().split())


@pytest.fixture
def notes(store_dir: str) -> str:
    loaded("append", store_dir, "notes")
    return store_dir


@pytest.mark.parametrize("words", FROM_FILES, ids=" ".join)
def test_a_command_on_the_files_loads_what_it_needs_and_nothing_else(
    notes: str, words: tuple[str, ...]
) -> None:
    name, *rest = words
    assert loaded(name, notes, *rest) - set(FROM_FILES[words].split()) == set()


@pytest.mark.parametrize("words", [("append", "notes"), ("last", "notes"), ("cat", "--last", "1")])
def test_a_command_with_a_server_loads_nothing_of_the_store(
    server: Server, words: tuple[str, ...]
) -> None:
    loaded("append", server.directory, "notes")
    name, *rest = words
    assert loaded(name, server.directory, *rest) - set(_SERVER.split()) == set()


def in_a_process(code: str) -> None:
    """Runs a program that imports this package before anything else."""
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"
    done = subprocess.run([*BARE, program], capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == 0, done.stderr


def test_a_server_has_loaded_what_its_requests_need_before_the_first_of_them(
    store_dir: str,
) -> None:
    """Later it may have no descriptor left, or no disk."""
    in_a_process(
        f"""
from xs import api, messages, server
from xs.store import Store
store = Store({store_dir!r}, exclusive=True, create=True)
store.start_sweeping()
store.runs.end_abandoned()
before = set(sys.modules)
def ask(method, target, body=b"", **fields):
    path, _, query = target.partition("?")
    lines = [(name.replace("_", "-"), value) for name, value in fields.items()]
    found = api.run(store, api.answer(store, messages.Request(method, path, query, lines, [body])))
    assert found.status < 300, (target, found.status, found.body)
    return b"".join(found.blocks or [found.body])
fields = {{"xs_meta": '{{"a": 1}}', "idempotency_key": "k"}}
line = ask("POST", "/append/a?ttl=time:60000", b"content", **fields)
value = line.partition(b'"id":"')[2][:25].decode()
ask("POST", "/append/b?ttl=last:1", b"x" * 100_000)
ask("POST", "/append/b?ttl=last:1", b"y" * 100_000)
ask("POST", "/append/c%2Ed?chunked=true", b"chunks")
ask("POST", "/append", b'{{"topic":"a","meta":null}}', content_type="application/x-ndjson")
many = b'{{"topic":"a","content":"x"}}\\n' * 100
ask("POST", "/append", many, content_type="application/x-ndjson")
ask("POST", "/import", line, content_type="application/x-ndjson")
ask("POST", "/cas", b"pinned")
for target in (
    "/", "/?with-timestamp=true&with-content=true&last=2&from=1h", "/" + value, "/last/a",
    "/head/a?last=2", "/first?first=2", "/next/" + value, "/content/" + value, "/version",
):
    assert ask("GET", target, accept="text/event-stream" if target == "/" else "*/*")
ask("DELETE", "/" + value)
ask("POST", "/check")
ask("POST", "/gc?age=0s")
late = set(sys.modules) - before
assert not late, late
"""
    )


def test_a_server_loads_nothing_for_archives_or_for_services() -> None:
    in_a_process(
        """
from xs import server, serving
assert not {"xs.service", "shutil", "bz2", "lzma"} & set(sys.modules)
"""
    )


# What stands in for parts of the standard library


def test_sqlite_keeps_its_statements_and_leaves_functools_to_others() -> None:
    in_a_process(
        """
from xs import sqlite
assert "functools" not in sys.modules or sys.modules["functools"].__file__
connection = sqlite.connect(":memory:", isolation_level=None, cached_statements=2)
for n in [*range(5), *range(5)]:
    assert connection.execute(f"SELECT {n}").fetchone() == (n,)
import functools, sqlite3
assert functools.reduce(max, [1, 3, 2]) == 3
assert sqlite3.connect is sqlite.connect and sqlite3.Error is sqlite.Error
assert sqlite3.sqlite_version_info == sqlite.VERSION
other = sqlite3.connect(":memory:", cached_statements=1)
assert [other.execute(f"SELECT {n}").fetchone()[0] for n in (1, 2, 1)] == [1, 2, 1]
"""
    )


def test_sqlite_takes_functools_as_it_is_where_that_is_loaded() -> None:
    in_a_process(
        """
import functools
from xs import sqlite
assert sys.modules["functools"] is functools
assert sqlite.connect(":memory:").execute("SELECT 1").fetchone() == (1,)
"""
    )


@pytest.mark.parametrize("without", [(), ("_sha2", "_sha256")])
def test_contents_are_hashed_the_same_by_whatever_is_there(without: tuple[str, ...]) -> None:
    in_a_process(
        f"""
sys.modules.update(dict.fromkeys({without}))
from xs.content import small
found = [small(data).digest for data in (b"first", b"second", b"first", b"x" * 16384)]
import hashlib
assert found == [
    hashlib.sha256(data).digest() for data in (b"first", b"second", b"first", b"x" * 16384)
]
"""
    )


class Ours(records.NamedTuple):
    """With a method."""

    a: int
    b: Optional[str] = None
    c: Any = ()

    def both(self) -> tuple[Any, ...]:
        return self.a, self.b


class Theirs(NamedTuple):
    """With a method."""

    a: int
    b: Optional[str] = None
    c: Any = ()

    def both(self) -> tuple[Any, ...]:
        return self.a, self.b


RECORDS = {
    "its fields": lambda t: (t(1).a, t(1, "x").b, t(1, "x", 3).c),
    "as a tuple": lambda t: (tuple(t(1, "x")), len(t(1)), t(1)[0], t(1)[1:], hash(t(1))),
    "by names": lambda t: tuple(t(b="x", a=1)),
    "equal": lambda t: (t(1) == t(1), t(1) == t(2), t(1) == (1, None, ()), t(1) < t(2)),
    "unpacked": lambda t: (lambda a, b, c: (c, b, a))(*t(1)),
    "a method": lambda t: t(1, "x").both(),
    "_replace": lambda t: tuple(t(1)._replace(b="y", c=0)),
    "_asdict": lambda t: t(1)._asdict(),
    "_make": lambda t: tuple(t._make([1, 2, 3])),
    "_fields": lambda t: (t._fields, t._field_defaults, t.__doc__, t.__module__),
    "repr": lambda t: repr(t(1, "x")).partition("(")[2],
    "pickled": lambda t: pickle.loads(pickle.dumps(t(1, "x"))) == t(1, "x"),
    "copied": lambda t: type(copy.copy(t(1))) is type(copy.deepcopy(t(1))) is t,
    "no dictionary": lambda t: hasattr(t(1), "__dict__"),
}


@pytest.mark.parametrize("what", RECORDS)
def test_a_record_is_what_typing_makes_of_it(what: str) -> None:
    assert RECORDS[what](Ours) == RECORDS[what](Theirs)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda t: t(),
        lambda t: t(1, 2, 3, 4),
        lambda t: t(1, d=2),
        lambda t: t(1)._make([1, 2, 3, 4]),
        lambda t: t(1)._replace(d=2),
        lambda t: setattr(t(1), "a", 2),
        lambda t: setattr(t(1), "d", 2),
    ],
)
def test_a_record_refuses_what_typing_s_refuses(wrong: Any) -> None:
    for kind in (Ours, Theirs):
        with pytest.raises((TypeError, ValueError, AttributeError)):
            wrong(kind)


def test_a_record_needs_no_more_than_tuples() -> None:
    in_a_process(
        """
sys.modules["_collections"] = None
from xs.records import NamedTuple
class Record(NamedTuple):
    a: int
    b: str = "x"
assert (Record(1).a, Record(1).b, Record(1)) == (1, "x", (1, "x"))
"""
    )
