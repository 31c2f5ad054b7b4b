"""The store's files with no server: the same answers, others' commits, a server's coming."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import pytest
from conftest import DEADLINE, XS, Peer, environment, start_server, until

import xs
from xs import frame, ids
from xs.batch import ERRORS_LISTED, EVERY_LINE
from xs.bulk import ALIKE_MIN
from xs.client import Client
from xs.errors import Conflict, Invalid, NoStore, NotFound, XsError
from xs.local import Local
from xs.lock import SERVE, WRITE, Lock
from xs.store import Store

NDJSON = [("content-type", "application/x-ndjson")]

Line = Callable[[int], bytes]


@pytest.fixture
def local(store_dir: str) -> Iterator[Local]:
    Store(store_dir, create=True).close()
    opened = Local(store_dir)
    yield opened
    opened.close()


def opened_of(store_dir: str) -> list[str]:
    """The store's files that this process has open."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # that of the listing itself
            found.append(os.readlink(f"/proc/self/fd/{name}"))
    return [path for path in found if path.startswith(os.path.realpath(store_dir) + "/")]


@pytest.fixture
def client(local: Local) -> Client:
    return Client(local)


def test_answers_are_those_of_a_server(store_dir: str, tmp_path: Path) -> None:
    """Every kind of request, to the files and to a server, gives the same but for ids."""
    requests = [
        ("POST", "/append/a.b?ttl=time:90000", [("xs-meta", '{"a":1.10}')], b"hi"),
        ("POST", "/append/a.b", [], b"x" * 40_000),
        ("POST", "/append", NDJSON, b'{"topic":"c"}\n{"topic":".."}\n'),
        ("POST", "/append?each", NDJSON, b'{"topic":"c"}\n{"topic":".."}\n'),
        ("POST", "/append?atomic", NDJSON, b'{"topic":"c"}\n{"topic":".."}\n'),
        ("POST", "/append/a.b?if-last=none", [], b""),
        ("POST", "/cas", [], b"pinned"),
        ("GET", "/?topic=a.*,c&with-content", [], None),
        ("GET", "/last/a.b", [], None),
        ("GET", "/first?first=2&topic=c", [], None),
        ("GET", "/last/nothing", [], None),
        ("GET", "/no/such/path", [], None),
        ("GET", "/?unknown", [], None),
        ("PUT", "/", [], None),
        ("GET", "/version", [], None),
        ("POST", "/append/xs.own", [], b""),
    ]

    def answers(transport: object) -> list[tuple[int, str | None, bytes]]:
        found = []
        for method, target, fields, body in requests:
            response = transport.request(method, target, fields, body)  # type: ignore[attr-defined]
            found.append((response.status, response.get("content-type"), response.read()))
        return found

    Store(store_dir, create=True).close()
    local = Local(store_dir)
    mine = answers(local)
    local.close()
    server = start_server(str(tmp_path / "other"))
    with xs.open(server.directory) as served:
        theirs = answers(served._transport)
    server.stop()
    for request, (status, kind, body), (their_status, their_kind, their_body) in zip(
        requests, mine, theirs
    ):
        assert (status, kind) == (their_status, their_kind), request
        assert len(body) == len(their_body), request


def test_what_needs_a_server_says_so(client: Client) -> None:
    with pytest.raises(Invalid, match="needs a server"):
        client.append("a", "x", ttl="ephemeral")
    with pytest.raises(Invalid, match="needs a server"):
        client.cat(follow=100)
    assert list(client.cat()) == []


def test_a_reader_makes_no_store(tmp_path: Path) -> None:
    with pytest.raises(NoStore):
        Local(str(tmp_path / "none"))
    assert os.listdir(tmp_path) == []


def test_two_clients_see_each_others_frames(client: Client, store_dir: str) -> None:
    other = Client(Local(store_dir))
    made = [each.append("a", "x") for each in (client, other, client, other)]
    assert list(client.cat()) == list(other.cat()) == made
    assert client.remove(made[1]) and not other.remove(made[1])
    other.close()


def test_a_follower_sees_other_processes_commits_and_removals(
    client: Client, store_dir: str
) -> None:
    other = Client(Local(store_dir))
    first = other.append("a", "1")
    frames = client.cat(follow=True)
    assert next(frames).id == first.id
    assert next(frames).topic == "xs.threshold"
    for n in range(5):
        made = other.append("a", f"{n}")
        assert next(frames).id == made.id
        other.remove(made)  # the newest is gone, and its place is not given again
    gone, kept = other.append_many([{"topic": "a"}]), other.append("a")
    assert next(frames).id == gone["first"]
    assert next(frames).id == kept.id
    other.close()


