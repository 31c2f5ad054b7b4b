"""Content by hash: taken in whole or not at all, placed durably, never served wrong."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from xs.cas import BLOCK, STALE_SECONDS, VERIFIED_WHOLE_MAX, Cas
from xs.content import INLINE_MAX, discard
from xs.errors import Damaged, NotFound


@pytest.fixture
def cas(tmp_path: Path) -> Cas:
    return Cas(str(tmp_path))


def put(cas: Cas, data: bytes) -> bytes:
    content = cas.take([data])
    assert content is not None
    cas.place(content)
    return content.digest


def path_of(tmp_path: Path, digest: bytes) -> Path:
    name = digest.hex()
    return tmp_path / name[:2] / name[2:]


@pytest.mark.parametrize("blocks", [[b"x" * 100_000], [b"x"] * 50_000, [b"", b"x" * 17_000, b""]])
def test_content_is_hashed_as_it_comes(cas: Cas, tmp_path: Path, blocks: list[bytes]) -> None:
    data = b"".join(blocks)
    content = cas.take(iter(blocks))
    assert content is not None and content.path is not None and content.data is None
    assert content.size == len(data)
    assert content.digest == hashlib.sha256(data).digest()
    cas.place(content)
    size, found = cas.open(content.digest)
    assert size == len(data) and b"".join(found) == data
    assert path_of(tmp_path, content.digest).stat().st_mode & 0o777 == 0o600
    assert list(cas.digests()) == [content.digest]


def test_small_content_stays_in_memory_and_none_is_none(cas: Cas, tmp_path: Path) -> None:
    content = cas.take([b"a", b"b" * (INLINE_MAX - 1)])
    assert content is not None and content.path is None and content.size == INLINE_MAX
    assert cas.take([]) is None and cas.take([b"", b""]) is None
    assert os.listdir(tmp_path) == []


def test_a_body_that_breaks_off_leaves_nothing(cas: Cas, tmp_path: Path) -> None:
    def blocks() -> Iterator[bytes]:
        yield b"x" * 100_000
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        cas.take(blocks())
    assert os.listdir(tmp_path) == []


def test_the_same_content_again_is_one_file(cas: Cas, tmp_path: Path) -> None:
    first, second = put(cas, b"x" * 20_000), put(cas, b"x" * 20_000)
    assert first == second and list(cas.digests()) == [first]
    assert [name for name in os.listdir(tmp_path) if name.startswith("new-")] == []


@pytest.mark.parametrize("size", [INLINE_MAX + 1, VERIFIED_WHOLE_MAX])
def test_damage_in_short_content_is_an_error_before_its_first_byte(
    cas: Cas, tmp_path: Path, size: int
) -> None:
    digest = put(cas, os.urandom(size))
    flip(path_of(tmp_path, digest), size // 2)
    with pytest.raises(Damaged):
        cas.open(digest)


@pytest.mark.parametrize("place", ["first", "last"])
def test_long_content_that_is_damaged_breaks_off_before_its_end(
    cas: Cas, tmp_path: Path, place: str
) -> None:
    size = VERIFIED_WHOLE_MAX + 3 * BLOCK + 5
    digest = put(cas, os.urandom(size))
    flip(path_of(tmp_path, digest), 0 if place == "first" else size - 1)
    found, blocks = cas.open(digest)
    given = 0
    with pytest.raises(Damaged):
        for block in blocks:
            given += len(block)
    assert found == size and given < size


@pytest.mark.parametrize("change", [-1, 1, -(2 * BLOCK)])
def test_a_file_of_another_length_is_damaged(cas: Cas, tmp_path: Path, change: int) -> None:
    size = VERIFIED_WHOLE_MAX + 3 * BLOCK
    digest = put(cas, os.urandom(size))
    path = path_of(tmp_path, digest)
    data = path.read_bytes()
    path.write_bytes(data[:change] if change < 0 else data + b"x")
    with pytest.raises(Damaged):
        b"".join(cas.open(digest)[1])


def flip(path: Path, place: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))


def test_what_is_not_there_is_said_so(cas: Cas, tmp_path: Path) -> None:
    digest = bytes(32)
    for act in (cas.open, cas.size):
        with pytest.raises(NotFound):
            act(digest)
    assert not cas.has(digest) and cas.remove(digest) == 0 and cas.age(digest) == 0
    assert list(Cas(str(tmp_path / "none")).digests()) == []


def test_a_link_in_place_of_a_file_is_not_followed(cas: Cas, tmp_path: Path) -> None:
    digest = put(cas, b"x" * 20_000)
    path = path_of(tmp_path, digest)
    (tmp_path / "elsewhere").write_bytes(b"x" * 20_000)
    path.unlink()
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Damaged):
        cas.open(digest)


def test_removing_answers_the_size(cas: Cas) -> None:
    digest = put(cas, b"x" * 20_000)
    assert cas.size(digest) == 20_000
    assert cas.remove(digest) == 20_000 and not cas.has(digest)


def test_what_writers_left_behind_goes_once_it_is_old(cas: Cas, tmp_path: Path) -> None:
    old, young = "new-1-0123456789abcdef", "new-2-0123456789abcdef"
    others = ["new-invoice.pdf", "new-1-old", "other"]  # `cas/` may be a link to where others lie
    for name, age in ((old, STALE_SECONDS + 9), (young, 5), *((name, 99_999) for name in others)):
        (tmp_path / name).write_bytes(b"x")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    assert cas.remove_stale() == 1
    assert sorted(os.listdir(tmp_path)) == sorted([young, *others])


def test_who_tidies_up_beside_others_is_in_nobody_s_way(
    cas: Cas, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    list_names = os.listdir

    def list_one_that_has_gone(path: str) -> list[str]:
        return [*list_names(path), "new-1-0123456789abcdef"]

    monkeypatch.setattr(os, "listdir", list_one_that_has_gone)
    assert cas.remove_stale() == 0


def test_other_names_are_passed_over(cas: Cas, tmp_path: Path) -> None:
    digest = put(cas, b"x" * 20_000)
    for name in ("ab/short", "AB/" + "0" * 62, "zz/" + "0" * 62, "ab/" + "G" * 62, "abc/def"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert list(cas.digests()) == [digest]


def test_content_that_is_discarded_leaves_nothing(cas: Cas, tmp_path: Path) -> None:
    content = cas.take([b"x" * 20_000])
    assert content is not None
    discard(content)
    discard(content)
    assert os.listdir(tmp_path) == []
