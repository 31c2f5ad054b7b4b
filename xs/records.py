"""`NamedTuple` as in `typing`, without what `typing` costs to import.

A command on the files starts through most of this package: `typing` and the `re` it brings would be
a third of that (bench/start.py). Type checkers are shown the original.
"""

from __future__ import annotations

from collections import namedtuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NamedTuple
else:

    class _RecordType(type):
        """Makes a tuple of the fields that a class annotates, with what it gives as defaults."""

        def __new__(cls, name: str, _: tuple, namespace: dict[str, Any]) -> type:
            fields = list(namespace.get("__annotations__", ()))
            defaults = [namespace.pop(field) for field in fields if field in namespace]
            base = namedtuple(name, fields, defaults=defaults, module=namespace["__module__"])
            return type(name, (base,), {**namespace, "__slots__": ()})

    NamedTuple = type.__new__(_RecordType, "NamedTuple", (), {})

__all__ = ["NamedTuple"]
