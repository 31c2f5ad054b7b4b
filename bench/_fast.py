"""The command line in a process whose clock runs faster: `_fast.py SPEED ORIGIN WORD …`.

At ORIGIN, in seconds since 1970, its clock shows the time as it is, and SPEED seconds for each one
from then on; what waits for a time waits as much shorter. Nothing of xs is changed: it is what
Python gives it of clocks and waits, and all of that before it is imported. The kernel's own limits
on a read stay as they are, which makes them longer.
"""

from __future__ import annotations

import selectors
import sys
import threading
import time
from typing import Any, Optional

real_time, real_monotonic, real_sleep = time.time, time.monotonic, time.sleep


def speed_up(speed: float, origin: float) -> None:
    offset = real_monotonic() - (real_time() - origin) - origin

    def monotonic() -> float:
        return offset + origin + (real_monotonic() - offset - origin) * speed

    def now() -> float:
        return fast(real_time(), speed, origin)

    time.monotonic = monotonic
    time.time = now
    time.time_ns = lambda: int(now() * 1_000_000_000)
    time.sleep = lambda seconds: real_sleep(seconds / speed)
    threading._time = monotonic  # type: ignore[attr-defined]  # for `Condition.wait_for`

    def shorter(wait: Any) -> Any:
        def waits(self: Any, timeout: Optional[float] = None) -> Any:
            return wait(self, None if timeout is None else timeout / speed)

        return waits

    threading.Condition.wait = shorter(threading.Condition.wait)  # type: ignore[method-assign]
    selector = selectors.DefaultSelector
    selector.select = shorter(selector.select)  # type: ignore[method-assign]


def fast(at: float, speed: float, origin: float) -> float:
    """What the fast clock shows at a time of the real one."""
    return origin + (at - origin) * speed


if __name__ == "__main__":
    speed_up(float(sys.argv[1]), float(sys.argv[2]))
    from xs.cli import main

    del sys.argv[1:3]
    main()
