"""Files by fsspec URL: a bare path, `file://`, `s3://` and `memory://` behave the same.

Credentials and endpoints come from the environment of the store's own library (`AWS_*`, `AWS_ENDPOINT_URL`).
What fails in passing is tried again (`freesolo.data.stores`): all that is done here may be done twice. What goes wrong
for good is told in one line: what was tried, where, and what to do.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Protocol, runtime_checkable

from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import glob_translate

from freesolo.data.stores import UnreadableFileError as UnreadableFileError  # callers meet it here
from freesolo.data.stores import ask, explained, is_full, is_there_already, is_transient, resolve

_LOG = logging.getLogger(__name__)
_READ_BLOCK = 8 * 2**20


@runtime_checkable
class ReadStream(Protocol):
    """What `open_stream` gives: of a file object, only what every store's has."""

    def read(self, size: int = -1, /) -> bytes:
        """The next `size` bytes, fewer at the end; all that is left if `size` is negative."""


def join(url: str, *parts: str) -> str:
    """`url` with path parts appended, whatever slashes they begin or end with."""
    base = url if not url or url.endswith("://") else url.rstrip("/") + "/"
    return base + "/".join(part.strip("/") for part in parts)


def is_local(url: str) -> bool:
    """Whether `url` is on this machine's file system."""
    return isinstance(resolve(url)[0], LocalFileSystem)


def exists(url: str) -> bool:
    """Whether there is a file at `url` (a folder is not one).

    Raises:
        UsageError: The URL's store needs credentials, or its protocol is unknown.
        JobError: The store cannot be reached.
    """
    return _details(url) is not None


def size(url: str) -> int | None:
    """Bytes of the file at `url`; None where there is none.

    Raises:
        UnreadableFileError: Its server does not tell.
        UsageError, JobError: As `exists`.
    """
    details = _details(url)
    if details is None:
        return None
    if details["size"] is None:
        raise UnreadableFileError(f"{url}: its server does not tell how large it is; copy it to one that does")
    return int(details["size"])


def _details(url: str) -> dict[str, Any] | None:
    """What its store knows of the file at `url`; None where there is none."""
    store, path = resolve(url)

    def look() -> dict[str, Any] | None:
        try:
            details: dict[str, Any] = store.info(path)
        except (FileNotFoundError, NotADirectoryError) as error:
            if is_transient(error):
                raise
            return None
        return details if details["type"] == "file" else None

    return ask(url, look)


def is_folder(url: str) -> bool:
    """Whether there is a folder at `url`; in an object store, whether any name begins with it."""
    store, path = resolve(url)
    return ask(url, lambda: bool(store.isdir(path)))


def read_bytes(url: str) -> bytes:
    """The whole file at `url`.

    Raises:
        UnreadableFileError: No such file or bucket, no permission, or a folder.
        UsageError: No credentials, unknown protocol.
        JobError: The store cannot be reached or failed.
    """
    store, path = resolve(url)
    return ask(url, lambda: bytes(store.cat_file(path)))


@contextmanager
def open_stream(url: str) -> Iterator[ReadStream]:
    """A file opened to be read once from front to back, in constant memory.

    A read that breaks goes on where it broke off: what comes from a store is the whole file, or an error.

    Raises:
        UsageError, JobError: As `read_bytes`, on opening or while reading.
        JobError: The file was replaced by another while it was read.
    """
    store, path = resolve(url)
    with ask(url, lambda: store.open(path, "rb", block_size=_READ_BLOCK)) as file:
        if isinstance(store, LocalFileSystem):  # no connection breaks; a file that ends early was cut
            with explained(url):
                yield file
        else:
            yield file if file.size is None else _SteadyStream(url, file)  # None: an HTTP server that doesn't say


def write_atomic(url: str, data: bytes) -> None:
    """Write a file that appears at `url` whole or not at all, replacing one that is there.

    Raises:
        UsageError: No such bucket, no credentials, no permission, unknown protocol.
        JobError: The store cannot be reached or failed, or the disk is full.
    """
    store, path = resolve(url)
    if isinstance(store, LocalFileSystem):
        with atomic_writer(url) as stream:
            stream.write(data)
        return
    ask(url, lambda: store.pipe_file(path, data))


def create_file(url: str, data: bytes) -> bool:
    """Write a small file unless there is one; of several processes that try at once, one does.

    On a local disk a reader may see it before all of it is written; in an object store it appears whole.

    Returns:
        Whether this call wrote it. Where the store's answer was lost on the way, a file of this call counts as there.

    Raises:
        UsageError, JobError: As `write_atomic`.
    """
    store, path = resolve(url)

    def create() -> bool:
        try:
            if isinstance(store, LocalFileSystem):
                _create_local(Path(path), data)
            else:
                store.pipe_file(path, data, mode="create")
        except OSError as error:
            if not is_there_already(error):
                raise
            return False
        return True

    return ask(url, create)


def _create_local(path: Path, data: bytes) -> None:
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:
            raise NotADirectoryError(str(error)) from error
        with suppress(FileNotFoundError), path.open("xb") as stream:  # its folder may have been removed just now
            stream.write(data)
            return


