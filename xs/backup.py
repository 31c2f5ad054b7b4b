"""`xs backup`: a folder becomes a copy of a store as it is at one moment, or is brought up to date.

It reads the store's files, whether a server has them or not: reads take no lock, and SQLite gives
all of a database as it was at one moment. Content files are held meanwhile, so that none vanishes.

The order, each step needed by the next: contents → the database → contents that nothing names go.
So the copy is a whole store after each step: first the old one, then the new one. The first time
it has no `xs.db` until that is whole, and nobody takes it for a store before.
"""

from __future__ import annotations

import json
import os
import time

from xs import fault
from xs.address import folder_of, is_host, no_store
from xs.cas import Cas
from xs.connections import Connections, has_index
from xs.creation import check_folder
from xs.disk import sync_folder, sync_names
from xs.errors import Damaged, Invalid, Locked, NotAStore, NotFound
from xs.index import Index
from xs.lock import WRITE, Lock, server_of
from xs.place import check_apart, check_length, check_writable, make_folder, why_not_written
from xs.schema import FILENAME, PART_FILENAME
from xs.snapshot import Snapshot, copied_from
from xs.terminal import Progress

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

_UNFINISHED = {
    "lock",
    "cas",
    PART_FILENAME,
    PART_FILENAME + "-journal",
    PART_FILENAME + "-wal",
    PART_FILENAME + "-shm",
}
_ALWAYS = -1  # a time before every expiry


def run(addr: str, dest: str) -> bytes:
    """Makes `dest` a copy of the store in the directory `addr`; a line of JSON that sums it up."""
    source = _folder_of(addr)
    if not has_index(source):
        check_folder(source, create=False)
    _bring_up(source)
    check_apart(source, dest, "back up")
    check_writable(dest)
    check_length(dest, PART_FILENAME[len(FILENAME) :], "copy")
    _make_folder(dest)
    lock = Lock(dest)
    try:
        lock.acquire(WRITE)
        fault.at("backup.locked")
        # Who made the folder, or the copy in it, may have been killed before its name was durable.
        sync_names(dest)
        _check_ours(source, dest)
        return json.dumps(_copy(source, dest), separators=(",", ":")).encode()
    finally:
        lock.close()


def _copy(source: str, dest: str) -> dict[str, int]:
    ours, theirs = Cas(os.path.join(dest, "cas")), Cas(os.path.join(source, "cas"))
    with theirs.held(), Progress("contents") as progress:
        # Most of them before the snapshot, which should not be held for long: while it is, SQLite
        # can't fold back what the store's log gets.
        connections = Connections(source, read_only=True)
        try:
            first = _adopt(Index(connections).file_digests(), ours, theirs, progress)
        finally:
            connections.close()
        fault.at("backup.before-snapshot")
        snapshot = Snapshot(source, dest)
        try:
            rest = _adopt(snapshot.file_digests(), ours, theirs, progress)
            fault.at("backup.before-folders-fsync")
            ours.sync_folders()
            fault.at("backup.contents-kept")
            frames = snapshot.keep()
        except Damaged:
            snapshot.check_unchanged()
            raise
        finally:
            snapshot.close()
        fault.at("backup.before-folder-fsync")
        sync_folder(dest)
    return {
        "frames": frames,
        "contents": rest[0],
        "copied": first[1] + rest[1],
        "bytes": first[2] + rest[2],
        "removed": _remove_unnamed(ours, dest),
    }


def _adopt(
    digests: Iterator[bytes], ours: Cas, theirs: Cas, progress: Progress
) -> tuple[int, int, int]:
    """Takes over content files; how many there are, how many were not here, their bytes."""
    contents = copied = size = 0
    for digest in digests:
        try:
            new = ours.adopt(digest, theirs)
        except (Damaged, NotFound) as error:
            raise Damaged(f"there is no backup, as the store is damaged: {error}") from error
        contents += 1
        copied += new > 0
        size += new
        progress.add(1)
    return contents, copied, size


def _remove_unnamed(ours: Cas, dest: str) -> int:
    if ours.is_held():  # by who copies what the copy was before: the next time
        return 0
    removed = 0
    connections = Connections(dest)
    index = Index(connections)
    try:
        for digest in list(ours.digests()):
            if not index.names_file(digest, _ALWAYS):
                fault.at("backup.before-unlink")
                ours.remove(digest)
                fault.at("backup.unlinked")
                removed += 1
    finally:
        connections.close()
    ours.remove_stale()
    fault.at("backup.done")
    return removed


# What may be a copy of what


def _folder_of(addr: str) -> str:
    if is_host(addr):
        raise Invalid(
            f"a backup reads a store's directory, and {addr} is a server: "
            "`xs export` takes what it needs from that"
        )
    addr = folder_of(addr)
    if not os.path.isdir(addr):
        raise no_store(addr)
    return addr


def _bring_up(source: str) -> None:
    """Brings a store of an older format up to today's, as a read does, where it may be written."""
    try:
        Connections(source, read_only=True).close()
    except NotAStore:
        if why_not_written(source) is not None:
            raise
        if server_of(source) is not None:
            raise Locked(
                f"the store at {source} is one of an older format, and a server of an older xs has "
                "it: stop that first"
            ) from None
        Connections(source).close()  # which says what it is, if it is no older store


def _make_folder(dest: str) -> None:
    """Makes the folder of a first copy, marked as not whole; one that is there stays as it is."""
    make_folder(dest, "back up")
    try:
        names = set(os.listdir(dest))
        if FILENAME in names:
            return
        if not names <= _UNFINISHED:
            raise Invalid(f"can't back up to {dest}: it has other files in it")
        fault.at("backup.folder-made")
        os.close(os.open(os.path.join(dest, PART_FILENAME), os.O_WRONLY | os.O_CREAT, 0o600))
        fault.at("backup.marked")
        os.makedirs(os.path.join(dest, "cas"), 0o700, exist_ok=True)
        os.chmod(dest, 0o700)
    except OSError as error:
        raise Invalid(f"can't back up to {dest}: {error.strerror}") from None


def _check_ours(source: str, dest: str) -> None:
    if not os.path.exists(os.path.join(dest, FILENAME)):
        return
    found = copied_from(dest)
    if found is None:
        raise Invalid(f"can't back up to {dest}: it is a store, and no backup")
    if os.path.realpath(found.source) != os.path.realpath(source):
        raise Invalid(f"can't back up to {dest}: it is a backup of {found.source}")
    if found.has_grown:
        raise Invalid(f"can't back up to {dest}: it has got frames of its own since it was made")
    if found.has_changed and _lacks_some_of(source, dest):
        raise Invalid(
            f"can't back up to {dest}: frames were imported into it, or removed from it, since it "
            f"was made, and it has some that {source} has not: back it up to a new folder"
        )


def _lacks_some_of(source: str, dest: str) -> bool:
    """Whether the copy has what the store has not: there is nothing to tell by that it once had.

    Without that, what has gone from the copy comes back.
    """
    connections = Connections(source, read_only=True)  # which looks at its log
    try:
        snapshot = Snapshot(source, dest)
        try:
            return snapshot.lacks_some_of_copy(time.time_ns() // 1_000_000)
        finally:
            snapshot.close()
    finally:
        connections.close()
