"""Content by hash, as files: take in, place, read back verified, remove.

Only large content becomes a file (`content.INLINE_MAX`). Its name is made from its digest alone,
`cas/ab/cdef…` in hexadecimal, never from anything that a client sent. This module knows digests and
files; which frames name them is the index's knowledge.

The order of a placement, each step needed by the next (docs/guarantees.md):
write the temporary file → fsync it → rename it to its name → fsync the folder it is in.
A crash before the rename leaves a temporary file, which the next server removes; a crash after it
leaves a file that no frame names, which `gc` removes. Who writes a temporary file has it locked, by
flock(2), which the kernel gives back however that ends: a body may be silent for hours, and is not
taken for left over.
"""

from __future__ import annotations

import fcntl
import os
import stat
import time

from xs import fault, frame
from xs.content import INLINE_MAX, Content, check_size, new_sha256, small, take
from xs.disk import on_disk, sync, sync_folder
from xs.errors import Damaged, DiskError, NotFound, XsError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

FOLDER = "cas"  # in a store's directory
BLOCK = 256 * 1024  # bytes read or written at a time
VERIFIED_WHOLE_MAX = 1024 * 1024  # bytes: content up to this is verified before its first byte goes
STALE_SECONDS = 3600  # a temporary file that nobody writes to, or has for so long, is left over

_FILE_MODE = 0o600
_FOLDER_MODE = 0o700


