"""Points at which this process can be made to die, as if it was killed right there.

`XS_FAULT=NAME` in the environment ends it by SIGKILL when it first comes to `at("NAME")`, and
`XS_FAULT=NAME:3` when it comes there for the third time: nothing is flushed, closed or undone.
Without that, which is decided when this module is imported, a point is a call that does nothing
(30 ns; an append passes seven). tests/test_faults.py dies at each.
"""

from __future__ import annotations

from xs.system import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


def _nothing(name: str) -> None:
    pass


def _deadly(setting: str) -> Callable[[str], None]:
    wanted, _, count = setting.partition(":")
    left = int(count or "1")

    def at(name: str) -> None:
        nonlocal left
        if name == wanted:
            left -= 1
            if left == 0:
                import signal  # which brings in `enum`

                os.kill(os.getpid(), signal.SIGKILL)

    return at


at = _deadly(os.environ["XS_FAULT"]) if os.environ.get("XS_FAULT") else _nothing
