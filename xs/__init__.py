"""xs: an event stream store for personal, local-first use.

    import xs
    store = xs.open("./store")
    frame = store.append("notes", "hello")

`xs.open` takes any address (docs/protocol.md, Addresses) and works with or without a server.
"""

from __future__ import annotations

__all__ = ["Client", "Frame", "XsError", "__version__", "open"]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from os import PathLike

    from xs.client import Client
    from xs.errors import XsError
    from xs.frame import Frame
    from xs.version import VERSION as __version__


def open(address: str | PathLike[str], *, timeout: float | None = None) -> Client:
    """The store at `address`, through its server if it has one, else through its files.

    It is a directory, HOST:PORT or a URL, or the path of a server's socket.
    `timeout` is in seconds, for each wait on a server (None: no limit). A directory that holds no
    store yet becomes one with the first append. A relative path is one from the directory that the
    process is in now, wherever it goes. Raises `XsError` when nothing can be reached there.
    """
    from os import fspath

    from xs.address import absolute, open_transport
    from xs.client import Client

    return Client(open_transport(absolute(fspath(address)), timeout=timeout, create=True))


def __getattr__(name: str) -> object:
    # Imported when first asked for: starting fast is part of the command line's work.
    if name == "Client":
        from xs.client import Client

        return Client
    if name == "Frame":
        from xs.frame import Frame

        return Frame
    if name == "XsError":
        from xs.errors import XsError

        return XsError
    if name == "__version__":
        from xs.version import VERSION

        return VERSION
    raise AttributeError(f"module 'xs' has no attribute {name!r}")
