"""`NamedTuple` as in `typing`, without what `typing` and `collections` cost to import.

A command on the files starts through most of this package: with `typing`, and the `re` it brings,
that took a third longer, and `collections` takes a ms by itself (bench/start.py). So a record is a
tuple made here, with what records of `typing` have besides; making one costs the same, as its
`__new__` is a plain function of its fields. Type checkers are shown the original.
"""

from __future__ import annotations

try:
    from _collections import _tuplegetter  # type: ignore[import-not-found]
except ImportError:  # an interpreter that is made otherwise
    from operator import itemgetter

    def _tuplegetter(number: int, text: None) -> property:
        return property(itemgetter(number))


TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import FunctionType
    from typing import Any, NamedTuple
else:

    class _Record(tuple):
        """What all records have."""

        __slots__ = ()
        _fields = ()

        @classmethod
        def _make(cls, values: Iterable[Any]) -> Any:
            return cls(*values)

        def _replace(self, **changes: Any) -> Any:
            found = type(self)(*map(changes.pop, self._fields, self))
            if changes:
                raise ValueError(f"no such fields: {', '.join(changes)}")
            return found

        __replace__ = _replace  # for copy.replace

        def _asdict(self) -> dict[str, Any]:
            return dict(zip(self._fields, self))

        def __getnewargs__(self) -> tuple:
            return tuple(self)

        def __repr__(self) -> str:
            fields = ", ".join(f"{n}={v!r}" for n, v in zip(self._fields, self))
            return f"{type(self).__name__}({fields})"

    # `__new__` by the number of fields, here since to compile one takes longer than all the rest.
    make = tuple.__new__
    _NEW = (
        lambda cls: make(cls, ()),
        lambda cls, a: make(cls, (a,)),
        lambda cls, a, b: make(cls, (a, b)),
        lambda cls, a, b, c: make(cls, (a, b, c)),
        lambda cls, a, b, c, d: make(cls, (a, b, c, d)),
        lambda cls, a, b, c, d, e: make(cls, (a, b, c, d, e)),
        lambda cls, a, b, c, d, e, f: make(cls, (a, b, c, d, e, f)),
        lambda cls, a, b, c, d, e, f, g: make(cls, (a, b, c, d, e, f, g)),
        lambda cls, a, b, c, d, e, f, g, h: make(cls, (a, b, c, d, e, f, g, h)),
    )

    def _new_of(fields: tuple[str, ...]) -> FunctionType:
        """`__new__` for a tuple of these fields."""
        if len(fields) < len(_NEW):
            new = _NEW[len(fields)]
        else:
            names = "".join([f"_{n}, " for n in range(len(fields))])
            new = eval(f"lambda cls, {names}: make(cls, ({names}))")
        code = new.__code__.replace(co_name="__new__", co_varnames=("cls", *fields))
        return type(_new_of)(code, {"make": make})

    class _RecordType(type):
        """Makes a tuple of the fields that a class annotates, with what it gives as defaults."""

        def __new__(cls, name: str, _: tuple, namespace: dict[str, Any]) -> type:
            fields = tuple(namespace.get("__annotations__", ()))
            defaults = {field: namespace[field] for field in fields if field in namespace}
            for number, field in enumerate(fields):
                namespace[field] = _tuplegetter(number, None)
            namespace["__new__"] = new = _new_of(fields)
            new.__defaults__ = tuple(defaults.values())
            new.__qualname__ = f"{name}.__new__"
            namespace["__slots__"] = ()
            namespace["__match_args__"] = namespace["_fields"] = fields
            namespace["_field_defaults"] = defaults
            return type(name, (_Record,), namespace)

    NamedTuple = type.__new__(_RecordType, "NamedTuple", (), {})

__all__ = ["NamedTuple"]
