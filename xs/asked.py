"""What a root store is asked about further stores: requests as values, and their dealings.

It says what one store has to do with another, by its path, its name or its gateway's address, and
what they can't have both. Nothing is served here, nor decided.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
from collections.abc import Iterator
from typing import Any, NamedTuple, Optional, Union

from xs.activation import place_of
from xs.address import is_socket_path, parse_host
from xs.errors import Invalid
from xs.schema import FILENAME as INDEX_FILENAME

NAME_MAX = 64  # of a store, in characters
PATH_MAX = 4096  # of its directory, in bytes

_NAME = re.compile(rf"[A-Za-z0-9_][A-Za-z0-9_.-]{{0,{NAME_MAX - 1}}}")
_OF_A_STORE = frozenset({"cas", "run"})  # folders of a store in which no other one can lie
_EVERYWHERE = frozenset({"0.0.0.0", "::"})  # who listens there has the port at each address


class Asked(NamedTuple):
    """What is to be served: `path` has no links in it; `http` is a gateway's address, or None."""

    path: str
    name: str
    http: Optional[str]


class Named(NamedTuple):
    """What is to be served no more: one of the two may be None."""

    path: Optional[str]
    name: Optional[str]

    def means(self, asked: Asked) -> bool:
        return self.path in (None, asked.path) and self.name in (None, asked.name)


class Claims:
    """What a store has to itself, so that another one that claims it, too, has to do with it."""

    __slots__ = ("above", "own")

    def __init__(self, wanted: Optional[Union[Asked, Named]] = None) -> None:
        self.own: set[tuple[str, object]] = set()  # of a kind: path, name, or that of an address
        self.above: set[tuple[str, object]] = set()  # paths of stores that would clear it away
        if wanted is None:
            return
        if wanted.path is not None:
            self.own.add(("path", wanted.path))
            self.above.update(("path", owner) for owner, _ in _owners(wanted.path))
        if wanted.name is not None:
            self.own.add(("name", wanted.name))
        where = _address(wanted.http) if isinstance(wanted, Asked) else None
        if where is not None:
            self.own.add(where[:2])

    def add(self, other: Claims) -> None:
        self.own |= other.own
        self.above |= other.above

    def meet(self, other: Claims) -> bool:
        return not (
            self.own.isdisjoint(other.own)
            and self.own.isdisjoint(other.above)
            and self.above.isdisjoint(other.own)
        )


def parse_add(meta: Any) -> Asked:
    """The meta of `xs.store.add`. Raises `Invalid`."""
    if not isinstance(meta, dict) or not isinstance(meta.get("path"), str):
        raise Invalid('the meta of xs.store.add is a record with "path": the store\'s directory')
    path = _real_path(meta["path"])
    name, http = meta.get("name"), meta.get("http")
    if name is None:
        name = _name_of(meta["path"])
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        shown = repr(name)[:80]
        raise Invalid(
            f"a store's name has up to {NAME_MAX} letters, digits, _ - and ., and begins with one "
            f"of the first three: not {shown}"
        )
    if http is not None and (not isinstance(http, str) or not http or "\0" in http):
        raise Invalid("http is the address of a gateway, such as :8080")
    if http is not None and is_socket_path(http) and not os.path.isabs(http):
        raise Invalid(f"the path of a gateway's socket is absolute, not {http[:80]!r}")
    return Asked(path, name, http)


def parse_remove(meta: Any) -> Named:
    """The meta of `xs.store.remove`. Raises `Invalid`."""
    if isinstance(meta, dict):
        path, name = meta.get("path"), meta.get("name")
        if isinstance(path, str) and (name is None or isinstance(name, str)):
            return Named(_real_path(path), name)
        if path is None and isinstance(name, str):
            return Named(None, name)
    raise Invalid('the meta of xs.store.remove is a record with "path", or "name"')


def _real_path(path: str) -> str:
    if not os.path.isabs(path):
        raise Invalid(f"the path of a store is absolute, not {path[:80]!r}")
    if "\0" in path or len(os.fsencode(path)) > PATH_MAX:
        raise Invalid(f"a path has no NUL character in it, and at most {PATH_MAX} bytes")
    real = os.path.realpath(path)
    try:
        real.encode()
    except UnicodeEncodeError:  # a link leads there; what is answered is JSON
        raise Invalid(f"{path} leads to {real!r}, which is not UTF-8") from None
    return real


def _name_of(path: str) -> str:
    """What a store is called that was given no name: the last part of its path, as a name."""
    last = os.path.basename(os.path.normpath(path))
    return re.sub(r"[^A-Za-z0-9_.-]", "-", last).lstrip("-.")[:NAME_MAX] or "store"


def check_place(path: str) -> None:
    """Raises `Invalid` for a path in a folder that is another store's own."""
    for owner, name in _owners(path):
        if os.path.exists(os.path.join(owner, INDEX_FILENAME)):
            raise _lies_in(path, owner, name)


def check_apart(path: str, other: str) -> None:
    """Raises `Invalid` if a store would lie in a folder that is another's own, or that in its."""
    for inner, outer in ((path, other), (other, path)):
        for owner, name in _owners(inner):
            if owner == outer:
                raise _lies_in(inner, owner, name)


def _lies_in(path: str, owner: str, name: str) -> Invalid:
    return Invalid(f"{path} lies in {name}, a folder of the store at {owner}")


def _owners(path: str) -> Iterator[tuple[str, str]]:
    """Which folders, were they stores, would clear away what lies at a path; as their `cas`, …"""
    parent, name = os.path.split(path)
    while name:
        if name in _OF_A_STORE:
            yield parent, name
        parent, name = os.path.split(parent)


def is_same_address(one: Optional[str], other: Optional[str]) -> bool:
    """Whether two gateways can't have both, however they are written."""
    a, b = _address(one), _address(other)
    if a is None or b is None or a[:2] != b[:2]:
        return False
    return a[2] == b[2] or not _EVERYWHERE.isdisjoint((a[2], b[2]))


def _address(http: Optional[str]) -> Optional[tuple[str, object, str]]:
    """("socket", its path, "") or ("port", number, host) of a gateway's address, however written.

    None if there is none, if the system is to choose it, or if it makes no sense.
    """
    if http is None:
        return None
    if is_socket_path(http):
        return "socket", place_of(http), ""
    try:
        (_, host, *port), token = parse_host(http)
    except Invalid:
        return None
    if token is not None:
        return None
    host = "127.0.0.1" if host == "localhost" else str(host).lower()
    with contextlib.suppress(OSError, UnicodeError):  # a name stays as it is
        host = str(socket.getaddrinfo(host, None, flags=socket.AI_NUMERICHOST)[0][4][0])
    return "port", port[0], host
