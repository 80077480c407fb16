"""Where Ray Train keeps checkpoints: its own way to the store is pyarrow's, here with tries that last as long as ours.

Without these a worker gives a checkpoint up after three tries, at most three seconds: that is what is left of pyarrow's
patience when it has been pickled. Each blink of a store would cost the training a restart of all its workers.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.fs
from fsspec.implementations.local import LocalFileSystem
from pyarrow.fs import AwsStandardS3RetryStrategy
from ray.train import Checkpoint

from freesolo.data.stores import CONNECT_TIMEOUT, READ_TIMEOUT, resolve

# AWS's standard strategy: what may pass is tried again, after a wait of a random share of 1, 2, 4, ... seconds, 20 at
# most. The waits of 12 tries are 123 s on average; of 20,000 draws the shortest was 56 s.
_TRIES = 12


class _PatientS3(pyarrow.fs.S3FileSystem):  # type: ignore[misc]
    """pyarrow's S3 with its tries, which pyarrow itself forgets when it is pickled for the workers."""

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__(**options, retry_strategy=AwsStandardS3RetryStrategy(max_attempts=_TRIES))
        self._options = options

    def __reduce__(self) -> tuple[type[_PatientS3], tuple[dict[str, Any]]]:
        return _PatientS3, (self._options,)


def checkpoint_storage(url: str) -> tuple[str, pyarrow.fs.FileSystem | None]:
    """What Ray's `RunConfig` takes as `storage_path` and `storage_filesystem` for a folder.

    Credentials and the endpoint are looked up in each process's own environment, and are not sent to the workers.
    """
    store, path = resolve(url)
    if isinstance(store, LocalFileSystem):
        return str(Path(path).resolve()), None
    if "s3" not in store.protocol:
        return url, None
    # Of the bucket alone: pyarrow takes `#`, `?` and `%` in a URL for more than characters of a name, as nothing else
    # here does.
    checkpoints, _ = pyarrow.fs.FileSystem.from_uri(f"s3://{path.partition('/')[0]}")
    # All that was read from the environment, the bucket's region for one.
    _, (options,) = checkpoints.__reduce__()
    options |= {"connect_timeout": CONNECT_TIMEOUT, "request_timeout": READ_TIMEOUT}
    return path, _PatientS3(options)


@contextmanager
def checkpoint_files(checkpoint: Checkpoint) -> Iterator[Path]:
    """A checkpoint's files in a folder: where they are, on a disk of this machine, or else copied, for this process.

    Not by `Checkpoint.as_directory`: all workers of a node share what that fetches, and one that comes late fetches it
    again over what the others are reading.

    Raises:
        OSError: The store failed, or the disk is full.
    """
    if isinstance(checkpoint.filesystem, pyarrow.fs.LocalFileSystem):
        yield Path(checkpoint.path)
        return
    with tempfile.TemporaryDirectory(prefix="freesolo-checkpoint-") as folder:
        checkpoint.to_directory(folder)
        yield Path(folder)
