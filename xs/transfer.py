"""A whole store as a folder: `xs export`, and `xs import` of what it wrote.

The folder has `frames.jsonl`, the frames one a line, and `cas/` with each content once, named by
its hash. A folder with a `frames.jsonl` is complete: until then that file has another name. What
is read from either side is held against its hash, and a folder is not trusted with links or pipes.
"""

from __future__ import annotations

import binascii
import contextlib
import json
import os
import stat
import sys
from hashlib import sha256
from typing import TYPE_CHECKING, Any, BinaryIO

from xs import errors, fault, ndjson
from xs.address import folder_of, is_host
from xs.content import INLINE_MAX
from xs.disk import sync, sync_folder, sync_names
from xs.frame import integrity, parse_integrity
from xs.place import check_apart, make_folder
from xs.request import SMALL, ask, quote, split_lines
from xs.stdio import blocks_of
from xs.terminal import Progress

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from xs.arguments import Arguments
    from xs.request import Transport

_PART = ".part"  # ends the name of what an export has not written whole yet


# Import


def import_folder(arguments: Arguments, folder: str) -> None:
    """Stores the contents and frames of an exported folder. Prints the summary."""
    path = os.path.join(folder, "frames.jsonl")
    cas = _open_regular(os.path.join(folder, "cas"), os.O_DIRECTORY)
    try:
        frames = _open_regular(path)
        if frames is None and os.path.lexists(path + _PART):
            raise errors.NotFound(
                f"not an exported folder: the export to {folder} broke off, or is under way: "
                "export the store again, to a new folder"
            )
        if frames is None:
            is_store = os.path.exists(os.path.join(folder, "xs.db"))
            hint = (
                f"it is a store: xs cat {folder} --with-content | xs import {arguments.addr}"
                if is_store
                else f"{folder} has no frames.jsonl"
            )
            raise errors.NotFound(f"not an exported folder: {hint}")
        with open(frames, "rb") as file, Progress("frames") as progress:
            if cas is not None:
                _post_contents(arguments, file, cas)
                fault.at("import.contents-put")
                file.seek(0)
            ndjson.send(arguments, "/import", _import_lines(file, cas, progress), progress)
    finally:
        if cas is not None:
            os.close(cas)


def _open_regular(name: str, flags: int = 0, folder: int | None = None) -> int | None:
    """A descriptor of that file (or directory, by `flags`); None if there is none.

    A folder that was exported elsewhere is not to be trusted with links out of it, or with pipes.
    """
    flags |= os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        descriptor = os.open(name, flags, dir_fd=folder)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise errors.Invalid(f"can't import {name}: {error.strerror}") from None
    mode = os.fstat(descriptor).st_mode
    if not (stat.S_ISREG(mode) or (stat.S_ISDIR(mode) and flags & os.O_DIRECTORY)):
        os.close(descriptor)
        raise errors.Invalid(f"can't import {name}: it is not a regular file")
    return descriptor


def _post_contents(arguments: Arguments, frames: Iterable[bytes], cas: int) -> None:
    """Stores those contents that become files: they are too large to go with their frames."""
    posted = set()
    transport = arguments.open(create=True)
    try:
        for line in frames:
            hash_ = _hash_in(line)
            if hash_ is None or hash_ in posted:
                continue
            descriptor = _open_regular(file_name(hash_), 0, cas)
            if descriptor is None:
                continue
            try:
                if os.fstat(descriptor).st_size > INLINE_MAX:
                    posted.add(hash_)
                    body = blocks_of(descriptor)
                    answer = ask(transport, "POST", "/cas?for=import", (), body).read()
                    _check_hash(hash_, answer.decode("ascii", "replace").strip())
                    fault.at("import.content-put")
            finally:
                os.close(descriptor)
    finally:
        transport.close()


