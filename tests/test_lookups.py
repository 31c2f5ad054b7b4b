"""The shortest way of a look-up gives what the whole way gives, and only where it is just that."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Server, start_server
from stores import add, together
from wire import Answer, Wire, request

import xs
from xs import frame, http1, ids, lookups
from xs.server import Running
from xs.store import Store

DAY = 86_400_000


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = start_server(str(tmp_path_factory.mktemp("shared") / "store"))
    with xs.open(server.directory) as client:
        for n in range(5):
            client.append("a", str(n), meta={"n": n})
            client.append(f"a.b{n}", str(n), ttl="time:86400000")
        client.append("gone")
        client.remove(client.last("gone"))
        client.append("seen", ttl="ephemeral")
        client.append("long", [b"one", b"two"], chunked=True)
    try:
        yield server
    finally:
        server.stop()


def known(server: Server) -> dict[str, str]:
    """Ids by which frames can be asked for, or can't."""
    with Wire(server.directory) as wire:
        wire.send(request("GET", "/?follow&limit=1&new"))
        wire.head()
        with xs.open(server.directory) as client:
            seen = client.append("seen", ttl="ephemeral").id
            first, last = client.first(), client.last()
            a, piece = client.last("a"), list(client.cat(topic="long"))[1]
            assert first and last and a
    return {
        "first": first.id,
        "newest": last.id,
        "a": a.id,
        "ephemeral": seen,
        "piece": piece.id,
        "none": ids.text(ids.parse(a.id) + 1),
        "oldest": ids.text(5),
        "later": ids.text(ids.parse(last.id) + (DAY << 80)),
    }


PLAIN = [
    *("/last/a", "/last/a.*", "/last/*", "/last/a,a.b1", "/last/long", "/last/A", "/last/gone"),
    *("/head/a", "/head/a.*", "/first/a", "/first/a.*", "/first/*", "/first/gone"),
]
WRONG = [
    *("/head", "/head/", "/head/a?last=2", "/first/", "/first", "/first/a?first=2"),
    *("/last/", "/last/a/", "/last/a..b", "/last/.", "/last/a,", "/last/a#b", "/last/%"),
    *("/last/%61", "/last/a%2eb1", "/last/a?last=2", "/last/a?topic=a", "/last/a?x", "/last"),
    *("/last?topic=a", "/last/a\\", '/last/"a"', "/last/" + "a" * 400, "//last/a", "/next/"),
    *("/prev/a", "/version", "/0", "/0/1", "/" + "0" * 26, "/0" + "_" * 24, "/" + "z" * 25),
]


def plainly(answer: Answer) -> tuple[int, dict[str, str], bytes]:
    fields = {name: value for name, value in answer.fields.items() if name != "date"}
    assert answer.fields["date"]
    return answer.status, fields, answer.body


def asked_first(server: Server, data: bytes) -> tuple[int, dict[str, str], bytes]:
    """The answer to a request by the whole way: it is the first on its connection."""
    with Wire(server.directory) as wire:
        wire.send(data)
        return plainly(wire.answer())


def asked_later(server: Server, data: bytes) -> tuple[int, dict[str, str], bytes]:
    """… where one with the same fields came before it."""
    with Wire(server.directory) as wire:
        rest = data[data.index(b" HTTP/") :]
        wire.send(b"GET /version" + rest)
        assert wire.answer().status == 200
        wire.send(data)
        return plainly(wire.answer())


@pytest.mark.parametrize("target", PLAIN + WRONG)
def test_a_target_is_answered_the_same_by_either_way(shared: Server, target: str) -> None:
    data = request("GET", target)
    assert asked_later(shared, data) == asked_first(shared, data)


@pytest.mark.parametrize("word", ["/", "/next/", "/prev/"])
@pytest.mark.parametrize("end", ["", "?topic=a", "?with-content", "?with-timestamp", "/", "x"])
def test_an_id_is_answered_the_same_by_either_way(shared: Server, word: str, end: str) -> None:
    found = {}
    for what, id_text in known(shared).items():
        for spelled in (id_text, id_text.upper()):
            data = request("GET", f"{word}{spelled}{end}")
            found[what] = asked_later(shared, data)
            assert found[what] == asked_first(shared, data), what
    if word == "/" and not end:
        there = {what for what, answer in found.items() if answer[0] == 200}
        assert there == {"first", "newest", "a", "ephemeral", "piece"}


@pytest.mark.parametrize(
    "data",
    [
        b"GET /last/a HTTP/1.0\r\nHost: localhost\r\n\r\n",
        b"GET /last/a HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
        b"GET /last/a HTTP/1.1\r\nConnection: keep-alive\r\n\r\n",
        b"GET /last/a HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
        b"GET /last/a HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\n\r\nabc",
        b"GET /last/a HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"GET /last/a HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\n\r\n",
        b"GET /last/a HTTP/1.1\r\nHost: localhost\r\nX: 1\r\nY: 2\r\n\r\n",
        b"HEAD /last/a HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET  /last/a HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /last/a  HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /last/a HTTP/1.2\r\nHost: localhost\r\n\r\n",
        b"GET /last/\xe4 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /last/a\r HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET http://localhost/last/a HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"DELETE /last/a HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ],
)
def test_a_request_in_other_words_is_answered_the_same_after_each_other(
    shared: Server, data: bytes
) -> None:
    method = data.split()[0].decode()

    def answers(*before: bytes) -> tuple[int, dict[str, str], bytes]:
        with Wire(shared.directory) as wire:
            for each in before:
                wire.send(each)
                wire.answer()
            wire.send(data)
            return plainly(wire.answer(method))

    expected = answers()
    assert answers(request("GET", "/version")) == expected
    assert answers(b"GET /version HTTP/1.1\r\nHost: localhost\r\nX: 1\r\n\r\n") == expected
    assert answers(b"GET /version HTTP/1.0\r\nConnection: keep-alive\r\n\r\n") == expected