def remove_file(url: str) -> None:
    """Remove the file at `url`; nothing happens where there is none.

    Raises:
        UsageError, JobError: As `write_atomic`.
    """
    store, path = resolve(url)

    def remove() -> None:
        with suppress(FileNotFoundError):
            store.rm_file(path)

    ask(url, remove)


def remove_empty_folder(url: str) -> None:
    """Remove the folder at `url` if nothing is in it; object stores have no empty folders anyway."""
    store, path = resolve(url)
    if isinstance(store, LocalFileSystem):
        with suppress(OSError):
            Path(path).rmdir()


@contextmanager
def atomic_writer(url: str) -> Iterator[BinaryIO]:
    """A file to write that appears at `url` whole, when the block ends, or not at all, when it raises.

    What is written goes to a temporary file first: in the target's folder for a local target, then synced and
    renamed; in the machine's temporary folder for an object store, then put in one upload.

    Raises:
        UsageError, JobError: As `write_atomic`.
    """
    store, path = resolve(url)
    folder = Path(path).parent if isinstance(store, LocalFileSystem) else Path(tempfile.gettempdir())
    temporary = folder / f".{PurePosixPath(path).name}.{os.getpid()}-{secrets.token_hex(4)}.part"
    with explained(url):
        folder.mkdir(parents=True, exist_ok=True)
        stream = temporary.open("xb")
    try:
        try:
            with stream:
                yield stream
                with explained(url):
                    stream.flush()
                    os.fsync(stream.fileno())
        except OSError as error:
            if not is_full(error):  # whatever else the block may have met is not this file's
                raise
            with explained(url):
                raise
        if isinstance(store, LocalFileSystem):
            with explained(url):
                temporary.replace(path)
                _sync_folder(folder)
        else:
            ask(url, lambda: store.put_file(str(temporary), path))
    finally:
        temporary.unlink(missing_ok=True)


def list_files(url: str, *, depth: int | None = None) -> list[str]:
    """Every file below the folder at `url`, relative to it, sorted; nothing where there is no folder.

    Links are followed, though not into a folder that they lie in; one that leads nowhere is listed as a file. A folder
    below that may not be read is told in the log.

    Args:
        url: Of the folder.
        depth: 1: only the folder's own files; 2: those of its folders too; ...; None: all.

    Raises:
        UsageError, JobError: As `read_bytes`.
    """
    store, path = resolve(url)
    root = path.rstrip("/") + "/"
    if isinstance(store, LocalFileSystem):
        with explained(url):
            found = list(_files_below(root, depth, frozenset({os.path.realpath(root)})))
    else:
        # All of them, however deep: fsspec's search to a depth takes a folder whose listing fails for an empty one.
        found = ask(url, lambda: store.find(path))
    names = sorted(name.removeprefix(root) for name in found if name.startswith(root))
    return names if depth is None else [name for name in names if name.count("/") < depth]


def _files_below(folder: str, depth: int | None, within: frozenset[str]) -> Iterator[str]:
    """What `list_files` lists of a folder of this machine, which lies within others."""
    try:
        with os.scandir(folder) as listing:
            entries = list(listing)
    except (FileNotFoundError, NotADirectoryError):
        return
    except PermissionError:
        if len(within) == 1:
            raise
        _LOG.warning("%s: access denied; what is in it is left out", folder)  # as of a disk's lost+found
        return
    for entry in entries:
        if not entry.is_dir():
            yield entry.path
        elif depth != 1 and (real := os.path.realpath(entry.path)) not in within:
            yield from _files_below(entry.path, depth and depth - 1, within | {real})


def glob_files(pattern: str) -> tuple[str, list[str]]:
    """The files that match a glob (`*`, `?`, `[...]`, `**`).

    Returns:
        The URL of the deepest folder that the pattern names without a wildcard, and the matches relative to it, sorted.

    Raises:
        UsageError, JobError: As `read_bytes`.
    """
    scheme, separator, rest = pattern.rpartition("://")
    parts = rest.split("/")
    fixed = list(takewhile(lambda part: not has_wildcard(part), parts))
    base = f"{scheme}{separator}{'/'.join(fixed) or ('/' if rest.startswith('/') else '')}"
    below = "/".join(parts[len(fixed) :])
    matches = re.compile(glob_translate(below)).match
    names = list_files(base or ".", depth=None if "**" in below else below.count("/") + 1)
    return base, [name for name in names if matches(name)]


def has_wildcard(text: str) -> bool:
    """Whether a glob would read `text` as a pattern."""
    return any(character in text for character in "*?[")


class _SteadyStream:
    """A store's file, read to its end whatever connections break on the way."""

    def __init__(self, url: str, file: Any) -> None:
        self._url = url
        self._file = file  # of fsspec: keeps its place when a read fails
        self._left = int(file.size)

    def read(self, size: int = -1, /) -> bytes:
        wanted = self._left if size < 0 else min(size, self._left)
        pieces: list[bytes] = []
        while wanted:
            piece = ask(self._url, partial(self._some, min(wanted, _READ_BLOCK)))
            pieces.append(piece)
            wanted -= len(piece)
            self._left -= len(piece)
        return b"".join(pieces)

    def _some(self, size: int) -> bytes:
        piece = bytes(self._file.read(size))
        if not piece:
            raise ConnectionError(f"nothing came where {self._left} bytes were left")
        return piece


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
