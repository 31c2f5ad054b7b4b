"""The HTTP gateway: a real `xs serve --http`, met as browsers, proxies and attackers meet it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import queue
import signal
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Optional

import http1_corpus
import pytest
from conftest import DEADLINE, XS, RunXs, environment, until
from handling import program
from stores import together
from web import (
    Handler,
    WebServer,
    echo,
    is_readable,
    nothing,
    respond,
    start_web,
    web_server,
)
from wire import Wire, chunked, request

import xs
from xs import ids, tokens
from xs.content import INLINE_MAX
from xs.door import Limits
from xs.frame import Frame
from xs.gateway import Options
from xs.mount import Web
from xs.server import Running


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebServer]:
    """A server with a Unix socket and a TCP port, whose handler `Routes` answers by the path."""
    folder = tmp_path_factory.mktemp("shared")
    options = ("--http", str(folder / "web"), "--http", ":0", "--http-timeout", "20")
    with web_server(str(folder / "store"), *options) as server:
        server.handler = Handler(server.directory, Routes(server))  # type: ignore[attr-defined]
        yield server
        server.handler.check()  # type: ignore[attr-defined]


class Routes:
    """What the shared server's handler does, by the path's first word; else it echoes."""

    def __init__(self, server: WebServer) -> None:
        self._server = server
        self.told: dict[str, Callable[[xs.Client, Frame], None]] = {}
        server.told = self.told  # type: ignore[attr-defined]

    def __call__(self, client: xs.Client, frame: Frame) -> None:
        self.told.get(frame.meta["path"], echo)(client, frame)


_paths = iter(range(1_000_000))


def told(server: WebServer, answer: Callable[[xs.Client, Frame], None]) -> str:
    """A path at which the shared server's handler does that."""
    path = f"/told{next(_paths)}"
    server.told[path] = answer  # type: ignore[attr-defined]
    return path


def answered_with(server: WebServer, content: Any = None, **meta: Any) -> str:
    """A path that is answered with that."""
    return told(server, lambda client, frame: (respond(client, frame, content, **meta), None)[1])


@pytest.fixture
def server(store_dir: str, tmp_path: Path) -> Iterator[WebServer]:
    """A server of its own, on a Unix socket; the time for an answer is not what is tested."""
    options = ("--http", str(tmp_path / "web"), "--http-timeout", "600")
    with web_server(store_dir, *options) as found:
        yield found


@pytest.fixture
def running(store_dir: str, tmp_path: Path) -> Iterator[Running]:
    """A server in this process, for tests that set its limits."""
    found = Running(store_dir, [], [], Web([str(tmp_path / "web"), ":0"], Options()))
    try:
        yield found
    finally:
        found.stop()


def frames(where: str, topic: str = "*") -> list[Frame]:
    with xs.open(where) as client:
        return list(client.cat(topic=topic))


def last(server: WebServer, topic: str) -> Frame:
    with xs.open(server.directory) as client:
        found = client.last(topic)
    assert isinstance(found, Frame)
    return found


def register(server: WebServer, name: str, script: str) -> None:
    """Puts a handler of requests in service."""
    with xs.open(server.directory) as client:
        client.append(f"{name}.register", script, meta={"topic": "http.request", "content": True})
        next(client.cat(topic=f"{name}.registered", follow=True))


def raw(where: str | int, data: bytes) -> bytes:
    """All that comes on a connection that sends `data` and then no more (Unix), or just waits."""
    with Wire(where) as wire:
        wire.send(data)
        if isinstance(where, str):
            wire.half_close()
        return wire.rest()


def is_listening(path: str) -> bool:
    try:
        Wire(path).sock.close()
    except OSError:
        return False
    return True


# A request becomes a frame


def test_a_request_becomes_a_frame_with_this_very_meta(shared: WebServer) -> None:
    with Wire(shared.port(1)) as wire:
        wire.send(
            b"GET /a%20b?x=1&x=2&y=%C3%A9 HTTP/1.1\r\nHost: example.org\r\nX-A: 1\r\n"
            b"Accept: */*\r\nx-a: 2\r\n\r\n"
        )
        assert wire.answer().status == 200
    frame = last(shared, "http.request")
    with Wire(shared.directory) as wire:
        line = wire.ask("GET", f"/{frame.id}").body.decode()
    request_id = frame.meta["request_id"]
    assert line == (
        f'{{"topic":"http.request","id":"{frame.id}","hash":null,"meta":{{"request_id":'
        f'"{request_id}","method":"GET","path":"/a%20b","query":{{"x":["1","2"],"y":"é"}},'
        '"headers":{"host":"example.org","x-a":["1","2"],"accept":"*/*"},'
        '"proto":"HTTP/1.1","remote_ip":"127.0.0.1"},"ttl":"forever"}\n'
    )
    assert last(shared, "http.response").meta == {"request_id": request_id}


def test_on_a_unix_socket_a_client_has_no_ip(shared: WebServer) -> None:
    with Wire(shared.web[0]) as wire:
        assert wire.ask("GET", "/here").status == 200
    assert last(shared, "http.request").meta["remote_ip"] is None


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "OPTIONS", "FROB", "TRACE"])
@pytest.mark.parametrize("path", ["/", "/a/../b//c;d=e", "/%2e%2F", "/version", "/append/x"])
def test_any_method_on_any_path_is_a_request(shared: WebServer, method: str, path: str) -> None:
    with Wire(shared.web[0]) as wire:
        answer = wire.ask(method, path, b"body")
    assert (answer.status, answer.body) == (200, f"{method} {path} body".encode())


def test_options_of_everything_is_a_request(shared: WebServer) -> None:
    with Wire(shared.web[0]) as wire:
        assert wire.ask("OPTIONS", "*").body == b"OPTIONS * "


def test_the_body_is_the_content(shared: WebServer) -> None:
    with Wire(shared.web[0]) as wire:
        for body in (b"x", b"\0\xff" * 5000, b"y" * INLINE_MAX, b"z" * 300_000):
            assert wire.ask("POST", "/b", body).body == b"POST /b " + body
            assert last(shared, "http.request").hash is not None
        wire.send(request("POST", "/c", chunked(b"a", b"b" * 70_000), transfer_encoding="chunked"))
        assert wire.answer().body == b"POST /c a" + b"b" * 70_000
        assert wire.ask("POST", "/d", b"").body == b"POST /d "
        assert last(shared, "http.request").hash is None


def test_a_client_that_asks_first_is_told_to_send_its_body(shared: WebServer) -> None:
    with Wire(shared.web[0]) as wire:
        wire.send(request("POST", "/e", expect="100-continue", content_length="4"))
        assert wire.until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        wire.send(b"body")
        assert wire.answer().body == b"POST /e body"


