"""A response that follows a stream: what is stored, and then what comes, for as long as its client.

It has the connection's thread until its client has all there is. Then it is parked with `delivery`,
and has no thread until what comes is more than the client can take at once.
"""

from __future__ import annotations

import socket
from collections.abc import Callable

from xs import framing, threads
from xs.delivery import Delivery, Follower
from xs.errors import XsError
from xs.outbox import Outbox
from xs.reader import Reader
from xs.store import Store


class Following:
    """One such response, the last on its connection; its head is out. See `delivery.Parked`."""

    def __init__(
        self,
        sock: socket.socket,
        out: Outbox,
        store: Store,
        delivery: Delivery,
        close: Callable[[], None],
        *,
        chunked: bool,
    ) -> None:
        """`close` ends the connection: who was parked has nobody else to do it."""
        self.sock = sock
        self.chunked = chunked
        self._out = out
        self._bus = store.bus
        self._delivery = delivery
        self._close = close

    def run(self, reader: Reader) -> bool:
        """Writes what there is. True: it is parked, and the connection others' (`_catch_up`).

        Raises `OSError` when the client is gone, and `XsError` for what can't be read.
        """
        follower = Follower(self, reader)
        for block in reader.history():
            self._out.write_body(*follower.parts(block))
            del block  # before the next one is made
        if reader.left <= 0:
            self._end_body()
            return False
        if reader.wants_threshold:
            self._out.write_body(follower.framed(reader.threshold()))
        return self._catch_up(follower)

    def _catch_up(self, follower: Follower) -> bool:
        """Writes what the follower has missed, until it is parked (True), or finished (False).

        Once it is parked the connection is the delivery thread's, and may be another thread's, or
        closed, before this returns: nothing here may touch it any more.
        """
        reader = follower.reader
        while not reader.is_finished:
            is_overdue = reader.is_overdue  # first: what is there by then is still given
            missed = reader.missed()
            if missed is not None:
                for block in missed:
                    self._out.write_body(*follower.parts(block))
                    del block  # before the next one is made
                continue
            is_closed = self._bus.closed  # as above
            coming = reader.coming()
            if coming is not None:
                if coming:
                    self._out.write_body(*follower.parts(coming))
                    del coming
                continue
            if is_overdue:
                break
            if self._delivery.park(follower):
                return True
            if is_closed:
                break
        self._end_body()
        return False

    def _end_body(self) -> None:
        if self.chunked:
            self._out.write_body(framing.LAST_CHUNK)

    # By the delivery's threads

    def resume(self, follower: Follower) -> None:
        try:
            threads.Thread(lambda: self._resume(follower), "xs-resume", insists=True).start()
        except (MemoryError, RuntimeError):  # no more threads: it can come back, from where it was
            self._close()

    def _resume(self, follower: Follower) -> None:
        is_parked = False
        try:
            self._write_unsent(follower)
            is_parked = self._catch_up(follower)
        except (OSError, XsError):
            pass  # the client is gone, or what is stored is damaged: the body breaks off
        finally:  # also where memory is short: who is cut off comes back
            if not is_parked:
                threads.insist(self._close)

    def _write_unsent(self, follower: Follower) -> None:
        """Writes what the delivery could not, and lets go of it."""
        unsent, follower.unsent = follower.unsent, b""
        self._out.write_body(unsent)

    def end_following(self) -> None:
        try:
            if self.chunked:
                self.sock.send(framing.LAST_CHUNK, socket.MSG_DONTWAIT)
        except (OSError, MemoryError):
            pass  # it is gone, or too slow to hear the end
        self._close()

    def drop(self) -> None:
        self._close()