def test_a_damaged_content_is_an_error_here_too(client: Client, store_dir: str) -> None:
    made = client.append("a", b"x" * 2_000_000)
    (path,) = (path for path in Path(store_dir, "cas").rglob("*") if path.is_file())
    path.write_bytes(path.read_bytes()[:-1] + b"y")
    with pytest.raises(XsError):
        client.content(made)
    path.write_bytes(b"")
    with pytest.raises(XsError):
        client.content(made)


def test_a_pipe_that_stays_open_keeps_nobody_out(client: Client, store_dir: str) -> None:
    go_on = threading.Event()
    begun = threading.Event()

    def lines() -> Iterator[bytes]:
        yield b'{"topic":"slow"}\n'
        yield b'{"topic":"slow"}\n'
        begun.set()
        assert go_on.wait(DEADLINE)
        yield b'{"topic":"slow"}\n'

    answers: list[bytes] = []
    thread = threading.Thread(
        target=lambda: answers.append(client._transport.request(
            "POST", "/append", NDJSON, lines()).read()
        )
    )  # fmt: skip
    thread.start()
    assert begun.wait(DEADLINE)
    other = Client(Local(store_dir))
    other.append("quick")
    go_on.set()
    thread.join(DEADLINE)
    assert json.loads(answers[0])["appended"] == 3
    assert [each.topic for each in other.cat()] == ["slow", "slow", "quick", "slow"]
    other.close()


@pytest.fixture
def taken_over(local: Local, store_dir: str) -> Iterator[Client]:
    """A client of the files whose store a server has taken meanwhile."""
    client = Client(local)
    client.append("before", "x")
    server = start_server(store_dir)
    yield client
    server.stop()


def test_every_write_goes_to_a_server_that_has_come(taken_over: Client) -> None:
    client = taken_over
    meta = {"ü": 10**30, "x": [1.5, None]}
    made = client.append("a.b", "é" * 30_000, meta=meta, ttl="time:99999", key="κ")
    assert (made.topic, made.meta, made.ttl) == ("a.b", meta, "time:99999")
    assert client.append("a.b", key="κ") == made
    assert client.content(made) == ("é" * 30_000).encode()
    with pytest.raises(Conflict) as conflict:
        client.append("a.b", if_last="none")
    assert conflict.value.frame is not None and made.id.encode() in conflict.value.frame
    assert client.append("a.b", if_last=made).hash is None
    summary = client.append_many(
        [{"topic": "m", "content": b"\xff\0", "meta": {"n": 1.10}}, {"topic": ".."}, {"topic": "m"}]
    )
    assert summary["appended"] == 2 and [each["line"] for each in summary["errors"]] == [2]
    many = [f"line {n}" for n in range(2 * ALIKE_MIN)]
    assert client.append_many([{"topic": "l", "content": each} for each in many])["errors"] == []
    assert [each.content for each in client.cat(topic="l", with_content=True)] == many
    hash_ = client.cas_post(b"p" * 30_000)
    assert client.cas(hash_) == b"p" * 30_000
    imported = client.import_([{"topic": "i", "id": "0" * 24 + "1", "hash": hash_}, {"topic": 5}])
    assert imported["imported"] == 1 and len(imported["errors"]) == 1
    put = client._transport.request("POST", "/cas?for=import", [], b"i" * 30_000).read().decode()
    client.import_([{"topic": "i", "id": "0" * 24 + "2", "hash": put}])
    assert client.cas(put) == b"i" * 30_000
    assert client.remove("0" * 24 + "2")
    with pytest.raises(NotFound):
        client.cas(put)
    assert client.remove(made) and client.get(made) is None
    with pytest.raises(NotFound):
        client.content(made)


def test_each_line_of_an_import_is_told_of_by_a_server_that_has_come(taken_over: Client) -> None:
    count = 2 * ERRORS_LISTED + 7
    hash_ = frame.integrity(b"\0" * 32)  # of a content that nobody has
    wrong = [{"topic": "i", "id": ids.text(n + 1 << 80), "hash": hash_} for n in range(count)]
    right = [{"topic": "i", "id": ids.text(n + 1 << 80)} for n in range(count, count + 5)]
    found = taken_over.import_([*wrong, *right])
    assert found["imported"] == 5
    assert len(found["errors"]) + found["errors_unlisted"] == count
    assert len(list(taken_over.cat(topic="i"))) == 5


ROOM = EVERY_LINE - 200  # bytes of a line for its content


