"""What `--help` prints, made from the command line's own table."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from xs.arguments import Command

_GENERAL = """\
xs: an event stream store

usage: xs COMMAND [ADDR] …

commands:
@COMMANDS@

ADDR is a store's directory, the path of its socket, HOST:PORT, :PORT (this machine),
http://HOST:PORT or https://HOST:PORT. A directory works with and without a server.

environment:
  XS_ADDR    the store to use when no ADDR is given; a first word without / or : is then not an ADDR
  XS_TOKEN   the token for TCP addresses, also given as TOKEN@HOST:PORT
  XS_COLOR   always or never; NO_COLOR is honoured too

`xs COMMAND --help` has the options of a command, and examples.
"""


def general(commands: Iterable[Command]) -> str:
    """What `xs --help` prints."""
    lines = [f"  {command.name:<11}{command.summary}" for command in commands]
    return _GENERAL.replace("@COMMANDS@", "\n".join(lines))


def of(command: Command) -> str:
    """What `xs COMMAND --help` prints."""
    lines = [f"usage: {command.usage}", "", command.summary]
    if command.options:
        lines += ["", "options:"]
        spelled = [", ".join(o.flags) + (f" {o.value}" if o.value else "") for o in command.options]
        width = max(map(len, spelled)) + 2
        for text, option in zip(spelled, command.options):
            lines.append(f"  {text:<{width}}{option.help}")
    if command.examples:
        lines += ["", "examples:", *(f"  {example}" for example in command.examples)]
    return "\n".join(lines) + "\n"
