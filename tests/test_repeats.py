"""A request in the words of the one before means what that meant, and no other request does."""

from __future__ import annotations

import pytest

from xs import api, http1
from xs.messages import Answer, Request
from xs.repeats import LastRequest
from xs.store import Store

WORDS = b"POST /append/a HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n"


def asked(store: Store, words: bytes, body: bytes = b"hi") -> LastRequest:
    """What is known after that request."""
    last = LastRequest()
    head = http1.read_request_head(bytearray(words))
    assert head is not None
    last.remember(words, head)
    last.learn(head, answer(store, head, body))
    return last


def answer(store: Store, head: http1.RequestHead, body: bytes) -> Answer:
    return api.answer(store, Request(head.method, head.path, head.query, head.fields, [body]))


def test_to_begin_with_there_is_nothing_to_repeat() -> None:
    buffer = bytearray(WORDS + b"hi")
    last = LastRequest()
    assert last.take_head(buffer) is None
    assert last.lone_append(buffer) is None
    assert buffer == WORDS + b"hi"


def test_the_same_words_are_the_same_head_and_leave_the_body(store: Store) -> None:
    last = asked(store, WORDS)
    buffer = bytearray(WORDS + b"ho" + WORDS)
    assert last.take_head(buffer) is last.head
    assert buffer == b"ho" + WORDS


@pytest.mark.parametrize(
    "words",
    [
        WORDS[:-1],
        WORDS.replace(b"/a", b"/b"),
        WORDS.replace(b": 2", b": 3"),
        WORDS.replace(b"\r\n\r\n", b"\r\nXS-TTL: ephemeral\r\n\r\n"),
        b"\r\n" + WORDS,
    ],
)
def test_other_words_are_not(store: Store, words: bytes) -> None:
    last = asked(store, WORDS)
    buffer = bytearray(words + b"hi")
    assert last.take_head(buffer) is None
    assert last.lone_append(buffer) is None
    assert buffer == words + b"hi"


def test_an_append_in_the_same_words_is_known_but_for_its_content(store: Store) -> None:
    last = asked(store, WORDS)
    assert last.head is not None
    append = last.append_of(last.head, bytearray(b"ho"))
    assert append is not None
    assert (append.topic, append.content) == ("a", None)
    assert last.append_of(last.head, bytearray(b"h")) is None, "not all of it is there"
    other = http1.read_request_head(bytearray(WORDS))
    assert other is not None
    assert last.append_of(other, bytearray(b"ho")) is None


def test_one_whole_append_and_no_more_may_go_the_short_way(store: Store) -> None:
    last = asked(store, WORDS)
    buffer = bytearray(WORDS + b"ho")
    assert last.lone_append(buffer) is not None
    assert last.body(buffer) == b"ho"
    assert last.lone_append(buffer[:-1]) is None
    assert last.lone_append(buffer + b"G") is None


@pytest.mark.parametrize(
    ("words", "body"),
    [
        (b"GET /last/a HTTP/1.1\r\nHost: x\r\n\r\n", b""),
        (WORDS.replace(b"/append/a", b"/append/a?key=k"), b"hi"),
        (WORDS.replace(b"/append/a", b"/append/A%20"), b"hi"),
        (WORDS.replace(b"Host: x", b"Host: x\r\nConnection: close"), b"hi"),
        (WORDS.replace(b"/append/a", b"/cas"), b"hi"),
    ],
)
def test_what_is_no_plain_append_may_not(store: Store, words: bytes, body: bytes) -> None:
    last = asked(store, words, body)
    buffer = bytearray(words + body)
    assert last.lone_append(buffer) is None
    assert last.take_head(buffer) is last.head


def test_what_another_head_means_is_not_taken_for_the_last_ones(store: Store) -> None:
    last = asked(store, b"GET /last/a HTTP/1.1\r\nHost: x\r\n\r\n", b"")
    other = http1.read_request_head(bytearray(WORDS))
    assert other is not None
    last.learn(other, answer(store, other, b"hi"))
    assert last.head is not None
    assert last.append_of(last.head, bytearray()) is None
