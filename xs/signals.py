"""Signals to a server: SIGTERM and SIGINT end it in good order, a second one at once; SIGHUP.

A signal that comes just before a lock is waited for would not end the wait (CPython looks for
signals before and after). A pipe has no such moment: its byte, the signal's number, stays. A thread
reads it, so that a second signal finds somebody whatever the first one has set in motion.
"""

from __future__ import annotations

import os
import signal
import time

from xs import threads

_SAME_SECONDS = 0.2  # Ctrl-C reaches a program, and again by whoever started it: that is once
_STOPS = (signal.SIGTERM, signal.SIGINT)


class Signals:
    """What signals ask for, from when this is made on. To be made in the main thread, once."""

    def __init__(self) -> None:
        self._terminal = next((number for number in range(3) if os.isatty(number)), None)
        if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # nohup(1)
            self._terminal = None
        self._received, sender = os.pipe()
        self._wanted, self._wants = os.pipe()
        os.set_blocking(sender, False)
        signal.set_wakeup_fd(sender, warn_on_full_buffer=False)
        for number in (*_STOPS, signal.SIGHUP):
            signal.signal(number, lambda *_: None)
        self._first = 0.0  # when one to stop came
        threads.Thread(lambda: threads.keep_on(self._hear), "xs-signals", insists=True).start()

    def wait(self) -> int:
        """The next signal, as soon as it has come. After one to stop none comes."""
        return os.read(self._wanted, 1)[0]

    def ends(self, number: int) -> bool:
        """Whether that signal is one to stop.

        SIGHUP is, if it comes because the terminal was closed from which the server was started.
        """
        if number == signal.SIGHUP:
            return self._terminal is not None and not os.isatty(self._terminal)
        return number in _STOPS

    def _hear(self) -> None:
        for number in os.read(self._received, 64):
            now = time.monotonic()
            if self._first and number in _STOPS and now - self._first > _SAME_SECONDS:
                # The store is made for that: nothing that was answered is lost, its lock is free,
                # and its scripts end with the process that started them.
                os._exit(128 + number)
            if not self._first:
                os.write(self._wants, bytes((number,)))
                self._first = now if self.ends(number) else 0.0
