"""Who may use a TCP address: the Host, the Origin and the token of a request. Pure.

The Unix socket needs none of it: the file system says who may connect (0600 in a folder of 0700).
"""

from __future__ import annotations

import hmac
import ipaddress
import socket
from typing import NamedTuple, Optional

from xs.errors import Forbidden, Misdirected, Unauthorized, XsError
from xs.http1 import RequestHead


class Access(NamedTuple):
    """What a listener asks of its requests: a token, and a Host among these names or any IP."""

    token: str
    hosts: frozenset[str]


def access(token: str, names: list[str]) -> Access:
    """With the names that this host has, and those given with `--host`."""
    return Access(token, frozenset(("localhost", socket.gethostname().lower(), *names)))


def refusal(head: RequestHead, asked: Optional[Access]) -> XsError | None:
    """Why a request must not be served, or None.

    A web page that resolves its own name to this machine (DNS rebinding) is stopped by Host, one
    that posts across sites by Origin, and everybody without the token by the token.
    """
    if asked is None:
        return None
    host = _host(head.authority or "")
    if host not in asked.hosts and not _is_ip(host):
        return Misdirected(
            f"this server does not serve the host {host[:64]!r}: "
            "use its IP address or localhost, or name it with --host"
        )
    origin = head.get("origin")
    if origin is not None and origin.partition("://")[2].lower() != (head.authority or "").lower():
        return Forbidden(f"a page of {origin[:64]!r} may not use this server")
    scheme, _, token = (head.get("authorization") or "").partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(
        token.strip().encode("latin-1", "replace"), asked.token.encode()
    ):
        return Unauthorized(
            "this address needs a token: send Authorization: Bearer TOKEN "
            "(the owner's is in the store's file token)"
        )
    return None


def _host(authority: str) -> str:
    """The host of `host[:port]`, lower case, an IPv6 address without its brackets."""
    if authority.startswith("["):
        return authority[1:].partition("]")[0].lower()
    return authority.partition(":")[0].rstrip(".").lower()


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
