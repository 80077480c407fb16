"""Files by fsspec URL: a bare path, `file://`, `s3://` and `memory://` behave the same.

Credentials and endpoints come from the environment of the store's own library (`AWS_*`, `AWS_ENDPOINT_URL`).
What goes wrong on the way is told in one line: what was tried, where, and what to do.
"""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Protocol, runtime_checkable

from aiohttp import ClientConnectionError as HttpConnectionError
from botocore.exceptions import (  # type: ignore[import-untyped]
    BotoCoreError,
    ClientError,
    HTTPClientError,
    NoCredentialsError,
    PartialCredentialsError,
)
from botocore.exceptions import ConnectionError as BotoConnectionError
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from freesolo.errors import JobError, UsageError

# What a store's library raises when the store, the network or the URL is at fault; the rest is a bug.
_STORE_ERRORS = (OSError, BotoCoreError, ClientError, HttpConnectionError)
_READ_BLOCK = 8 * 2**20


class UnreadableFileError(UsageError):
    """One file that is missing, forbidden or a folder, while its store answers well enough."""


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
    return isinstance(_resolve(url)[0], LocalFileSystem)


def exists(url: str) -> bool:
    """Whether there is a file at `url` (a folder is not one).

    Raises:
        UsageError: The URL's store needs credentials, or its protocol is unknown.
        JobError: The store cannot be reached.
    """
    return size(url) is not None


def size(url: str) -> int | None:
    """Bytes of the file at `url`; None where there is none.

    Raises:
        UsageError, JobError: As `exists`.
    """
    store, path = _resolve(url)
    with _explained(url):
        try:
            details = store.info(path)
        except (FileNotFoundError, NotADirectoryError) as error:
            if isinstance(error.__cause__, HttpConnectionError):  # fsspec takes a server that is away for no file
                raise error.__cause__ from error
            return None
    return int(details["size"]) if details["type"] == "file" else None


def is_folder(url: str) -> bool:
    """Whether there is a folder at `url`; in an object store, whether any name begins with it."""
    store, path = _resolve(url)
    with _explained(url):
        return bool(store.isdir(path))


def read_bytes(url: str) -> bytes:
    """The whole file at `url`.

    Raises:
        UnreadableFileError: No such file or bucket, no permission, or a folder.
        UsageError: No credentials, unknown protocol.
        JobError: The store cannot be reached or failed.
    """
    store, path = _resolve(url)
    with _explained(url):
        return bytes(store.cat_file(path))


@contextmanager
def open_stream(url: str) -> Iterator[ReadStream]:
    """A file opened to be read once from front to back, in constant memory.

    Raises:
        UsageError, JobError: As `read_bytes`, on opening or while reading.
    """
    store, path = _resolve(url)
    with _explained(url), store.open(path, "rb", block_size=_READ_BLOCK) as stream:
        yield stream


def write_atomic(url: str, data: bytes) -> None:
    """Write a file that appears at `url` whole or not at all, replacing one that is there.

    Raises:
        UsageError: No such bucket, no credentials, no permission, unknown protocol.
        JobError: The store cannot be reached or failed, or the disk is full.
    """
    store, path = _resolve(url)
    if isinstance(store, LocalFileSystem):
        with atomic_writer(url) as stream:
            stream.write(data)
        return
    with _explained(url):
        store.pipe_file(path, data)


def create_file(url: str, data: bytes) -> bool:
    """Write a small file unless there is one; of several processes that try at once, one does.

    On a local disk a reader may see it before all of it is written; in an object store it appears whole.

    Returns:
        Whether this call wrote it.

    Raises:
        UsageError, JobError: As `write_atomic`.
    """
    store, path = _resolve(url)
    with _explained(url):
        try:
            if isinstance(store, LocalFileSystem):
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                with Path(path).open("xb") as stream:
                    stream.write(data)
            else:
                store.pipe_file(path, data, mode="create")
        except OSError as error:
            if isinstance(error, FileExistsError) or _was_there_first(error.__cause__):
                return False
            raise
    return True


def _was_there_first(error: BaseException | None) -> bool:
    """Whether an object store refused a conditional put because of what is there, or of another put under way."""
    refusals = ("PreconditionFailed", "ConditionalRequestConflict")
    return isinstance(error, ClientError) and error.response["Error"].get("Code") in refusals


def remove_file(url: str) -> None:
    """Remove the file at `url`; nothing happens where there is none.

    Raises:
        UsageError, JobError: As `write_atomic`.
    """
    store, path = _resolve(url)
    with _explained(url), suppress(FileNotFoundError):
        store.rm_file(path)


