"""Who may use a TCP address, and for what: the Host, the Origin and the token of a request. Pure.

The Unix socket needs none of it: the file system says who may connect (0600 in a folder of 0700),
and who has connected is the store's owner, who may do everything.
"""

from __future__ import annotations

import hmac
import socket
from typing import Callable, NamedTuple, Optional

from xs.errors import Forbidden, Misdirected, Unauthorized
from xs.http1 import RequestHead
from xs.rights import EVERYTHING, Rights


class Grant(NamedTuple):
    """A token of somebody else's, and the rights that a request has by it."""

    token: str
    rights: Rights


class Access(NamedTuple):
    """What a listener asks of its requests: a token, and a Host among these names or any IP.

    `token` is the owner's; `find` gives the rights of others' tokens, and None for what is none.
    """

    token: str
    hosts: frozenset[str]
    find: Callable[[str], Optional[Rights]]

    def holds(self, grant: Grant) -> bool:
        """Whether the token is good for just the same as when it was granted that."""
        return self.find(grant.token) == grant.rights


def access(token: str, names: list[str], find: Callable[[str], Optional[Rights]]) -> Access:
    """With the names that this host has, and those given with `--host`."""
    return Access(token, frozenset(("localhost", socket.gethostname().lower(), *names)), find)


def rights_of(head: RequestHead, asked: Optional[Access]) -> Rights:
    """What a request may do. Raises `Misdirected`, `Forbidden`, `Unauthorized`.

    A web page that resolves its own name to this machine (DNS rebinding) is stopped by Host, one
    that posts across sites by Origin, and everybody without a token by the token.
    """
    if asked is None:
        return EVERYTHING
    host = _host(head.authority or "")
    if host not in asked.hosts and not _is_ip(host):
        raise Misdirected(
            f"this server does not serve the host {host[:64]!r}: "
            "use its IP address or localhost, or name it with --host"
        )
    for origin in head.get_all("origin"):
        if origin.partition("://")[2].lower() != (head.authority or "").lower():
            raise Forbidden(f"a page of {origin[:64]!r} may not use this server")
    token = token_of(head)
    found = None
    if token is not None:
        if hmac.compare_digest(token.encode("latin-1", "replace"), asked.token.encode()):
            return EVERYTHING
        found = asked.find(token)
    if found is None and token is not None:
        raise Unauthorized(
            "this token is not known here, or not any more: the owner's is in the store's file "
            "token, and `xs token list` there names the others"
        )
    if found is None:
        raise Unauthorized(
            "this address needs a token: the owner's is in the store's file token, `xs token add` "
            "makes others (for xs: XS_TOKEN=$(cat DIR/token), or TOKEN@HOST:PORT; "
            "for HTTP: Authorization: Bearer TOKEN)"
        )
    return found


def token_of(head: RequestHead) -> Optional[str]:
    """The token that a request brings, right or wrong; None if it brings none, or several.

    Of several another program on the way may have looked at another one.
    """
    return tokens_of(head)[0] if len(head.get_all("authorization")) == 1 else None


def tokens_of(head: RequestHead) -> list[Optional[str]]:
    """What each Authorization field of a request brings as a token (RFC 6750 §2.1), or None."""
    found: list[Optional[str]] = []
    for value in head.get_all("authorization"):
        scheme, _, token = value.partition(" ")
        found.append(token.strip(" ") if scheme.lower() == "bearer" else None)
    return found


def _host(authority: str) -> str:
    """The host of `host[:port]`, lower case, an IPv6 address without its brackets."""
    if authority.startswith("["):
        return authority[1:].partition("]")[0].lower()
    return authority.partition(":")[0].rstrip(".").lower()


def _is_ip(host: str) -> bool:
    import ipaddress  # here: on a Unix socket nobody asks

    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