def _import_lines(frames: Iterable[bytes], cas: int | None, progress: Progress) -> Iterator[bytes]:
    """The frames' lines, with the content of those whose content is small; many in a block."""
    lines: list[bytes] = []
    size = 0
    for line in frames:
        hash_ = _hash_in(line) if cas is not None else None
        if hash_ is not None:
            line = _with_content(line, hash_, cas)
        lines.append(line)
        size += len(line)
        if size >= SMALL:
            yield b"".join(lines)
            progress.add(len(lines))
            lines, size = [], 0
    if lines:
        yield b"".join(lines)


def _with_content(line: bytes, hash_: str, cas: int | None) -> bytes:
    descriptor = _open_regular(file_name(hash_), 0, cas)
    if descriptor is None:
        return line  # the store may have it already; if not, it refuses the line
    try:
        if os.fstat(descriptor).st_size > INLINE_MAX:
            return line
        content = b"".join(blocks_of(descriptor))
    finally:
        os.close(descriptor)
    _check_hash(hash_, integrity(sha256(content).digest()))
    encoded = binascii.b2a_base64(content, newline=False)
    return line.rstrip()[:-1] + b',"content_base64":"' + encoded + b'"}\n'


def _check_hash(expected: str, found: str) -> None:
    if found != expected:
        raise errors.Damaged(f"cas/{file_name(expected)} is damaged: its content is {found}")


def file_name(hash_: str) -> str:
    """The name of a content's file in `cas/`: base64 of its hash string.

    No letter of a hash string has bits that base64 writes as `/` or `+`, so it is a file's name.
    """
    return binascii.b2a_base64(hash_.encode("ascii"), newline=False).decode("ascii")


def _hash_in(line: bytes) -> str | None:
    """The hash in a frame's line of JSON; None without one, or if the line is no frame."""
    parts = line.split(b'"', 12)
    value: Any = None
    is_ours = len(parts) > 11 and (parts[1], parts[5], parts[9]) == (b"topic", b"id", b"hash")
    if is_ours and parts[10].startswith(b":null,"):
        return None
    if is_ours and parts[10] == b":":
        value = parts[11].decode("latin-1")
    else:  # written by another hand: spaces, another order
        try:
            value = json.loads(line)["hash"]
        except (ValueError, TypeError, KeyError, RecursionError):
            return None
    try:
        parse_integrity(value)
    except (errors.Invalid, TypeError):
        return None
    return str(value)


# Export


def export(arguments: Arguments, out: str) -> None:
    """Writes the whole store to `out`, a new folder or an empty one."""
    transport = arguments.open()
    cas = os.path.join(out, "cas")
    # What is not whole yet has another name: a folder with a frames.jsonl is complete.
    part = os.path.join(out, "frames.jsonl" + _PART)
    begun: list[str] = []
    try:
        if not is_host(arguments.addr):
            check_apart(folder_of(arguments.addr), out, "export")
        begun += _make_empty(out)
        os.mkdir(cas, 0o700)
        begun.append(cas)
        with Progress("frames") as progress, open(part, "xb") as file:
            _export_frames(transport, file, cas, progress)
        with Progress("contents") as progress:
            gone = _export_contents(transport, part, cas, progress)
        if gone:
            _leave_out(part, gone)
        sync_folder(cas)
        with open(part, "rb") as file:
            sync(file.fileno())
        sync_names(out)
        os.rename(part, os.path.join(out, "frames.jsonl"))
        sync_folder(out)
    except errors.XsError:
        if begun:  # else what is there is not of this export
            _take_back(part, begun)
        raise
    finally:
        transport.close()


def _take_back(part: str, folders: list[str]) -> None:
    """Removes what was made for an export, if nothing has come yet."""
    with contextlib.suppress(OSError):
        if not os.path.getsize(part):
            os.unlink(part)
        for folder in reversed(folders):
            os.rmdir(folder)


