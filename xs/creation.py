"""A store is made: its folder, what lies in it, and names that outlast a power failure."""

from __future__ import annotations

import os

from xs import fault
from xs.cas import FOLDER as CAS_FOLDER
from xs.cas import Cas
from xs.connections import Connections, has_index, has_log
from xs.disk import sync_names
from xs.errors import Damaged, NoStore, NotAStore, dangling, half_repaired
from xs.lock import SERVE, WRITE
from xs.place import check_writable
from xs.schema import FILENAME as INDEX_FILENAME
from xs.schema import PART_FILENAME, REPAIRED_FILENAME

TYPE_CHECKING = False
if TYPE_CHECKING:
    from xs.lock import Lock

# What may be in a store's directory before there is an index. After a power failure that includes
# the journal of its making: names of one folder reach the disk in any order.
_BEFORE_THE_INDEX = frozenset(
    ("lock", CAS_FOLDER, "sock", "token", "run", INDEX_FILENAME, f"{INDEX_FILENAME}-journal")
)
_CLEARED = (CAS_FOLDER, "run")  # folders of a store in which nothing of another's stays


def check_folder(folder: str, *, create: bool) -> None:
    """Raises `NoStore`, … for a folder without an index, unless it may get one."""
    if os.path.islink(folder) and not os.path.exists(folder):
        raise dangling(folder, os.path.realpath(folder))
    if os.path.lexists(folder) and not os.path.isdir(folder):
        raise NotAStore(f"not a store: {folder} is not a directory")
    if os.path.exists(os.path.join(folder, REPAIRED_FILENAME)):
        raise half_repaired(folder)
    _check_not_lost(folder)
    if not create:
        hint = f"make one with xs serve {folder} or xs append {folder} TOPIC"
        raise NoStore(f"no store at: {folder}: {hint}")
    if os.path.basename(folder) == "sock" and not os.path.isdir(folder):
        # A folder there would keep the server of the store that it lies in from its socket.
        raise NotAStore(f"not a store: {folder} is a socket's name: give the directory it is in")
    check_writable(folder)
    try:
        os.makedirs(folder, 0o700, exist_ok=True)
        others = set(os.listdir(folder)) - _BEFORE_THE_INDEX
    except OSError as error:
        raise NotAStore(f"can't make a store at {folder}: {error.strerror}") from None
    if others and not has_index(folder):  # another process may have made it meanwhile
        raise NotAStore(
            f"not a store: {folder} has other files in it: name an empty or a new directory"
        )
    for name in _CLEARED:  # mostly there is neither, or nothing in it
        for place, _, files in os.walk(os.path.join(folder, name)):
            if INDEX_FILENAME in files:
                raise NotAStore(
                    f"can't make a store at {folder}: it would clear away the one at {place}: name "
                    "another directory"
                )


def _check_not_lost(folder: str) -> None:
    """Raises `Damaged` where an index was, and is an empty file now, or none.

    The making of a store begins like that, too, but has no contents yet, nor a log. As a new store
    it would have `gc` remove the contents, and SQLite the log.
    """
    contents, index = (os.path.join(folder, name) for name in (CAS_FOLDER, INDEX_FILENAME))
    if not (has_log(folder) or _has_contents(contents)):
        return
    what = "has become empty"
    if not os.path.exists(index):
        # A first copy gets its contents first, and a repair lends a new store those of the old one.
        if os.path.exists(os.path.join(folder, PART_FILENAME)) or os.path.islink(contents):
            return
        what = "is gone"
    if not has_index(folder):  # looked at last: another process may have made it meanwhile
        raise Damaged(
            f"the store at {folder} is damaged: its xs.db {what}, and what it had is nowhere else: "
            "restore the store from a backup, or make a new one in another directory"
        )


def _has_contents(folder: str) -> bool:
    try:
        return any(True for _ in Cas(folder).digests())
    except OSError:
        return False


def make(folder: str, lock: Lock, *, exclusive: bool, create: bool) -> None:
    """Makes what a store consists of, under its lock, which a server (`exclusive`) then keeps."""
    lock.acquire(SERVE if exclusive else WRITE)
    try:
        fault.at("store.locked")
        os.makedirs(os.path.join(folder, CAS_FOLDER), 0o700, exist_ok=True)
        fault.at("store.folders-made")
        if create:
            os.chmod(folder, 0o700)  # an empty directory that was there may be open to all
            if not (exclusive and has_index(folder)):  # else it is opened next
                Connections(folder, create=True).close()
    finally:
        if not exclusive:
            lock.release()


def outlast_power_loss(folder: str) -> None:
    """Makes the name of a store durable that nobody has been answered by yet."""
    fault.at("store.before-folder-fsync")
    sync_names(folder)
