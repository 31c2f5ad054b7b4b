"""The operating system, as `os` has it, with no more of that than a command needs.

`os` is `posix`, which is built in, and around it what its paths and its environment are made of: a
millisecond and a half, of the few that a command may take (bench/start.py). Where something has
loaded it, as site.py does, it is that; else a stand-in, which loads it for what is not here.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["os"]


class _Path:
    """What of `os.path` a command mostly needs, for strings."""

    def __init__(self, posix: Any) -> None:
        self._posix = posix

    def join(self, path: str, *more: str) -> str:
        for part in more:
            if not path or part[:1] == "/":
                path = part
            else:
                path += part if path[-1] == "/" else "/" + part
        return path

    def exists(self, path: str) -> bool:
        try:
            self._posix.stat(path)
        except (OSError, ValueError):
            return False
        return True

    def abspath(self, path: str) -> str:
        if path[:1] != "/":
            path = self.join(self._posix.getcwd(), path)
        kept: list[str] = []
        for part in path.split("/"):
            if part == "..":
                del kept[-1:]
            elif part and part != ".":
                kept.append(part)
        # Two slashes at the beginning, and no more, may have a meaning of their own (POSIX).
        return ("//" if path[:2] == "//" != path[1:3] else "/") + "/".join(kept)

    def __getattr__(self, name: str) -> Any:
        import os

        return getattr(os.path, name)


class _System:
    """What of `os` is in `posix`, and a little more."""

    def __init__(self) -> None:
        import posix

        self.__dict__.update(vars(posix))
        self.path = _Path(posix)
        self.environ = {
            self.fsdecode(key): self.fsdecode(posix.environ[key]) for key in posix.environ
        }

    def fsencode(self, text: str) -> bytes:
        return text.encode(sys.getfilesystemencoding(), "surrogateescape")

    def fsdecode(self, data: bytes | str) -> str:
        if isinstance(data, str):
            return data
        return data.decode(sys.getfilesystemencoding(), "surrogateescape")

    def __getattr__(self, name: str) -> Any:
        import os

        return getattr(os, name)


if TYPE_CHECKING:
    import os
elif "os" in sys.modules:
    os = sys.modules["os"]
else:
    os = _System()
