"""What a reader asks for: the parameters of a read, what they mean, and which are refused."""

from __future__ import annotations

from typing import Any

import pytest

from xs import ids
from xs.errors import Invalid
from xs.query import ReadOptions, parse_read_options

NOW = 1_700_000_000_000


def options(text: str) -> ReadOptions:
    pairs = [tuple(part.partition("=")[::2]) for part in text.split("&") if part]
    return parse_read_options(pairs, NOW)  # type: ignore[arg-type]


ID = ids.text(ids.first_of(NOW) + 5)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("follow", {"follow": True}),
        ("follow=1", {"follow": True}),
        ("follow=true", {"follow": True}),
        ("follow=no", {}),
        ("follow=250", {"follow": True, "pulse": 250}),
        ("tail&follow", {"new": True, "follow": True}),
        (f"last-id={ID}", {"after": ids.parse(ID)}),
        (f"after={ID.upper()}", {"after": ids.parse(ID)}),
        (f"from={ID}&until={ID}", {"after": ids.parse(ID) - 1, "until": ids.parse(ID)}),
        ("from=2h", {"after": ids.first_of(NOW - 7_200_000) - 1}),
        ("after=90s", {"after": ids.last_of(NOW - 90_000)}),
        ("until=2023-11-14T22:13:20Z", {"until": ids.last_of(NOW)}),
        ("until=2023-11-15T00:13:20.0009+02:00", {"until": ids.last_of(NOW)}),
        ("topic=a,b.*", {"patterns": frozenset({"a", "b.*"})}),
        ("topic=a,*", {}),
        ("last=3&limit=2", {"last": 3, "limit": 2}),
        ("with-timestamp&with-content=1", {"with_timestamp": True, "with_content": True}),
    ],
)
def test_read_options_mean(text: str, expected: dict[str, Any]) -> None:
    assert options(text) == ReadOptions(**expected)


@pytest.mark.parametrize(
    "text",
    ["follow=9", "follow=maybe", "limit=0", "limit=-1", "limit=x", "last=", "last=1.0", "after=",
     "after=yesterday", "from=2023-13-01T00:00:00Z", "until=5", "new&after=1s", "new&from=1s",
     "new&last=1", f"after={ID}&from={ID}", "topic=", "unknown=1", "limit=1&limit=2",
     f"after={ID}&last-id={ID}", "new&tail", "after=" + "z" * 25, "with-content=perhaps"],
)  # fmt: skip
def test_wrong_read_options_are_refused(text: str) -> None:
    with pytest.raises(Invalid):
        options(text)
