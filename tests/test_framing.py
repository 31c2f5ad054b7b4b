"""xs.framing: bodies end where they say, however their bytes arrive.

Whole messages, attacks among them, are read in test_http1.py.
"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xs import framing, http1


def test_a_length_body_never_hands_out_bytes_past_its_end():
    body, buffer = framing.LengthBody(5), bytearray(b"hel")
    assert body.read(buffer) == b"hel"
    assert body.read(buffer) is None
    assert not body.done
    buffer += b"loGET"
    assert body.read(buffer) == b"lo"
    assert body.done
    assert body.read(buffer) == b""
    assert buffer == b"GET"


def test_a_chunked_body_never_hands_out_bytes_past_its_end():
    body, buffer = framing.ChunkedBody(), bytearray(b"3\r\nhel\r\n2\r\nl")
    assert body.read(buffer) == b"hell"
    assert body.read(buffer) is None
    buffer += b"o\r\n0\r\nA: b\r\n\r\nGET"
    assert body.read(buffer) == b"o"
    assert body.done
    assert body.read(buffer) == b""
    assert buffer == b"GET"


def test_a_request_without_framing_has_no_body():
    head = http1.read_request_head(bytearray(b"POST / HTTP/1.1\r\nHost: a\r\n\r\n"))
    assert head is not None
    body = framing.body_reader(head)
    assert head.length == 0
    assert body.done
    assert body.read(bytearray(b"GET")) == b""


def test_a_chunk_may_be_larger_than_any_memory():
    body, buffer = framing.ChunkedBody(), bytearray(b"ffffffffffffffff\r\nabc")
    assert body.read(buffer) == b"abc"
    assert body.read(buffer) is None
    assert not buffer


def test_chunk_lines_are_read_up_to_their_limits_to_the_byte():
    line = b"5;" + b"a" * (framing.CHUNK_LINE_LIMIT - 2)
    assert framing.ChunkedBody().read(bytearray(line + b"\r\nhello")) == b"hello"
    with pytest.raises(http1.Refusal):
        framing.ChunkedBody().read(bytearray(line + b"a\r\nhello"))
    size = b"5".rjust(framing.CHUNK_SIZE_DIGITS, b"0")
    assert framing.ChunkedBody().read(bytearray(size + b"\r\nhello")) == b"hello"


def test_what_a_chunked_body_keeps_back_is_bounded():
    endless = {
        b"0": 300,  # a size
        b"5;": 300,  # an extension
        b"0\r\nA: ": framing.TRAILER_LIMIT + 10,  # a trailer
    }
    for start, most in endless.items():
        body, buffer = framing.ChunkedBody(), bytearray(start)
        with pytest.raises(http1.Refusal):
            for _ in range(most):
                buffer += b"0"
                body.read(buffer)


def test_many_small_chunks_take_no_quadratic_time():
    # 1.2 MB; copied for each chunk that would be 240 GB.
    buffer = bytearray(b"1\r\na\r\n" * 200_000 + framing.LAST_CHUNK)
    assert framing.ChunkedBody().read(buffer) == b"a" * 200_000


def test_a_large_buffer_is_taken_in_pieces_in_no_quadratic_time():
    # 8 MB in 80,000 requests; copied for each that would be 320 GB.
    request = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 50\r\n\r\n" + b"x" * 50
    buffer = bytearray(request * 80_000)
    count = 0
    while buffer:
        head = http1.read_request_head(buffer)
        assert head is not None
        assert framing.body_reader(head).read(buffer) == b"x" * 50
        count += 1
    assert count == 80_000


@settings(deadline=None, max_examples=300, derandomize=True)
@given(st.lists(st.binary(min_size=1, max_size=300), max_size=20), st.data())
def test_chunks_make_a_round_trip(blocks, draw):
    data = b"".join(map(framing.chunk, blocks)) + framing.LAST_CHUNK + b"GET"
    cuts = sorted(draw.draw(st.lists(st.integers(0, len(data)), max_size=10)))
    body, buffer, got = framing.ChunkedBody(), bytearray(), b""
    for start, end in zip([0, *cuts], [*cuts, len(data)]):
        buffer += data[start:end]
        while not body.done:
            block = body.read(buffer)
            if block is None:
                break
            got += block
    assert body.done
    assert got == b"".join(blocks)
    assert buffer == b"GET"


def test_an_empty_chunk_is_never_made():
    with pytest.raises(ValueError, match="empty chunk"):
        framing.chunk(b"")