def test_hundreds_of_megabytes_go_in_and_out_in_little_memory(server: WebServer) -> None:
    size = 200 * 1024 * 1024
    block = os.urandom(1 << 20)

    def send_back(client: xs.Client, frame: Frame) -> None:
        respond(client, frame, None, hash=frame.hash)

    Handler(server.directory, send_back)
    before = server.status_of("VmHWM")
    with Wire(server.web[0]) as wire:
        wire.send(request("POST", "/", content_length=str(size)))
        sent, received = hashlib.sha256(), hashlib.sha256()
        for _ in range(size // len(block)):
            wire.send(block)
            sent.update(block)
        status, fields = wire.head()
        assert (status, fields["content-length"]) == (200, str(size))
        for _ in range(size // len(block)):
            received.update(wire.exactly(len(block)))
        assert received.digest() == sent.digest()
        assert wire.ask("GET", "/").status == 200, "the connection goes on"
    assert server.status_of("VmHWM") - before < 16 * 1024


def test_the_web_needs_no_token_and_any_host_and_origin_will_do(shared: WebServer) -> None:
    with Wire(shared.port(1)) as wire:
        fields = {"host": "evil.example", "origin": "https://other.example"}
        assert wire.ask("GET", "/open", **fields).status == 200


def test_a_token_of_the_store_s_own_never_comes_onto_the_stream(
    store_dir: str, tmp_path: Path, run_xs: RunXs
) -> None:
    """Who sends one has taken the web's address for that of the API."""
    options = ("--expose", "127.0.0.1:0", "--http", str(tmp_path / "web"), "--http", "127.0.0.1:0")
    with web_server(store_dir, *options) as server:
        mine = Path(store_dir, "token").read_text().strip()
        others = tokens.add(store_dir, "phone", read=True)
        for sent in (
            f"Bearer {mine}",
            f"bearer {others}",
            f"Basic a\r\nauthorization: Bearer {mine}",
        ):
            with Wire(server.web[0]) as wire:
                answer = wire.ask("POST", "/x", b"body", authorization=sent)
                assert (answer.status, answer.fields["connection"]) == (421, "close")
        told = run_xs(["last", f"127.0.0.1:{server.port(1)}"], env={"XS_TOKEN": mine})
        assert told.returncode == 1
        assert b"this address is for requests from the web" in told.stderr
        assert frames(store_dir, "http.request") == []
        handler = Handler(server.directory, echo)
        with Wire(server.web[0]) as wire:
            assert wire.ask("GET", "/", authorization="Bearer other").status == 200
        assert handler.next().meta["headers"]["authorization"] == "Bearer other"


@pytest.mark.parametrize(
    ("ttl", "stored"), [("ephemeral", 0), ("time:3600000", 3), ("last:2", 2), ("forever", 3)]
)
def test_what_the_gateway_appends_has_the_ttl_that_was_asked_for(
    store_dir: str, tmp_path: Path, ttl: str, stored: int
) -> None:
    with web_server(store_dir, "--http", str(tmp_path / "web"), "--http-ttl", ttl) as server:
        handler = Handler(server.directory, echo)
        gone = Handler(server.directory, nothing, "http.disconnect")
        with Wire(server.web[0]) as wire:
            for n in range(3):
                assert wire.ask("POST", f"/{n}", b"body").body == f"POST /{n} body".encode()
                assert handler.next().ttl == ttl
        assert len(frames(store_dir, "http.request")) == stored
        handler._answer = nothing
        with Wire(server.web[0]) as wire:
            wire.send(request("GET", "/"))
            handler.next()
        assert gone.next().ttl == ttl


def test_a_body_too_large_for_an_ephemeral_frame_is_413(store_dir: str, tmp_path: Path) -> None:
    options = ("--http", str(tmp_path / "web"), "--http-ttl", "ephemeral")
    with web_server(store_dir, *options) as server, Wire(server.web[0]) as wire:
        Handler(server.directory, echo)
        assert wire.ask("POST", "/", b"x" * INLINE_MAX).status == 200
        answer = wire.ask("POST", "/", b"x" * (INLINE_MAX + 1))
        assert answer.status == 413 and b"too large" in answer.body
        assert wire.ask("GET", "/").status == 200
        assert not [name for name in os.listdir(f"{store_dir}/cas") if name.startswith("new-")]


# An answer comes back


def test_an_answer_may_name_the_request_or_its_frame(shared: WebServer) -> None:
    def by_frame(client: xs.Client, frame: Frame) -> None:
        meta = {"frame_id": frame.id, "handler_id": frame.id}
        client.append("http.response", b"by its frame", meta=meta)

    with Wire(shared.web[0]) as wire:
        assert wire.ask("GET", told(shared, by_frame)).body == b"by its frame"


def test_only_an_http_response_with_the_right_id_is_an_answer(shared: WebServer) -> None:
    def others_first(client: xs.Client, frame: Frame) -> None:
        own = {"request_id": frame.meta["request_id"], "frame_id": frame.id}
        for topic in ("http.responses", "http", "page", "http.response.x", "http.request.out"):
            client.append(topic, b"no", meta=own)
        client.append("http.response", b"no", meta={"request_id": "another", "frame_id": "x"})
        client.append("http.response", b"no", meta=frame.meta["request_id"])
        client.append("http.response", b"no")
        client.append("http.response", b"yes", meta=own)
        client.append("http.response", b"too late", meta=own)

    with Wire(shared.web[0]) as wire:
        for _ in range(3):
            assert wire.ask("GET", told(shared, others_first)).body == b"yes"


def test_what_a_handler_answers_a_client_who_is_gone_is_not_given_to_who_has_it_say_so(
    server: WebServer,
) -> None:
    chat = program(
        """
        for given in frames():
            frame = given["frame"]
            viewer = frame["meta"]["headers"].get("viewer", frame["meta"]["request_id"])
            to_viewer = {"topic": "http.response", "meta": {"request_id": viewer}, "content": "new"}
            posted = {"topic": "http.response", "meta": {"status": 201}, "content": "posted"}
            answer({"out": [to_viewer, posted]})
        """
    )
    register(server, "chat", chat)
    with Wire(server.web[0]) as viewer, Wire(server.web[0]) as wire:
        assert viewer.ask("GET", "/").body == b"new"
        gone = last(server, "http.request").meta["request_id"]
        answer = wire.ask("POST", "/", viewer=gone)
        assert (answer.status, answer.body) == (201, b"posted")


def test_status_headers_and_content_are_the_answer_s(shared: WebServer) -> None:
    headers = {"Content-Type": "text/html", "Set-Cookie": ["a=1", "b=2"], "X-Name": "Ünï €"}
    path = answered_with(shared, "<p>é", status=418, headers=headers)
    found = raw(shared.web[0], request("GET", path, connection="close"))
    head, _, body = found.partition(b"\r\n\r\n")
    status, *fields = head.decode("utf-8").split("\r\n")
    assert status == "HTTP/1.1 418 "
    assert [field for field in fields if not field.startswith("date: ")] == [
        "Content-Type: text/html",
        "Set-Cookie: a=1",
        "Set-Cookie: b=2",
        "X-Name: Ünï €",
        "content-length: 5",
        "connection: close",
    ]
    assert body == "<p>é".encode()


@pytest.mark.parametrize("ttl", ["forever", "ephemeral", "time:600000", "last:1000"])
@pytest.mark.parametrize("size", [0, 1, INLINE_MAX])
def test_an_answer_may_be_stored_or_not(shared: WebServer, ttl: str, size: int) -> None:
    path = answered_with(shared, os.urandom(size), ttl=ttl)
    with Wire(shared.web[0]) as wire:
        answer = wire.ask("GET", path)
    assert (answer.status, answer.fields["content-length"]) == (200, str(size))


@pytest.mark.parametrize("size", [INLINE_MAX + 1, 1 << 20, (1 << 20) + 1, 5_000_000])
def test_large_content_has_its_length_and_is_whole(shared: WebServer, size: int) -> None:
    content = os.urandom(size)
    path = answered_with(shared, content)
    with Wire(shared.web[0]) as wire:
        for _ in range(2):
            answer = wire.ask("GET", path)
            assert answer.fields["content-length"] == str(size) and answer.body == content


@pytest.mark.parametrize("size", [5, 3_000_000])
def test_content_may_be_named_by_its_hash(shared: WebServer, size: int) -> None:
    content = os.urandom(size)

    def by_hash(client: xs.Client, frame: Frame) -> None:
        respond(client, frame, None, hash=client.cas_post(content))

    with Wire(shared.web[0]) as wire:
        answer = wire.ask("GET", told(shared, by_hash))
        assert answer.fields["content-length"] == str(size) and answer.body == content


def test_head_has_the_length_and_no_body_and_the_connection_goes_on(shared: WebServer) -> None:
    paths = [answered_with(shared, b"x" * size) for size in (0, 5, 2_000_000)]
    paths.append(answered_with(shared, headers={"Content-Length": "1234"}))
    with Wire(shared.web[0]) as wire:
        for path, length in zip(paths, ("0", "5", "2000000", "1234")):
            answer = wire.ask("HEAD", path)
            assert (answer.status, answer.fields["content-length"]) == (200, length)
        assert wire.ask("GET", "/after").body == b"GET /after "


@pytest.mark.parametrize("status", [204, 304])
def test_no_content_is_a_head_alone(shared: WebServer, status: int) -> None:
    path = answered_with(shared, status=status)
    with Wire(shared.web[0]) as wire:
        wire.send(request("GET", path) + request("GET", "/after"))
        answer = wire.answer()
        assert answer.status == status and "content-length" not in answer.fields
        assert wire.answer().body == b"GET /after "


def test_an_answer_that_was_appended_at_once_is_never_lost(server: WebServer) -> None:
    """The handler answers within the request's own commit, as far as that can be."""

    def at_once(client: xs.Client, frame: Frame) -> None:
        meta = {"frame_id": frame.id}
        client.append("http.response", frame.id, meta=meta, ttl="ephemeral")

    Handler(server.directory, at_once)

    def ask() -> None:
        with Wire(server.web[0]) as wire:
            for _ in range(200):
                assert wire.ask("GET", "/").status == 200

    together(8, lambda _: ask())


# Runs of frames


class Paced:
    """A handler that answers with the frames that a test gives it, one by one."""

    def __init__(self, server: WebServer) -> None:
        self._frames: queue.Queue[tuple[Any, dict[str, Any], threading.Event]] = queue.Queue()
        self.request: Optional[Frame] = None
        self.path = told(server, self._answer)

    def _answer(self, client: xs.Client, frame: Frame) -> None:
        self.request = frame
        more = True
        while more:
            content, meta, appended = self._frames.get(timeout=DEADLINE)
            respond(client, frame, content, **meta)
            more = meta.get("more") is True
            appended.set()

    def give(self, content: Any = None, **meta: Any) -> None:
        appended = threading.Event()
        self._frames.put((content, meta, appended))
        assert appended.wait(DEADLINE)


@pytest.mark.parametrize("ttl", ["forever", "ephemeral"])
def test_each_frame_of_a_run_is_sent_at_once(shared: WebServer, ttl: str) -> None:
    paced = Paced(shared)
    with Wire(shared.web[0]) as wire:
        wire.send(request("GET", paced.path))
        paced.give(more=True, ttl=ttl, status=201, headers={"content-type": "text/event-stream"})
        status, fields = wire.head()  # it is there before there is any content
        assert (status, fields["content-type"]) == (201, "text/event-stream")
        assert fields["transfer-encoding"] == "chunked" and "content-length" not in fields
        for n in range(20):
            paced.give(f"data: {n}\n\n", more=True, ttl=ttl)
            assert wire.chunk() == f"data: {n}\n\n".encode()
        paced.give("last", ttl=ttl)
        assert wire.chunk() == b"last" and wire.chunk() == b""
        assert wire.ask("GET", "/after").body == b"GET /after ", "the connection goes on"


def test_a_run_may_have_frames_of_any_size_and_kind(shared: WebServer) -> None:
    paced = Paced(shared)
    large = os.urandom(2_500_000)
    with Wire(shared.web[0]) as wire:
        wire.send(request("GET", paced.path))
        paced.give("first", more=True)
        paced.give(None, more=True)
        paced.give(large, more=True)
        paced.give("ephemeral", more=True, ttl="ephemeral")
        with xs.open(shared.directory) as client:
            hash_ = client.cas_post(large)
        paced.give(None, more=True, hash=hash_)
        paced.give(None)
        assert wire.answer().body == b"first" + large + b"ephemeral" + large


def test_a_run_may_be_empty(shared: WebServer) -> None:
    paced = Paced(shared)
    with Wire(shared.web[0]) as wire:
        wire.send(request("GET", paced.path))
        paced.give(more=True)
        assert wire.head()[0] == 200
        paced.give()
        assert wire.chunk() == b""


def test_a_run_for_http_1_0_ends_with_its_connection(shared: WebServer) -> None:
    paced = Paced(shared)
    with Wire(shared.web[0]) as wire:
        wire.send(f"GET {paced.path} HTTP/1.0\r\nConnection: keep-alive\r\n\r\n".encode())
        paced.give("a", more=True)
        status, fields = wire.head()
        assert status == 200 and fields["connection"] == "close"
        assert not {"transfer-encoding", "content-length"} & set(fields)
        paced.give("b", more=True)
        paced.give("c")
        assert wire.rest() == b"abc"


class Written:
    """A request that is answered by a chunked content, which the test writes block by block."""

    def __init__(self, server: WebServer) -> None:
        self._client = xs.open(server.directory)
        self._asked: queue.Queue[Frame] = queue.Queue()
        self._blocks: queue.Queue[Optional[bytes]] = queue.Queue()
        self.path = told(server, lambda _, frame: self._asked.put(frame))
        self.asked: Frame

    def begin(self, **meta: Any) -> None:
        self.asked = self._asked.get(timeout=DEADLINE)
        meta["request_id"] = self.asked.meta["request_id"]
        self._thread = threading.Thread(target=self._append, args=(meta,), daemon=True)
        self._thread.start()

    def _append(self, meta: dict[str, Any]) -> None:
        with contextlib.suppress(xs.XsError, RuntimeError):
            self._client.append("http.response", self._given(), meta=meta, chunked=True)

    def _given(self) -> Iterator[bytes]:
        while True:
            block = self._blocks.get(timeout=DEADLINE)
            if block is None:
                return
            if not block:
                raise RuntimeError("the writer breaks off")
            yield block

    def write(self, block: bytes) -> None:
        self._blocks.put(block)

    def end(self) -> None:
        self._blocks.put(None)

    def break_off(self) -> None:
        self._blocks.put(b"")


def test_an_answer_may_be_a_chunked_content_and_is_sent_as_it_is_written(shared: WebServer) -> None:
    gone = Handler(shared.directory, nothing, "http.disconnect")
    written = Written(shared)
    with Wire(shared.web[0]) as wire:
        wire.send(request("GET", written.path))
        written.begin(status=201, headers={"content-type": "text/plain"})
        for block in (b"one", b"two", b"three"):
            written.write(block)
            if block == b"one":
                status, fields = wire.head()
                assert (status, fields["content-type"]) == (201, "text/plain")
                assert fields["transfer-encoding"] == "chunked" and "content-length" not in fields
            assert wire.chunk() == block
        written.end()
        assert wire.chunk() == b""
        # The connection goes on, and nobody was kept from the rest.
        wire.send(request("GET", answered_with(shared, "x", more=True)))
        assert wire.head()[0] == 200 and wire.chunk() == b"x"
    assert gone.next().meta["request_id"] != written.asked.meta["request_id"]


def test_a_chunked_content_of_any_size_is_an_answer_also_when_it_is_whole_already(
    shared: WebServer,
) -> None:
    def at_once(client: xs.Client, frame: Frame) -> None:
        meta = {"frame_id": frame.id, "x": "y"}
        client.append("http.response", iter([large[:7], large[7:]]), meta=meta, chunked=True)

    large = os.urandom(3_000_000)
    with Wire(shared.web[0]) as wire:
        assert wire.ask("GET", told(shared, at_once)).body == large
        large = b""
        assert wire.ask("GET", told(shared, at_once)).body == b""
    with Wire(shared.web[0]) as wire:
        large = b"abc"
        wire.send(f"GET {told(shared, at_once)} HTTP/1.0\r\n\r\n".encode())
        assert wire.head()[1]["connection"] == "close"
        assert wire.rest() == b"abc"


def test_a_chunked_content_may_end_an_answer_that_other_frames_have_begun(
    shared: WebServer,
) -> None:
    def mixed(client: xs.Client, frame: Frame) -> None:
        respond(client, frame, "a page of ", more=True)
        meta = {"request_id": frame.meta["request_id"]}
        client.append("http.response", iter([b"one", b" and two"]), meta=meta, chunked=True)
        respond(client, frame, "too late")

    with Wire(shared.web[0]) as wire:
        assert wire.ask("GET", told(shared, mixed)).body == b"a page of one and two"
        assert wire.ask("GET", "/after").body == b"GET /after "


def test_a_chunked_content_is_an_answer_also_where_it_was_imported(shared: WebServer) -> None:
    def imported(client: xs.Client, frame: Frame) -> None:
        hashes = [client.cas_post("one"), client.cas_post(" and two")]
        names = [ids.text(ids.parse(frame.id) + n) for n in (1, 2)]
        whole = {"chunk": names[0], "more": False}
        metas = [{"request_id": frame.meta["request_id"], "more": True}, whole]
        lines = [
            {"topic": "http.response", "id": id, "hash": hash, "meta": meta, "ttl": "forever"}
            for id, hash, meta in zip(names, hashes, metas)
        ]
        assert client.import_(lines)["imported"] == 2

    with Wire(shared.web[0]) as wire:
        assert wire.ask("GET", told(shared, imported)).body == b"one and two"


@pytest.mark.parametrize("how", ["broken off", "removed"])
def test_a_chunked_content_that_is_never_whole_breaks_the_answer_off(
    shared: WebServer, how: str
) -> None:
    gone = Handler(shared.directory, nothing, "http.disconnect")
    written = Written(shared)
    with Wire(shared.web[0]) as wire:
        wire.send(request("GET", written.path))
        written.begin()
        written.write(b"one")
        assert wire.head()[0] == 200 and wire.chunk() == b"one"
        if how == "removed":
            with xs.open(shared.directory) as client:
                assert client.remove(last(shared, "http.response"))
        else:
            written.break_off()
        with pytest.raises(EOFError):
            wire.chunk()
        written.end()
    assert gone.next().meta == {"request_id": written.asked.meta["request_id"]}
    assert "breaks off: the content 0" in shared.log()


def test_a_client_that_goes_amid_a_chunked_content_is_noted(shared: WebServer) -> None:
    gone = Handler(shared.directory, nothing, "http.disconnect")
    for where in (shared.web[0], shared.port(1)):
        written = Written(shared)
        with Wire(where) as wire:
            wire.send(request("GET", written.path))
            written.begin()
            written.write(b"one")
            assert wire.head()[0] == 200 and wire.chunk() == b"one"
        assert gone.next().meta == {"request_id": written.asked.meta["request_id"]}
        written.end()


def test_a_chunked_content_breaks_off_when_the_server_stops(store_dir: str, tmp_path: Path) -> None:
    server = start_web(store_dir, "--http", str(tmp_path / "web"))
    server.handler = Handler(store_dir, Routes(server))  # type: ignore[attr-defined]
    written = Written(server)
    with Wire(server.web[0]) as wire:
        wire.send(request("GET", written.path))
        written.begin()
        written.write(b"one")
        assert wire.head()[0] == 200 and wire.chunk() == b"one"
        server.process.terminate()
        with pytest.raises(EOFError):
            wire.chunk()
    server.process.communicate(timeout=DEADLINE)
    assert server.process.returncode == 0
    written.end()
    ends = [each.topic for each in frames(store_dir)[-3:]]
    assert ends == ["http.disconnect", "http.response", "xs.stop"]


def test_what_a_handler_answers_in_parts_is_its_first_request_s_whoever_causes_the_rest(
    server: WebServer,
) -> None:
    parts = program(
        """
        for given in frames():
            path = given["frame"]["meta"]["path"]
            if path == "/whole":
                out = [{"topic": "http.response", "content": "a", "more": True}]
                out += [{"topic": "http.response", "content": "b", "more": False}]
            else:
                own = {"topic": "http.response", "content": "own"}
                out = [{"topic": "http.response", "content": path, "more": path != "/end"}]
                out += [own] if path != "/begin" else []
            answer({"out": out})
        """
    )
    register(server, "parts", parts)
    with Wire(server.web[0]) as first, Wire(server.web[0]) as other:
        assert first.ask("GET", "/whole").body == b"ab"
        first.send(request("GET", "/begin"))
        assert first.head()[0] == 200 and first.chunk() == b"/begin"
        for path in ("/middle", "/end"):
            assert other.ask("GET", path).body == b"own"
            assert first.chunk() == path.encode()
        assert first.chunk() == b""
        assert first.ask("GET", "/whole").body == b"ab", "the connection goes on"


@pytest.mark.parametrize("ttl", ["forever", "ephemeral"])
@pytest.mark.parametrize("where", [0, 1], ids=["unix", "tcp"])
def test_a_page_of_a_thousand_events_arrives_whole(shared: WebServer, ttl: str, where: int) -> None:
    def events(client: xs.Client, frame: Frame) -> None:
        lines = [
            {
                "topic": "http.response",
                "content": f"id: {n}\ndata: {'x' * (n % 50)}\n\n",
                "ttl": ttl,
                "meta": {"frame_id": frame.id, "more": n < 999},
            }
            for n in range(1000)
        ]
        assert client.append_many(lines)["appended"] == 1000

    expected = "".join(f"id: {n}\ndata: {'x' * (n % 50)}\n\n" for n in range(1000)).encode()
    with Wire(shared.port(1) if where else shared.web[0]) as wire:
        for _ in range(3):
            assert wire.ask("GET", told(shared, events)).body == expected


def test_curl_is_shown_events_as_they_come(shared: WebServer) -> None:
    paced = Paced(shared)
    curl = subprocess.Popen(
        ["curl", "-sN", "-H", "Accept: text/event-stream", shared.web[1] + paced.path],
        stdout=subprocess.PIPE,
    )
    assert curl.stdout is not None
    try:
        for n in range(10):
            paced.give(f"data: {n}\n\n", more=True, headers={"content-type": "text/event-stream"})
            assert curl.stdout.readline() == f"data: {n}\n".encode()
            assert curl.stdout.readline() == b"\n"
        paced.give("end\n")
        assert curl.stdout.read() == b"end\n"
        assert curl.wait(DEADLINE) == 0
    finally:
        curl.kill()
        curl.stdout.close()
        curl.wait()


# One connection, many requests


def test_a_connection_is_kept_for_many_requests(shared: WebServer) -> None:
    for where in (shared.web[0], shared.port(1)):
        with Wire(where) as wire:
            for n in range(50):
                answer = wire.ask("PUT", f"/kept{n}", b"%d" % n)
                assert answer.body == b"PUT /kept%d %d" % (n, n)
                assert "connection" not in answer.fields


def test_requests_that_are_sent_ahead_are_answered_in_their_order(shared: WebServer) -> None:
    def talk(n: int) -> None:
        with Wire(shared.web[0]) as wire:
            wire.send(b"".join(request("POST", f"/{n}/{k}", b"%d" % k) for k in range(50)))
            for k in range(50):
                assert wire.answer().body == b"POST /%d/%d %d" % (n, k, k)

    together(8, talk)


def test_who_asks_for_the_connection_s_end_gets_it(shared: WebServer) -> None:
    closing = answered_with(shared, "bye", headers={"connection": "close"})
    for data in (
        request("GET", "/x", connection="close"),
        request("HEAD", "/x", connection="close"),
        b"GET /x HTTP/1.0\r\n\r\n",
        request("GET", closing),
        request("GET", closing) + request("GET", "/never/read"),
    ):
        with Wire(shared.web[0]) as wire:
            wire.send(data)
            answer = wire.answer("HEAD" if data.startswith(b"HEAD") else "GET")
            assert (answer.status, answer.fields["connection"]) == (200, "close")
            assert wire.is_ended()
    assert "/never/read" not in [f.meta["path"] for f in frames(shared.directory, "http.request")]


def test_http_1_0_may_keep_its_connection(shared: WebServer) -> None:
    with Wire(shared.web[0]) as wire:
        for _ in range(3):
            wire.send(b"GET /old HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
            answer = wire.answer()
            assert (answer.body, answer.fields["connection"]) == (b"GET /old ", "keep-alive")


def test_on_a_unix_socket_who_only_sends_no_more_is_answered(shared: WebServer) -> None:
    asked = request("GET", "/half1") + request("GET", "/half2")
    found = raw(shared.web[0], asked)
    assert b"GET /half1 " in found and found.endswith(b"GET /half2 ")


# No answer


def test_without_an_answer_in_time_it_is_504_and_a_late_one_is_nobody_s(
    store_dir: str, tmp_path: Path
) -> None:
    options = ("--http", str(tmp_path / "web"), "--http-timeout", "1")
    with web_server(store_dir, *options) as server, Wire(server.web[0]) as wire:
        handler = Handler(store_dir, nothing)
        gone = Handler(store_dir, nothing, "http.disconnect")
        started = time.monotonic()
        answer = wire.ask("GET", "/")
        assert (answer.status, answer.body) == (504, b"nobody answered within 1 s\n")
        assert 0.9 < time.monotonic() - started < DEADLINE
        late = handler.next()
        respond(handler.client, late, "late", more=True)
        assert gone.next().meta == {"request_id": late.meta["request_id"]}
        handler._answer = echo
        assert wire.ask("GET", "/next").body == b"GET /next "
    assert len(frames(store_dir, "http.disconnect")) == 1


def test_who_is_refused_and_stays_holds_no_place_and_is_noted_once(
    store_dir: str, tmp_path: Path
) -> None:
    options = ("--http", str(tmp_path / "web"), "--http-timeout", "1", "--http-max", "1")
    with web_server(store_dir, *options) as server, Wire(server.web[0]) as stays:
        handler = Handler(store_dir, nothing)
        stays.send(b"GET / HTTP/1.0\r\n\r\n")
        answer = stays.answer()
        assert (answer.status, answer.fields["connection"]) == (504, "close")
        handler.next()
        handler._answer = echo
        with Wire(server.web[0]) as wire:
            assert wire.ask("GET", "/").status == 200
        assert stays.is_ended()
        until(lambda: server.status_of("Threads") < 20)
    assert len(frames(store_dir, "http.disconnect")) == 1


def test_the_time_for_an_answer_is_the_time_for_its_beginning(
    store_dir: str, tmp_path: Path
) -> None:
    options = ("--http", str(tmp_path / "web"), "--http-timeout", "1")
    with web_server(store_dir, *options) as server, Wire(server.web[0]) as wire:
        handler = Handler(store_dir, nothing)
        wire.send(request("GET", "/"))
        frame = handler.next()
        respond(handler.client, frame, "a", more=True)
        assert wire.head()[0] == 200 and wire.chunk() == b"a"
        assert not is_readable(wire.sock, 1.5)
        respond(handler.client, frame, "b")
        assert wire.chunk() == b"b" and wire.chunk() == b""


def test_above_the_number_that_may_wait_it_is_503_and_nothing_is_appended(
    store_dir: str, tmp_path: Path
) -> None:
    options = ("--http", str(tmp_path / "web"), "--http-max", "2")
    with web_server(store_dir, *options) as server, contextlib.ExitStack() as stack:
        handler = Handler(store_dir, nothing)
        wires = [stack.enter_context(Wire(server.web[0])) for _ in range(3)]
        for n, wire in enumerate(wires[:2]):
            wire.send(request("GET", f"/{n}"))
        waiting = [handler.next() for _ in range(2)]
        answer = wires[2].ask("GET", "/third")
        assert (answer.status, answer.fields["retry-after"]) == (503, "1")
        assert answer.body == b"2 requests are waiting already: try again in a moment\n"
        assert "connection" not in answer.fields
        # A body isn't taken in for nothing.
        wires[2].send(request("POST", "/fourth", content_length=str(1 << 29)))
        answer = wires[2].answer()
        assert (answer.status, answer.fields["connection"]) == (503, "close")
        # An answer that has begun counts no more.
        respond(handler.client, waiting[0], "a", more=True)
        begun = next(wire for wire in wires if f"/{wires.index(wire)}" == waiting[0].meta["path"])
        assert begun.head()[0] == 200
        with Wire(server.web[0]) as wire:
            wire.send(request("GET", "/fifth"))
            respond(handler.client, handler.next(), "b")
            assert wire.answer().body == b"b"


def test_whatever_becomes_of_a_request_its_place_is_free_again(
    store_dir: str, tmp_path: Path
) -> None:
    options = ("--http", str(tmp_path / "web"), "--http-max", "1", "--http-timeout", "1")

    def answer(client: xs.Client, frame: Frame) -> None:
        if frame.meta["path"] != "/none":
            respond(client, frame, "x", **json.loads(frame.meta["query"].get("meta", "{}")))

    with web_server(store_dir, *options) as server:
        handler = Handler(store_dir, answer)
        gone = Handler(store_dir, nothing, "http.disconnect")
        for _ in range(3):
            until(lambda: asked_once(server.web[0]) == 200)  # told of, a place is free at once
            with Wire(server.web[0]) as wire:
                assert wire.ask("HEAD", "/").status == 200
                assert wire.ask("GET", '/?meta={"status":1}').status == 502
                assert wire.ask("GET", "/none").status == 504
                wire.send(request("POST", "/", content_length="5") + b"x")
            # Its end is seen by another thread: until then there is no place.
            until(lambda: asked_once(server.web[0], '/?meta={"more":true}') == 200)
            gone.next()
            with Wire(server.web[0]) as wire:
                while handler.seen.qsize():
                    handler.next()
                wire.send(request("GET", "/none"))
                handler.next()
            gone.next()
        until(lambda: asked_once(server.web[0]) == 200)


def asked_once(path: str, target: str = "/") -> int:
    """The status of an answer, whose body nobody waits for."""
    with Wire(path) as wire:
        wire.send(request("GET", target))
        return wire.head()[0]


def test_a_disk_that_is_full_is_507_and_the_door_stays_open(store_dir: str, tmp_path: Path) -> None:
    """No file may become larger than 4 MiB, which to a program is much the same."""
    process = subprocess.Popen(
        [
            *("bash", "-c", 'ulimit -f 4096; exec "$@"', "bash"),
            *(*XS, "serve", store_dir, "--http", str(tmp_path / "web")),
        ],
        stdout=subprocess.PIPE,
        env=environment(),
    )
    assert process.stdout is not None
    assert b"serving" in process.stdout.readline() and b"web" in process.stdout.readline()
    try:
        Handler(store_dir, echo)
        with Wire(str(tmp_path / "web")) as wire:
            wire.send(request("POST", "/", b"x" * 8_000_000))
            answer = wire.answer()
            assert (answer.status, answer.fields["connection"]) == (507, "close")
        with Wire(str(tmp_path / "web")) as wire:
            assert wire.ask("POST", "/", b"x" * 1_000_000).status == 200
        assert not [n for n in os.listdir(f"{store_dir}/cas") if n.startswith("new-")]
    finally:
        process.terminate()
        process.communicate(timeout=DEADLINE)


# The client goes away


def test_a_client_that_goes_while_it_waits_is_noted(shared: WebServer) -> None:
    gone = Handler(shared.directory, nothing, "http.disconnect")
    for where in (shared.web[0], shared.port(1)):
        arrived: queue.Queue[Frame] = queue.Queue()
        path = told(shared, lambda _, frame: arrived.put(frame))  # noqa: B023
        with Wire(where) as wire:
            wire.send(request("GET", path))
            asked = arrived.get(timeout=DEADLINE)
        noted = gone.next()
        assert noted.meta == {"request_id": asked.meta["request_id"]} and noted.hash is None
        with Wire(where) as wire:  # also when it had sent more
            wire.send(request("GET", path) + request("GET", "/ahead") + b"POST")
            asked = arrived.get(timeout=DEADLINE)
        assert gone.next().meta == {"request_id": asked.meta["request_id"]}


def test_a_client_that_goes_amid_a_run_is_noted(shared: WebServer) -> None:
    gone = Handler(shared.directory, nothing, "http.disconnect")
    arrived: queue.Queue[Frame] = queue.Queue()

    def begin(client: xs.Client, frame: Frame) -> None:
        respond(client, frame, "data: 1\n\n", more=True)
        arrived.put(frame)

    for where in (shared.web[0], shared.port(1)):
        with Wire(where) as wire:
            wire.send(request("GET", told(shared, begin)))
            assert wire.head()[0] == 200 and wire.chunk() == b"data: 1\n\n"
        asked = arrived.get(timeout=DEADLINE)
        assert gone.next().meta == {"request_id": asked.meta["request_id"]}


def test_a_client_that_goes_amid_a_long_body_is_noted(shared: WebServer) -> None:
    gone = Handler(shared.directory, nothing, "http.disconnect")
    path = answered_with(shared, b"x" * 20_000_000)
    with Wire(shared.web[0]) as wire:
        wire.send(request("GET", path))
        assert wire.head()[0] == 200
    noted = gone.next()
    assert noted.meta["request_id"] in [
        f.meta["request_id"]
        for f in frames(shared.directory, "http.request")
        if f.meta["path"] == path
    ]


def test_an_answer_that_was_heard_to_its_end_is_not_followed_by_a_disconnect(
    server: WebServer,
) -> None:
    Handler(server.directory, echo)
    for _ in range(20):
        with Wire(server.web[0]) as wire:
            for _ in range(3):
                assert wire.ask("GET", "/").status == 200
        assert raw(server.web[0], request("GET", "/", connection="close"))
    server.stop()
    assert frames(server.directory, "http.disconnect") == []


def test_a_handler_is_told_that_nobody_hears_the_rest_of_a_run(shared: WebServer) -> None:
    """Of a HEAD the head is all there is to send; of what is not HTTP, nothing is sent."""
    gone = Handler(shared.directory, nothing, "http.disconnect")
    with Wire(shared.web[0]) as wire:
        for method, status, meta in (("HEAD", 200, {}), ("GET", 502, {"headers": {"a b": "c"}})):
            path = answered_with(shared, "x", more=True, **meta)
            assert wire.ask(method, path).status == status
            asked = last(shared, "http.request")
            assert gone.next().meta == {"request_id": asked.meta["request_id"]}
        assert wire.ask("GET", "/after").body == b"GET /after "


# Answers that are not HTTP

INJECTED = {"x": "a\r\nset-cookie: evil=1\r\n\r\n<script>"}


@pytest.mark.parametrize(
    ("meta", "why"),
    [
        ({"status": 99}, "its status is 99"),
        ({"status": 101}, "its status is 101"),
        ({"status": 199}, "its status is 199"),
        ({"status": 600}, "its status is 600"),
        ({"status": "200 OK\r\nevil: 1"}, 'its status is "200 OK\\r\\nevil: 1"'),
        ({"status": 204}, "it has content"),
        ({"status": 304}, "it has content"),
        ({"headers": INJECTED}, "control character"),
        ({"headers": {"evil\r\nx": "1"}}, "not a token"),
        ({"headers": {"evil: x\r\ny": "1"}}, "not a token"),
        ({"headers": {"": "x"}}, "not a token"),
        ({"headers": {"x y": "x"}}, "not a token"),
        ({"headers": {"x": 5}}, 'its header "x" is 5'),
        ({"headers": "evil: 1"}, "its headers are"),
        ({"headers": {"Transfer-Encoding": "chunked"}}, "Transfer-Encoding"),
        ({"headers": {"content-length": "100"}}, "its Content-Length is 100"),
        ({"headers": {"content-length": ["4", "4"]}}, "its Content-Length"),
        ({"headers": {"connection": "upgrade"}}, "its Connection"),
        ({"headers": {"content-length": "4"}, "more": True}, "its Content-Length"),
        ({"more": "yes"}, 'its more is "yes"'),
        ({"hash": "sha256-none"}, 'its hash is "sha256-none"'),
        ({"hash": "sha256-" + "A" * 43 + "="}, "content of its own"),
    ],
)
def test_what_is_not_legal_never_reaches_the_wire(
    shared: WebServer, meta: dict[str, Any], why: str
) -> None:
    path = answered_with(shared, "evil", **meta)
    found = raw(shared.web[0], request("GET", path) + request("GET", "/after"))
    head, _, rest = found.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 502 Bad Gateway\r\ncontent-type: text/plain")
    assert rest.startswith(b"the answer to this request was not HTTP; see the log\nHTTP/1.1 200 ")
    assert b"evil" not in found and b"script" not in found and b"chunked" not in head
    answer = last_of(shared, path)
    lines = [line for line in shared.log().splitlines() if path in line]
    assert len(lines) == 1
    assert lines[0].startswith(f"xs: gateway: GET {path}: the answer {answer.id} is not sent: ")
    assert why in lines[0]


def last_of(server: WebServer, path: str) -> Frame:
    """The answer to the only request for that path."""
    ids = {
        f.meta["request_id"]
        for f in frames(server.directory, "http.request")
        if f.meta["path"] == path
    }
    (found,) = [
        f
        for f in frames(server.directory, "http.response")
        if isinstance(f.meta, dict) and f.meta.get("request_id") in ids
    ]
    return found


def test_content_that_is_not_there_is_502(shared: WebServer) -> None:
    path = answered_with(shared, None, hash="sha256-" + "A" * 43 + "=")
    with Wire(shared.web[0]) as wire:
        assert wire.ask("GET", path).status == 502
        assert wire.ask("GET", "/after").status == 200
    assert f"{path}: the answer" in shared.log()


def test_content_that_is_damaged_is_never_sent_as_if_it_were_whole(server: WebServer) -> None:
    Handler(
        server.directory, lambda c, f: (respond(c, f, None, hash=f.meta["query"]["h"]), None)[1]
    )
    with xs.open(server.directory) as client:
        hashes = [client.cas_post(os.urandom(size)) for size in (500_000, 3_000_000)]
    for path in Path(server.directory, "cas").glob("??/*"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    small_hash, large_hash = (hash_.replace("+", "%2B") for hash_ in hashes)
    with Wire(server.web[0]) as wire:
        assert wire.ask("GET", f"/?h={small_hash}").status == 502
        wire.send(request("GET", f"/?h={large_hash}"))
        with pytest.raises(EOFError):
            wire.answer()
    assert "breaks off: content" in server.log()


@pytest.mark.parametrize(
    "meta", [{"more": 1}, {"hash": "x"}, {"hash": "sha256-" + "A" * 43 + "=", "more": True}]
)
def test_a_run_whose_next_frame_is_wrong_breaks_off(
    shared: WebServer, meta: dict[str, Any]
) -> None:
    gone = Handler(shared.directory, nothing, "http.disconnect")
    paced = Paced(shared)
    for version in ("1.1", "1.0"):
        with Wire(shared.port(1)) as wire:
            wire.send(f"GET {paced.path} HTTP/{version}\r\nHost: a\r\n\r\n".encode())
            paced.give("a", more=True)
            assert wire.head()[0] == 200
            assert wire.exactly(1 if version == "1.0" else 6)[-3:].strip() == b"a"
            paced.give(None, **meta)
            if meta.get("more") is True:
                paced.give()
            # With no chunks to tell a body's end from its breaking off, the connection is reset.
            with pytest.raises(EOFError if version == "1.1" else ConnectionResetError):
                wire.until(b"0\r\n\r\n")
        assert paced.request is not None
        assert gone.next().meta == {"request_id": paced.request.meta["request_id"]}
    assert f"GET {paced.path}: the answer" in shared.log()


# Attacks


@pytest.mark.parametrize("name", http1_corpus.REFUSED)
def test_an_attack_is_refused_with_its_status_and_becomes_no_frame(
    shared: WebServer, name: str
) -> None:
    status, data = http1_corpus.REFUSED[name]
    if name in ("one field too large", "endless fields"):
        data = data.replace(b"\r\nA: ", b"\r\nA: " + b"b" * Limits.head_bytes, 1)
    earlier = int(name in ("second request bad", "bytes after a body"))
    stored = len(frames(shared.directory, "http.request"))
    with Wire(shared.web[0]) as wire:
        wire.send(data)
        wire.half_close()
        answers = []
        with contextlib.suppress(EOFError):
            while True:
                answers.append(wire.answer())
    assert [answer.status for answer in answers] == [200] * earlier + [status]
    assert answers[-1].fields["connection"] == "close"
    assert answers[-1].fields["content-type"] == "text/plain; charset=utf-8"
    assert len(frames(shared.directory, "http.request")) == stored + earlier


@pytest.mark.parametrize("name", http1_corpus.ACCEPTED)
def test_what_is_unusual_but_right_becomes_a_frame(shared: WebServer, name: str) -> None:
    stored = len(frames(shared.directory, "http.request"))
    with Wire(shared.web[0]) as wire:
        wire.send(http1_corpus.ACCEPTED[name])
        wire.half_close()
        answers = []
        with contextlib.suppress(EOFError):
            while True:
                answers.append(wire.answer("HEAD" if name == "HEAD" else "GET"))
    statuses = [answer.status for answer in answers if answer.status != 100]
    assert statuses and set(statuses) == {200}
    assert len(frames(shared.directory, "http.request")) == stored + len(statuses)


def test_what_follows_a_refused_request_is_never_read_as_one(shared: WebServer) -> None:
    smuggled = request("POST", "/smuggled", b"x")
    for attack in (
        b"POST /t HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked"
        b"\r\n\r\n0\r\n\r\n" + smuggled,
        request("POST", "/t", transfer_encoding="chunked") + b"x\r\n" + smuggled,
        request("POST", "/t", transfer_encoding="chunked") + b"5\r\nabcdefg\r\n" + smuggled,
        request("POST", "/t", content_length=str(1 << 40)) + smuggled,
        request("GET", "/t", connection="close") + smuggled,
        b"GET /t HTTP/1.1\r\nHost: a\r\nContent-Length : 0\r\n\r\n" + smuggled,
    ):
        raw(shared.web[0], attack)
    paths = [f.meta["path"] for f in frames(shared.directory, "http.request")]
    assert "/smuggled" not in paths


def test_a_body_that_breaks_off_becomes_no_frame(shared: WebServer) -> None:
    stored = len(frames(shared.directory, "http.request"))
    for data, status in (
        (request("POST", "/", content_length="100000") + b"x" * 50_000, b"400"),
        (request("POST", "/", transfer_encoding="chunked") + b"5\r\nab", b"400"),
        (request("POST", "/", transfer_encoding="chunked") + b"zz\r\n", b"400"),
    ):
        assert raw(shared.web[0], data)[9:12] == status
    assert len(frames(shared.directory, "http.request")) == stored
    assert not [n for n in os.listdir(f"{shared.directory}/cas") if n.startswith("new-")]


def test_a_body_above_the_limit_is_413_before_it_is_taken_in(
    store_dir: str, tmp_path: Path
) -> None:
    options = ("--http", str(tmp_path / "web"), "--http-body", "50000")
    with web_server(store_dir, *options) as server:
        Handler(store_dir, echo)
        with Wire(server.web[0]) as wire:
            assert wire.ask("POST", "/", b"x" * 50_000).status == 200
            wire.send(request("POST", "/", content_length="50001", expect="100-continue"))
            answer = wire.answer()
            assert (answer.status, answer.fields["connection"]) == (413, "close")
        with Wire(server.web[0]) as wire:
            wire.send(request("POST", "/", transfer_encoding="chunked"))
            wire.send(chunked(*[b"x" * 1000] * 60))
            assert wire.answer().status == 413
    assert len(frames(store_dir, "http.request")) == 1
    assert not [n for n in os.listdir(f"{store_dir}/cas") if n.startswith("new-")]


# Slow clients


def test_a_head_that_comes_slowly_is_refused_in_time(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Limits, "head_seconds", 0.3)
    for first in (b"GET / HTTP/1.1\r\n", b"G", b"\r\n"):
        with Wire(running.root.web[0]) as wire:
            wire.send(first)
            answer = wire.answer()
            assert (answer.status, answer.fields["connection"]) == (408, "close")
            assert wire.is_ended()
    with Wire(running.root.web[0]) as wire:  # also when it trickles
        wire.send(b"GET / HTTP/1.1\r\nA: ")
        assert trickle(wire, b"b").status == 408


def trickle(wire: Wire, data: bytes) -> Any:
    """Sends `data` again and again until there is an answer."""

    started = time.monotonic()
    while not is_readable(wire.sock, 0.02):
        wire.send(data)
        assert time.monotonic() < started + DEADLINE
    return wire.answer()


def test_a_body_that_comes_slowly_is_refused_in_time(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Limits, "body_seconds", 0.3)
    for sent in (b"", b"x"):
        with Wire(running.root.web[0]) as wire:
            wire.send(request("POST", "/", content_length="1000000") + sent)
            answer = wire.answer()
            assert (answer.status, answer.fields["connection"]) == (408, "close")
    with Wire(running.root.web[0]) as wire:
        wire.send(request("POST", "/", content_length="1000000"))
        assert trickle(wire, b"b").status == 408
    assert frames(running.root.folder, "http.request") == []


def test_a_long_body_may_take_its_time_if_it_keeps_coming(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Limits, "body_seconds", 0.3)
    monkeypatch.setattr(Limits, "body_rate", 10_000)
    Handler(running.root.folder, echo)
    with Wire(running.root.web[0]) as wire:
        wire.send(request("POST", "/", content_length="20000"))
        for _ in range(10):  # some 2,000 bytes each 0.1 s
            wire.send(b"x" * 2000)
            threading.Event().wait(0.1)
        assert wire.answer().status == 200


def test_an_idle_connection_is_closed_without_a_word(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Limits, "idle_seconds", 0.2)
    Handler(running.root.folder, echo)
    for where in (running.root.web[0], int(running.root.web[1].rpartition(":")[2])):
        with Wire(where) as wire:
            assert wire.ask("GET", "/").status == 200
            assert wire.is_ended()
        with Wire(where) as wire:
            assert wire.is_ended()


@pytest.mark.parametrize("kind", ["content", "run"])
def test_a_client_that_takes_nothing_is_left_and_noted(
    running: Running, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(Limits, "written_seconds", 0.3)

    def answer(client: xs.Client, frame: Frame) -> None:
        if kind == "content":
            respond(client, frame, b"x" * 20_000_000)
        else:
            line = {"topic": "http.response", "content": "x" * 10_000}
            line["meta"] = {"frame_id": frame.id, "more": True}  # type: ignore[assignment]
            client.append_many([line] * 2000)

    Handler(running.root.folder, answer)
    gone = Handler(running.root.folder, nothing, "http.disconnect")
    for where in (running.root.web[0], int(running.root.web[1].rpartition(":")[2])):
        with Wire(where) as wire:
            wire.send(request("GET", "/"))
            assert gone.next().meta is not None
            with contextlib.suppress(OSError, EOFError):
                assert not wire.rest().endswith(b"0\r\n\r\n")


def test_a_client_that_takes_too_little_is_left_and_noted(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 KiB within the time, and not a byte now and then."""
    monkeypatch.setattr(Limits, "written_seconds", 0.5)
    Handler(running.root.folder, lambda c, f: (respond(c, f, b"x" * 20_000_000), None)[1])
    gone = Handler(running.root.folder, nothing, "http.disconnect")
    left = threading.Event()

    def take_little(wire: Wire) -> None:
        while not left.wait(0.01) and wire.sock.recv(1000):
            pass

    for where in (running.root.web[0], int(running.root.web[1].rpartition(":")[2])):
        with Wire(where) as wire:
            wire.send(request("GET", "/"))
            left.clear()
            taking = threading.Thread(target=take_little, args=(wire,))
            taking.start()
            try:
                assert gone.next().meta is not None
            finally:
                left.set()
                taking.join(DEADLINE)


@pytest.mark.parametrize("ttl", ["forever", "time:600000"])
def test_behind_a_client_that_is_slow_to_read_memory_is_bounded_and_nothing_is_lost(
    server: WebServer, ttl: str
) -> None:
    count, size = 8000, 4000

    def answer(client: xs.Client, frame: Frame) -> None:
        client.append_many(
            {
                "topic": "http.response",
                "content": str(n).zfill(size),
                "ttl": ttl,
                "meta": {"frame_id": frame.id, "more": n < count - 1},
            }
            for n in range(count)
        )
        client.append("done")

    with xs.open(server.directory) as client:
        Handler(server.directory, answer)
        ends = Handler(server.directory, nothing, "done")
        with Wire(server.web[0]) as wire:
            wire.send(request("GET", "/"))
            assert wire.head()[0] == 200
            before = server.status_of("VmRSS")
            ends.next(DEADLINE * 3)  # all 32 MB are stored, and the client has read nothing
            assert server.status_of("VmRSS") - before < 24 * 1024
            for n in range(count):
                assert wire.chunk() == str(n).zfill(size).encode()
            assert wire.chunk() == b""
        assert client.version()


def test_a_slow_client_of_ephemeral_events_never_gets_a_body_with_a_hole(
    server: WebServer,
) -> None:
    def answer(client: xs.Client, frame: Frame) -> None:
        client.append_many(
            {
                "topic": "http.response",
                "content": str(n).zfill(4000),
                "ttl": "ephemeral",
                "meta": {"frame_id": frame.id, "more": True},
            }
            for n in range(8000)
        )
        client.append("done")

    Handler(server.directory, answer)
    ends = Handler(server.directory, nothing, "done")
    with Wire(server.web[0]) as wire:
        wire.send(request("GET", "/"))
        assert wire.head()[0] == 200
        ends.next(DEADLINE * 3)
        with pytest.raises(EOFError):
            for n in range(8000):
                assert wire.chunk() == str(n).zfill(4000).encode()
        assert n > 10
    assert "breaks off: " in server.log()


# A thousand that wait


def switches(server: WebServer) -> int:
    """How often the server's threads were woken so far."""
    found = 0
    for task in Path(f"/proc/{server.process.pid}/task").iterdir():
        with contextlib.suppress(OSError):
            for line in (task / "status").read_text().splitlines():
                if line.startswith("voluntary_ctxt_switches"):
                    found += int(line.split()[1])
    return found


def test_a_thousand_that_wait_cost_as_few_wake_ups_as_one_and_are_all_answered(
    server: WebServer,
) -> None:
    handler = Handler(server.directory, nothing)

    def cost() -> int:
        """Wake-ups for 200 appends that are not theirs, and one answer that nobody waits for."""
        with xs.open(server.directory) as client:
            client.append("other")
            before = switches(server)
            for _ in range(200):
                client.append("other")
            client.append("http.response", meta={"request_id": "nobody's"})
            return switches(server) - before

    wires = [Wire(server.web[0])]
    wires[0].send(request("GET", "/0"))
    waiting = [handler.next()]
    of_one = min(cost() for _ in range(3))
    memory = server.status_of("VmRSS")
    for n in range(1, 1000):
        wires.append(Wire(server.web[0]))
        wires[n].send(request("GET", f"/{n}"))
        waiting.append(handler.next())
    of_all = min(cost() for _ in range(3))
    # If that one answer woke each of them, there would be 999 more; other work makes some, too.
    assert of_all < of_one + 700
    assert server.status_of("VmRSS") - memory < 100 * 1024
    for frame in reversed(waiting):
        respond(handler.client, frame, frame.meta["path"])
    for n, wire in enumerate(wires):
        assert wire.answer().body == f"/{n}".encode()
        wire.sock.close()
    until(lambda: server.status_of("Threads") < 30)


def test_a_thousand_clients_that_go_at_once_are_all_noted_and_leave_nothing(
    server: WebServer,
) -> None:
    handler = Handler(server.directory, nothing)
    gone = Handler(server.directory, nothing, "http.disconnect")
    files = len(os.listdir(f"/proc/{server.process.pid}/fd"))
    wires = [Wire(server.web[0]) for _ in range(1000)]
    for wire in wires:
        wire.send(request("GET", "/"))
    asked = {handler.next().meta["request_id"] for _ in wires}
    assert len(asked) == 1000
    for wire in wires:
        wire.sock.close()
    assert {gone.next().meta["request_id"] for _ in wires} == asked
    until(lambda: len(os.listdir(f"/proc/{server.process.pid}/fd")) <= files + 5)
    until(lambda: server.status_of("Threads") < 30)


def test_above_the_limit_of_connections_the_web_is_asked_to_come_back_and_the_owner_is_served(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Limits, "connections", 3)
    Handler(running.root.folder, echo)
    wires = [Wire(running.root.web[0]) for _ in range(3)]
    for wire in wires:
        assert wire.ask("GET", "/").status == 200
    with Wire(running.root.web[0]) as late:
        answer = late.answer()
        assert (answer.status, answer.fields["retry-after"]) == (503, "1")
        assert late.is_ended()
    with Wire(running.root.folder) as owner:
        assert owner.ask("GET", "/version").status == 200
    for wire in wires:
        wire.sock.close()


# Start, stop, restart


def test_it_says_where_it_answers_and_the_first_frame_too(shared: WebServer) -> None:
    assert shared.web[1].startswith("http://127.0.0.1:")
    assert frames(shared.directory)[0].meta["http"] == shared.web


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--http", "here"], "not an address: 'here'"),
        (["--http", "x@:80"], "can't answer the web at ':80': use HOST:PORT"),
        (["--http", "https://127.0.0.1:0"], "needs a certificate"),
        (["--http", "/"], "can't listen on /"),
        (["--http", "DIR/file"], "a file is there already"),
        (["--http", "DIR/none/sock"], "can't listen on"),
        (["--http", "DIR/store/sock"], "a server listens there already"),
        (["--http", ":0", "--http-ttl", "never"], "--http-ttl: not a ttl"),
        (["--http", ":0", "--http-timeout", "0"], "--http-timeout takes a number above 0"),
        (["--http", ":0", "--http-max", "x"], "--http-max takes a whole number"),
        (["--http", ":0", "--tls-key", "DIR/file"], "--tls-key goes with --tls-cert"),
        (["--http", ":0", "--tls-cert", "DIR/none"], "/none: No such file or directory"),
        (["--http", ":0", "--tls-cert", "DIR/file"], "/file: it has no certificate in PEM"),
        (["--http-max", "5"], "--http-max goes with --http ADDR"),
        (["--tls-cert", "DIR/file"], "--tls-cert goes with --http ADDR"),
    ],
)
def test_what_can_t_be_is_said_in_one_line_and_nothing_is_left(
    tmp_path: Path, run_xs: RunXs, options: list[str], says: str
) -> None:
    (tmp_path / "file").write_text("not a certificate")
    is_within = "DIR/store/sock" in options
    options = [word.replace("DIR", str(tmp_path)) for word in options]
    done = run_xs(["serve", str(tmp_path / "store"), *options])
    assert done.returncode != 0 and done.stdout == b""
    text = done.stderr.decode()
    assert says in text and text.count("\n") == 1
    assert not (tmp_path / "store" / "sock").exists()
    assert (tmp_path / "store").exists() == is_within, "no store is made for what can't be"
    assert (tmp_path / "file").read_text() == "not a certificate"


def test_an_address_that_is_taken_is_refused(
    shared: WebServer, run_xs: RunXs, tmp_path: Path
) -> None:
    for address in (shared.web[0], shared.web[1].partition("//")[2]):
        done = run_xs(["serve", str(tmp_path / "store"), "--http", address])
        assert done.returncode == 5 and b"can't listen on" in done.stderr
        assert not (tmp_path / "store").exists()


def test_a_killed_server_is_replaced_and_the_stream_has_what_was_asked(
    store_dir: str, tmp_path: Path
) -> None:
    options = ("--http", str(tmp_path / "web"))
    first = start_web(store_dir, *options)
    handler = Handler(store_dir, nothing)
    wires = [Wire(first.web[0]) for _ in range(20)]
    for n, wire in enumerate(wires):
        wire.send(request("POST", f"/{n}", b"body"))
        handler.next()
    first.process.send_signal(signal.SIGKILL)
    first.process.communicate()
    for wire in wires:
        assert wire.is_ended()
    with web_server(store_dir, *options) as second:
        before = frames(store_dir, "http.request")
        assert sorted(int(f.meta["path"][1:]) for f in before) == list(range(20))
        with xs.open(store_dir) as client:
            for frame in before:  # a handler that goes on where it was answers them all
                respond(client, frame, "late")
        Handler(store_dir, echo)
        with Wire(second.web[0]) as wire:
            assert wire.ask("GET", "/new").body == b"GET /new "


def test_a_server_that_ends_leaves_the_socket_of_one_that_has_come_in_its_place(
    tmp_path: Path,
) -> None:
    web = str(tmp_path / "web")
    first = start_web(str(tmp_path / "a"), "--http", web)
    os.unlink(web)  # as somebody may who takes it for left over
    with web_server(str(tmp_path / "b"), "--http", web) as second:
        first.stop()
        Handler(second.directory, echo)
        with Wire(web) as wire:
            assert wire.ask("GET", "/b").body == b"GET /b "
    assert not os.path.exists(web)


def test_the_socket_of_a_server_that_is_stopping_is_another_s_at_once(tmp_path: Path) -> None:
    web = str(tmp_path / "web")
    first = start_web(str(tmp_path / "a"), "--http", web)
    handler = Handler(first.directory, nothing)
    with Wire(web) as waits:
        waits.send(request("GET", "/a"))
        asked = handler.next()
        first.process.terminate()
        until(lambda: not is_listening(web))
        with web_server(str(tmp_path / "b"), "--http", web) as second:
            respond(handler.client, asked, "still")
            assert waits.answer().body == b"still"
            assert first.process.wait(DEADLINE) == 0
            Handler(second.directory, echo)
            with Wire(web) as wire:
                assert wire.ask("GET", "/b").body == b"GET /b "
    first.stop()


def test_who_waits_is_answered_before_the_server_stops(store_dir: str, tmp_path: Path) -> None:
    server = start_web(store_dir, "--http", str(tmp_path / "web"))
    handler = Handler(store_dir, nothing)
    with Wire(server.web[0]) as waits, Wire(server.web[0]) as idle, Wire(server.web[0]) as streams:
        waits.send(request("GET", "/waits"))
        asked = handler.next()
        streams.send(request("GET", "/streams"))
        run = handler.next()
        respond(handler.client, run, "a", more=True)
        assert streams.head()[0] == 200 and streams.chunk() == b"a"
        server.process.terminate()
        assert idle.is_ended()
        with pytest.raises(EOFError):
            streams.chunk()
        respond(handler.client, asked, "still")
        answer = waits.answer()
        assert (answer.body, answer.fields["connection"]) == (b"still", "close")
        assert waits.is_ended()
    server.process.communicate(timeout=DEADLINE)
    assert server.process.returncode == 0
    assert not os.path.exists(server.web[0])
    found = frames(store_dir)
    assert found[-1].topic == "xs.stop"
    gone = [f for f in found if f.topic == "http.disconnect"]
    assert [f.meta for f in gone] == [{"request_id": run.meta["request_id"]}]


def test_who_waits_in_vain_is_told_that_the_server_stops(store_dir: str, tmp_path: Path) -> None:
    running = Running(store_dir, [], [], Web([str(tmp_path / "web")], Options()), grace=0.4)
    handler = Handler(store_dir, nothing)
    with Wire(running.root.web[0]) as wire:
        wire.send(request("GET", "/"))
        handler.next()
        running.stop()
        answer = wire.answer()
        assert (answer.status, answer.fields["connection"]) == (503, "close")
        assert answer.body == b"the server is stopping\n"


def test_many_requests_at_the_moment_of_a_stop_are_each_answered_or_ended(
    store_dir: str, tmp_path: Path
) -> None:
    server = start_web(store_dir, "--http", str(tmp_path / "web"))
    Handler(store_dir, echo)
    answered = threading.Event()

    def ask() -> None:
        try:
            with Wire(server.web[0]) as wire:
                while True:
                    assert wire.ask("POST", "/", b"x" * 100).status in (200, 503)
                    answered.set()
        except (OSError, EOFError):
            pass

    threads = [threading.Thread(target=ask) for _ in range(20)]
    for thread in threads:
        thread.start()
    assert answered.wait(DEADLINE)
    server.process.terminate()
    for thread in threads:
        thread.join(DEADLINE)
        assert not thread.is_alive()
    server.process.communicate(timeout=DEADLINE)
    assert server.process.returncode == 0
    assert "Traceback" not in server.log()
    assert frames(store_dir)[-1].topic == "xs.stop"


# TLS


class Certificate:
    """A certificate for `localhost`, its key, and both in one file."""

    def __init__(self, folder: Path) -> None:
        self.path, self.key = str(folder / "cert.pem"), str(folder / "key.pem")
        subprocess.run(
            [
                *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
                *("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"),
                *("-keyout", self.key, "-out", self.path),
            ],
            check=True,
            capture_output=True,
        )
        self.both = str(folder / "both.pem")
        Path(self.both).write_text(Path(self.key).read_text() + Path(self.path).read_text())


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return Certificate(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def secure(
    tmp_path_factory: pytest.TempPathFactory, certificate: Certificate
) -> Iterator[WebServer]:
    """A server that speaks TLS at its first address, and not at the other two."""
    folder = tmp_path_factory.mktemp("secure")
    addresses = ("--http", ":0", "--http", "http://127.0.0.1:0", "--http", str(folder / "web"))
    files = ("--tls-cert", certificate.path, "--tls-key", certificate.key)
    with web_server(str(folder / "store"), *addresses, *files) as server:
        handler = Handler(server.directory, Routes(server))
        yield server
        handler.check()


@pytest.mark.parametrize(
    ("cert", "key", "says"),
    [
        ("cert", None, "cert {cert}: it has no key in it: give the key's file as --tls-key"),
        ("key", "cert", "cert {cert}: it has no certificate in PEM: no line"),
        ("damaged", "key", "cert {cert}: a certificate in it is damaged"),
        ("cert", "folder", "key {key}: Is a directory"),
        ("cert", "cert", "key {key}: it has no key in PEM: no line -----BEGIN PRIVATE KEY-----"),
        ("cert", "locked", "key {key}: the key has a passphrase, and nobody is asked"),
        ("cert", "another", "key {key}: the key is not that of the first certificate of {cert}, "),
        ("cert", "of another kind", "key {key}: the key is not that of the first certificate"),
        ("cert", "damaged key", "key {key}: the key in it is damaged"),
    ],
)
def test_what_is_wrong_with_a_certificate_or_its_key_is_told_with_its_file(
    certificate: Certificate,
    tmp_path: Path,
    run_xs: RunXs,
    cert: str,
    key: Optional[str],
    says: str,
) -> None:
    files = {"cert": certificate.path, "key": certificate.key, "folder": str(tmp_path)}
    for made in (cert, key):
        if made is not None and made not in files:
            files[made] = str(tmp_path / made)
            make_wrong(certificate, made, files[made])
    words = ["--tls-cert", files[cert], *(["--tls-key", files[key]] if key else [])]
    done = run_xs(["serve", str(tmp_path / "store"), "--http", ":0", *words])
    assert (done.returncode, done.stdout) == (2, b"")
    text = done.stderr.decode()
    said = says.format(cert=files[cert], key=files[key or cert])
    assert text.startswith(f"xs: can't use --tls-{said}") and text.count("\n") == 1, text
    assert not (tmp_path / "store").exists()


def make_wrong(certificate: Certificate, what: str, path: str) -> None:
    if what in ("damaged", "damaged key"):
        lines = Path(certificate.path if what == "damaged" else certificate.key).read_text()
        Path(path).write_text(lines.replace("MI", "AA", 1))
        return
    asked = {
        "locked": ["pkey", "-in", certificate.key, "-aes128", "-passout", "pass:word", "-out"],
        "another": ["genpkey", "-algorithm", "RSA", "-out"],
        "of another kind": ["ecparam", "-genkey", "-noout", "-name", "prime256v1", "-out"],
    }
    subprocess.run(["openssl", *asked[what], path], check=True, capture_output=True)


class TlsWire(Wire):
    """A connection with TLS."""

    def __init__(self, port: int, certificate: Certificate) -> None:
        super().__init__(port)
        context = ssl.create_default_context(cafile=certificate.path)
        self.sock = context.wrap_socket(self.sock, server_hostname="localhost")


def curl(*arguments: str, certificate: Certificate) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        ["curl", "-s", "--cacert", certificate.path, *arguments],
        capture_output=True,
        timeout=DEADLINE,
    )


def test_curl_asks_over_tls(secure: WebServer, certificate: Certificate, tmp_path: Path) -> None:
    assert secure.web[0].startswith("https://127.0.0.1:")
    upload = tmp_path / "upload"
    upload.write_bytes(os.urandom(3_000_000))
    done = curl(f"{secure.web[0]}/up", "-T", str(upload), certificate=certificate)
    assert done.stdout == b"PUT /up " + upload.read_bytes()
    done = curl("-v", f"{secure.web[0]}/a", f"{secure.web[0]}/b", certificate=certificate)
    assert done.stdout == b"GET /a GET /b "
    assert b"Re-using existing connection" in done.stderr
    assert b"ALPN" in done.stderr and b"http/1.1" in done.stderr


def test_addresses_that_are_plain_stay_plain(secure: WebServer) -> None:
    assert secure.web[1].startswith("http://127.0.0.1:") and secure.web[2].startswith("/")
    for where in (secure.port(1), secure.web[2]):
        with Wire(where) as wire:
            assert wire.ask("GET", "/plain").body == b"GET /plain "


@pytest.mark.parametrize(
    ("version", "works"),
    [("-tls1", False), ("-tls1_1", False), ("-tls1_2", True), ("-tls1_3", True)],
)
def test_tls_is_of_version_1_2_or_1_3(
    secure: WebServer, certificate: Certificate, version: str, works: bool
) -> None:
    where = secure.web[0].partition("//")[2]
    done = subprocess.run(
        [
            *("openssl", "s_client", "-connect", where, version, "-CAfile", certificate.path),
            *("-verify_return_error", "-quiet", "-cipher", "DEFAULT:@SECLEVEL=0"),
        ],
        input=b"GET /s_client HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
        capture_output=True,
        timeout=DEADLINE,
    )
    assert done.stdout.endswith(b"GET /s_client ") == works
    assert done.stdout.startswith(b"HTTP/1.1 200 OK\r\n") == works


def test_a_certificate_may_have_its_key_in_the_same_file(
    store_dir: str, certificate: Certificate
) -> None:
    options = ("--http", "https://localhost:0", "--tls-cert", certificate.both)
    with web_server(store_dir, *options) as server:
        Handler(store_dir, echo)
        with TlsWire(server.port(), certificate) as wire:
            assert wire.ask("GET", "/").body == b"GET / "


def test_who_speaks_no_tls_where_it_is_spoken_is_told_so(secure: WebServer) -> None:
    with Wire(secure.port()) as wire:
        answer = wire.ask("GET", "/")
        assert (answer.status, answer.body) == (400, b"this address speaks TLS: use https\n")
        assert wire.is_ended()
    with Wire(secure.port()) as wire:  # what is no handshake either is just ended
        wire.send(b"\x16\x03\x01\x00\x05hello" + b"x" * 100)
        with contextlib.suppress(OSError):
            assert b"HTTP" not in wire.rest()


def test_over_tls_runs_bodies_and_pipelines_are_as_without(
    secure: WebServer, certificate: Certificate
) -> None:
    paced = Paced(secure)
    large = os.urandom(3_000_000)
    with TlsWire(secure.port(), certificate) as wire:
        wire.send(request("GET", paced.path))
        for n in range(5):
            paced.give(f"data: {n}\n\n", more=True)
            if n == 0:
                assert wire.head()[0] == 200
            assert wire.chunk() == f"data: {n}\n\n".encode()
        paced.give(large)
        assert wire.chunk() + b"".join(iter(wire.chunk, b"")) == large
        wire.send(b"".join(request("POST", f"/{n}", b"x" * n * 1000) for n in range(20)))
        for n in range(20):
            assert wire.answer().body == b"POST /%d " % n + b"x" * n * 1000
        wire.send(request("GET", "/bye", connection="close"))
        assert wire.answer().body == b"GET /bye "
        assert wire.is_ended(), "an orderly end: ssl raises for one that may be a cut"


def test_over_tls_a_client_that_goes_is_noted(secure: WebServer, certificate: Certificate) -> None:
    gone = Handler(secure.directory, nothing, "http.disconnect")
    arrived: queue.Queue[Frame] = queue.Queue()
    path = told(secure, lambda _, frame: arrived.put(frame))
    with TlsWire(secure.port(), certificate) as wire:
        wire.send(request("GET", path))
        asked = arrived.get(timeout=DEADLINE)
    assert gone.next().meta == {"request_id": asked.meta["request_id"]}


def test_a_handshake_has_a_time_limit_and_holds_nobody_else(
    store_dir: str, certificate: Certificate, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = Options(certificate=certificate.both)
    monkeypatch.setattr(Limits, "handshake_seconds", 0.5)
    running = Running(store_dir, [], [], Web([":0"], options))
    try:
        Handler(store_dir, echo)
        port = int(running.root.web[0].rpartition(":")[2])
        with contextlib.ExitStack() as stack:
            silent = [stack.enter_context(Wire(port)) for _ in range(20)]
            for wire in silent[::2]:
                wire.send(b"\x16\x03\x01")
            with TlsWire(port, certificate) as wire:
                assert wire.ask("GET", "/").body == b"GET / "
            for wire in silent:
                assert wire.is_ended()
    finally:
        running.stop()


def test_over_tls_slow_clients_are_left_in_time_too(
    store_dir: str, certificate: Certificate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Limits, "head_seconds", 0.3)
    monkeypatch.setattr(Limits, "body_seconds", 0.3)
    monkeypatch.setattr(Limits, "idle_seconds", 0.3)
    monkeypatch.setattr(Limits, "written_seconds", 0.3)
    running = Running(store_dir, [], [], Web([":0"], Options(certificate=certificate.both)))
    try:
        Handler(store_dir, lambda c, f: (respond(c, f, b"x" * 20_000_000), None)[1])
        gone = Handler(store_dir, nothing, "http.disconnect")
        port = int(running.root.web[0].rpartition(":")[2])
        with TlsWire(port, certificate) as wire:
            assert wire.is_ended()
        for data in (b"GET / HT", request("POST", "/", content_length="100") + b"x"):
            with TlsWire(port, certificate) as wire:
                wire.send(data)
                assert wire.answer().status == 408
        with TlsWire(port, certificate) as wire:
            wire.send(request("GET", "/"))
            assert gone.next().meta is not None
    finally:
        running.stop()


def test_a_server_with_tls_stops_in_good_order(store_dir: str, certificate: Certificate) -> None:
    server = start_web(store_dir, "--http", ":0", "--tls-cert", certificate.both)
    handler = Handler(store_dir, nothing)
    with contextlib.ExitStack() as stack:
        waits, idle = (stack.enter_context(TlsWire(server.port(), certificate)) for _ in range(2))
        waits.send(request("GET", "/"))
        asked = handler.next()
        server.process.terminate()
        assert idle.is_ended()
        respond(handler.client, asked, "still")
        assert waits.answer().body == b"still"
        assert waits.is_ended()
    server.process.communicate(timeout=DEADLINE)
    assert server.process.returncode == 0
    assert "Traceback" not in server.log()