@contextmanager
def atomic_writer(url: str) -> Iterator[BinaryIO]:
    """A file to write that appears at `url` whole, when the block ends, or not at all, when it raises.

    What is written goes to a temporary file first: in the target's folder for a local target, then synced and
    renamed; in the machine's temporary folder for an object store, then put in one upload.

    Raises:
        UsageError, JobError: As `write_atomic`.
    """
    store, path = _resolve(url)
    folder = Path(path).parent if isinstance(store, LocalFileSystem) else Path(tempfile.gettempdir())
    temporary = folder / f".{PurePosixPath(path).name}.{os.getpid()}-{secrets.token_hex(4)}.part"
    with _explained(url):
        folder.mkdir(parents=True, exist_ok=True)
        stream = temporary.open("xb")
    try:
        with stream:
            yield stream
            with _explained(url):
                stream.flush()
                os.fsync(stream.fileno())
        with _explained(url):
            if isinstance(store, LocalFileSystem):
                temporary.replace(path)
                _sync_folder(folder)
            else:
                store.put_file(str(temporary), path)
    finally:
        temporary.unlink(missing_ok=True)


def list_files(url: str) -> list[str]:
    """Every file below the folder at `url`, relative to it, sorted; nothing where there is no folder.

    Raises:
        UsageError, JobError: As `read_bytes`.
    """
    store, path = _resolve(url)
    with _explained(url):
        found = store.find(path)
    root = path.rstrip("/") + "/"
    return sorted(name.removeprefix(root) for name in found if name.startswith(root))


def glob_files(pattern: str) -> tuple[str, list[str]]:
    """The files that match a glob (`*`, `?`, `[...]`, `**`).

    Returns:
        The URL of the deepest folder that the pattern names without a wildcard, and the matches relative to it, sorted.

    Raises:
        UsageError, JobError: As `read_bytes`.
    """
    store, path = _resolve(pattern)
    with _explained(pattern):
        found = store.glob(path, detail=True)
    fixed = list(takewhile(lambda part: not has_wildcard(part), path.split("/")))
    depth = len("/".join([*fixed, ""]))
    names = sorted(name[depth:] for name, details in found.items() if details["type"] == "file")
    scheme, separator, rest = pattern.rpartition("://")
    base = "/".join(takewhile(lambda part: not has_wildcard(part), rest.split("/")))
    return f"{scheme}{separator}{base or ('/' if rest.startswith('/') else '')}", names


def has_wildcard(text: str) -> bool:
    """Whether a glob would read `text` as a pattern."""
    return any(character in text for character in "*?[")


def _resolve(url: str) -> tuple[Any, str]:
    """The file system of a URL and the path in it, without a cache of listings: other processes write there too."""
    if not url:
        raise UsageError("an empty URL: give a path, file://..., s3://bucket/... or another fsspec URL")
    try:
        store, path = url_to_fs(url, use_listings_cache=False)
    except (ValueError, ImportError) as error:
        raise UsageError(f"{url}: {_one_line(error)}; give a path, file://... or s3://bucket/...") from error
    return store, str(path)


@contextmanager
def _explained(url: str) -> Iterator[None]:
    """Turn what a store's library raises into one line with what to do."""
    try:
        yield
    except _STORE_ERRORS as error:
        raise _explanation(url, error) from error


def _explanation(url: str, error: BaseException) -> UsageError | JobError:
    if isinstance(error, (NoCredentialsError, PartialCredentialsError)):
        return UsageError(f"{url}: no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    if isinstance(error, FileNotFoundError):
        return UnreadableFileError(f"{url}: no such file or bucket; check the URL")
    if isinstance(error, (IsADirectoryError, NotADirectoryError, FileExistsError)):
        return UnreadableFileError(f"{url}: {_one_line(error)}; a folder where a file should be, or the reverse")
    if isinstance(error, PermissionError):
        return UnreadableFileError(
            f"{url}: access denied ({_one_line(error)}); check the credentials and the permissions"
        )
    away = (HTTPClientError, BotoConnectionError, HttpConnectionError, ConnectionError, TimeoutError)
    if isinstance(error, away):
        return JobError(
            f"{url}: the store cannot be reached ({_one_line(error)}); check AWS_ENDPOINT_URL and the network"
        )
    return JobError(f"{url}: {_one_line(error)}")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
