"""A script that is run for a request: `POST /eval` and `POST /pipe/:id`.

The kind of what the script yields decides the answer's type. A list, a stream or bytes are answered
as they come, as is text when there is much of it; anything else once the script has ended well.
Standard error is never part of it: it goes to the server's log, and into the error if the script
fails.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import time
from collections.abc import Callable, Iterator

from xs import nu
from xs.errors import Failed, Unavailable, XsError
from xs.pipes import Pipes
from xs.process import Processes, command_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Optional

LOOK_SECONDS = 0.2  # between two looks whether anybody still waits for the answer
HELD_BYTES = 1 << 18  # of a text: so much waits for the script's end, since it may yet fail

# Kinds of answers. A text is one block, a long one many.
NOTHING, TEXT, JSON, LINES, BYTES = "nothing", "text", "json", "lines", "bytes"
LONG_TEXT = "long text"
_LISTS = ("stream", "list", "table", "range")


class Evaluation:
    """A script that runs: its kind of answer, and as an iterator the blocks of that.

    Iterating raises `Failed` when the script fails, `Unavailable` when it is ended because the
    store closes. `close` ends the script, wherever it is.
    """

    def __init__(
        self,
        processes: Processes,
        log: Callable[[str], None],
        text: bytes,
        line: Optional[bytes],
        is_wanted: Callable[[], bool],
        on_close: Callable[[], None],
    ) -> None:
        """Starts it, and waits until the kind is known. `line` is the frame that is its input.

        `is_wanted` is asked now and then; the script is ended when it says no. Raises `Failed` with
        the script's own message, `NoNushell`, `Invalid`, `Unavailable`; `on_close` is called then
        too.
        """
        self._processes = processes
        self._on_close: Callable[[], None] | None = on_close
        self._is_wanted = is_wanted
        self._looked = time.monotonic()  # when that was asked last
        self._held = contextlib.ExitStack()  # what is closed when it ends, whatever there is of it
        self._pipes: Pipes | None = None
        is_program = text.startswith(b"#!")
        try:
            self._selector = self._held.enter_context(selectors.DefaultSelector())
            self._wakened, self._waker = map(self._held.enter_context, socket.socketpair())
            self._selector.register(self._wakened, selectors.EVENT_READ)
            command = (
                command_of(text) if is_program else nu.script(text, "frame" if line else "none")
            )
            self._pipes = Pipes(
                processes.start(command, self._wake), command.mark, self._selector, log
            )
            self._pipes.send_all(line + b"\n" if line else b"")
            self._blocks = self._bytes() if is_program else self._answer()
            self.kind = next(self._blocks).decode()
        except OSError as error:
            self.close()
            raise Unavailable(f"the script can't be started: {error.strerror}") from None
        except BaseException:
            self.close()
            raise

    def __iter__(self) -> Evaluation:
        return self

    def __next__(self) -> bytes:
        return next(self._blocks)

    def close(self) -> None:
        """Ends the script, and gives back all it has."""
        pipes, self._pipes = self._pipes, None
        if pipes is not None:
            pipes.close()
        self._held.close()
        on_close, self._on_close = self._on_close, None
        if on_close is not None:
            on_close()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # it is closed: nobody waits
            self._waker.send(b".")

    # What comes

    def _wait(self) -> bool:
        """Waits for output; False when there will be no more. Raises `Failed`."""
        pipes = self._pipes
        if pipes is None or pipes.status is not None:
            return False
        while True:
            ready = {key.fd for key, _ in self._selector.select(LOOK_SECONDS)}
            if self._wakened.fileno() in ready:
                self._wakened.recv(64)
            pipes.handle(ready)
            # Also of a script that always has something to say: it need not be said to the client.
            now = time.monotonic()
            if now - self._looked >= LOOK_SECONDS:
                self._looked = now
                if not self._is_wanted():
                    raise self._failed("nobody waits for the answer any more")
            if ready:
                return True

    def _check_end(self) -> None:
        """Raises `Failed` unless the script has ended well."""
        assert self._pipes is not None
        status = self._pipes.status
        if status:
            how = f"signal {-status}" if status < 0 else f"status {status}"
            raise self._failed(self._pipes.tail or f"the script ended with {how}, and said nothing")

    def _failed(self, why: str) -> XsError:
        """What to say of a script without a good end, which may be no fault of its own."""
        return Unavailable("the store is closing") if self._processes.is_closed else Failed(why)

    def _lines(self) -> Iterator[bytes]:
        """Lines that are meant for us, each taken when it is asked for, to the script's end."""
        assert self._pipes is not None
        more = True
        while more:
            more = self._wait()
            while True:
                line = self._pipes.line()
                if line is None:
                    break
                said = self._pipes.ours(line)
                if said is not None:
                    yield said
        self._check_end()

    def _bytes(self) -> Iterator[bytes]:
        """The kind, as soon as there is a byte or none will come, and all output as it is."""
        assert self._pipes is not None
        begun = False
        more = True
        while more:
            block = self._pipes.rest()  # it may have come with what was before it
            if not block:
                more = self._wait()
                block = self._pipes.rest()
            if block and not begun:
                begun = True
                yield BYTES.encode()
            if block:
                yield block
        self._check_end()
        if not begun:
            yield NOTHING.encode()

    def _answer(self) -> Iterator[bytes]:
        """The kind, then the answer's blocks."""
        lines = self._lines()
        for said in lines:
            if said != b"start":
                break
        else:
            said = b"nothing"
        if said == b"nothing":
            for _ in lines:
                pass
            yield NOTHING.encode()
        elif said == nu.BYTE_STREAM:
            yield from self._bytes()
        elif said == nu.BINARY:
            yield from self._pieces(lines)
        elif said == nu.TEXT:
            yield from self._text(lines)
        elif said.startswith(tuple(kind.encode() for kind in _LISTS)):
            yield from self._list(lines)
        else:
            # One line, and the script has ended well.
            yield from self._single(b"".join(list(lines)))

    def _pieces(self, lines: Iterator[bytes]) -> Iterator[bytes]:
        first = next(lines, None)  # or its error
        yield BYTES.encode()
        if first is not None:
            yield nu.content_of(first)
        yield from map(nu.content_of, lines)

    def _text(self, lines: Iterator[bytes]) -> Iterator[bytes]:
        held: list[bytes] = []
        size = 0
        for said in lines:
            held.append(nu.content_of(said))
            size += len(held[-1])
            if size > HELD_BYTES:
                yield LONG_TEXT.encode()
                yield b"".join(held)
                yield from map(nu.content_of, lines)
                return
        yield TEXT.encode()
        yield b"".join(held)

    def _list(self, lines: Iterator[bytes]) -> Iterator[bytes]:
        first = next(lines, None)  # or its error
        yield LINES.encode()
        if first is not None:
            yield _as_json(first)
        for said in lines:
            yield _as_json(said)

    def _single(self, said: bytes) -> Iterator[bytes]:
        if said[1:2] in (b"{", b"[") or said[1:] == b"null":
            yield JSON.encode()
            yield said[1:] + b"\n"
        else:  # also what JSON has no type for, and as a text: a time
            yield TEXT.encode()
            yield nu.content_of(b"S" + said[1:] if said[1:2] == b'"' else said)


def _as_json(said: bytes) -> bytes:
    """A value in a list: bytes are base64 there, as a JSON string."""
    if said[:1] == b"B":
        return b'"' + said[1:] + b'"\n'
    return said[1:] + b"\n"
