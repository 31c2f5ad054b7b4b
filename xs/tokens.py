"""Tokens for TCP addresses: the owner's, and those of others, which have names and rights.

The owner's is a line in `DIR/token`, made at the first need. The others are lines of JSON in
`DIR/tokens`: name, rights, and the token's hash. A token itself is told once, when it is made: 256
random bits, of which a plain hash gives nothing away. Both files are the owner's alone (0600), and
neither is opened through a link.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import hmac
import json
import os
import re
from collections.abc import Iterator
from typing import Any, NamedTuple, Optional

from xs import fault, frame
from xs.disk import sync, sync_folder
from xs.errors import Damaged, Invalid, NotFound
from xs.place import check_writable
from xs.rights import Rights

OWNER_FILENAME = "token"
FILENAME = "tokens"
TOKENS_MAX = 1000  # of one store, beside the owner's
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")


class Token(NamedTuple):
    """One token of somebody else's. `append` has patterns as one gives them, or is None."""

    name: str
    admin: bool
    read: bool
    append: Optional[str]
    hash: str  # SHA-256, hexadecimal

    @property
    def line(self) -> bytes:
        """As `xs token list` shows it: the hash is nobody's business."""
        shown = {name: value for name, value in self._asdict().items() if name != "hash"}
        return json.dumps(shown, separators=(",", ":")).encode() + b"\n"

    @property
    def rights(self) -> Rights:
        if self.append is None:
            return Rights(self.admin, self.read)
        return Rights(self.admin, self.read, frame.parse_patterns(self.append))


def owner_token(folder: str) -> str:
    """The owner's token; it is made if there is none. Raises `OSError`."""
    with contextlib.suppress(FileNotFoundError):
        token = _owner_token_in(folder)
        if token:
            sync_folder(folder)  # who made it may have been killed before that
            return token
    token = _new()
    _write(folder, OWNER_FILENAME, f"{token}\n".encode())
    return token


def listed(folder: str) -> list[Token]:
    """The tokens of others, in the order in which they were made. Raises `Damaged`, `OSError`."""
    try:
        lines = _read(os.path.join(folder, FILENAME)).splitlines()
    except FileNotFoundError:
        return []
    try:
        if any(line.count(b"[") + line.count(b"{") > 1 for line in lines):
            raise ValueError  # unparsed: for what is nested deep a thread's stack has no room
        return [_checked(Token(**json.loads(line))) for line in lines]
    except (ValueError, TypeError, Invalid):
        raise Damaged(
            f"the tokens of the store are damaged: remove {folder}/{FILENAME}, and add them anew"
        ) from None


def add(
    folder: str, name: str, *, admin: bool = False, read: bool = False, append: Optional[str] = None
) -> str:
    """Makes a token, which a running server takes from now on. Raises `Invalid`."""
    if not _NAME.fullmatch(name):
        raise Invalid(
            f"not a token's name: {name[:80]!r}: use up to 64 of A-Z a-z 0-9 _ . - and begin with "
            "a letter, a digit or _"
        )
    if not (admin or read or append):
        raise Invalid(f"what may {name} do? Give --read, --append PATTERN or --admin")
    if append is not None:
        frame.parse_patterns(append)
    with _changing(folder) as tokens:
        if any(each.name == name for each in tokens):
            raise Invalid(f"there is a token {name} already: remove it first, or choose a new name")
        if len(tokens) >= TOKENS_MAX:
            raise Invalid(f"there are {TOKENS_MAX} tokens already: remove one first")
        token = _new()
        tokens.append(Token(name, admin, read, append, _hash(token)))
    return token


def remove(folder: str, name: str) -> None:
    """Ends a token, at once. Raises `NotFound`."""
    with _changing(folder) as tokens:
        left = [each for each in tokens if each.name != name]
        if len(left) == len(tokens):
            known = ", ".join(each.name for each in tokens)
            there = f"there are: {known}" if known else "there is none"
            raise NotFound(f"no token {name[:80]!r}: {there}")
        tokens[:] = left


class Finder:
    """Finds the rights of tokens for a server. The file is read again when it has changed."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        # The file's state, and what was in it then. One value: of threads that read at once none
        # can leave the tokens of an older file under the state of a newer one.
        self._known: tuple[Any, list[tuple[bytes, Rights]]] = (None, [])

    def __call__(self, token: str) -> Optional[Rights]:
        presented = _hash(token).encode()
        found = None
        for known, rights in self._look():  # all of them: the time tells nothing
            if hmac.compare_digest(known, presented):
                found = rights
        return found

    def knows(self, token: str) -> bool:
        """Whether it is one of the store's, the owner's included."""
        try:
            owner = _owner_token_in(self._folder)
        except OSError:
            owner = ""
        is_owners = hmac.compare_digest(_hash(owner), _hash(token)) and bool(owner)
        return self(token) is not None or is_owners

    def _look(self) -> list[tuple[bytes, Rights]]:
        last_seen, known = self._known
        try:
            status = os.stat(os.path.join(self._folder, FILENAME))
            seen = (status.st_ino, status.st_mtime_ns, status.st_size)
        except OSError:
            seen = None
        if seen == last_seen:
            return known
        tokens = []  # where there are none to be had, nobody but the owner comes in
        try:
            tokens = listed(self._folder)
        except Damaged:
            pass
        except OSError:
            return []  # not kept: it may have been no more than a lack of descriptors
        known = [(each.hash.encode(), each.rights) for each in tokens]
        self._known = (seen, known)
        return known


@contextlib.contextmanager
def _changing(folder: str) -> Iterator[list[Token]]:
    """The tokens, to be changed within the block; no other process changes them meanwhile."""
    check_writable(folder)
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        sync(lock)  # what is there now, and told of, may be of one who was killed before that
        tokens = listed(folder)
        yield tokens
        lines = [json.dumps(each._asdict()) + "\n" for each in tokens]
        _write(folder, FILENAME, "".join(lines).encode())
    finally:
        os.close(lock)


def _checked(token: Token) -> Token:
    """The token, if it is one that `add` could have made. Raises `TypeError`, `Invalid`."""
    is_append = token.append is None or isinstance(token.append, str)
    is_flags = isinstance(token.admin, bool) and isinstance(token.read, bool)
    is_hash = isinstance(token.hash, str) and token.hash.isascii()
    if not (is_append and is_flags and isinstance(token.name, str) and is_hash):
        raise TypeError
    _ = token.rights
    return token


def _owner_token_in(folder: str) -> str:
    text = _read(os.path.join(folder, OWNER_FILENAME)).decode("ascii", "replace")
    return text.partition("\n")[0].strip()


def _new() -> str:
    import secrets  # here: it brings `random`, for which a server has no use

    return secrets.token_urlsafe(32)


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()


def _read(path: str) -> bytes:
    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NOFOLLOW)

    with open(path, "rb", opener=opener) as stream:
        return stream.read()


def _write(folder: str, name: str, data: bytes) -> None:
    """Replaces a file whole, durably."""
    path = os.path.join(folder, name)
    with contextlib.suppress(FileNotFoundError):  # of one who was killed here
        os.unlink(f"{path}.new")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    with os.fdopen(os.open(f"{path}.new", flags, 0o600), "wb") as stream:
        stream.write(data)
        stream.flush()
        fault.at("token.before-fsync")
        sync(stream.fileno())
    fault.at("token.before-rename")
    os.replace(f"{path}.new", path)
    fault.at("token.before-folder-fsync")
    sync_folder(folder)
    fault.at("token.done")
