"""The store behind a URL: how it is reached, asked again when it fails in passing, and what its errors mean.

One policy for every store and every call: what may pass (a server that is busy, away or restarting, a connection that
breaks) is tried again for `retry.PATIENCE`; what will not (no such file, access denied, no credentials) is told at
once. S3's client has its own tries switched off: they would multiply, in silence.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from aiohttp import ClientConnectionError as HttpConnectionError
from aiohttp import ClientPayloadError
from botocore.exceptions import (  # type: ignore[import-untyped]
    BotoCoreError,
    ClientError,
    FlexibleChecksumError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
    SSLError,
)
from botocore.exceptions import ConnectionError as BotoConnectionError
from botocore.parsers import ResponseParserError  # type: ignore[import-untyped]
from fsspec import get_filesystem_class
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from freesolo.data.retry import StillFailingError, one_line, persist
from freesolo.errors import JobError, UsageError

Result = TypeVar("Result")

# Seconds. A first byte that takes 20 s is waited for; a connection that has died is noticed.
CONNECT_TIMEOUT = 10.0
READ_TIMEOUT = 30.0

# What a store's library raises when the store, the network or the URL is at fault; the rest is a bug.
_STORE_ERRORS = (OSError, BotoCoreError, ClientError, HttpConnectionError, ClientPayloadError, StillFailingError)
_AWAY = (HTTPClientError, BotoConnectionError, HttpConnectionError, ConnectionError, TimeoutError)
_TRANSIENT = (*_AWAY, ClientPayloadError, IncompleteReadError, ResponseParserError, FlexibleChecksumError)
_TRANSIENT_STATUS = frozenset({408, 429, 500, 502, 503, 504})
# With statuses that say otherwise: bytes that were damaged or lost on the way to the store, and an upload in parts that
# is no more, because its end was asked for twice or it was swept away: it is begun anew.
_TRANSIENT_CODES = frozenset(
    {"BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch", "RequestTimeout", "NoSuchUpload"}
)


class UnreadableFileError(UsageError):
    """One file that is missing, forbidden or a folder, while its store answers well enough."""


def resolve(url: str) -> tuple[Any, str]:
    """The file system of a URL and the path in it, without a cache of listings: other processes write there too.

    Raises:
        UsageError: The URL is empty, or of an unknown protocol.
    """
    if not url:
        raise UsageError("an empty URL: give a path, file://..., s3://bucket/... or another fsspec URL")
    scheme = url.partition("://")[0] if "://" in url else "file"
    if scheme in ("file", "local"):
        # Not by `url_to_fs`, for which a `::` in a name chains one store to another; so too in a bucket.
        return LocalFileSystem(), str(LocalFileSystem._strip_protocol(url))
    if scheme in ("s3", "s3a"):
        s3 = get_filesystem_class(scheme)(use_listings_cache=False, config_kwargs=_s3_config())
        s3.retries = 1  # s3fs's own tries of a call
        return s3, str(s3._strip_protocol(url))
    try:
        store, path = url_to_fs(url, use_listings_cache=False)
    except (ValueError, ImportError) as error:
        raise UsageError(f"{url}: {one_line(error)}; give a path, file://... or s3://bucket/...") from error
    return store, str(path)


def ask(url: str, act: Callable[[], Result]) -> Result:
    """Do something with the store of a URL, again when it fails in passing.

    Args:
        url: What is asked for; named in every line.
        act: A call of the store's library. It may be done twice: when the answer is lost on the way, for one.

    Raises:
        UnreadableFileError: No such file or bucket, no permission, or a folder.
        UsageError: No credentials.
        JobError: The store cannot be reached or failed.
    """
    with explained(url):
        return persist(act, url, is_transient)


@contextmanager
def explained(url: str) -> Iterator[None]:
    """Turn what a store's library raises into one line with what to do."""
    try:
        yield
    except _STORE_ERRORS as error:
        raise _explanation(url, error) from error


def is_transient(error: BaseException) -> bool:
    """Whether what a store's library raised may pass by itself."""
    if isinstance(error, SSLError) and "CERTIFICATE_VERIFY_FAILED" in str(error):
        return False
    if isinstance(error, _TRANSIENT):
        return True
    refusal = error if isinstance(error, ClientError) else error.__cause__
    if isinstance(refusal, ClientError):  # s3fs makes an OSError of it
        status = refusal.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return status in _TRANSIENT_STATUS or refusal.response.get("Error", {}).get("Code") in _TRANSIENT_CODES
    # fsspec takes an HTTP server that is away for one that has no such file.
    return isinstance(error, FileNotFoundError) and isinstance(error.__cause__, HttpConnectionError)


def is_there_already(error: BaseException) -> bool:
    """Whether a file was not created because there is one, or because another is being created just now."""
    refusal = error.__cause__
    if isinstance(refusal, ClientError):
        return refusal.response["Error"].get("Code") in ("PreconditionFailed", "ConditionalRequestConflict")
    return isinstance(error, FileExistsError)


def is_full(error: BaseException) -> bool:
    """Whether a disk, or someone's share of it, has no room left."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def _s3_config() -> dict[str, Any]:
    return {
        "connect_timeout": CONNECT_TIMEOUT,
        "read_timeout": READ_TIMEOUT,
        "retries": {"mode": "standard", "total_max_attempts": 1},
    }


def _explanation(url: str, error: BaseException) -> UsageError | JobError:
    effort = ""
    if isinstance(error, StillFailingError) and error.__cause__ is not None:
        effort, error = f"; {error}" if error.tries > 1 else "", error.__cause__
    if isinstance(error, (NoCredentialsError, PartialCredentialsError)):
        return UsageError(f"{url}: no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    if isinstance(error, (*_AWAY, ClientPayloadError)) or isinstance(error.__cause__, HttpConnectionError):
        return JobError(
            f"{url}: the store cannot be reached ({one_line(error)}{effort}); check AWS_ENDPOINT_URL and the network"
        )
    if isinstance(error, FileNotFoundError):
        return UnreadableFileError(f"{url}: no such file or bucket; check the URL")
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return UnreadableFileError(f"{url}: {one_line(error)}; no file system takes such a name")
    if isinstance(error, (IsADirectoryError, NotADirectoryError, FileExistsError)):
        return UnreadableFileError(f"{url}: {one_line(error)}; a folder where a file should be, or the reverse")
    if isinstance(error, PermissionError):
        return UnreadableFileError(
            f"{url}: access denied ({one_line(error)}); check the credentials and the permissions"
        )
    if is_full(error):
        return JobError(f"{url}: the disk is full ({one_line(error)}); make room")
    return JobError(f"{url}: {one_line(error)}{effort}")
