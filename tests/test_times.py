"""Times as people write them."""

from __future__ import annotations

from email.utils import formatdate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xs.times import http_date, parse_time, timestamp

NOW = 1_700_000_000_000


@given(st.integers(0, 253_402_300_799_999))
def test_a_timestamp_can_be_given_back_as_a_time(ms: int) -> None:
    assert parse_time(timestamp(ms), NOW) == ms


@pytest.mark.parametrize(
    ("text", "ms"),
    [
        ("0s", 0),
        ("90s", -90_000),
        ("5ms", -5),
        ("2h", -7_200_000),
        ("7d", -7 * 86_400_000),
        ("1w", -7 * 86_400_000),
    ],
)
def test_ago_is_before_now(text: str, ms: int) -> None:
    assert parse_time(text, NOW) == NOW + ms


@pytest.mark.parametrize(
    ("text", "ms"),
    [
        ("1970-01-01T00:00:00Z", 0),
        ("1970-01-01t01:00:00.123456+01:00", 123),
        ("2016-12-31T23:59:60Z", 1_483_228_800_000),  # a leap second
        ("2024-02-29T00:00:00-00:30", 1_709_166_600_000),
    ],
)
def test_rfc_3339_is_understood(text: str, ms: int) -> None:
    assert parse_time(text, NOW) == ms


@pytest.mark.parametrize(
    "text",
    ["", "2h ", "h", "-2h", "2.5h", "now", "2023-02-29T00:00:00Z", "2023-01-01",
     "2023-01-01T00:00Z", "2023-01-01T24:00:00Z", "2023-01-01T00:00:00",
     "2023-01-01T00:00:00+24:00", "٣s"],
)  # fmt: skip
def test_what_is_no_time_is_none(text: str) -> None:
    assert parse_time(text, NOW) is None


@pytest.mark.parametrize("second", [0, 951_782_399, 951_782_400, 1_769_851_800, 4_102_444_799])
def test_a_time_for_http_is_as_the_standard_library_writes_it(second: int) -> None:
    assert http_date(second) == formatdate(second, usegmt=True)
