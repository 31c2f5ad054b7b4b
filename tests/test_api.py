"""Every route, parameter and refusal of the HTTP API (docs/protocol.md), without sockets.

How the same answers go over a connection is in test_httpd.py.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Union

import pytest

from xs import api, ids, messages
from xs.errors import BrokenBody
from xs.store import Store
from xs.version import VERSION

NOW = 1_750_000_000_000  # 2025-06-15T15:06:40Z
NDJSON = "application/x-ndjson"


class Clock:
    """Milliseconds since 1970, as a test says."""

    def __init__(self) -> None:
        self.ms = NOW

    def __call__(self) -> int:
        return self.ms


class Answer(NamedTuple):
    status: int
    fields: dict[str, str]
    body: bytes

    @property
    def kind(self) -> str:
        return self.fields.get("content-type", "")

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def lines(self) -> list[Any]:
        assert self.kind == NDJSON
        assert not self.body or self.body.endswith(b"\n")
        return [json.loads(line) for line in self.body.splitlines()]

    @property
    def sentence(self) -> str:
        assert self.kind == "text/plain; charset=utf-8"
        text = self.body.decode()
        assert text.endswith("\n") and text.count("\n") == 1, text
        return text[:-1]


Body = Union[bytes, Iterable[bytes]]


class Api:
    """Requests to a store in this process."""

    def __init__(self, folder: str) -> None:
        self.clock = Clock()
        self.folder = folder
        self.store = Store(folder, exclusive=True, create=True, clock=self.clock)

    def ask(self, method: str, target: str, body: Body = b"", **fields: str) -> Answer:
        """`fields` with `_` for `-`."""
        found = api.run(
            self.store, api.answer(self.store, self.request(method, target, body, fields))
        )
        if found.reader is not None:
            text = b"".join(found.reader.history())
        else:
            text = found.body if found.blocks is None else b"".join(found.blocks)
        if found.length is not None:
            assert found.length == len(text)
        names = [name for name, _ in found.fields]
        assert len(set(names)) == len(names)
        return Answer(found.status, dict(found.fields), text)

    def request(
        self, method: str, target: str, body: Body = b"", fields: dict[str, str] | None = None
    ) -> messages.Request:
        path, _, query = target.partition("?")
        named = [(name.replace("_", "-"), value) for name, value in (fields or {}).items()]
        blocks = ([body] if body else []) if isinstance(body, bytes) else body
        return messages.Request(method, path, query, named, blocks)

    def get(self, target: str, **fields: str) -> Answer:
        return self.ask("GET", target, **fields)

    def post(self, target: str, body: Body = b"", **fields: str) -> Answer:
        return self.ask("POST", target, body, **fields)

    def append(self, topic: str, content: Body = b"", **fields: str) -> dict[str, Any]:
        """Appends in a millisecond of its own, so that ids in the tests are far apart."""
        self.clock.ms += 1
        answer = self.post(f"/append/{topic}", content, **fields)
        assert answer.status == 200, answer
        frame: dict[str, Any] = answer.json
        return frame

    def many(self, target: str, *lines: Union[bytes, dict[str, Any]]) -> Answer:
        texts = [x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines]
        return self.post(target, b"\n".join(texts) + b"\n", content_type=NDJSON)

    def frames(self) -> list[Any]:
        return self.get("/").lines

    def contents(self) -> list[str]:
        """The names of all content files, temporary ones included."""
        return [n for _, _, names in os.walk(os.path.join(self.folder, "cas")) for n in names]


@pytest.fixture
def xs(tmp_path: Path) -> Iterator[Api]:
    found = Api(str(tmp_path / "store"))
    yield found
    assert [x for x in found.store.check() if isinstance(x, str)] == []
    found.store.close()


def integrity(data: bytes) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(data).digest()).decode()


def id_at(ms: int, counter: int = 0) -> str:
    return ids.text(ids.first_of(ms) + counter)


# One frame


def test_a_frame_s_json_has_every_key_in_order_and_ends_with_a_newline(xs: Api) -> None:
    answer = xs.post("/append/notes.add", b"hello")
    assert (answer.status, answer.kind) == (200, "application/json")
    frame_id = answer.json["id"]
    assert answer.body.decode() == (
        f'{{"topic":"notes.add","id":"{frame_id}","hash":"{integrity(b"hello")}",'
        '"meta":null,"ttl":"forever"}\n'
    )
    assert xs.get("/").body == answer.body


def test_without_a_body_a_frame_has_no_hash(xs: Api) -> None:
    assert xs.append("notes")["hash"] is None


@pytest.mark.parametrize("path", ["/append/t", "/stream/t", "/t"])
def test_each_way_to_append_is_the_same(xs: Api, path: str) -> None:
    answer = xs.post(f"{path}?ttl=last:3", b"x", xs_meta='{"a":1}')
    assert answer.status == 200
    assert answer.json == {
        "topic": "t",
        "id": answer.json["id"],
        "hash": integrity(b"x"),
        "meta": {"a": 1},
        "ttl": "last:3",
    }
    assert xs.frames() == [answer.json]


def test_a_topic_may_be_percent_encoded(xs: Api) -> None:
    assert xs.post("/append/%6eotes%2Eadd").json["topic"] == "notes.add"


def test_the_first_word_of_a_path_may_be_percent_encoded(xs: Api) -> None:
    """RFC 3986 §6.2.2.2: it is the same path. So it is no topic, either."""
    assert xs.post("/%61ppend/t").json["topic"] == "t"
    assert xs.get("/l%61st/t").json["topic"] == "t"
    assert xs.get("/%76ersion").status == 200
    refused = xs.post("/%6cast")
    assert (refused.status, refused.fields["allow"]) == (405, "GET, HEAD")
    assert xs.post("/%6eotes").json["topic"] == "notes"


@pytest.mark.parametrize("topic", ["a", "_", "A-b_c.0", "a" * 255, "a.0.-._", "xs", "xsx.a"])
def test_a_topic_is_accepted(xs: Api, topic: str) -> None:
    assert xs.post(f"/append/{topic}").json["topic"] == topic


BAD_TOPICS = {
    "0a": "not a topic: '0a'",
    "-a": "not a topic",
    ".a": "not a topic",
    "a.": "not a topic",
    "a..b": "not a topic",
    "a%20b": "not a topic: 'a b'",
    "a%2Fb": "not a topic: 'a/b'",
    "a/b": "not a topic: 'a/b'",
    "a%0A": "not a topic: 'a\\n'",
    "%C3%A9": "not a topic: 'é'",
    "%FF": "not UTF-8: '\\xff'",
    "%zz": "broken percent-encoding: '%zz'",
    "%": "broken percent-encoding: '%'",
    "%4": "broken percent-encoding",
    "": "the topic is empty",
    "a" * 256: "the topic is too long: at most 255 bytes",
    "xs.start": "topic 'xs.start' belongs to the runtime",
    "xs.anything": "belongs to the runtime",
    "xs.pulse": "belongs to the runtime",
    "xs.threshold": "belongs to the runtime",
    "xs.": "belongs to the runtime",
}


@pytest.mark.parametrize("topic", BAD_TOPICS)
@pytest.mark.parametrize("path", ["/append/", "/stream/"])
def test_what_is_no_topic_is_refused_and_nothing_is_stored(xs: Api, path: str, topic: str) -> None:
    answer = xs.post(path + topic, b"content")
    assert answer.status == 400
    assert BAD_TOPICS[topic] in answer.sentence
    assert xs.frames() == [] and xs.contents() == []


@pytest.mark.parametrize("topic", ["xs.store.add", "xs.store.remove"])
def test_a_client_may_ask_for_stores(xs: Api, topic: str) -> None:
    assert xs.post(f"/append/{topic}").json["topic"] == topic


# Meta

METAS = {
    "null": "null",
    "{}": "{}",
    ' { "b" : 1.10 , "a" : [ 1 , 2 ] } ': '{"b":1.10,"a":[1,2]}',
    '"a b"': '"a b"',
    '"\\u00e9 \\" x"': '"\\u00e9 \\" x"',
    "1e400": "1e400",
    "1" * 6000: "1" * 6000,
    "-0.0": "-0.0",
    '{"a":1,"a":2}': '{"a":1,"a":2}',
    '"\\ud83d\\ude00"': '"\\ud83d\\ude00"',
    "[" * 128 + "]" * 128: "[" * 128 + "]" * 128,
    '"' + "[" * 200 + '"': '"' + "[" * 200 + '"',
    "true": "true",
    "1234": "1234",  # base64 too, but JSON is tried first
}


@pytest.mark.parametrize("encoding", ["raw", "base64"])
@pytest.mark.parametrize("text", METAS, ids=range(len(METAS)))
def test_meta_keeps_its_text_less_insignificant_white_space(
    xs: Api, text: str, encoding: str
) -> None:
    field = text if encoding == "raw" else base64.b64encode(text.encode()).decode()
    answer = xs.post("/append/t", xs_meta=field)
    assert answer.status == 200, answer
    assert f'"meta":{METAS[text]},"ttl"'.encode() in answer.body
    assert xs.get("/").body == answer.body


def test_meta_may_be_utf8_as_it_is_or_in_base64(xs: Api) -> None:
    text = '{"é":"日本 😀"}'
    raw = xs.post("/append/t", xs_meta=text.encode().decode("latin-1"))
    coded = xs.post("/append/t", xs_meta=base64.b64encode(text.encode()).decode())
    assert raw.json["meta"] == coded.json["meta"] == {"é": "日本 😀"}
    assert '"meta":{"é":"日本 😀"}'.encode() in raw.body


BAD_METAS = {
    "": "meta is not JSON",
    "{": "meta is not JSON",
    "{'a':1}": "meta is not JSON",
    "NaN": "meta is not JSON: NaN is not a JSON value",
    "[Infinity]": "meta is not JSON: Infinity is not a JSON value",
    "-Infinity": "not a JSON value",
    '"\\ud800"': "half of a surrogate pair",
    "[" * 129 + "]" * 129: "meta is nested too deep: at most 128 levels",
    "[" * 100_000: "meta is nested too deep",
    "1 2": "meta is not JSON",
    '"\t"': "meta is not JSON",
    "\xff": "xs-meta is not UTF-8: send base64 of the JSON instead",
    "bm90IGpzb24=": "meta is not JSON",  # base64 of: not json
    "e30": "meta is not JSON",  # base64 without its padding
    "01": "meta is not JSON",
    "1.": "meta is not JSON",
    "{}\x0b": "meta is not JSON",
}


@pytest.mark.parametrize("text", BAD_METAS, ids=range(len(BAD_METAS)))
def test_what_is_no_meta_is_refused_and_nothing_is_stored(xs: Api, text: str) -> None:
    answer = xs.post("/append/t", b"content", xs_meta=text)
    assert answer.status == 400
    assert BAD_METAS[text] in answer.sentence
    assert xs.frames() == []


def test_meta_has_at_most_a_mebibyte_of_json(xs: Api) -> None:
    fits = '"' + "a" * ((1 << 20) - 2) + '"'
    assert xs.post("/append/t", xs_meta=fits).status == 200
    answer = xs.post("/append/t", xs_meta=base64.b64encode(b"[" + fits.encode() + b"]").decode())
    assert answer.status == 400
    assert "meta is too large: at most 1048576 bytes" in answer.sentence
    # Bytes are counted, not characters.
    wide = '"' + "é" * (1 << 19) + '"'
    assert xs.post("/append/t", xs_meta=wide.encode().decode("latin-1")).status == 400
    assert len(xs.frames()) == 1


def test_a_header_that_comes_twice_is_refused(xs: Api) -> None:
    for name in ("xs-meta", "idempotency-key", "content-type"):
        target = "/append" if name == "content-type" else "/append/t"
        request = messages.Request("POST", target, "", [(name, "1"), (name, "1")])
        found = api.answer(xs.store, request)
        assert (found.status, found.body) == (400, f"the header {name} is given twice\n".encode())
    assert xs.frames() == []


# Time to live


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("forever", "forever"),
        ("time:60000", "time:60000"),
        ("60000", "time:60000"),
        ("last:1", "last:1"),
        ("last:007", "last:7"),
    ],
)
def test_a_ttl_is_answered_in_its_one_spelling(xs: Api, given: str, kept: str) -> None:
    assert xs.post(f"/append/t?ttl={given}").json["ttl"] == kept


@pytest.mark.parametrize(
    "ttl",
    [
        "",
        "never",
        "time:",
        "time:0",
        "time:-1",
        "last:0",
        "last:x",
        "time:1.5",
        "0",
        "-5",
        "time:%C2%B2",
        "Forever",
        "time:1:2",
        "9" * 30,
        "last:" + "9" * 5000,
    ],
)
def test_what_is_no_ttl_is_refused_and_nothing_is_stored(xs: Api, ttl: str) -> None:
    answer = xs.post(f"/append/t?ttl={ttl}", b"content")
    assert answer.status == 400
    assert (
        "not a ttl" in answer.sentence
        and "time:<milliseconds> (or the number alone)" in answer.sentence
    )
    assert xs.frames() == []


def test_an_ephemeral_frame_is_answered_and_never_stored(xs: Api) -> None:
    made = xs.post("/append/t?ttl=ephemeral", b"now").json
    assert made["ttl"] == "ephemeral"
    assert xs.frames() == []
    assert xs.get("/last/t").status == 404
    assert xs.get(f"/{made['id']}").json == made  # while it is in the ring
    assert xs.get(f"/cas/{made['hash']}").body == b"now"
    assert xs.get(f"/content/{made['id']}").body == b"now"


def test_no_read_returns_an_expired_frame(xs: Api) -> None:
    made = xs.append("t?ttl=time:1000", b"gone soon")
    before, after = xs.append("t"), xs.append("u")
    assert len(xs.frames()) == 3
    xs.clock.ms += 1000
    assert xs.frames() == [before, after]
    assert xs.get(f"/{made['id']}").status == 404
    assert xs.get("/first").json == before
    assert xs.get(f"/prev/{before['id']}").status == 404
    assert xs.get(f"/content/{made['id']}").status == 404
    assert xs.get(f"/cas/{made['hash']}").status == 404
    assert xs.get("/?last=3").lines == [before, after]


def test_last_n_keeps_the_newest_n_of_that_topic(xs: Api) -> None:
    other = xs.append("u")
    made = [xs.append("t?ttl=last:2") for _ in range(4)]
    assert xs.frames() == [other, *made[2:]]


# Reading one frame


def test_get_gives_the_frame_by_its_id_in_either_case(xs: Api) -> None:
    made = xs.append("t", b"x")
    for text in (made["id"], made["id"].upper()):
        answer = xs.get(f"/{text}")
        assert (answer.status, answer.kind, answer.json) == (200, "application/json", made)


def test_get_can_add_the_timestamp_and_the_content(xs: Api) -> None:
    made = xs.append("t", b"text")
    answer = xs.get(f"/{made['id']}?with-timestamp&with-content")
    assert list(answer.json) == ["topic", "id", "hash", "meta", "ttl", "content", "timestamp"]
    assert answer.json["content"] == "text"
    assert answer.json["timestamp"] == "2025-06-15T15:06:40.001Z"


@pytest.mark.parametrize("path", ["/", "/next/", "/prev/", "/content/"])
@pytest.mark.parametrize("text", ["abc", "0" * 24, "0" * 26, "f5lxx1zz5pnorynqglhzmsp34", "!" * 25])
def test_what_is_no_id_is_refused(xs: Api, path: str, text: str) -> None:
    answer = xs.get(path + text)
    assert answer.status == 400
    why = "the last one is f5lxx1zz5pnorynqglhzmsp33" if text[0] == "f" else "25 characters"
    assert answer.sentence.startswith("not an id: ") and why in answer.sentence


def test_an_unknown_id_is_not_found(xs: Api) -> None:
    unknown = id_at(NOW)
    for method, target in [
        ("GET", f"/{unknown}"),
        ("DELETE", f"/{unknown}"),
        ("GET", f"/next/{unknown}"),
        ("GET", f"/prev/{unknown}"),
        ("GET", f"/content/{unknown}"),
    ]:
        answer = xs.ask(method, target)
        assert answer.status == 404
        assert unknown in answer.sentence


def test_next_and_prev_take_topics_and_ids_that_are_not_stored(xs: Api) -> None:
    a, b, c = xs.append("a"), xs.append("b.c"), xs.append("a")
    assert xs.get(f"/next/{a['id']}").json == b
    assert xs.get(f"/next/{a['id'].upper()}?topic=a").json == c
    assert xs.get(f"/prev/{c['id']}").json == b
    assert xs.get(f"/prev/{c['id']}?topic=a").json == a
    assert xs.get(f"/prev/{c['id']}?topic=b.*,zz").json == b
    assert xs.get(f"/next/{id_at(NOW - 1000)}").json == a
    assert xs.get(f"/prev/{id_at(NOW + 99_000)}?topic=*").json == c
    xs.ask("DELETE", f"/{b['id']}")
    assert xs.get(f"/next/{b['id']}").json == c
    assert xs.get(f"/prev/{b['id']}").json == a
    assert xs.get(f"/next/{c['id']}").status == 404
    assert xs.get(f"/prev/{a['id']}").status == 404
    assert xs.get(f"/next/{a['id']}?topic=none").status == 404


def test_delete_removes_a_frame_once(xs: Api) -> None:
    kept, made = xs.append("t"), xs.append("t", b"content")
    answer = xs.ask("DELETE", f"/{made['id'].upper()}")
    assert (answer.status, answer.body, answer.fields) == (204, b"", {})
    assert xs.ask("DELETE", f"/{made['id']}").status == 404
    assert xs.frames() == [kept]
    assert xs.get(f"/cas/{made['hash']}").status == 404


# First, last, head


def test_first_and_last_give_one_object(xs: Api) -> None:
    a, b, c = xs.append("a"), xs.append("b"), xs.append("a.x")
    assert xs.get("/first").json == a
    assert xs.get("/first").kind == "application/json"
    assert xs.get("/last").json == c
    assert xs.get("/first/b").json == xs.get("/last/b").json == xs.get("/head/b").json == b
    assert xs.get("/first/a.*").json == xs.get("/last/a.*").json == c
    assert xs.get("/last?topic=a,b").json == b
    assert xs.get("/last?last=1").kind == "application/json"


def test_first_n_and_last_n_are_ndjson_in_order_of_id(xs: Api) -> None:
    made = [xs.append("ab"[n % 2]) for n in range(6)]
    assert xs.get("/first?first=2").lines == made[:2]
    assert xs.get("/last?last=2").lines == made[-2:]
    assert xs.get("/first/a?first=2").lines == [made[0], made[2]]
    assert xs.get("/last/a?last=2").lines == [made[2], made[4]]
    assert xs.get("/head/a?last=9").lines == made[0::2]
    assert xs.get("/last?last=1000000000000000").lines == made


def test_first_and_last_of_nothing_are_not_found(xs: Api) -> None:
    for target in ("/first", "/last", "/first?first=2", "/last?last=2"):
        assert (xs.get(target).status, xs.get(target).sentence) == (404, "the store has no frames")
    for target in ("/first/t", "/last/t", "/head/t", "/last/t?last=3", "/first?topic=t"):
        assert (xs.get(target).status, xs.get(target).sentence) == (404, "no frame of t")


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("/first?first=0", "first='0'"),
        ("/first?last=1", "unknown parameter: 'last'"),
        ("/last?last=", "last=''"),
        ("/last?last=-1", "last='-1'"),
        ("/last?last=1.0", "whole number"),
        ("/last?last=10000000000000000", "whole number"),
        ("/last?first=1", "unknown parameter: 'first'"),
        ("/last/t?topic=t", "topic is in the path already"),
        ("/first/t?topic=t", "topic is in the path already"),
        ("/stream/t?topic=t", "topic is in the path already"),
        ("/last/0", "not a topic pattern: '0'"),
        ("/last?follow=maybe", "follow='maybe'"),
        ("/head/t?first=1", "unknown parameter"),
    ],
)
def test_a_wrong_parameter_of_first_or_last_is_refused(xs: Api, target: str, says: str) -> None:
    answer = xs.get(target)
    assert answer.status == 400
    assert says in answer.sentence


# Content


def test_content_is_put_and_got_by_its_hash(xs: Api) -> None:
    for data in (b"small", os.urandom(70_000)):
        put = xs.post("/cas", data)
        assert (put.status, put.kind) == (200, "text/plain; charset=utf-8")
        assert put.body.decode() == integrity(data)
        got = xs.get("/cas/" + put.body.decode())
        assert (got.status, got.kind, got.body) == (200, "application/octet-stream", data)
    assert xs.frames() == []


def test_a_hash_may_be_percent_encoded_or_as_it_is(xs: Api) -> None:
    for n in range(200):  # with + and / in some of them
        data = str(n).encode()
        hash_ = xs.post("/cas", data).body.decode()
        if "/" in hash_ and "+" in hash_:
            break
    else:
        pytest.fail("no such hash")
    assert xs.get("/cas/" + hash_).body == data
    encoded = hash_.replace("/", "%2f").replace("+", "%2B").replace("=", "%3D")
    assert xs.get("/cas/" + encoded).body == data


def test_an_empty_body_is_no_content(xs: Api) -> None:
    answer = xs.post("/cas")
    assert (answer.status, answer.sentence.partition(":")[0]) == (400, "the body is empty")


def test_content_may_be_for_an_import_and_for_nothing_else(xs: Api) -> None:
    assert xs.post("/cas?for=import", b"x").body.decode() == integrity(b"x")
    answer = xs.post("/cas?for=ever", b"x")
    assert answer.status == 400 and "import is the only thing" in answer.sentence


@pytest.mark.parametrize(
    "text",
    [
        "x",
        "sha256-",
        "sha256-" + "A" * 44,
        "sha256-" + "A" * 42 + "B=",
        "md5-" + "A" * 43 + "=",
        "sha256-" + "A" * 43 + "=x",
        "sha256-" + "_" * 43 + "=",
        "SHA256-" + "A" * 43 + "=",
        "../lock",
    ],
)
def test_what_is_no_hash_is_refused(xs: Api, text: str) -> None:
    answer = xs.get("/cas/" + text)
    assert answer.status == 400
    assert "not a hash" in answer.sentence and "sha256-" in answer.sentence


def test_unknown_content_is_not_found(xs: Api) -> None:
    answer = xs.get("/cas/" + integrity(b"x"))
    assert (answer.status, answer.sentence) == (404, f"no content {integrity(b'x')}")


def test_the_content_of_a_frame_is_got_by_the_frame_s_id(xs: Api) -> None:
    large = os.urandom(300_000)
    for data in (b"x", large):
        made = xs.append("t", data)
        answer = xs.get(f"/content/{made['id'].upper()}")
        assert (answer.kind, answer.body) == ("application/octet-stream", data)
    assert xs.get(f"/content/{xs.append('t')['id']}").body == b""


def test_content_that_was_changed_on_disk_is_an_error_and_is_not_served(tmp_path: Path) -> None:
    xs = Api(str(tmp_path / "store"))
    made = xs.append("t", b"x" * 100_000)
    (name,) = [os.path.join(d, n) for d, _, ns in os.walk(xs.folder + "/cas") for n in ns]
    with open(name, "r+b") as file:
        file.write(b"y")
    for target in (f"/cas/{made['hash']}", f"/content/{made['id']}"):
        answer = xs.get(target)
        assert answer.status == 500
        assert "damaged" in answer.sentence
    xs.store.close()


# Reading the stream


def test_the_stream_is_ndjson(xs: Api) -> None:
    assert (xs.get("/").status, xs.get("/").kind, xs.get("/").body) == (200, NDJSON, b"")
    made = [xs.append(topic) for topic in ("a", "b", "a.b", "a.b.c", "ab")]
    assert xs.get("/").lines == made


@pytest.mark.parametrize(
    ("pattern", "topics"),
    [
        ("a", ["a"]),
        ("a.*", ["a.b", "a.b.c"]),
        ("a.b.*", ["a.b.c"]),
        ("*", ["a", "b", "a.b", "a.b.c", "ab"]),
        ("b,a.b", ["b", "a.b"]),
        ("a,a.*", ["a", "a.b", "a.b.c"]),
        ("zz,*", ["a", "b", "a.b", "a.b.c", "ab"]),
        ("zz", []),
    ],
)
def test_a_topic_pattern_selects(xs: Api, pattern: str, topics: list[str]) -> None:
    for topic in ("a", "b", "a.b", "a.b.c", "ab"):
        xs.append(topic)
    assert [f["topic"] for f in xs.get(f"/?topic={pattern}").lines] == topics
    if "," not in pattern:
        assert [f["topic"] for f in xs.get(f"/stream/{pattern}").lines] == topics
    assert [f["topic"] for f in xs.get(f"/?topic={pattern.replace(',', '%2C')}").lines] == topics


def test_after_from_and_until_bound_the_stream(xs: Api) -> None:
    made = [xs.append("t") for _ in range(5)]
    got = [f["id"] for f in made]
    assert xs.get(f"/?after={got[1]}").lines == made[2:]
    assert xs.get(f"/?last-id={got[1].upper()}").lines == made[2:]
    assert xs.get(f"/?from={got[1]}").lines == made[1:]
    assert xs.get(f"/?until={got[1]}").lines == made[:2]
    assert xs.get(f"/?after={got[0]}&until={got[3]}").lines == made[1:4]
    assert xs.get(f"/?after={got[3]}&until={got[1]}").lines == []
    assert xs.get(f"/?after={id_at(0)}").lines == made


def test_times_bound_the_stream_at_their_millisecond(xs: Api) -> None:
    made = [xs.append("t") for _ in range(5)]  # at .001 to .005
    at = "2025-06-15T15:06:40.00"
    assert xs.get(f"/?from={at}3Z").lines == made[2:]
    assert xs.get(f"/?after={at}3Z").lines == made[3:]
    assert xs.get(f"/?until={at}3Z").lines == made[:3]
    assert xs.get(f"/?from={at}3%2B00:00").lines == made[2:]
    assert xs.get("/?from=2025-06-15T17:06:40.003+02:00").lines == made[2:]
    assert xs.get("/?until=2025-06-15t15:06:40z").lines == []
    xs.clock.ms += 60_000 - 2
    assert xs.get("/?from=1m").lines == made[2:]
    assert xs.get("/?after=60s").lines == made[3:]
    assert xs.get("/?until=60000ms").lines == made[:3]
    assert xs.get("/?from=7d").lines == made


def test_last_and_limit_count_what_the_others_select(xs: Api) -> None:
    made = [xs.append("ab"[n % 2]) for n in range(8)]
    assert xs.get("/?last=3").lines == made[-3:]
    assert xs.get("/?last=2&topic=a").lines == [made[4], made[6]]
    assert xs.get(f"/?last=2&until={made[3]['id']}").lines == made[2:4]
    assert xs.get(f"/?last=9&after={made[3]['id']}").lines == made[4:]
    assert xs.get("/?limit=3").lines == made[:3]
    assert xs.get("/?limit=1&topic=b").lines == made[1:2]
    assert xs.get("/?last=5&limit=2").lines == made[3:5]
    assert xs.get(f"/?from={made[2]['id']}&limit=1").lines == made[2:3]


def test_a_timestamp_is_the_last_key(xs: Api) -> None:
    made = xs.append("t", b"x")
    (got,) = xs.get("/?with-timestamp=true&with-content").lines
    assert list(got) == ["topic", "id", "hash", "meta", "ttl", "content", "timestamp"]
    assert got["timestamp"] == "2025-06-15T15:06:40.001Z"
    (got,) = xs.get("/?with-timestamp").lines
    assert got == {**made, "timestamp": "2025-06-15T15:06:40.001Z"}


def test_with_content_gives_text_as_text_and_other_bytes_in_base64(xs: Api) -> None:
    text = [b"text", 'é 日本 \u2028 \0 "\\'.encode(), b"a" * 3_000_000, b"null"]
    binary = [b"\xff\x00", b"\xff" + os.urandom(200_000), b"\xed\xa0\x80"]
    empty = xs.append("t")
    made = [xs.append("t", data) for data in text + binary]
    got = xs.get("/?with-content").lines
    assert got[0] == empty
    for data, appended, line in zip(text, made, got[1:]):
        assert line == {**appended, "content": data.decode()}
    for data, appended, line in zip(binary, made[len(text) :], got[1 + len(text) :]):
        assert line == {**appended, "content_base64": base64.b64encode(data).decode()}


def test_what_is_read_with_content_can_be_imported(xs: Api, tmp_path: Path) -> None:
    for data in (b"text", b"\xff" * 20_000, b"", b"z" * 1_000_000):
        xs.append("t", data, xs_meta='{"n":1.10}')
    body = xs.get("/?with-content&with-timestamp").body
    other = Api(str(tmp_path / "other"))
    other.clock.ms = xs.clock.ms
    assert other.post("/import", body, content_type=NDJSON).json["imported"] == 4
    assert other.get("/?with-content&with-timestamp").body == body
    other.store.close()


@pytest.mark.parametrize("flag", ["with-timestamp", "with-content"])
@pytest.mark.parametrize(
    ("value", "is_on"),
    [
        ("", True),
        ("=", True),
        ("=1", True),
        ("=true", True),
        ("=false", False),
        ("=no", False),
        ("=0", False),
    ],
)
def test_a_flag_is_on_or_off(xs: Api, flag: str, value: str, is_on: bool) -> None:
    xs.append("t", b"x")
    (got,) = xs.get(f"/?{flag}{value}").lines
    assert (flag[5:] in got) is is_on


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ("nonsense=1", "unknown parameter: 'nonsense'"),
        ("Limit=1", "unknown parameter: 'Limit'"),
        ("limit=0", "limit='0'"),
        ("limit=x", "limit='x'"),
        ("limit=%C2%B2", "limit='²'"),
        ("limit=1&limit=1", "limit is given twice"),
        ("after=x", "after='x'"),
        ("after=", "after=''"),
        ("from=2025-13-01T00:00:00Z", "from='2025-13-01T00:00:00Z'"),
        ("until=2025-01-01", "until='2025-01-01'"),
        ("until=5y", "until='5y'"),
        ("follow=9", "not a pulse: 9: it has 10 to "),
        ("follow=maybe", "follow='maybe'"),
        ("follow=" + "9" * 30, "follow="),
        ("new=2", "new='2'"),
        ("with-content=x", "with-content='x'"),
        ("topic=", "not a topic pattern: ''"),
        ("topic=a,", "not a topic pattern: ''"),
        ("topic=.*", "not a topic pattern: '.*'"),
        ("topic=a*", "not a topic pattern: 'a*'"),
        ("topic=*.a", "not a topic pattern: '*.a'"),
        ("topic=" + ",".join(["a"] * 101), "too many topic patterns: at most 100"),
        ("new&last=1", "new and last can't go together"),
        ("tail&after=1h", "new and after can't go together"),
        ("new&from=1h", "new and from can't go together"),
        ("after=1h&last-id=1h", "given twice"),
        ("after=1h&from=1h", "after and from can't go together"),
        ("topic=%FF", "not UTF-8"),
    ],
)
def test_a_wrong_query_is_refused_and_says_which_parameter(xs: Api, query: str, says: str) -> None:
    answer = xs.get("/?" + query)
    assert answer.status == 400
    assert says in answer.sentence


@pytest.mark.parametrize(
    ("method", "target"),
    [
        ("GET", f"/{'0' * 25}?x=1"),
        ("DELETE", f"/{'0' * 25}?x=1"),
        ("GET", f"/next/{'0' * 25}?x=1"),
        ("GET", f"/prev/{'0' * 25}?limit=1"),
        ("GET", f"/cas/{integrity(b'')}?x"),
        ("GET", f"/content/{'0' * 25}?x"),
        ("POST", "/cas?x"),
        ("POST", "/append/t?x"),
        ("POST", "/append/t?ttl=forever&ttl=forever"),
        ("POST", "/append?x"),
        ("POST", "/import?x"),
        ("GET", "/version?x"),
        ("POST", "/check?x"),
        ("POST", "/gc?x"),
    ],
)
def test_no_route_takes_a_parameter_that_it_does_not_know(
    xs: Api, method: str, target: str
) -> None:
    answer = xs.ask(method, target, b"x", content_type=NDJSON)
    assert answer.status == 400
    assert "unknown parameter" in answer.sentence or "given twice" in answer.sentence
    assert xs.frames() == []


# Server-sent events


def test_the_stream_can_be_server_sent_events(xs: Api) -> None:
    a, b = xs.append("t"), xs.append("t", b"x")
    answer = xs.get("/", accept="text/html, Text/Event-Stream;q=0.9")
    assert answer.kind == "text/event-stream"
    raw = xs.get("/").body.splitlines()
    assert answer.body == b"".join(
        b"id: %s\ndata: %s\n\n" % (f["id"].encode(), line) for f, line in zip((a, b), raw)
    )
    assert xs.get("/", accept="application/json, */*").kind == NDJSON
    for weight in ("0", "0.0", "0.000"):  # it is not wanted
        assert xs.get("/", accept=f"*/*, text/event-stream; Q={weight}").kind == NDJSON
    assert xs.get("/", accept="text/event-stream;q=0.001").kind == "text/event-stream"


def test_content_in_an_event_never_breaks_its_line(xs: Api) -> None:
    xs.append("t", b"a\nb\r\n\ndata: c\n\n")
    body = xs.get("/?with-content", accept="text/event-stream").body
    assert body.count(b"\n") == 3
    assert json.loads(body.split(b"data: ", 1)[1])["content"] == "a\nb\r\n\ndata: c\n\n"


def test_last_event_id_resumes_after_it(xs: Api) -> None:
    a, b, c = (xs.append("t") for _ in range(3))

    def resumed(query: str, after: str) -> list[str]:
        body = xs.get("/" + query, accept="text/event-stream", last_event_id=after).body
        return [line[4:].decode() for line in body.splitlines() if line.startswith(b"id: ")]

    assert resumed("", a["id"]) == [b["id"], c["id"]]
    assert resumed("?last=1", a["id"].upper()) == [b["id"], c["id"]]  # as a browser repeats it
    assert resumed("?from=1h", b["id"]) == [c["id"]]
    assert resumed("?new", b["id"]) == [c["id"]]
    assert resumed(f"?after={a['id']}", b["id"]) == [c["id"]]
    assert resumed(f"?last-id={a['id']}", b["id"]) == [c["id"]]
    assert resumed("", "") == [a["id"], b["id"], c["id"]]
    # It means nothing to who wants lines.
    assert xs.get("/", last_event_id=b["id"]).lines == [a, b, c]
    assert xs.get("/", accept="text/event-stream", last_event_id="x y").status == 400


def test_an_accept_field_may_come_in_several_lines(xs: Api) -> None:
    fields = [("accept", "text/html"), ("accept", "text/event-stream")]
    found = api.answer(xs.store, messages.Request("GET", "/", "", fields))
    assert (found.status, found.fields) == (200, [("content-type", "text/event-stream")])


# Many appends


def test_ndjson_appends_each_line_and_sums_up(xs: Api) -> None:
    answer = xs.many(
        "/append",
        {"topic": "a", "content": "text"},
        b"",
        {"topic": "b", "content_base64": base64.b64encode(b"\xff\x00").decode()},
        b"\r",
        b'{"topic":"c","meta":{"n" : 1.10,"n2":12345678901234567890123},"ttl":"time:5000"}',
        {"topic": "d", "content": ""},
    )
    assert (answer.status, answer.kind) == (200, "application/json")
    frames = xs.get("/").lines
    assert answer.json == {
        "appended": 4,
        "first": frames[0]["id"],
        "last": frames[3]["id"],
        "errors": [],
    }
    assert [f["topic"] for f in frames] == ["a", "b", "c", "d"]
    assert xs.get(f"/content/{frames[1]['id']}").body == b"\xff\x00"
    assert frames[3]["hash"] is None
    assert b'"meta":{"n":1.10,"n2":12345678901234567890123},"ttl":"time:5000"' in xs.get("/").body


def test_ndjson_of_nothing_appends_nothing(xs: Api) -> None:
    for body in (b"", b"\n\n\r\n", b" "):
        answer = xs.post("/append", body, content_type="Application/X-NDJSON; charset=utf-8")
        assert answer.json == {"appended": 0, "first": None, "last": None, "errors": []}


def test_the_last_line_needs_no_newline(xs: Api) -> None:
    body = b'{"topic":"a"}\n{"topic":"b"}'
    assert xs.post("/append", body, content_type=NDJSON).json["appended"] == 2


BAD_LINES = {
    b"{": "the line is not JSON",
    b"[]": "the line is not a JSON object",
    b"null": "the line is not a JSON object",
    b'"t"': "the line is not a JSON object",
    b"{}": 'no topic: a line is {"topic"',
    b'{"topic":1}': "no topic",
    b'{"topic":"a b"}': "not a topic: 'a b'",
    b'{"topic":"xs.stop"}': "belongs to the runtime",
    b'{"topic":"t","contents":"x"}': "unknown key: 'contents'",
    b'{"topic":"t","content":1}': "content is not a string",
    b'{"topic":"t","content":"\\ud800"}': "half of a surrogate pair",
    b'{"topic":"t","content":"a","content_base64":"YQ=="}': "both content and content_base64",
    b'{"topic":"t","content_base64":"YQ"}': "content_base64 is not base64",
    b'{"topic":"t","content_base64":"Y Q=="}': "content_base64 is not base64",
    b'{"topic":"t","content_base64":1}': "content_base64 is not base64",
    b'{"topic":"t","ttl":"soon"}': "not a ttl: 'soon'",
    b'{"topic":"t","ttl":true}': "not a ttl",
    b'{"topic":"t","ttl":1.5}': "not a ttl",
    b'{"topic":"t","meta":NaN}': "the line is not JSON",
    b'{"topic":"t","meta":"\\ud800"}': "half of a surrogate pair",
    b'{"topic":"t","meta":' + b"[" * 129 + b"]" * 129 + b"}": "nested too deep",
    b'{"topic":"t","meta":' + b"[" * 200_000: "nested too deep",
    b'{"topic":"t","meta":"' + b"a" * (1 << 20) + b'"}': "meta is too large",
    b'{"topic":"t","if_last":"x"}': 'if_last is neither an id nor "none"',
    b'{"topic":"t","if_last":1}': "if_last is neither",
    b'{"topic":"t","key":""}': "the key is not a string of 1 to 255 bytes",
    b'{"topic":"t","key":"' + b"k" * 256 + b'"}': "the key is not a string of 1 to 255 bytes",
    b'{"topic":"t","key":1}': "the key is not a string",
    b'{"topic":"t","key":"\\udfff"}': "the key is not a string",
    b'{"topic":"\xff"}': "the line is not UTF-8",
    b"\xef\xbb\xbf{}": "the line is not JSON: it begins with a byte order mark (BOM)",
    b'{"topic":"t","content":5}': "content is not a string: quote it, or put it into meta",
    b"   ": "the line is not JSON",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_wrong_line_is_an_error_of_its_own_and_the_others_count(xs: Api, line: bytes) -> None:
    answer = xs.many("/append", b'{"topic":"a"}', line, b'{"topic":"b"}')
    assert (answer.status, answer.json["appended"]) == (200, 2)
    (error,) = answer.json["errors"]
    assert error["line"] == 2
    assert BAD_LINES[line] in error["error"]
    assert [f["topic"] for f in xs.frames()] == ["a", "b"]


@pytest.mark.parametrize("line", BAD_LINES, ids=range(len(BAD_LINES)))
def test_with_atomic_a_wrong_line_refuses_all(xs: Api, line: bytes) -> None:
    answer = xs.many("/append?atomic", b'{"topic":"a"}', line, b'{"topic":"b"}')
    assert answer.status == 400
    assert answer.sentence.startswith("line 2: ") and BAD_LINES[line] in answer.sentence
    assert answer.sentence.endswith("; nothing was stored")
    assert xs.frames() == []


def test_atomic_appends_all_lines(xs: Api) -> None:
    answer = xs.many("/append?atomic=1", {"topic": "a"}, b"", {"topic": "b", "content": "x"})
    assert answer.json["appended"] == 2
    assert [f["topic"] for f in xs.frames()] == ["a", "b"]


def test_atomic_is_refused_as_a_whole_by_a_condition(xs: Api) -> None:
    kept = xs.append("old?ttl=last:2")
    answer = xs.many(
        "/append?atomic",
        {"topic": "old", "ttl": "last:1", "content": "x" * 100_000},
        {"topic": "a", "key": "k"},
        {"topic": "a", "if_last": "none"},
    )
    assert answer.status == 409
    assert xs.frames() == [kept] and xs.contents() == []
    assert xs.many("/append", {"topic": "a", "key": "k"}).json["appended"] == 1
    assert len(xs.frames()) == 2


def test_each_and_atomic_exclude_each_other(xs: Api) -> None:
    answer = xs.many("/append?each&atomic", {"topic": "a"})
    assert answer.status == 400 and "can't go together" in answer.sentence
    assert xs.many("/append?each=maybe", {"topic": "a"}).status == 400
    assert xs.frames() == []


def test_each_gives_one_line_for_each_line(xs: Api) -> None:
    answer = xs.many("/append?each", {"topic": "a"}, b"", b"nonsense", {"topic": "b"})
    assert (answer.status, answer.kind) == (200, NDJSON)
    first, error, last = answer.lines
    assert [first, last] == xs.frames()
    assert error["line"] == 3 and "not JSON" in error["error"]


def test_each_answers_a_block_s_lines_before_it_asks_for_the_next(xs: Api) -> None:
    """So a client may wait for an answer before it sends more."""
    sent: list[int] = []

    def body() -> Iterator[bytes]:
        for n in range(3):
            sent.append(n)
            yield b'{"topic":"t"}\n'

    request = xs.request("POST", "/append?each", body(), {"content_type": NDJSON})
    found = api.answer(xs.store, request)
    assert found.blocks is not None
    assert [(block.count(b"\n"), len(sent)) for block in found.blocks] == [(1, 1), (1, 2), (1, 3)]


@pytest.mark.parametrize("target", ["/append", "/append?each", "/append?atomic"])
def test_ndjson_must_be_said_to_be_so(xs: Api, target: str) -> None:
    for fields in ({}, {"content_type": "application/json"}):
        answer = xs.post(target, b'{"topic":"t"}\n', **fields)
        assert answer.status == 400
        assert NDJSON in answer.sentence and "POST /append/TOPIC" in answer.sentence
    assert xs.frames() == []


def test_a_line_over_the_limit_is_an_error_and_the_next_line_counts(xs: Api) -> None:
    limit = 16 * 1024 * 1024
    start = b'{"topic":"t","content":"'

    def body() -> Iterator[bytes]:
        yield b'{"topic":"a"}\n' + start
        for _ in range(17):
            yield b"x" * (1 << 20)
        yield b'"}\n{"topic":"b"}\n' + start
        yield b"y" * (limit - len(start) - 2) + b'"}\n'

    answer = xs.post("/append", body(), content_type=NDJSON)
    assert answer.json["appended"] == 3
    assert answer.json["errors"] == [
        {"line": 2, "error": f"the line is too long: at most {limit} bytes"}
    ]
    assert [f["topic"] for f in xs.frames()] == ["a", "b", "t"]


def test_errors_are_listed_up_to_a_thousand_and_the_others_counted(xs: Api) -> None:
    answer = xs.many("/append", *[b"x"] * 1500, {"topic": "t"})
    assert len(answer.json["errors"]) == 1000
    assert (answer.json["errors_unlisted"], answer.json["appended"]) == (500, 1)


def breaking_off(*blocks: bytes) -> Iterator[bytes]:
    yield from blocks
    raise BrokenBody("the body broke off before its end")


@pytest.mark.parametrize("target", ["/append", "/import"])
def test_of_a_body_that_breaks_off_the_whole_lines_are_kept_and_it_is_said(
    xs: Api, target: str
) -> None:
    lines = [f'{{"topic":"t","id":"{id_at(NOW - n)}"}}\n'.encode() for n in range(3)]
    if target == "/append":
        lines = [b'{"topic":"t"}\n'] * 3
    body = breaking_off(lines[0] + lines[1][:5], lines[1][5:] + b"nonsense\n", lines[2][:-1])
    answer = xs.post(target, body, content_type=NDJSON)
    assert answer.status == 400
    assert answer.sentence == "the body broke off: 2 whole lines of it are kept"
    assert len(xs.frames()) == 2


def test_of_an_atomic_body_that_breaks_off_nothing_is_kept(xs: Api) -> None:
    body = breaking_off(b'{"topic":"t"}\n{"topic":"t"}\n')
    assert xs.post("/append?atomic", body, content_type=NDJSON).status == 400
    assert xs.frames() == []


@pytest.mark.parametrize("size", [5, 100_000])
def test_of_a_single_body_that_breaks_off_nothing_is_kept(xs: Api, size: int) -> None:
    for target in ("/append/t", "/cas", "/import", "/t"):
        answer = xs.post(target, breaking_off(b"x" * size))
        assert (answer.status, answer.sentence) == (400, "the body broke off before its end")
    assert xs.frames() == [] and xs.contents() == []


# Conditions


def test_if_last_appends_only_upon_the_newest_frame(xs: Api) -> None:
    first = xs.post("/append/t?if-last=none", b"1")
    assert first.status == 200
    refused = xs.post("/append/t?if-last=none", b"2")
    assert (refused.status, refused.kind) == (409, "application/json")
    assert refused.body == first.body
    assert first.json["id"] in refused.fields["xs-error"]
    second = xs.post(f"/append/t?if-last={first.json['id'].upper()}")
    assert second.status == 200
    assert xs.post(f"/append/t?if-last={first.json['id']}").body == second.body
    other = xs.post(f"/append/u?if-last={first.json['id']}")
    assert (other.status, other.body) == (409, b"null\n")
    assert len(xs.frames()) == 2


def test_a_condition_that_fails_leaves_no_content_behind(xs: Api) -> None:
    xs.append("t")
    assert xs.post("/append/t?if-last=none", b"x" * 100_000).status == 409
    assert xs.contents() == []


@pytest.mark.parametrize("value", ["", "NONE", "x", "0" * 24])
def test_what_if_last_can_t_expect_is_refused(xs: Api, value: str) -> None:
    answer = xs.post(f"/append/t?if-last={value}")
    assert answer.status == 400
    assert f"if-last='{value}'" in answer.sentence


def test_a_key_appends_once_on_its_topic(xs: Api) -> None:
    first = xs.post("/append/t", b"1", idempotency_key="k")
    again = xs.post("/append/t?ttl=last:1&if-last=none", b"2", idempotency_key="k", xs_meta="2")
    assert (first.status, again.status, again.body) == (200, 200, first.body)
    other = xs.post("/append/u", idempotency_key="k")
    assert other.json["id"] != first.json["id"]
    assert len(xs.frames()) == 2


@pytest.mark.parametrize("key", ["", "k" * 256, "é" * 128])
def test_a_key_has_1_to_255_bytes(xs: Api, key: str) -> None:
    answer = xs.post("/append/t", idempotency_key=key.encode().decode("latin-1"))
    assert (answer.status, answer.sentence) == (400, "the idempotency key has 1 to 255 bytes")
    assert xs.frames() == []


def test_a_key_is_the_same_in_a_header_and_in_a_line(xs: Api) -> None:
    for key in ("k", "é" * 127 + "x"):
        first = xs.post("/append/t", idempotency_key=key.encode().decode("latin-1"))
        assert first.status == 200
        again = xs.many("/append?each", {"topic": "t", "key": key})
        assert again.body == first.body


def test_lines_have_conditions_and_keys_and_are_judged_in_order(xs: Api) -> None:
    answer = xs.many(
        "/append?each",
        {"topic": "t", "if_last": "none", "key": "a"},
        {"topic": "t", "if_last": "none"},
        {"topic": "t", "key": "a"},
        {"topic": "t", "key": "b", "if_last": None},
    )
    one, two, three, four = answer.lines
    assert three == one
    assert two["line"] == 2 and one["id"] in two["error"]
    assert xs.frames() == [one, four]
    more = xs.many("/append", {"topic": "t", "if_last": four["id"].upper()})
    assert more.json["appended"] == 1


# Import


def imported(xs: Api, **changes: Any) -> dict[str, Any]:
    line = {"topic": "t", "id": id_at(NOW - 5000), "hash": None, "meta": None, "ttl": "forever"}
    return {**line, **changes}


def test_import_stores_a_frame_as_it_is(xs: Api) -> None:
    newer = xs.append("t")
    line = imported(xs, meta={"b": 1, "a": [1.5]})
    answer = xs.post("/import", json.dumps(line).encode())
    assert (answer.status, answer.kind, answer.json) == (200, "application/json", line)
    assert xs.frames() == [line, newer]


def test_import_of_the_same_frame_again_changes_nothing(xs: Api) -> None:
    body = json.dumps(imported(xs)).encode()
    first = xs.post("/import", body)
    again = xs.post("/import", body)
    assert (again.status, again.body) == (200, first.body)
    assert xs.get("/").body == first.body


@pytest.mark.parametrize(
    "changes", [{"topic": "u"}, {"meta": 1}, {"ttl": "last:1"}], ids=["topic", "meta", "ttl"]
)
def test_import_of_another_frame_with_that_id_is_a_conflict(
    xs: Api, changes: dict[str, Any]
) -> None:
    xs.post("/import", json.dumps(imported(xs)).encode())
    answer = xs.post("/import", json.dumps(imported(xs, **changes)).encode())
    assert answer.status == 409
    assert answer.sentence == f"another frame has the id {id_at(NOW - 5000)}"
    assert xs.frames() == [imported(xs)]


def test_import_takes_ids_up_to_a_day_ahead(xs: Api) -> None:
    day = 86_400_000
    fits = imported(xs, id=id_at(NOW + day, 7))
    assert xs.post("/import", json.dumps(fits).encode()).status == 200
    answer = xs.post("/import", json.dumps(imported(xs, id=id_at(NOW + day + 1))).encode())
    assert answer.status == 400
    assert "more than a day ahead of the clock" in answer.sentence
    assert xs.frames() == [fits]
    assert xs.append("t")["id"] > fits["id"]


def test_imported_content_must_be_there_or_come_along(xs: Api) -> None:
    for n, data in enumerate((b"small", b"large" * 10_000)):
        line = imported(xs, hash=integrity(data), id=id_at(NOW - 100 - n))
        missing = xs.post("/import", json.dumps(line).encode())
        assert missing.status == 400
        assert integrity(data) in missing.sentence and "POST /cas" in missing.sentence
        wrong = xs.post("/import", json.dumps({**line, "content": "other"}).encode())
        assert wrong.status == 400 and "does not match its hash" in wrong.sentence
        xs.post("/cas", data)
        assert xs.post("/import", json.dumps(line).encode()).status == 200
        assert xs.get(f"/content/{line['id']}").body == data
        inline = imported(xs, hash=integrity(data * 2), id=id_at(NOW - 200 - n))
        with_content = {**inline, "content": (data * 2).decode()}
        assert xs.post("/import", json.dumps(with_content).encode()).json == inline
        assert xs.get(f"/content/{inline['id']}").body == data * 2


BAD_IMPORTS: dict[str, Any] = {
    "no frame": {"topic": 1},
    "not an id": {"id": "abc"},
    "not a topic": {"topic": "a b"},
    "xs.pulse is never stored": {"topic": "xs.pulse"},
    "xs.threshold is never stored": {"topic": "xs.threshold"},
    "an ephemeral frame is never stored": {"ttl": "ephemeral"},
    "not a ttl": {"ttl": "x"},
    "not a hash": {"hash": "x"},
    "the hash is not a string": {"hash": 1},
    "no hash for it": {"content": "x"},
    "unknown key: 'x'": {"x": 1},
    "content_base64 is not base64": {"content_base64": "!", "hash": integrity(b"x")},
}


@pytest.mark.parametrize("says", BAD_IMPORTS)
def test_what_can_t_be_imported_is_refused(xs: Api, says: str) -> None:
    line = imported(xs, **BAD_IMPORTS[says])
    single = xs.post("/import", json.dumps(line).encode())
    assert single.status == 400 and says in single.sentence
    many = xs.many("/import", line, imported(xs))
    assert many.status == 200 and many.json["imported"] == 1
    assert many.json["errors"][0]["line"] == 1 and says in many.json["errors"][0]["error"]
    assert xs.frames() == [imported(xs)]


def test_imports_of_the_runtime_s_own_history_are_welcome(xs: Api) -> None:
    line = imported(xs, topic="xs.start")
    assert xs.post("/import", json.dumps(line).encode()).status == 200


def test_import_without_a_ttl_is_forever(xs: Api) -> None:
    for n, extra in enumerate(({}, {"ttl": None})):
        line = {"topic": "t", "id": id_at(NOW, n).upper(), **extra}
        answer = xs.post("/import", json.dumps(line).encode())
        assert answer.json == imported(xs, id=id_at(NOW, n))


def test_imports_are_history(xs: Api) -> None:
    live = [xs.append("t") for _ in range(2)]
    answer = xs.many(
        "/import", imported(xs, ttl="last:1"), imported(xs, id=id_at(NOW - 1), ttl="last:1")
    )
    assert answer.json == {
        "imported": 2,
        "first": id_at(NOW - 5000),
        "last": id_at(NOW - 1),
        "errors": [],
    }
    assert len(xs.frames()) == 4  # no last:n was applied
    assert xs.frames()[2:] == live


def test_a_single_import_has_a_limit(xs: Api) -> None:
    answer = xs.post("/import", (b"x" * (1 << 20) for _ in range(17)))
    assert (answer.status, answer.sentence) == (
        413,
        "the frame is too large: at most 16777216 bytes",
    )
    assert xs.post("/import").status == 400


# Paths and methods


@pytest.mark.parametrize(
    ("path", "allow"),
    [
        ("/", "GET, HEAD"),
        ("/append", "POST"),
        ("/append/t", "POST"),
        ("/cas", "POST"),
        (f"/cas/{integrity(b'')}", "GET, HEAD"),
        (f"/content/{'0' * 25}", "GET, HEAD"),
        ("/first", "GET, HEAD"),
        ("/first/t", "GET, HEAD"),
        ("/last", "GET, HEAD"),
        ("/last/t", "GET, HEAD"),
        ("/head/t", "GET, HEAD"),
        ("/import", "POST"),
        (f"/next/{'0' * 25}", "GET, HEAD"),
        (f"/prev/{'0' * 25}", "GET, HEAD"),
        ("/stream/t", "GET, HEAD, POST"),
        ("/version", "GET, HEAD"),
        ("/check", "POST"),
        ("/gc", "POST"),
        (f"/{'0' * 25}", "DELETE, GET, HEAD, POST"),
    ],
)
def test_a_known_path_with_another_method_says_which_it_has(xs: Api, path: str, allow: str) -> None:
    for method in ("GET", "HEAD", "POST", "DELETE", "PUT", "PATCH", "OPTIONS", "TRACE"):
        if method not in allow.split(", "):
            answer = xs.ask(method, path, b"content")
            assert (answer.status, answer.fields["allow"]) == (405, allow), method
            assert answer.sentence == f"{method} is not for {path}: use {allow}"
    assert xs.ask("FROB", path).status == 501
    assert xs.frames() == []


@pytest.mark.parametrize(
    "path",
    [
        "/a/b",
        "/next",
        "/prev",
        "/head",
        "/stream",
        "/content",
        "//",
        "/version/x",
        "/import/x",
        "//a",
        "/Append/t",
        "/version/",
        "/check/",
        "/a/",
    ],
)
def test_an_unknown_path_is_not_found(xs: Api, path: str) -> None:
    for method in ("GET", "POST", "DELETE", "PUT"):
        answer = xs.ask(method, path, b"content")
        assert answer.status == 404
        assert answer.sentence.startswith(f"no such path: {path}")
    assert xs.frames() == []


@pytest.mark.parametrize("word", ["pipe", "content", "head", "next", "prev", "store", "stream"])
def test_the_words_of_other_routes_are_no_topics(xs: Api, word: str) -> None:
    assert xs.post(f"/{word}", b"content").status == 404
    assert xs.post(f"/append/{word}", b"content").json["topic"] == word


@pytest.mark.parametrize("word", ["version", "first", "last", "ps", "stores"])
def test_the_words_of_routes_that_read_are_no_topics(xs: Api, word: str) -> None:
    assert xs.post(f"/{word}", b"content").status == 405
    assert xs.frames() == []


def test_without_a_server_no_script_is_run(xs: Api) -> None:
    frame = xs.append("t", b"x")
    for answer in (xs.get("/ps"), xs.post("/eval", b"5"), xs.post(f"/pipe/{frame['id']}", b"5")):
        assert answer.status == 403
        assert "xs serve" in answer.sentence


def test_without_a_server_there_are_no_other_stores(xs: Api) -> None:
    assert xs.get("/stores").status == 404


def test_the_version_is_told(xs: Api) -> None:
    answer = xs.get("/version")
    assert (answer.kind, answer.json) == ("application/json", {"version": VERSION})


def test_check_says_what_was_looked_at(xs: Api) -> None:
    xs.append("t", b"x")
    xs.append("t", b"y" * 100_000)
    answer = xs.post("/check")
    assert answer.lines == [{"checked": {"frames": 2, "contents": 2}, "problems": 0}]


def test_gc_removes_what_nothing_names_by_its_age(xs: Api) -> None:
    small, large = xs.post("/cas", b"s").body.decode(), xs.post("/cas", b"l" * 50_000).body.decode()
    assert xs.post("/gc").json == {"removed": 0, "bytes": 0}
    assert xs.post("/gc?age=x").status == 400
    assert xs.post("/gc?age=2025-01-01T00:00:00Z").status == 400
    xs.clock.ms += 1000
    assert xs.post("/gc?age=0s").json == {"removed": 2, "bytes": 50_001}
    assert xs.get(f"/cas/{small}").status == xs.get(f"/cas/{large}").status == 404


def test_every_route_of_the_table_is_tested_here() -> None:
    words = {word for word in api._ROUTES if word}
    text = Path(__file__).read_text()
    assert [word for word in words if f'"/{word}' not in text and f'"{word}"' not in text] == []


def test_following_answers_say_so_and_are_given_a_reader(xs: Api) -> None:
    for target in ("/?follow", "/?follow=500&limit=1", "/last?follow", "/last/t?follow=true"):
        found = api.answer(xs.store, xs.request("GET", target))
        assert found.status == 200 and found.reader is not None
    for target in ("/?follow=false", "/?follow=no"):
        assert api.answer(xs.store, xs.request("GET", target)).reader is None
