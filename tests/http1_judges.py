"""What xs.http1 makes of bytes, and what h11 makes of them: for test_http1.py and for fuzzing."""

from __future__ import annotations

import h11

from xs import framing, http1


def head_fields(head: http1.RequestHead) -> tuple:
    names = ("method", "target", "path", "query", "minor", "authority", "length")
    return (
        *(getattr(head, name) for name in names),
        head.keep_alive,
        head.expects_continue,
        tuple(head.fields),
    )


def head_alone(buffer: bytearray) -> tuple[tuple, bytearray]:
    """What is read of a head, and left, by who has seen no head before it."""
    try:
        head = http1.read_request_head(buffer)
    except http1.Refusal as refusal:
        raise AssertionError("it was taken after another head") from refusal
    return head_fields(head), buffer


def read_all(pieces) -> tuple[list, tuple]:
    """What a server would read: the whole messages, and how it ends.

    The end is ("refused", status, sentence), or ("waiting", bytes of the body so far, buffer).
    """
    buffer, messages, head, so_far = bytearray(), [], None, b""
    before = None
    try:
        for piece in pieces:
            buffer += piece
            while True:
                if head is None:
                    whole = bytearray(buffer) if b"\r\n\r\n" in buffer else None
                    head = http1.read_request_head(buffer, like=before)
                    if head is None:
                        break
                    assert head_alone(whole) == (head_fields(head), buffer)
                    before = head
                    body = framing.body_reader(head)
                data = body.read(buffer)
                if data is None:
                    break
                assert data or body.done, "an empty block is given only at the end"
                so_far += data
                if body.done:
                    messages.append((head_fields(head), so_far))
                    head, so_far = None, b""
    except http1.Refusal as refusal:
        return messages, ("refused", refusal.status, str(refusal))
    return messages, ("waiting", so_far, bytes(buffer))


def one_by_one(data: bytes) -> list[bytes]:
    return [data[i : i + 1] for i in range(len(data))]


def read_response(pieces, method: str = "GET"):
    """(status, body) when the connection is closed after the pieces, or what was raised."""
    buffer, head, body, got = bytearray(), None, None, b""
    try:
        for piece in pieces:
            buffer += piece
            if head is None:
                head = http1.read_response_head(buffer, method)
                if head is None:
                    continue
                body = framing.response_body_reader(head)
            while not body.done:
                data = body.read(buffer)
                if data is None:
                    break
                got += data
        if body is None:
            return "no head"
        body.eof()
    except http1.Refusal as refusal:
        return "refused", str(refusal)
    except framing.BrokenOff:
        return "broken off", got
    return head.status, head.fields, head.keep_alive, got, bytes(buffer)


# Places where h11 refuses and this module does not. There is one, and it is the RFC's own wish
# (§2.2: "a server … SHOULD ignore at least one empty line (CRLF) received prior to the
# request-line").
def is_read_on_purpose(data: bytes) -> bool:
    return data.startswith(b"\r\n") or data == b"\r"


def h11_reads(data: bytes):
    """("refused",) or (method, target, fields, body, whether it is whole, what is left)."""
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=http1.HEAD_LIMIT)
    head, body = None, b""
    try:
        connection.receive_data(data)
        while True:
            event = connection.next_event()
            if isinstance(event, h11.Request):
                head = event
            elif isinstance(event, h11.Data):
                body += bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                left = bytes(connection.trailing_data[0])
                break
            elif event is h11.NEED_DATA or event is h11.PAUSED:
                if head is None:
                    return ("waiting",)
                left = None
                break
            else:
                raise AssertionError(event)
    except h11.RemoteProtocolError:
        return ("refused",)
    fields = [(name.decode(), value.decode("latin-1")) for name, value in head.headers]
    return head.method.decode(), head.target.decode(), fields, body, left


def http1_reads(data: bytes):
    """The same, by this module."""
    buffer, body = bytearray(data), b""
    try:
        head = http1.read_request_head(buffer)
        if head is None:
            return ("waiting",)
        reader = framing.body_reader(head)
        while not reader.done:
            block = reader.read(buffer)
            if block is None:
                break
            body += block
    except http1.Refusal:
        return ("refused",)
    fields = [
        (name, value.lower() if name == "transfer-encoding" else value)  # as h11 gives it
        for name, value in head.fields
    ]
    return head.method, head.target, fields, body, bytes(buffer) if reader.done else None


def compare(data: bytes) -> None:
    ours, theirs = http1_reads(data), h11_reads(data)
    if ours == ("refused",) or is_read_on_purpose(data):
        return  # the stricter one
    if len(theirs) > 2 and len(ours) > 2 and not theirs[1].startswith("/"):
        theirs = (theirs[0], ours[1], *theirs[2:])  # absolute form: h11 does not reduce it
    assert ours == theirs
