"""Responses under way that hang on somebody else's token: they end when that is good no more.

A request's token is looked at when the request begins. Who follows has begun long ago; so here the
tokens are looked at again, now and then, while there is anybody who reads by one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Optional, Protocol

from xs.access import Access, Grant

LOOK_SECONDS = 1.0  # between two looks at the tokens by which something is being read


class Reading(Protocol):
    """A connection with a response under way."""

    def revoke(self) -> None:
        """Breaks the response off."""


class Grants:
    """Those of one listener.

    Lock: `_lock` guards who reads by what; a connection's own may be taken under it.
    """

    def __init__(self, access: Optional[Access], wake: Callable[[], None]) -> None:
        """`wake` has `look` called soon, by whom it asks to call it again."""
        self._access = access
        self._wake = wake
        self._lock = threading.Lock()
        self._reading: dict[Reading, Grant] = {}
        self._look_at: Optional[float] = None  # the clock; None: there is nobody

    def guard(self, reading: Reading, grant: Grant) -> None:
        """From now on the response is broken off when what it was granted holds no more."""
        with self._lock:
            self._reading[reading] = grant
            if self._look_at is not None:
                return
            self._look_at = time.monotonic() + LOOK_SECONDS
        self._wake()

    def unguard(self, reading: Reading) -> None:
        with self._lock:
            self._reading.pop(reading, None)

    def look(self) -> tuple[int, Optional[float]]:
        """Looks at the tokens if it is time: how many responses broke off, and when to call again.

        That is in so many seconds, or (None) not before `wake` was called.
        """
        access = self._access
        if self._look_at is None or access is None:
            return 0, None
        now = time.monotonic()
        if now < self._look_at:
            return 0, self._look_at - now
        with self._lock:
            self._look_at = now + LOOK_SECONDS if self._reading else None
            reading = dict(self._reading)
        ended = {grant for grant in set(reading.values()) if not access.holds(grant)}
        revoked = 0
        for each, grant in reading.items():
            if grant in ended:
                with self._lock:
                    if self._reading.get(each) is grant:  # else it has its next request
                        each.revoke()
                        del self._reading[each]
                        revoked += 1
        return revoked, LOOK_SECONDS if reading else None
