"""The pipes of a script's process in a selector: what is written to it, what it says, its end.

Nothing here blocks: what a process does not read yet is kept, and whoever sends has an eye on it;
what nobody takes yet is left in the pipe, so that a process that is ahead has to wait.
"""

from __future__ import annotations

import collections
import os
import selectors
from collections.abc import Callable, Iterator

from xs.errors import Failed
from xs.process import Process
from xs.terminal import harmless

LINE_BYTES = 16 << 20  # of one line of a script's output; above it: it has failed
TAIL_LINES = 20  # of standard error, for the frame that says how a script ended
TAIL_BYTES = 4096
_RECEIVE = 1 << 18
_LAST_READS = 8  # when it has ended: a pipe holds less, and a daemon of its may write for ever


class Pipes:
    """A process, and its pipes in the runner's selector. Never blocks."""

    def __init__(
        self,
        process: Process,
        mark: bytes,
        selector: selectors.BaseSelector,
        log: Callable[[str], None],
    ) -> None:
        """`mark` begins each line of output that is meant for us, as in `Command`."""
        self._mark = mark
        self._selector = selector
        self._log = log
        self._process = process
        self._unsent = bytearray()
        self._ends = False  # its input, when that is written
        self._output = bytearray()
        self._scanned = 0  # of the output: so much has no end of a line in it
        self._errors = b""
        self._tail: collections.deque[str] = collections.deque(maxlen=TAIL_LINES)
        self._reading = True
        self.received = 0  # bytes of output, when that was last looked for
        self.read_all = False
        self._last_reads = _LAST_READS
        selector.register(self._process.output, selectors.EVENT_READ)
        selector.register(self._process.errors, selectors.EVENT_READ)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def started(self) -> float:
        return self._process.started

    @property
    def status(self) -> int | None:
        """As `Process.status`, but None until all it has written is read."""
        return self._process.status if self.read_all else None

    @property
    def has_unsent(self) -> bool:
        return bool(self._unsent)

    def send(self, data: bytes) -> None:
        """Writes to the process's input, now or as it reads."""
        idle = not self._unsent
        self._unsent += data
        if idle:
            self._write()

    def send_all(self, data: bytes) -> None:
        """As `send`, and nothing follows: the process finds the end behind it."""
        self._ends = True
        self.send(data)

    def _write(self) -> None:
        number = self._process.input
        if number is None:
            self._unsent.clear()
            return
        try:
            while self._unsent:
                sent = os.write(number, memoryview(self._unsent)[:_RECEIVE])
                del self._unsent[:sent]
        except BlockingIOError:
            pass  # it has enough to read for now
        except OSError:
            # It has closed its input, or is gone: then its end follows.
            self._unsent.clear()
        self._watch(number, selectors.EVENT_WRITE if self._unsent else 0)
        if self._ends and not self._unsent:
            self._process.close_input()

    @property
    def is_paused(self) -> bool:
        return not self._reading

    def pause(self, paused: bool) -> None:
        """Whether its output is left in the pipe for now: a process that is ahead has to wait."""
        if paused == (not self._reading) or self.read_all:
            return
        self._reading = not paused
        self._watch(self._process.output, 0 if paused else selectors.EVENT_READ)

    def _watch(self, number: int, events: int) -> None:
        registered = number in self._selector.get_map()
        if events and not registered:
            self._selector.register(number, events)
        elif registered and not events:
            self._selector.unregister(number)

    def handle(self, ready: set[int]) -> None:
        """Does what the selector found possible."""
        ended = self._process.status is not None  # before reading: so all it wrote can be read
        self.received = 0
        if self._process.input in ready:
            self._write()
        if self._process.errors in ready:
            self._read_errors()
        if self._reading and (self._process.output in ready or ended):
            more = self._read_output()
            self._last_reads -= ended
            if ended and (not more or self._last_reads == 0):
                self._read_errors()
                self._note_errors()
                self.read_all = True

    def _read_output(self) -> bool:
        try:
            data = os.read(self._process.output, _RECEIVE)
        except BlockingIOError:
            return False
        if not data:
            # A process that closes its output goes on: nothing more is to be read of it.
            self._watch(self._process.output, 0)
            return False
        self._output += data
        self.received = len(data)
        return True

    def _read_errors(self) -> None:
        # One read: who writes without end must not keep us from everything else.
        try:
            data = os.read(self._process.errors, _RECEIVE)
        except BlockingIOError:
            return
        if not data:
            self._watch(self._process.errors, 0)
        *lines, self._errors = (self._errors + data).split(b"\n")
        for line in lines:
            self._note(line)
        if not data or len(self._errors) > TAIL_BYTES:
            self._note_errors()

    def _note_errors(self) -> None:
        self._note(self._errors)
        self._errors = b""

    def _note(self, line: bytes) -> None:
        if line.strip():
            text = harmless(line.decode("utf-8", "replace")).rstrip()
            self._log(text)
            self._tail.append(text)

    @property
    def tail(self) -> str:
        """The last lines of its standard error."""
        text = "\n".join(self._tail)
        return text[-TAIL_BYTES:]

    def lines(self) -> Iterator[bytes]:
        """The whole lines of output that have come, each without its end.

        Raises `Failed` for a line that does not end.
        """
        end = self._output.rfind(b"\n", self._scanned)
        if end >= 0:
            whole = bytes(memoryview(self._output)[: end + 1])
            del self._output[: end + 1]
            self._scanned = 0
            yield from whole[:-1].split(b"\n")
        self._wait_for_end()

    def line(self) -> bytes | None:
        """The next whole line alone, without its end; None if none has come.

        Raises `Failed` for a line that does not end.
        """
        end = self._output.find(b"\n", self._scanned)
        if end < 0:
            self._wait_for_end()
            return None
        line = bytes(memoryview(self._output)[:end])
        del self._output[: end + 1]
        self._scanned = 0
        return line

    def _wait_for_end(self) -> None:
        """What is left is a part of a line."""
        self._scanned = len(self._output)
        if self._scanned > LINE_BYTES:
            raise Failed(f"it wrote a line of more than {LINE_BYTES} bytes")

    def rest(self) -> bytes:
        """All the output that has come and is not taken."""
        data = bytes(self._output)
        self._output.clear()
        self._scanned = 0
        return data

    def ours(self, line: bytes) -> bytes | None:
        """What is meant for us in a line of output; a script's own `print` goes to the log."""
        if not self._mark:
            return line
        printed, found, said = line.partition(self._mark)
        if printed:
            self._log(harmless(printed.decode("utf-8", "replace")))
        return said if found else None

    def kill(self) -> None:
        """Ends the process at once."""
        self._process.kill()

    def end(self) -> None:
        """Asks the process to end, then ends it. What it has written by then is read."""
        self._process.end()
        self._reading = True
        while not self.read_all:
            self.handle(set())

    def close(self) -> None:
        """Ends the process at once and gives back all it has."""
        self._process.kill()
        for number in (self._process.output, self._process.errors, self._process.input):
            if number is not None:
                self._watch(number, 0)
        self._process.close()