class Cas:
    """The folder of large content."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        # Placed, but nobody knows whether that would outlive a crash.
        self._unsure: set[bytes] = set()

    def take(self, blocks: Iterable[bytes]) -> Content | None:
        """As `content.take`; what is large goes to a temporary file here."""
        return take(blocks, 0, self.spill)

    def take_whole(self, data: bytes) -> Content | None:
        """As `take`, of content that is in memory as it is."""
        if len(data) > INLINE_MAX:
            return self.take((data,))
        return small(data) if data else None

    def place(self, content: Content) -> None:
        """Gives the temporary file its name, durably. What had that name is replaced whole."""
        if content.path is None:
            return
        name = self._path(content.digest)
        folder = os.path.dirname(name)
        if not os.path.isdir(folder):
            try:
                os.mkdir(folder, _FOLDER_MODE)
            except FileExistsError:
                pass
            fault.at("content.folder-made")
        if _is_empty(folder):  # new, made here or by a process that was killed before it synced it
            try:
                sync_folder(self._folder)
                sync_folder(os.path.dirname(self._folder))
            except OSError:
                try:
                    os.rmdir(folder)  # so that the next one makes it anew, and syncs that
                except OSError:
                    pass
                raise
        fault.at("content.before-rename")
        os.replace(content.path, name)
        content.path = None
        # After an fsync that has failed, the next one may say all is well though it is not.
        self._unsure.add(content.digest)
        fault.at("content.before-folder-fsync")
        sync_folder(folder)
        self._unsure.discard(content.digest)
        fault.at("content.placed")

    def adopt(self, digest: bytes, source: Cas) -> int:
        """Takes over a file of another store; the bytes that were new here (0: it was here).

        It becomes another name of the same file where that can be, since no content file is ever
        written to again; else a copy, which is verified. So is what is to replace another one, as
        that may be the one that is whole. `sync_folders` makes it durable. Raises `NotFound`,
        `Damaged`.
        """
        size = _size_of_file(source._path(digest), digest)
        if size < 0:
            raise _no_file(digest)
        name = self._path(digest)
        try:
            if _size_of_file(name, digest) == size:
                return 0
            for _ in source.open(digest)[1]:
                pass
        except NotFound:
            os.makedirs(os.path.dirname(name), _FOLDER_MODE, exist_ok=True)
        path = self._new_path()
        try:
            try:
                os.link(source._path(digest), path)
            except OSError:  # another file system, or one that has no links
                file = self._create(path)
                try:
                    for block in source.open(digest)[1]:
                        _write(file, block)
                    sync(file)
                finally:
                    os.close(file)
            fault.at("backup.content-linked")
            os.replace(path, name)
            fault.at("backup.content-named")
        except BaseException:
            _unlink(path)
            raise
        return size

    def sync_folders(self) -> None:
        """Makes the names of all files durable, and that of their folder."""
        for prefix in _names(self._folder):
            if len(prefix) == 2:
                sync_folder(os.path.join(self._folder, prefix))
        sync_folder(self._folder)
        sync_folder(os.path.dirname(self._folder))

    def held(self) -> Held:
        """A block within which no writer removes a file, in whatever process (`is_held`).

        Who may not even list the folder can't do this; then nothing is held.
        """
        return Held(self._path_of_hold)

    def is_held(self) -> bool:
        """Whether somebody needs all files to stay.

        Who asks this after a commit, and then removes files that no frame names, is safe: who holds
        them from then on sees that commit, and needs none of them.
        """
        return _is_locked(self._path_of_hold, fcntl.LOCK_EX)  # who holds them shares it

    def has(self, digest: bytes) -> bool:
        """Whether it is here, durably."""
        return digest not in self._unsure and os.path.isfile(self._path(digest))

    def size(self, digest: bytes) -> int:
        """Bytes. Raises `NotFound` if there is no such file."""
        try:
            return os.stat(self._path(digest)).st_size
        except FileNotFoundError:
            raise _missing(digest) from None

    def open(self, digest: bytes) -> tuple[int, Iterator[bytes]]:
        """Size and blocks of a file's content, which are only ever the right bytes.

        Up to VERIFIED_WHOLE_MAX it is verified before this returns. Longer content is hashed as it
        goes and its last block held back until the digest is right. Raises `Damaged` for what does
        not match, `DiskError` for what can't be read just now, `NotFound` if there is no file.
        """
        try:
            file = _Opened(self._path(digest))
            found = os.fstat(file.number)
        except FileNotFoundError:
            raise _missing(digest) from None
        except OSError as error:
            raise _unreadable(digest, error) from None
        if not stat.S_ISREG(found.st_mode):
            raise _no_file(digest)
        blocks = _verified(file, digest)
        if found.st_size > VERIFIED_WHOLE_MAX:
            return found.st_size, blocks
        data = b"".join(blocks)
        return len(data), iter((data,))

    def is_whole(self, digest: bytes) -> bool:
        """Whether it is here, and can be read to its end."""
        try:
            for _ in self.open(digest)[1]:
                pass
        except XsError:
            return False
        return True

    def remove(self, digest: bytes) -> int:
        """Removes a file, and answers how many bytes it had (0 if it was not there)."""
        name = self._path(digest)
        try:
            size = os.stat(name).st_size
        except FileNotFoundError:
            return 0
        _unlink(name)
        return size

    def move(self, digest: bytes, path: str) -> None:
        """Puts a file elsewhere, under another name."""
        os.rename(self._path(digest), path)

    def digests(self) -> Iterator[bytes]:
        """The digests of all files, folder by folder; other names are passed over."""
        for prefix in sorted(_names(self._folder)):
            if len(prefix) != 2:
                continue
            for rest in sorted(_names(os.path.join(self._folder, prefix))):
                try:
                    digest = bytes.fromhex(prefix + rest)
                except ValueError:
                    continue
                if len(digest) == 32 and digest.hex() == prefix + rest:
                    yield digest

    def age(self, digest: bytes) -> float:
        """Seconds since the file was placed."""
        return _age(self._path(digest))

    def remove_stale(self) -> int:
        """Removes temporary files whose writers are gone; answers how many."""
        removed = 0
        for name in _names(self._folder):
            path = os.path.join(self._folder, name)
            if (
                _is_arriving(name)
                and _age(path) > STALE_SECONDS  # who has just made it may not have it locked yet
                and not _is_locked(path, fcntl.LOCK_SH)
            ):
                _unlink(path)
                removed += 1
        return removed

    def _path(self, digest: bytes) -> str:
        name = digest.hex()
        return os.path.join(self._folder, name[:2], name[2:])

    @property
    def _path_of_hold(self) -> str:
        # The folder itself, also where that is a link. A file for it would be made by whoever comes
        # first: by root it would be one that the store's user can't look at; others can't make any.
        return os.path.join(self._folder, ".")

    def _new_path(self) -> str:
        return os.path.join(self._folder, f"new-{os.getpid()}-{os.urandom(8).hex()}")

    def spill(self, head: list[bytes], rest: Iterator[bytes]) -> Content:
        """Writes content to a temporary file: what has come of it, and what is still to come."""
        path = self._new_path()
        digest = new_sha256()
        size = 0
        try:
            file = self._create(path)
            try:
                for blocks in (head, rest):
                    for block in blocks:
                        digest.update(block)
                        with on_disk():  # not around the blocks: they may come from a client
                            _write(file, block)
                        size += len(block)
                        check_size(size)
                        fault.at("content.block-written")
                fault.at("content.before-fsync")
                with on_disk():
                    os.utime(file)  # from here on it is kept by its age, until it has its name
                    sync(file)
            finally:
                os.close(file)
        except BaseException:
            _unlink(path)
            raise
        return Content(digest.digest(), size, None, path)

    def _create(self, path: str) -> int:
        """A new file, open for writing."""
        with on_disk():
            try:
                return _new_file(path)
            except FileNotFoundError:
                # The folder is lost: the power went as it was made, or what copies a store leaves
                # out empty folders.
                try:
                    os.mkdir(self._folder, _FOLDER_MODE)
                except FileExistsError:
                    pass
                sync_folder(os.path.dirname(self._folder))
                return _new_file(path)


class Held:
    """The block that `Cas.held` gives."""

    __slots__ = ("_file", "_path")

    def __init__(self, path: str) -> None:
        self._path = path
        self._file = -1

    def __enter__(self) -> None:
        try:
            self._file = os.open(self._path, os.O_RDONLY)
        except (FileNotFoundError, PermissionError):
            return
        fcntl.flock(self._file, fcntl.LOCK_SH)

    def __exit__(self, *_: object) -> None:
        if self._file >= 0:
            os.close(self._file)


def _new_file(path: str) -> int:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _FILE_MODE)
    fcntl.flock(file, fcntl.LOCK_EX)
    return file


def _is_locked(path: str, kind: int) -> bool:
    """Whether a file has a lock, flock(2), beside which one of that kind can't be had."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError as error:
        import errno

        # A link, or none any more, is nobody's. For want of descriptors nobody can tell.
        return error.errno not in (errno.ELOOP, errno.ENOENT)
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(file)
    return False


