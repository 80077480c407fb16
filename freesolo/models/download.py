"""Fetch one file over HTTP so that it arrives whole or not at all.

Bytes go to `<file>.part`, which an interrupted fetch leaves for the next to go on from; the file gets its name only
after its length and checksum are right.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from freesolo.errors import JobError, UsageError

Progress = Callable[[int, int | None], None]  # bytes so far, bytes in all where the server says

_BLOCK = 2**20
_RETRIED_STATUSES = (408, 425, 429, 500, 502, 503, 504)


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How long to keep trying.

    Attributes:
        attempts: Requests in a row that bring no new byte before giving up.
        first_delay: Seconds before the second attempt; doubles with each.
        timeout: Seconds that a connection or a read may take.
    """

    attempts: int = 5
    first_delay: float = 1.0
    timeout: float = 60.0


class _InterruptedError(Exception):
    """The transfer broke off; another attempt may go on from where it stopped."""


def sha256_of_file(path: Path) -> str:
    """The file's SHA-256 in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download(
    url: str,
    target: Path,
    *,
    sha256: str | None = None,
    progress: Progress | None = None,
    retry: RetryPolicy | None = None,
) -> str:
    """Fetch `url` into `target`, going on from an earlier interrupted fetch where the server allows it.

    Args:
        url: `http://` or `https://`.
        target: The file to write; its folder is made. Replaced if it exists.
        sha256: What the file must hash to; None: anything is taken.
        progress: Called after each block.
        retry: How long to keep trying; None: the default policy.

    Returns:
        The SHA-256 of the file.

    Raises:
        UsageError: The URL is not HTTP, names no file, or needs credentials.
        JobError: The server cannot be reached or keeps failing; what has arrived is kept. Or the checksum is wrong;
            what has arrived is deleted.
    """
    _check_url(url)
    policy = retry or RetryPolicy()
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    _fetch_with_retries(url, part, policy, progress, resume_unversioned=sha256 is not None)
    found = sha256_of_file(part)
    if sha256 is not None and found != sha256:
        _discard(part)
        raise JobError(f"{url}: has sha256 {found}, expected {sha256}: another file, or damaged on the way; deleted")
    part.replace(target)
    _version_file(part).unlink(missing_ok=True)
    return found


def _check_url(url: str) -> None:
    try:
        address = urlsplit(url)
    except ValueError as error:
        raise UsageError(f"{url}: not an address: {error}") from error
    if address.scheme not in ("http", "https") or not address.hostname:
        raise UsageError(f"{url}: only http://host/... and https://host/... can be downloaded")


def _fetch_with_retries(
    url: str, part: Path, policy: RetryPolicy, progress: Progress | None, *, resume_unversioned: bool
) -> None:
    fruitless = 0
    while True:
        before = _size(part)
        try:
            _fetch(url, part, policy.timeout, progress, resume_unversioned=resume_unversioned)
            return
        except _InterruptedError as error:
            fruitless = 0 if _size(part) > before else fruitless + 1
            if fruitless >= policy.attempts:
                raise JobError(
                    f"{url}: {error}, {policy.attempts} times in a row; {_size(part)} bytes are kept in {part}: "
                    "run again to go on from there"
                ) from error
            time.sleep(policy.first_delay * 2 ** max(0, fruitless - 1))


def _fetch(url: str, part: Path, timeout: float, progress: Progress | None, *, resume_unversioned: bool) -> None:
    """One request: append to `part` what is missing of it.

    A part is only continued if it is of the same version of the file: the server says so by its entity tag, or the
    caller knows the checksum of the whole.
    """
    headers = {"User-Agent": "freesolo", "Accept-Encoding": "identity"}
    version = _version_file(part).read_text(encoding="utf-8") if _version_file(part).exists() else ""
    start = _size(part) if version or resume_unversioned else 0
    if start:
        headers["Range"] = f"bytes={start}-"
        if version:
            headers["If-Range"] = version
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=timeout) as response:
            _receive(response, part, progress)
    except urllib.error.HTTPError as error:
        error.close()
        _refuse_or_retry(url, part, error)
    except (OSError, http.client.HTTPException) as error:
        # URLError, timeouts and resets are all OSErrors.
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise _InterruptedError(f"the transfer failed ({reason or type(error).__name__})") from error


def _receive(response: http.client.HTTPResponse, part: Path, progress: Progress | None) -> None:
    start = _range_start(response) if response.status == 206 else 0
    if start is None or start > _size(part):
        _discard(part)
        raise _InterruptedError("the server continued the file at another place than asked")
    length = response.headers.get("Content-Length", "")
    total = start + int(length) if re.fullmatch(r"[0-9]{1,18}", length) else None
    _remember_version(response, part)
    with part.open("r+b" if start else "wb") as file:
        file.seek(start)
        file.truncate()
        received = start
        while block := response.read(_BLOCK):
            file.write(block)
            received += len(block)
            if progress is not None:
                progress(received, total)
        file.flush()
        os.fsync(file.fileno())
    if total is not None and received < total:
        raise _InterruptedError(f"the transfer broke off after {received} of {total} bytes")


def _range_start(response: http.client.HTTPResponse) -> int | None:
    match = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    return int(match[1]) if match else None


def _refuse_or_retry(url: str, part: Path, error: urllib.error.HTTPError) -> None:
    if error.code == 416:  # the part is already as long as the file, or longer
        total = (error.headers.get("Content-Range") or "").rpartition("/")[2]
        if total == str(_size(part)):
            return
        _discard(part)
        raise _InterruptedError("the part fetched earlier does not fit the file") from error
    if error.code in _RETRIED_STATUSES:
        raise _InterruptedError(f"the server answered {error.code} {error.reason}") from error
    if error.code in (401, 403):
        raise UsageError(
            f"{url}: the server refuses access ({error.code}); fetch it by hand and give its path"
        ) from error
    raise UsageError(f"{url}: the server answered {error.code} {error.reason}; check the address") from error


def _remember_version(response: http.client.HTTPResponse, part: Path) -> None:
    tag = response.headers.get("ETag", "")
    if tag and not tag.startswith("W/"):  # a weak tag does not promise equal bytes
        _version_file(part).write_text(tag, encoding="utf-8")
    else:
        _version_file(part).unlink(missing_ok=True)


def _version_file(part: Path) -> Path:
    return part.with_name(part.name + ".etag")


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    _version_file(part).unlink(missing_ok=True)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
