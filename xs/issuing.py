"""`xs token`: the tokens of others, who may use a store's TCP addresses, made, listed and ended."""

from __future__ import annotations

import os

from xs import address, errors, stdio, tokens
from xs.arguments import plain_directory

TYPE_CHECKING = False
if TYPE_CHECKING:
    from xs.arguments import Arguments


def run(arguments: Arguments) -> None:
    """Does what is asked, and prints what there is to be told. Raises `XsError`."""
    action, folder, *rest = arguments.rest
    # Before the folder is looked at: who has put the words in another order is told of that.
    if action not in ("add", "list", "remove"):
        raise errors.Usage(f"token takes add, list or remove, not {action!r}")
    if action == "list" and (rest or arguments.options):
        raise errors.Usage("token list takes a store's directory alone")
    if action == "remove" and arguments.options:
        raise errors.Usage("token remove takes no options")
    if action != "list" and not rest:
        raise errors.Usage(f"NAME is missing: xs token {action} DIR NAME")
    try:
        os.stat(os.path.join(plain_directory(folder), "xs.db"))
    except (FileNotFoundError, NotADirectoryError):
        raise address.no_store(folder) from None
    if action == "list":
        for each in tokens.listed(folder):
            stdio.write(each.line)
    elif action == "remove":
        tokens.remove(folder, rest[0])
    else:
        token = tokens.add(
            folder,
            rest[0],
            admin=arguments.has("admin"),
            read=arguments.has("read"),
            append=",".join(arguments.options.get("append", [])) or None,
        )
        stdio.write(f"{token}\n".encode())