def _make_empty(out: str) -> list[str]:
    """Makes a folder, unless there is an empty one; the folders that it made."""
    made = make_folder(out, "export")
    try:
        names = os.listdir(out)
    except OSError as error:
        raise errors.Invalid(f"can't export to {out}: {error.strerror}") from None
    if "frames.jsonl" + _PART in names:
        raise errors.Invalid(
            f"can't export to {out}: an export to it broke off, or is under way: remove it, or "
            "name a new folder"
        )
    if names:
        raise errors.Invalid(f"can't export to {out}: it is not empty")
    return made


def _export_frames(transport: Transport, file: BinaryIO, cas: str, progress: Progress) -> None:
    """Writes all frames, and the contents that come with them: all but the very large ones.

    One stream with everything in it takes a tenth of the time of a request for each content.
    """
    for line in split_lines(ask(transport, "GET", "/?with-content=true")):
        bare, content = _without_content(line)
        if content is not None:
            hash_ = integrity(sha256(content).digest())
            if hash_ != _hash_in(bare):
                raise errors.Damaged(f"the store gave content {hash_} for {bare.decode()}")
            _write_new(os.path.join(cas, file_name(hash_)), content)
        file.write(bare + b"\n")
        progress.add(1)


def _write_new(path: str, content: bytes) -> None:
    try:
        with open(path, "xb") as file:
            file.write(content)
            _sync_unless_linux(file)
    except FileExistsError:
        pass  # another frame has it too


def _without_content(line: bytes) -> tuple[bytes, bytes | None]:
    """A frame's line as it is stored, and the content that was added to it at its end, if any."""
    # In a string of JSON no quote stands behind a comma without a backslash: these are keys. What
    # follows the last one is the frame's own content only if it goes on to the end of the line.
    at = line.rfind(b',"content_base64":"')
    value = line[at + 19 : -2]
    if at > 0 and b'"' not in value:
        return line[:at] + b"}", binascii.a2b_base64(value)
    at = line.rfind(b',"content":"')
    if at > 0:
        try:
            text = json.loads(line[at + 11 : -1])
        except ValueError:
            return line, None  # it is within meta
        return line[:at] + b"}", text.encode("utf-8")
    return line, None


def _export_contents(transport: Transport, frames: str, cas: str, progress: Progress) -> set[bytes]:
    """Fetches the contents still missing; returns the lines of frames removed meanwhile."""
    gone = set()
    with open(frames, "rb") as file:
        for line in file:
            hash_ = _hash_in(line)
            if hash_ is None:
                continue
            path = os.path.join(cas, file_name(hash_))
            if os.path.exists(path):
                continue
            progress.add(1)
            try:
                _fetch(transport, hash_, path)
            except errors.NotFound:
                if _is_stored(transport, line):
                    raise errors.Damaged(
                        f"{hash_} is missing in the store: `xs check` says more"
                    ) from None
                gone.add(line)
    if sys.platform == "linux":
        os.sync()  # once for all of them, and on Linux it waits until they are written
    return gone


def _fetch(transport: Transport, hash_: str, path: str) -> None:
    digest = sha256()
    response = ask(transport, "GET", "/cas/" + quote(hash_))
    with open(path, "xb") as file:
        for block in response:
            digest.update(block)
            file.write(block)
        _sync_unless_linux(file)
    found = integrity(digest.digest())
    if found != hash_:
        os.unlink(path)
        raise errors.Damaged(f"the store gave other content for {hash_}: {found}")


def _sync_unless_linux(file: BinaryIO) -> None:
    if sys.platform != "linux":  # there `os.sync` does it for all files at the end
        file.flush()
        sync(file.fileno())


def _is_stored(transport: Transport, line: bytes) -> bool:
    try:
        ask(transport, "GET", "/" + quote(json.loads(line)["id"])).read()
    except errors.NotFound:
        return False
    return True


def _leave_out(frames: str, gone: set[bytes]) -> None:
    rest = frames + ".rest"
    with open(frames, "rb") as old, open(rest, "xb") as new:
        new.writelines(line for line in old if line not in gone)
    os.rename(rest, frames)
