"""Standard input and output, as commands use them: unbuffered, as data comes and goes.

Data is written as it is, but for a person at a terminal, whom it must not harm (`terminal`). Also
promised: what can't be read or written is an error of one sentence, and a reader of the output who
has gone away is a `ClosedPipe`, which is none. This module knows no commands and no requests.
"""

from __future__ import annotations

from xs import errors
from xs.request import BLOCK, SMALL
from xs.system import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from xs.request import Body


_INTERRUPTED = 130  # the exit status, as a shell has it: 128 + SIGINT


class ClosedPipe(Exception):
    """Whoever read standard output reads no more."""


def write(data: bytes) -> None:
    """Writes all of `data` to standard output."""
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(1, view) :]
        except BlockingIOError:  # a descriptor that someone shares with us and made non-blocking
            _wait_for(1, writing=True)
        except BrokenPipeError:
            raise ClosedPipe from None
        except OSError as error:
            raise errors.XsError(f"can't write to standard output: {error.strerror}") from None


def show(blocks: Iterable[bytes], *, is_json: bool = True) -> None:
    """Writes an answer's body as it comes: untouched, but for a person at a terminal."""
    if os.isatty(1) or os.environ.get("XS_COLOR") == "always":
        from xs import terminal

        colour = is_json and terminal.wants_colour(os.environ)
        blocks = terminal.shown(blocks, colour=colour)
    for block in blocks:
        write(block)


def show_bytes(blocks: Iterable[bytes]) -> None:
    """The same for content, which is nobody's JSON."""
    show(blocks, is_json=False)


def show_text(blocks: Iterable[bytes]) -> None:
    """The same for an answer that is text: it ends with a newline, so that answers don't run on."""
    show(_with_newline(blocks))


def _with_newline(blocks: Iterable[bytes]) -> Iterator[bytes]:
    last = b"\n"
    for block in blocks:
        last = block or last
        yield block
    if not last.endswith(b"\n"):
        yield b"\n"


def leave_with_reader() -> None:
    """From now on the process ends when nobody reads its output any more, and at Ctrl-C.

    A live read may have nothing to write for hours, and only a write would notice. And the
    interpreter looks for signals before it waits for the server, not while it does: one that comes
    in between, or to another thread than the main one, would be heard with the next frame.
    """
    # `signal`, which wraps it, would bring `enum`: 3 ms.
    import _signal  # type: ignore[import-not-found]
    import _thread
    import select

    interrupted, interrupting = os.pipe()
    os.set_blocking(interrupting, False)
    _signal.set_wakeup_fd(interrupting)

    def watch() -> None:
        poll = select.poll()
        poll.register(1, 0)  # POLLERR and POLLHUP are told unasked
        poll.register(interrupted, select.POLLIN)
        ready = {number for number, _ in poll.poll()}
        os._exit(_INTERRUPTED if interrupted in ready else 0)

    _thread.start_new_thread(watch, ())


def content() -> Body:
    """Standard input: bytes if it is short, else blocks as they come; None from a terminal."""
    if os.isatty(0):
        return None
    data = b""
    while len(data) < SMALL:
        block = _read(SMALL, 0)
        if not block:
            return data
        data += block
    return _after(data)


def _after(data: bytes) -> Iterator[bytes]:
    yield data
    yield from blocks_of()


def blocks_of(descriptor: int = 0) -> Iterator[bytes]:
    """What is there to read, as it comes, from standard input or another file."""
    while block := _read(BLOCK, descriptor):
        yield block


def _read(size: int, descriptor: int) -> bytes:
    """Up to `size` bytes, as soon as there is something; b"" at the end."""
    while True:
        try:
            return os.read(descriptor, size)
        except BlockingIOError:
            _wait_for(descriptor, writing=False)
        except OSError as error:
            raise errors.XsError(f"can't read standard input: {error.strerror}") from None


def _wait_for(descriptor: int, *, writing: bool) -> None:
    import select

    poll = select.poll()
    poll.register(descriptor, select.POLLOUT if writing else select.POLLIN)
    poll.poll()
