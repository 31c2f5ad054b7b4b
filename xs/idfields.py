"""An id taken apart into its fields and put together again, as JSON: `xs scru128`.

The fields are those of the SCRU128 specification: 48 bits of time, two counters of 24 bits, 32 bits
that name the id's maker.
"""

from __future__ import annotations

import scru128

from xs import ids
from xs.errors import Invalid

_BITS = (("ts_ms", 48), ("counter_hi", 24), ("counter_lo", 24), ("node", 32))


def new() -> str:
    """A new id, of now."""
    return str(scru128.new_string())


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
