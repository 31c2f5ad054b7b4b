"""Which clients have gone away, of all whose answers are still to come: one thread for all.

Who waits for an answer doesn't read its connection, so that the client has closed it would show
only when the answer is written. The system tells of that without anything being read (epoll(7)'s
EPOLLRDHUP, kqueue(2)'s EV_EOF), whatever else the client has sent before.
"""

from __future__ import annotations

import select
import socket
import sys
from collections.abc import Callable

from xs import threads
from xs.sockets import is_gone

_EVENTS = 256  # looked at in one go


class Hangups:
    """Calls back when the client of a watched socket has gone. Any thread may call anything.

    There is no lock: a socket that is unwatched just now may be told of all the same.
    """

    def __init__(self) -> None:
        self._watched: dict[int, tuple[socket.socket, Callable[[], None]]] = {}
        self._waker, self._wakened = socket.socketpair()
        self._stopping = False
        self._system = _System()
        self._system.add(self._wakened.fileno())
        self._thread = threads.Thread(
            lambda: threads.keep_on(self._look), "xs-hangups", insists=True
        )

    def start(self) -> None:
        self._thread.start()

    def watch(self, sock: socket.socket, gone: Callable[[], None]) -> None:
        """From now on `gone` is called when the client goes away, once or twice, at once.

        It must not block. Raises `OSError` where the system can watch no more.
        """
        number = sock.fileno()
        self._watched[number] = sock, gone
        try:
            self._system.add(number)
        except ValueError:
            pass  # nothing is watched any more
        except OSError:  # there is no room for another one
            del self._watched[number]
            raise

    def unwatch(self, sock: socket.socket) -> None:
        """To be called before `sock` is closed."""
        number = sock.fileno()
        if self._watched.pop(number, None) is not None:
            try:
                self._system.remove(number)
            except ValueError:
                pass  # nothing is watched any more

    def stop(self) -> None:
        self._stopping = True
        self._waker.close()  # its other end is watched like any other
        self._thread.join()
        self._system.close()
        self._wakened.close()

    def _look(self) -> bool:
        for number in self._system.wait():
            found = self._watched.get(number)
            # The number may be another socket's by now: so this one is asked itself.
            if found is not None and has_gone(found[0]):
                found[1]()
        return self._stopping


def has_gone(sock: socket.socket) -> bool:
    """Whether the client has closed its end, as far as the system tells."""
    if not hasattr(select, "POLLRDHUP"):
        return True  # kqueue(2) has told so
    try:
        return is_gone(sock)
    except (OSError, ValueError):
        return False  # it was closed here


if sys.platform == "linux":

    class _System:
        """epoll(7), by edges: of one that sends no more it tells once, and again when it goes."""

        def __init__(self) -> None:
            self._epoll = select.epoll()

        def add(self, number: int) -> None:
            self._epoll.register(number, select.EPOLLRDHUP | select.EPOLLET)

        def remove(self, number: int) -> None:
            self._epoll.unregister(number)

        def wait(self) -> list[int]:
            return [number for number, _ in self._epoll.poll(maxevents=_EVENTS)]

        def close(self) -> None:
            self._epoll.close()

else:

    class _System:
        """kqueue(2), by edges."""

        def __init__(self) -> None:
            self._kqueue = select.kqueue()

        def add(self, number: int) -> None:
            self._change(number, select.KQ_EV_ADD | select.KQ_EV_CLEAR)

        def remove(self, number: int) -> None:
            self._change(number, select.KQ_EV_DELETE)

        def _change(self, number: int, flags: int) -> None:
            self._kqueue.control([select.kevent(number, select.KQ_FILTER_READ, flags)], 0)

        def wait(self) -> list[int]:
            events = self._kqueue.control(None, _EVENTS)
            return [event.ident for event in events if event.flags & select.KQ_EV_EOF]

        def close(self) -> None:
            self._kqueue.close()
