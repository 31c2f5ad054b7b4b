"""Where a store may lie: its owner, the length of its path, its file system; and where copies may.

A store has one writer at a time, and that hangs on its machine: a lock, and memory that SQLite's
processes share. And what one user writes the next one can't. So both are looked at before anything
is written, and told in one sentence; who only reads is let through.
"""

from __future__ import annotations

from xs.errors import Invalid, NotAStore
from xs.system import os

# Bytes of a store's path, links followed: SQLite's own 512 (MAX_PATHNAME in its os_unix.c), less
# those of "/xs.db" and of its journal's name.
FOLDER_MAX = 498

MOUNTS = "/proc/self/mountinfo"  # proc(5); only Linux has it, and elsewhere no kind is known

# Kinds of file systems that another machine may have mounted, too. Those of a virtual machine's own
# host (9p, virtiofs) are not among them.
NETWORKED = frozenset(("nfs", "nfs4", "cifs", "smb3", "smbfs", "ncpfs", "afs", "coda", "ceph"))
NETWORKED |= {"lustre", "beegfs", "gpfs", "pvfs2", "fuse.sshfs", "fuse.glusterfs", "fuse.ceph"}
NETWORKED |= {"fuse.davfs", "fuse.s3fs", "fuse.rclone", "fuse.gcsfuse"}


def why_not_written(folder: str) -> str | None:
    """The sentence that says why nothing may be written to a store in `folder`; None if it may.

    A folder that is not there yet is judged by the one in which it would be made.
    """
    place = folder
    while not os.path.exists(place):
        place = os.path.dirname(os.path.abspath(place))
    reason = _network(place)
    if reason is None and place == folder:
        reason = _foreign(place) or _refused(place) or _refused_index(place)
    return None if reason is None else f"can't write to the store at {folder}: {reason}"


def check_length(folder: str, within: str = "", what: str = "store") -> None:
    """Raises `NotAStore` for a path, links followed, in which SQLite can't open its files.

    They get names as much longer than those of a store as `within` is.
    """
    size, most = len(os.fsencode(os.path.realpath(folder))), FOLDER_MAX - len(within)
    if size > most:
        raise NotAStore(
            f"the path of {folder} has {size} bytes, and that of a {what} at most {most}"
        )


def check_writable(folder: str) -> None:
    """Raises `NotAStore` where nothing may be written to a store in `folder`."""
    check_length(folder)
    reason = why_not_written(folder)
    if reason is not None:
        raise NotAStore(reason)


def check_apart(source: str, dest: str, what: str) -> None:
    """Raises `Invalid` if one of two folders lies in the other; `what` is to be done: "export"."""
    one, other = os.path.realpath(source), os.path.realpath(dest)
    if os.path.commonpath((one, other)) in (one, other):
        raise Invalid(f"can't {what} {source} to {dest}: one of them lies in the other")


def make_folder(path: str, what: str) -> list[str]:
    """Makes a folder, and those that it is to lie in, unless they are there; those that it made.

    Raises `Invalid`, which says that `what` can't be done to it.
    """
    if not os.path.exists(path) and os.path.islink(path):
        target = os.path.realpath(path)
        raise Invalid(f"can't {what} to {path}: it is a symbolic link, and {target} isn't there")
    if os.path.exists(path) and not os.path.isdir(path):
        raise Invalid(f"can't {what} to {path}: it is a file")
    missing: list[str] = []
    place = os.path.abspath(path)
    while not os.path.exists(place):
        missing.insert(0, place)
        place = os.path.dirname(place)
    try:
        os.makedirs(path, 0o700, exist_ok=True)
    except OSError as error:
        raise Invalid(f"can't {what} to {path}: {error.strerror}") from None
    return missing


def kind_of_file_system(path: str) -> str | None:
    """The kind of file system that `path` is on, as Linux names it; None if that isn't known."""
    device = os.stat(path).st_dev
    mark = b" %d:%d " % (os.major(device), os.minor(device))
    try:
        with open(MOUNTS, "rb") as mounts:
            for line in mounts:
                if mark in line.partition(b"/")[0]:  # ID PARENT MAJOR:MINOR ROOT …
                    return line.rpartition(b" - ")[2].split(b" ", 1)[0].decode("utf-8", "replace")
    except OSError:
        pass
    return None


def _network(place: str) -> str | None:
    kind = kind_of_file_system(place)
    if kind not in NETWORKED:
        return None
    return (
        f"it is on a network file system ({kind}), where a second machine could write at the same "
        "time and damage it: keep it on a disk of the machine that writes, and reach it from "
        "others by `xs serve --expose`"
    )


def _foreign(place: str) -> str | None:
    """What root writes into a user's store, that user can neither read nor remove."""
    owner, user = os.stat(place).st_uid, os.geteuid()
    if owner == user:
        return None
    return f"it is {_name(owner)}'s, and this runs as {_name(user)}: run it as {_name(owner)}"


def _refused(place: str) -> str | None:
    if os.access(place, os.W_OK):
        return None
    is_read_only = os.statvfs(place).f_flag & os.ST_RDONLY
    return "Read-only file system" if is_read_only else "Permission denied"


def _refused_index(place: str) -> str | None:
    path = os.path.join(place, "xs.db")
    reason = _refused(path) if os.path.exists(path) else None
    return None if reason is None else f"its xs.db: {reason}"


def _name(user: int) -> str:
    import pwd

    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:
        return f"user {user}"