def test_look_ups_that_are_sent_ahead_are_answered_in_order(server: Server) -> None:
    """Each sees the append before it, in the same words, which others may be about to commit."""

    def ask(client: int) -> None:
        mine, none = f"a{client}", f"none{client}"
        look_ups = [request("GET", f"/last/{name}", b"") for name in (mine, none, mine)]
        round_ = [*look_ups, request("POST", f"/append/{mine}", b""), look_ups[0]]
        with Wire(server.directory) as wire:
            wire.ask("POST", f"/append/{mine}", b"")
            wire.send(b"".join(round_) * 50)
            for _ in range(50):
                before = wire.answer()
                assert wire.answer().status == 404
                assert wire.answer().body == before.body
                made = wire.answer()
                assert made.status == 200 and made.body > before.body
                assert wire.answer().body == made.body

    together(4, ask)


def test_what_was_sent_behind_a_look_up_is_answered_without_more(server: Server) -> None:
    """Also half a request, when its rest has come."""
    with Wire(server.directory) as wire:
        wire.ask("GET", "/version")
        for behind in ("/last/none", "/version", "/last/xs.start", "/?topic=none"):
            wire.send(request("GET", "/last/xs.start") + request("GET", behind))
            found, then = wire.answer(), wire.answer()
            assert found.status == 200
            assert then.status == (404 if behind == "/last/none" else 200)
            rest = request("GET", behind)
            wire.send(request("GET", "/last/xs.start") + rest[:9])
            assert wire.answer().body == found.body
            wire.send(rest[9:])
            assert wire.answer().status == then.status


def test_each_answer_has_what_was_appended_before_it(server: Server) -> None:
    with Wire(server.directory) as wire, xs.open(server.directory) as client:
        wire.ask("GET", "/version")
        for n in range(50):
            made = client.append("a" if n % 3 else "a.b", meta={"n": n})
            assert json.loads(wire.ask("GET", "/last/a,a.*").body)["id"] == made.id
            assert json.loads(wire.ask("GET", f"/{made.id}").body)["meta"] == {"n": n}
            assert wire.ask("GET", f"/next/{made.id}").status == 404
            if n % 5 == 0:
                client.remove(made)
                assert wire.ask("GET", f"/{made.id}").status == 404


def test_only_the_plainest_requests_take_the_shortest_way(store_dir: str) -> None:
    """Else all of the above would hold without it."""
    with contextlib.closing(Store(store_dir, exclusive=True, create=True)) as store:
        first, second = add(store, "a.b"), add(store, "c")

        def answered(target: str, fields: str = "Host: x") -> str | None:
            end = f" HTTP/1.1\r\n{fields}\r\n\r\n".encode()
            like = http1.read_request_head(bytearray(b"GET /version" + end))
            assert like is not None
            buffer = bytearray(f"GET {target}".encode() + end + b"more")
            found = lookups.path_in(buffer, like)
            line = None if found is None else lookups.line_of(store, found[0])
            if found is None or line is None:
                return None
            assert buffer[found[1] :] == b"more"
            return frame.id_of(line)

        for target in ("/last/a.b", "/head/a.*", "/first/*", f"/{first}", f"/prev/{second}"):
            assert answered(target) == first, target
        for target in ("/last/c", "/last/a.b,c", "/last/*", f"/next/{first}"):
            assert answered(target) == second, target
        others = ("/last/none", f"/next/{second}", f"/{first}?with-content", "/last/a.b?last=2")
        for target in (*WRONG, *others, "/last/a%2eb", "/last/a.b/", "/first/c?topic=a.b"):
            assert answered(target) is None, target
        for fields in ("Host: x\r\nConnection: close", "Host: x\r\nContent-Length: 1"):
            assert answered("/last/a.b", fields) is None, fields


def test_a_defect_of_the_shortest_way_is_told_and_the_whole_way_answers(
    store_dir: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    running = Running(store_dir, [], [])
    try:
        store = running.root.store
        with Wire(store_dir) as wire:
            made = wire.ask("POST", "/append/a", b"x").body
            assert wire.ask("GET", "/last/a").body == made
            clock = store.clock

            def fail_once() -> int:
                monkeypatch.undo()
                raise TypeError("of ours")

            monkeypatch.setattr(store, "clock", fail_once)
            assert wire.ask("GET", "/last/a").body == made
            assert store.clock is clock
    finally:
        running.stop()
    said = capfd.readouterr().err
    assert "last/a: TypeError: of ours" in said and "in line_of" in said


def commits_of(store_dir: str) -> int:
    """How many transactions the write-ahead log has (https://sqlite.org/fileformat2.html#walformat)."""
    log = Path(store_dir, "xs.db-wal").read_bytes()
    page = int.from_bytes(log[8:12], "big")
    heads = [log[at : at + 24] for at in range(32, len(log), 24 + page)]
    return sum(head[4:8] != bytes(4) and head[8:16] == log[16:24] for head in heads)


def test_appends_that_are_sent_ahead_share_their_commits(server: Server) -> None:
    """Nothing waits for those before it but what reads."""
    before = commits_of(server.directory)

    def append(client: int) -> None:
        with Wire(server.directory) as wire:
            wire.send(request("POST", f"/append/a{client}", b"x") * 400)
            for _ in range(400):
                assert wire.answer().status == 200

    together(2, append)
    assert commits_of(server.directory) - before < 250  # some 50 on a trial
