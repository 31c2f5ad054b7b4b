"""In which order things reach the disk and the world, and what is left when the power goes."""

from __future__ import annotations

import json
import os
import random
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import losses
import power
import pytest
from power import Call

from xs import frame
from xs.content import INLINE_MAX

LARGE = b"large" * INLINE_MAX
MOMENTS = 40  # of some 900, each looked at twice; `tools/powerloss` looks at all of them


ON_LINUX = sys.platform == "linux"  # which strace is for


KINDS = {"fsync": "fsync", "fdatasync": "fsync", "write": "write", "pwrite64": "write",
         "sendto": "tell", "sendmsg": "tell"}  # fmt: skip


class Step:
    """What was done, from the first call of it to the end of the last one."""

    def __init__(self, name: str, calls: list[Call]) -> None:
        assert calls, f"there is no {name}"
        self.name = name
        self.began = min(call.entered for call in calls)
        self.ended = max(call.left for call in calls)


def named(calls: list[Call], store_dir: str) -> Iterator[tuple[str, Call]]:
    """Calls with what they do, as `fsync xs.db-wal`; paths are relative to the store."""
    opened: dict[int, str] = {}
    for call in calls:
        if call.name == "openat":
            opened[call.result] = os.path.relpath(os.fsdecode(call.strings[0]), store_dir)
        elif call.name == "close":
            opened.pop(call.fd, None)
        elif call.name.startswith("rename"):
            yield "rename " + os.path.relpath(os.fsdecode(call.strings[1]), store_dir), call
        elif call.name in KINDS:
            path = opened.get(call.fd)
            yield (f"{KINDS[call.name]} {path}" if path else "tell"), call


def steps_of(calls: list[Call], store_dir: str, line: bytes) -> list[Step]:
    """The steps by which that frame, whose content is large, was stored, and was told of."""
    found = list(named(calls, store_dir))
    hash_, id_text = frame.hash_text(line), frame.id_of(line).encode()
    assert hash_ is not None
    digest = frame.parse_integrity(hash_).hex()
    folder = f"cas/{digest[:2]}"

    def of(pattern: str, after: int = -1, having: bytes = b"") -> list[Call]:
        return [
            call
            for name, call in found
            if re.fullmatch(pattern, name)
            and call.entered > after
            and having in b"".join(call.strings)
        ]

    renamed = Step("rename", of(f"rename {folder}/{digest[2:]}"))
    placed = Step("fsync of the folder", of(f"fsync {folder}", renamed.ended)[:1])
    # Its page is written again by later commits: the first one counts.
    written = Step("writing the frame", of("write xs.db-wal", having=id_text)[:1])
    return [
        Step("writing the content", of("write cas/new-.*")),
        Step("fsync of the content", of("fsync cas/new-.*")),
        renamed,
        placed,
        written,
        Step("fsync of the frame", of("fsync xs.db-wal", written.ended)[:1]),
        Step("telling of it", of("tell", having=b'"id":"' + id_text)),
    ]


def in_order(steps: list[Step]) -> None:
    for one, following in zip(steps, steps[1:]):
        assert one.ended < following.began, f"{following.name} began before the end of {one.name}"


def test_content_frame_answer_and_delivery_reach_disk_and_world_in_that_order(
    store_dir: str, tmp_path: Path
) -> None:
    if not ON_LINUX:
        return
    trace = str(tmp_path / "trace")
    with losses.served(store_dir, trace) as client:
        follower = losses.connected(store_dir)
        assert follower is not None
        with follower:
            live = follower.cat(follow=True)
            while next(live).topic != "xs.threshold":
                pass
            made = client.append("notes", LARGE)
            assert next(live) == made
    line = json.dumps(made._asdict(), separators=(",", ":")).encode()
    calls = power.calls(trace)
    telling = [
        call
        for what, call in named(calls, store_dir)
        if what == "tell" and f'"id":"{made.id}"'.encode() in b"".join(call.strings)
    ]
    assert len(telling) == 2, "the answer, and the delivery"
    in_order(steps_of(calls, store_dir, line))


def test_a_command_on_the_files_says_what_it_did_when_it_is_durable(
    store_dir: str, tmp_path: Path
) -> None:
    if not ON_LINUX:
        return
    told, calls = power.recorded(
        [sys.executable, "-m", "xs", "append", store_dir, "notes"], LARGE, str(tmp_path / "trace")
    )
    in_order(steps_of(calls, store_dir, told))


def test_what_a_killed_process_has_left_in_the_log_is_durable_before_more_is_written(
    store_dir: str, tmp_path: Path
) -> None:
    if not ON_LINUX:
        return
    words = [sys.executable, "-m", "xs", "append", store_dir, "notes"]
    trace = str(tmp_path / "trace")
    power.recorded(words, b"one", trace)
    power.recorded(words, b"two", trace, dies_at="commit.before-answers")
    _, calls = power.recorded(words, b"three", trace)
    to_log = [what for what, _ in named(calls, store_dir) if what.endswith(" xs.db-wal")]
    assert to_log[:2] == ["fsync xs.db-wal", "write xs.db-wal"]


@pytest.fixture(scope="module")
def life() -> Iterator[losses.Life | None]:
    with tempfile.TemporaryDirectory() as folder:
        yield losses.Life(folder) if ON_LINUX else None


@pytest.fixture
def seed() -> int:
    seed = random.randrange(10**6)
    print("seed:", seed)
    return seed


def test_whenever_the_power_goes_the_store_opens_with_all_that_was_answered(
    life: losses.Life | None, seed: int
) -> None:
    if life is None:
        return
    assert max(made for _, made in life.disks()) == len(life.promises) - 1, "all were seen"
    assert losses.look(life, seed, MOMENTS) >= 2 * MOMENTS


def test_whenever_the_power_goes_while_a_store_is_opened_it_opens_again(
    life: losses.Life | None, seed: int
) -> None:
    if life is None:
        return
    assert losses.look_again(life, seed, 3, 4) > 3 * 4


def test_whenever_the_power_goes_a_store_is_of_the_older_format_or_of_the_newer(
    tmp_path: Path, seed: int
) -> None:
    if not ON_LINUX:
        return
    run = losses.Migration(str(tmp_path))
    assert losses.look(run, seed, 10) >= 20
    assert any(losses.look_again(run, seed + n, 1, 3) > 3 for n in range(5))


@pytest.mark.parametrize(
    "kind",
    [losses.Backup, losses.Repair, losses.RepairOfLog, losses.Tokens, losses.Export, losses.Import],
)
def test_whenever_the_power_goes_what_is_made_of_a_store_is_as_before_or_as_after(
    kind: type[losses.Run], tmp_path: Path, seed: int
) -> None:
    if not ON_LINUX:
        return
    run = kind(str(tmp_path))
    assert losses.look(run, seed, 6) >= 12
    # Behind some moments there is nothing left to do, of which more could be lost.
    assert any(losses.look_again(run, seed + n, 1, 1) > 1 for n in range(5))


@pytest.mark.parametrize(
    "point",
    ["store.folders-made", "migration.done", "store.before-folder-fsync", "content.folder-made"],
)
def test_what_a_killed_process_has_left_is_not_taken_for_durable(
    point: str, tmp_path: Path, seed: int
) -> None:
    if not ON_LINUX:
        return
    run = losses.Killed(str(tmp_path), point)
    assert losses.look(run, seed, 1) >= 2
