"""What requests about stores mean, and which of them have to do with each other."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Optional

import pytest

from xs.asked import (
    Asked,
    Claims,
    Named,
    check_apart,
    check_place,
    is_same_address,
    parse_add,
    parse_remove,
)
from xs.errors import Invalid


def test_an_addition_has_a_path_without_links_and_a_name(tmp_path: Path) -> None:
    (tmp_path / "a b").mkdir()
    (tmp_path / "link").symlink_to("a b")
    real = os.path.realpath(tmp_path / "a b")
    assert parse_add({"path": str(tmp_path / "link")}) == Asked(real, "link", None)
    assert parse_add({"path": str(tmp_path / "a b")}).name == "a-b"
    given = {"path": real, "name": "n", "http": ":8080", "other": 1}
    assert parse_add(given) == Asked(real, "n", ":8080")


@pytest.mark.parametrize(
    ("meta", "told"),
    [
        (None, 'a record with "path"'),
        ({"path": 5}, 'a record with "path"'),
        ({"path": "a"}, "is absolute"),
        ({"path": "/a\0"}, "no NUL"),
        ({"path": "/a", "name": "-"}, "a store's name has"),
        ({"path": "/a", "http": ""}, "is the address of a gateway"),
        ({"path": "/a", "http": "./sock"}, "socket is absolute"),
    ],
)
def test_what_is_no_addition_is_told(meta: Any, told: str) -> None:
    with pytest.raises(Invalid, match=told):
        parse_add(meta)


def test_a_removal_has_a_path_or_a_name_or_both() -> None:
    assert parse_remove({"name": "n"}) == Named(None, "n")
    both = parse_remove({"path": "/a", "name": "n"})
    assert both == Named("/a", "n")
    assert both.means(Asked("/a", "n", None))
    assert not both.means(Asked("/a", "m", None))
    for wrong in (None, {}, {"name": 5}, {"path": "/a", "name": 5}):
        with pytest.raises(Invalid):
            parse_remove(wrong)


@pytest.mark.parametrize(
    ("one", "other", "is_same"),
    [
        (":8080", "127.0.0.1:8080", True),
        (":8080", "http://localhost:8080", True),
        (":8080", "0.0.0.0:8080", True),
        ("[::]:8080", "192.0.2.1:8080", True),
        ("[::1]:8080", "[0:0:0:0:0:0:0:1]:8080", True),
        (":8080", ":8081", False),
        ("192.0.2.1:80", "192.0.2.2:80", False),
        (":0", ":0", False),
        ("/tmp/a", "/tmp/./a", True),
        ("/tmp/a", "/tmp/b", False),
        ("nonsense", "nonsense", False),
        (None, None, False),
        (None, ":8080", False),
    ],
)
def test_addresses_are_the_same_however_they_are_written(
    one: Optional[str], other: Optional[str], is_same: bool
) -> None:
    assert is_same_address(one, other) is is_same
    assert is_same_address(other, one) is is_same


@pytest.mark.parametrize(
    ("one", "other", "do_meet"),
    [
        (Asked("/a", "a", None), Asked("/a", "b", None), True),
        (Asked("/a", "a", None), Asked("/b", "a", None), True),
        (Asked("/a", "a", ":80"), Asked("/b", "b", "127.0.0.2:80"), True),
        (Asked("/a", "a", None), Asked("/b", "b", None), False),
        (Asked("/a", "a", ":0"), Asked("/b", "b", ":0"), False),
        (Asked("/a", "a", None), Asked("/a/cas/b", "b", None), True),
        (Asked("/a", "a", None), Asked("/a/b", "b", None), False),
        (Asked("/a/cas/b", "b", None), Asked("/a/cas/c", "c", None), False),
        (Asked("/a", "a", None), Named("/a", None), True),
        (Asked("/a", "a", None), Named(None, "a"), True),
        (Asked("/a", "a", None), Named("/b", "b"), False),
    ],
)
def test_who_claims_the_same_has_to_do_with_each_other(
    one: Asked, other: Asked | Named, do_meet: bool
) -> None:
    assert Claims(one).meet(Claims(other)) is do_meet
    assert Claims(other).meet(Claims(one)) is do_meet
    both = Claims()
    both.add(Claims(one))
    assert both.meet(Claims(other)) is do_meet


def test_a_store_in_another_s_own_folder_is_refused(tmp_path: Path) -> None:
    outer, inner = str(tmp_path), str(tmp_path / "run" / "b")
    for pair in ((outer, inner), (inner, outer)):
        with pytest.raises(Invalid, match="lies in run, a folder of the store at"):
            check_apart(*pair)
    check_apart(outer, str(tmp_path / "b"))
    check_place(inner)
    (tmp_path / "xs.db").touch()
    with pytest.raises(Invalid, match="lies in run"):
        check_place(inner)