@pytest.mark.parametrize(
    ("key", "text", "data"),
    [
        ("content", "t" * ROOM, b"t" * ROOM),
        ("content", "ü" * (ROOM // 2), "ü".encode() * (ROOM // 2)),
        ("content_base64", "/wAA" * (ROOM // 4), b"\xff\0\0" * (ROOM // 4)),
        ("content_base64", "AQEB" * (ROOM // 4), b"\1\1\1" * (ROOM // 4)),  # in JSON: \u0001
    ],
    ids=["text", "not ASCII", "no text", "text that is longer in JSON"],
)
def test_a_line_that_the_files_take_is_taken_by_a_server_that_has_come(
    taken_over: Client, key: str, text: str, data: bytes
) -> None:
    """Also one that has nearly as many bytes as a line may have."""
    append = {"topic": "t", key: text}
    hash_ = frame.integrity(sha256(data).digest())
    imported = {**append, "id": "0" * 24 + "1", "hash": hash_}
    for target, members in (("/append", append), ("/import", imported)):
        line = json.dumps(members, ensure_ascii=False).encode()
        answer = taken_over._transport.request("POST", target, NDJSON, [line]).read()
        assert json.loads(answer)["errors"] == []
    assert [taken_over.content(each) == data for each in taken_over.cat(topic="t")] == [True, True]


@contextlib.contextmanager
def server_that_ends(
    store_dir: str,
    then: Callable[[], object],
    before: Callable[[socket.socket], object] = lambda connection: None,
) -> Iterator[None]:
    """One that ends as soon as it is connected to, and has done `before`."""
    path = os.path.join(store_dir, "sock")
    lock = Lock(store_dir)
    lock.acquire(SERVE)

    def end() -> None:
        connection, _ = listener.accept()
        before(connection)
        listener.close()
        os.unlink(path)
        connection.close()
        lock.close()
        then()

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        thread = threading.Thread(target=end)
        thread.start()
        yield
        thread.join(DEADLINE)
        assert not thread.is_alive()


def test_a_write_for_a_server_that_has_ended_before_it_is_asked_is_done_here(
    client: Client, store_dir: str
) -> None:
    with server_that_ends(store_dir, then=lambda: None):
        made = client.append("a", key="once")
    assert list(client.cat()) == [made]


def test_of_lines_that_a_killed_server_was_asked_for_only_those_unanswered_are_unknown(
    client: Client, store_dir: str
) -> None:
    """What was answered counts, what has a key is done again, and of the others it is said."""
    answered = [f'{{"topic":"{topic}","id":"{ids.text(1 << 80)}"}}' for topic in "ab"]

    def answer_two_of_four(connection: socket.socket) -> None:
        peer = Peer(connection)
        peer.head()
        peer.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        for _ in range(4):
            peer.chunk()
        body = "\n".join([*answered, '{"topic":"c'])
        head = "HTTP/1.1 200 OK\r\nXs-Version: 1\r\nTransfer-Encoding: chunked\r\n\r\n"
        peer.send(f"{head}{len(body):x}\r\n{body}\r\n".encode())

    lines = [{"topic": "a"}, {"topic": "b"}, {"topic": "c"}, {"topic": "d", "key": "once"}]
    with server_that_ends(store_dir, then=lambda: None, before=answer_two_of_four):
        summary = client.append_many(lines)
    assert summary["appended"] == 3
    (error,) = summary["errors"]
    assert error["line"] == 3 and "nobody knows whether this line is stored" in error["error"]
    assert [each.topic for each in client.cat()] == ["d"]


def number(n: int) -> bytes:
    return b"%-200d\n" % n


def frame_of(n: int) -> bytes:
    return b'{"topic":"l","id":"%b","meta":%d}\n' % (ids.text(n + 1 << 80).encode(), n)


def feed(process: subprocess.Popen[bytes], line: Line, stop: threading.Event) -> int:
    """Writes a line for each number to it until told to stop; how many."""
    assert process.stdin is not None
    count = 1
    while not stop.is_set():
        process.stdin.write(b"".join([line(n) for n in range(count, count + 1000)]))
        count += 1000
    process.stdin.close()
    return count


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL], ids=["in order", "killed"])
@pytest.mark.parametrize(
    ("words", "line"),
    [(["append", "STORE", "l", "--lines"], number), (["import", "STORE"], frame_of)],
    ids=["append", "import"],
)
def test_lines_that_go_to_a_server_that_ends_are_each_stored_once_in_order_and_told_right(
    client: Client, store_dir: str, words: list[str], line: Line, end: signal.Signals
) -> None:
    command = subprocess.Popen(
        [*XS, *(store_dir if word == "STORE" else word for word in words)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(),
    )  # fmt: skip
    assert command.stdin is not None
    command.stdin.write(line(0))
    command.stdin.flush()
    until(lambda: client.last("l") is not None)  # it has begun on the files
    stop = threading.Event()
    with ThreadPoolExecutor() as pool:
        count = pool.submit(feed, command, line, stop)
        try:
            for _ in range(3 if end == signal.SIGTERM else 1):
                server = start_server(store_dir)
                newest = client.last("l")
                until(lambda: client.last("l") != newest)  # noqa: B023
                server.process.send_signal(end)
                server.process.communicate(timeout=DEADLINE)
        finally:
            stop.set()
    assert command.stdout is not None and command.stderr is not None
    with command:
        summary, said = json.loads(command.stdout.read()), command.stderr.read()
    read = client.cat(topic="l", with_content=True)
    stored = [int(each.content if line is number else each.meta) for each in read]
    assert stored == sorted(set(stored))
    unknown = {each["line"] - 1 for each in summary["errors"]}
    told = summary["appended" if line is number else "imported"]
    assert told + len(unknown) == count.result()
    assert set(range(count.result())) - set(stored) <= unknown
    if end == signal.SIGTERM or line is frame_of:  # an import may be done twice
        assert (unknown, said) == (set(), b"")
    else:
        assert all("nobody knows" in each["error"] for each in summary["errors"])


def test_a_follower_stays_with_the_files_of_a_server_that_ends_as_it_is_asked(
    client: Client, store_dir: str
) -> None:
    with Client(Local(store_dir)) as other:
        first = other.append("a")
        frames = client.cat(follow=True)
        assert next(frames) == first
        assert next(frames).topic == "xs.threshold"
        made = []
        with server_that_ends(store_dir, then=lambda: made.append(other.append("a"))):
            assert next(frames).topic == "a"
        made.append(other.append("a"))
        assert next(frames) == made[1]


def test_who_only_reads_needs_no_lock_and_makes_none(store_dir: str) -> None:
    first = Client(Local(store_dir, create=True))
    first.append("a", "content")
    first.close()
    path = os.path.join(store_dir, "lock")
    os.unlink(path)
    client = Client(Local(store_dir))
    assert client.content(client.last("a")) == b"content"
    assert [frame.topic for frame in client.cat(limit=1)] == ["a"]
    assert not os.path.exists(path)
    os.mkdir(path)
    with pytest.raises(XsError, match="its lock: Is a directory"):
        client.append("a", "more")
    assert client.last("a") is not None
    os.rmdir(path)
    assert client.append("a", "more") == client.last("a")  # what was in the way once is forgotten
    client.close()


def test_large_content_can_be_what_a_store_is_made_by(store_dir: str) -> None:
    client = Client(Local(store_dir, create=True))
    client.append("a", b"x" * 100_000)
    assert client.content(client.last("a")) == b"x" * 100_000
    client.close()


def test_who_is_kept_waiting_too_long_is_told_by_whom(
    store_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Store(store_dir, create=True).close()
    monkeypatch.setattr("xs.lock.Lock.acquire.__kwdefaults__", {"wait": 0.02})
    lock = Lock(store_dir)
    lock.acquire(WRITE)
    client = Client(Local(store_dir))
    with pytest.raises(XsError, match=f"process {os.getpid()}"):
        client.append("a")
    assert list(client.cat()) == []
    lock.release()
    assert client.append("a").topic == "a"
    lock.acquire(SERVE)
    lock.close()
    client.close()


# Closing


@pytest.mark.parametrize("is_served", [False, True])
def test_iterators_that_are_in_use_stay_when_the_client_is_closed(
    store_dir: str, is_served: bool
) -> None:
    with xs.open(store_dir) as client:
        client.append_many([{"topic": "t", "content": str(n)} for n in range(3000)])
        large = client.append("large", b"x" * 3_000_000)
    with contextlib.ExitStack() as then:
        if is_served:
            then.callback(start_server(store_dir).stop)
        client = xs.open(store_dir)
        frames = client.cat(topic="t")
        blocks = client.content_blocks(large)
        next(frames)
        size = len(next(blocks))
        client.close()
        assert len(list(frames)) == 2999
        assert client.last("large") == large  # it opens the store anew
        client.close()
        assert size + sum(map(len, blocks)) == 3_000_000
        client.close()
        if not is_served:
            assert opened_of(store_dir) == []


def test_what_nobody_reads_keeps_no_store_open(store_dir: str) -> None:
    with xs.open(store_dir) as client:
        frame = client.append("t", b"x" * 3_000_000)
        client.cat()
        client.content_blocks(frame)
        half_read = client.cat(follow=True)
        next(half_read)
        del half_read
        assert client.get(frame.id[:-1] + "0") is None
    assert opened_of(store_dir) == []
