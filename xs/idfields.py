"""An id taken apart into its fields and put together again, as JSON: `xs scru128`.

The fields are those of the SCRU128 specification: 48 bits of time, two counters of 24 bits, 32 bits
that name the id's maker.
"""

from __future__ import annotations

import scru128

from xs import ids
from xs.errors import Invalid, Usage
from xs.request import split_lines
from xs.stdio import blocks_of, show_text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

_BITS = (("ts_ms", 48), ("counter_hi", 24), ("counter_lo", 24), ("node", 32))


def run(words: list[str]) -> None:
    """Prints a new id, or what becomes of those that are given, in the words or on standard input.

    Raises `Usage`, `Invalid`.
    """
    if not words:
        show_text([scru128.new_string().encode()])
        return
    action, *given = words
    if action not in ("pack", "unpack"):
        raise Usage(f"scru128 takes pack or unpack, not {action!r}")
    convert = pack if action == "pack" else unpack
    for text in _lines_of_input() if given in ([], ["-"]) else given:
        show_text([convert(text.strip()).encode()])


def _lines_of_input() -> Iterator[str]:
    for line in split_lines(blocks_of()):
        if line.strip():
            yield line.decode("utf-8", "replace")


def unpack(text: str) -> str:
    """The fields of an id, as a JSON object. Raises `Invalid` for what is none."""
    value = ids.parse(text)
    return (
        f'{{"ts_ms":{value >> 80},"counter_hi":{value >> 56 & 0xFFFFFF},'
        f'"counter_lo":{value >> 32 & 0xFFFFFF},"node":"{value & 0xFFFFFFFF:08x}"}}'
    )


def pack(text: str) -> str:
    """The id that has these fields. Raises `Invalid` for what isn't all of them."""
    import json

    try:
        return ids.text(_packed(json.loads(text)))
    except (ValueError, TypeError, KeyError, RecursionError):
        raise Invalid(
            'not an id\'s parts: give {"ts_ms", "counter_hi", "counter_lo", "node"}, '
            "the node as 8 hex digits"
        ) from None


def _packed(fields: dict[str, int | str]) -> int:
    value = 0
    for name, bits in _BITS:
        field = fields[name]
        if name == "node":
            field = _node(field)
        if type(field) is not int or not 0 <= field < 1 << bits:
            raise ValueError(name)
        value = value << bits | field
    return value


def _node(field: int | str) -> int:
    if not isinstance(field, str) or len(field) != 8:
        raise ValueError("node")
    return int.from_bytes(bytes.fromhex(field), "big")
