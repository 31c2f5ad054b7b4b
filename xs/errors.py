"""Everything that can go wrong, as types: one sentence, one HTTP status, one exit code each.

A message says what was wrong and what would be right. `api` turns an error into an answer by its
`status`, `cli` ends with its `exit`, and `request` turns an answer back into one of them.
"""

from __future__ import annotations


class XsError(Exception):
    """The base of every error that a user can meet. `str(error)` is the sentence."""

    status = 500
    exit = 1


class Invalid(XsError):
    """The request itself is wrong: a topic, an id, meta, a query, a body."""

    status = 400


class Usage(XsError):
    """The command line itself is wrong."""

    status = 400
    exit = 2


class Unauthorized(XsError):
    """A TCP address was used without its token."""

    status = 401


class Forbidden(XsError):
    """Understood, and not allowed from here."""

    status = 403


class NotFound(XsError):
    """No such frame, content or path."""

    status = 404


class MethodNotAllowed(XsError):
    """A known path, with a method it does not have; `allow` lists those it has."""

    status = 405

    def __init__(self, sentence: str, allow: str = "") -> None:
        super().__init__(sentence)
        self.allow = allow


class Conflict(XsError):
    """A condition did not hold: `if-last`, or an import that contradicts what is stored.

    `frame` is the newest frame of the topic as JSON bytes (`b"null"` if there is none) when the
    condition was `if-last`, else None.
    """

    status = 409

    def __init__(self, sentence: str, frame: bytes | None = None) -> None:
        super().__init__(sentence)
        self.frame = frame


class TooLarge(XsError):
    """Over a named limit (docs/protocol.md, Limits)."""

    status = 413


class Misdirected(XsError):
    """The Host header names a host that this is not."""

    status = 421


class Damaged(XsError):
    """What is stored is not what was stored: content unlike its hash, a broken file."""

    status = 500


class Failed(XsError):
    """A script has failed. The message says how, mostly in the script's own words."""

    status = 400


class NoNushell(XsError):
    """A script is in Nushell, and there is none here, or one that is too old."""

    status = 501


class Full(XsError):
    """The disk is full, or a quota is reached. Nothing of the request was stored."""

    status = 507


class Unavailable(XsError):
    """The store is busy or closing; the same request may succeed later."""

    status = 503


class DiskError(Unavailable):
    """The disk gives an error where the index is read or written; what is on it may be whole."""


class Unreached(Unavailable):
    """Nobody answers at an address: nothing of the request was done."""


class Lost(Unavailable):
    """The other end went away amid a request: whether it was done, nobody knows."""


class NoMemory(Unavailable):
    """The process has no memory left for this, or no room for another thread."""

    def __init__(self, sentence: str = "no memory is left for this just now") -> None:
        super().__init__(sentence)


class Locked(Unavailable):
    """Another process holds the store."""


class NoAddress(Unavailable):
    """An address can't be listened on: it is taken, or not this machine's."""


class NoStore(XsError):
    """There is no store at that address."""

    status = 404


class NotAStore(XsError):
    """There is something at that address, but it can't be opened as a store of this version."""

    status = 500


class BrokenBody(XsError):
    """A body ended before it was whole: the other end went away, or found damage on its way."""

    status = 400


# What is wrong with every relative path while the directory that the process is in is none.
HERE_IS_GONE = "the current directory was removed: change to another one, or give whole paths"


def dangling(path: str, target: str) -> NoStore:
    """What is told of a symbolic link, at a store's path, to a target that isn't there."""
    return NoStore(
        f"no store at: {path}: it is a symbolic link, and {target} isn't there: mend the link, or "
        "make a store by that name"
    )


def replaced(folder: str) -> Unavailable:
    """What is told to who has files of a store open that don't lie in its folder any more.

    Others can't see what is written to them, and nobody would find it again.
    """
    return Unavailable(
        f"the store at {folder} was replaced or removed while it was open: open it again"
    )


def half_repaired(folder: str) -> Unavailable:
    """What is told of a store while a repair replaces its database, or if one was killed then."""
    return Unavailable(
        f"the store at {folder} is being repaired, or its repair broke off: if none is under way, "
        f"xs check --repair {folder} finishes it"
    )