def _is_arriving(name: str) -> bool:
    """Whether a file is named as `spill` does: `cas/` may be a link to where others lie, too."""
    new, _, rest = name.partition("-")
    pid, _, random = rest.partition("-")
    return new == "new" and pid.isdigit() and len(random) == 16 and random.isalnum()


class _Opened:
    """An open file. It is closed by who has read it, or when nobody has it any more.

    A generator that was never begun does not come to its `finally`.
    """

    __slots__ = ("number",)

    def __init__(self, path: str) -> None:
        self.number = -1
        # A pipe in its place would be waited for, until somebody writes to it.
        self.number = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)

    def close(self) -> None:
        number, self.number = self.number, -1
        if number >= 0:
            os.close(number)

    __del__ = close


def _verified(file: _Opened, digest: bytes) -> Iterator[bytes]:
    seen = new_sha256()
    held = b""
    try:
        while True:
            block = os.read(file.number, BLOCK)
            seen.update(block)
            if not block:
                break
            if held:
                yield held
            held = block
    except OSError as error:
        raise _unreadable(digest, error) from None
    finally:
        file.close()
    if seen.digest() != digest:
        raise Damaged(f"content {frame.integrity(digest)} is damaged: its bytes don't match")
    if held:
        yield held


def _write(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except (FileNotFoundError, NotADirectoryError):
        pass


def _names(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _is_empty(folder: str) -> bool:
    with os.scandir(folder) as names:
        return next(names, None) is None


def _size_of_file(path: str, digest: bytes) -> int:
    """Bytes of a content's file, -1 for a link or whatever else is none. Raises `NotFound`."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        raise _missing(digest) from None
    except OSError as error:
        raise _unreadable(digest, error) from None
    return found.st_size if stat.S_ISREG(found.st_mode) else -1


def _age(path: str) -> float:
    """Seconds since a file was written to; 0 if it is gone."""
    try:
        return time.time() - os.stat(path).st_mtime
    except FileNotFoundError:
        return 0.0


def _missing(digest: bytes) -> NotFound:
    return NotFound(f"no content {frame.integrity(digest)}")


def _no_file(digest: bytes) -> Damaged:
    return Damaged(
        f"content {frame.integrity(digest)} is damaged: there is no file where it should be"
    )


def _unreadable(digest: bytes, error: OSError) -> Damaged | DiskError:
    import errno

    if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.EISDIR):
        return _no_file(digest)
    return DiskError(
        f"content {frame.integrity(digest)} can't be read: {error.strerror}: what is on the disk "
        "may be whole, and be read again later"
    )
