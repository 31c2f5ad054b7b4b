"""The disk: what is to outlast a power failure, and its errors as ours."""

from __future__ import annotations

import os
import sys

from xs.errors import Full, NotAStore, Unavailable, XsError


def sync(file: int) -> None:
    """fsync that reaches the disk: on macOS only F_FULLFSYNC does (fcntl(2) there)."""
    if _FULL_SYNC is None:
        os.fsync(file)
    else:
        _full_sync(file)


def sync_folder(path: str) -> None:
    """Makes the names in a folder durable."""
    folder = os.open(path, os.O_RDONLY)
    try:
        sync(folder)
    finally:
        os.close(folder)


def sync_names(folder: str) -> None:
    """Makes the names in a folder durable, its own, and those of the folders above it.

    Who made them may have been killed before they were: all that are this user's may be new.
    """
    path = os.path.abspath(folder)
    sync_folder(path)
    try:
        sync_folder(os.path.dirname(path))
    except PermissionError:
        return  # a folder of somebody else's, which this user can't make names in
    try:
        while os.stat(path).st_uid == os.geteuid() and path != os.path.dirname(path):
            path = os.path.dirname(path)
            sync_folder(path)
    except OSError:
        pass  # what can't be opened was not made by this user


def _full_sync(file: int) -> None:
    import fcntl

    assert _FULL_SYNC is not None
    try:
        fcntl.fcntl(file, _FULL_SYNC)
    except OSError:  # a file system that has no such call
        os.fsync(file)


def _find_full_sync() -> int | None:
    if sys.platform != "darwin":
        return None
    import fcntl

    return getattr(fcntl, "F_FULLFSYNC", None)


_FULL_SYNC = _find_full_sync()


class _OnDisk:
    __slots__ = ()

    def __enter__(self) -> None: ...

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if not isinstance(error, OSError):
            return
        import errno

        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise Full("the disk is full: nothing of this request was stored") from error
        raise Unavailable(f"the store can't be written: {error.strerror}") from error


_ON_DISK = _OnDisk()


def refusal(sentence: str, error: OSError) -> XsError:
    """An error of the system's that keeps a store from being used, as ours.

    `NotAStore` needs somebody's hand, and a service that ends with it is not started again. What
    may pass, such as a disk that is full, is told from that.
    """
    import errno

    text = f"{sentence}: {error.strerror or error}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Full(text)
    if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EIO):
        return Unavailable(text)
    return NotAStore(text)


def on_disk() -> _OnDisk:
    """A block in which the system's errors are those of the disk, and become ours."""
    return _ON_DISK
