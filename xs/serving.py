"""`xs serve` and `xs service`: what a server is told by the options of its command.

A service is given the same options, and they are judged when it is installed.
"""

from __future__ import annotations

import os

from xs import address, errors, log, stdio
from xs.arguments import plain_directory, plain_path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from xs.arguments import Arguments, Option
    from xs.mount import Web

_FILES = ("tls-cert", "tls-key", "log-file")  # of these options, those whose values are paths


def run_serve(arguments: Arguments) -> int:
    """Serves a store until it is to stop; the exit status."""
    directory = plain_directory(arguments.rest[0])
    for name in _FILES:
        if arguments.has(name):
            plain_path(arguments.get(name) or "")
    from xs.server import serve

    return serve(
        directory,
        expose=arguments.options.get("expose", []),
        hosts=arguments.options.get("host", []),
        insecure=arguments.has("insecure"),
        scripts=not arguments.has("no-scripts"),
        web=_web(arguments),
        grace=_grace(arguments),
        log_options=log.options_of(arguments.get, is_json=arguments.has("log-json")),
    )


def run_service(arguments: Arguments, options_of_serve: Sequence[Option]) -> int:
    """Does what is asked for a store's service, and says what it did; the exit status."""
    from xs import service  # here: a server has no need of it

    action, store = arguments.rest[0], os.path.abspath(plain_directory(arguments.rest[1]))
    manager = service.manager_of(arguments.get("kind"))
    name = arguments.get("name")
    if action == "install":
        if os.path.lexists(store) and not os.path.isdir(store):
            raise address.no_store(store)
        options, grace = _checked(arguments, options_of_serve), _grace(arguments)
        if arguments.has("print"):
            stdio.write(service.printed(manager, store, name, options, grace))
            return 0
        now = arguments.has("now")
        lines, status = service.install(manager, store, name, options, grace, now=now), 0
    elif action not in ("status", "remove"):
        raise errors.Usage(f"service takes install, status or remove, not {action!r}")
    elif wrong := [each for each in arguments.options if each not in ("name", "kind")]:
        raise errors.Usage(f"--{wrong[0]} goes with install")
    elif action == "status":
        lines, status = service.status(manager, store, name)
    else:
        lines, status = service.remove(manager, store, name), 0
    stdio.write("".join(f"{line}\n" for line in lines).encode("utf-8", "surrogateescape"))
    return status


def _checked(arguments: Arguments, options_of_serve: Sequence[Option]) -> list[str]:
    """The options for `xs serve`, in the words that it takes anywhere. Raises `Usage`.

    What it would refuse is refused here: nobody reads a service's standard error.
    """
    from xs.server import exposed_address, host_name

    for each in arguments.options.get("expose", []):
        exposed_address(each, insecure=arguments.has("insecure"))
    for each in arguments.options.get("host", []):
        host_name(each)
    _web(arguments)
    log.options_of(arguments.get, is_json=arguments.has("log-json"))
    words = []
    for option in options_of_serve:
        for value in arguments.options.get(option.name, []):
            is_path = option.name == "http" and address.is_socket_path(value)
            if is_path or option.name in _FILES:
                value = os.path.abspath(value)
            words.append(f"--{option.name}={value}")
        if not option.value and arguments.has(option.name):
            words.append(f"--{option.name}")
    return words


def _grace(arguments: Arguments) -> int:
    from xs.server import GRACE_SECONDS

    grace = arguments.get("grace")
    return GRACE_SECONDS if grace is None else int(grace[:9])


def _web(arguments: Arguments) -> Web | None:
    from xs.activation import expects_web

    addresses = arguments.options.get("http", [])
    if not addresses and not expects_web(os.environ):
        for name in ("http-timeout", "http-max", "http-body", "http-ttl", "tls-cert", "tls-key"):
            if arguments.has(name):
                raise errors.Usage(f"--{name} goes with --http ADDR")
        return None
    from xs.gateway import options_of
    from xs.mount import Web

    return Web(addresses, options_of(arguments.get))
