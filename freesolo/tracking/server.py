"""Where MLflow is, and how to speak with it: bounded requests, errors in words."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from freesolo.data.files import is_local, join
from freesolo.errors import UsageError
from freesolo.settings import TrackingSettings
from freesolo.tracking.courier import Refused


@dataclass(frozen=True, slots=True)
class TrackingServer:
    """Where MLflow keeps runs and models.

    Attributes:
        uri: `http(s)://...` of a server, or `sqlite:///...` or another database, which needs none.
        artifact_root: Where experiments that we make keep their files; None: the server knows.
    """

    uri: str
    artifact_root: str | None = None


def resolve_server(settings: TrackingSettings, storage: str) -> TrackingServer | None:
    """Where a job's runs are witnessed: `tracking.uri`, or MLFLOW_TRACKING_URI, or SQLite in the storage folder.

    Args:
        settings: The job's; `tracking.uri=off` trains without MLflow.
        storage: The job's storage URL.

    Returns:
        None for `off`.

    Raises:
        UsageError: Nothing is configured and the storage is remote, where SQLite cannot be; or the URI is a folder.
    """
    uri = settings.uri or os.environ.get("MLFLOW_TRACKING_URI")
    if uri == "off":
        return None
    if uri is None:
        if not is_local(storage):
            raise UsageError(
                f"no tracking server, and storage {storage} cannot hold MLflow's SQLite file: set tracking.uri or "
                "MLFLOW_TRACKING_URI to a server's address, or train without: tracking.uri=off"
            )
        folder = Path(urlsplit(storage).path if "://" in storage else storage).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        return TrackingServer(f"sqlite:///{folder}/mlflow.db", str(folder / "mlartifacts"))
    scheme = urlsplit(uri).scheme
    if scheme in ("", "file"):
        raise UsageError(
            f"tracking.uri={uri}: MLflow does not keep runs in folders any more; give sqlite:///{uri}/mlflow.db or a "
            "server's http address"
        )
    return TrackingServer(uri, None if scheme in ("http", "https") else join(storage, "mlartifacts"))


@contextmanager
def request_limits(*, seconds: int, retries: int) -> Iterator[None]:
    """Bound MLflow's requests, which by default go on for over five minutes when nobody answers, and keep it quiet.

    MLflow takes these settings from the environment of the process at each request and from nowhere else, so they are
    set there while the block runs. What the user has set stays. Blocks that overlap without being nested end early
    for each other; then a request takes longer and nothing else happens.

    Args:
        seconds: To wait for a connection, and for each part of an answer.
        retries: Of a request that fails.
    """
    wanted = {
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(seconds),
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": str(retries),
        "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # a job's last line there is its result
    }
    ours = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)


def explain(uri: str, error: BaseException) -> str:
    """What went wrong with MLflow at `uri`, in one line for people."""
    if isinstance(error, Refused):
        return str(error)
    cause = error
    while (deeper := cause.__cause__ or cause.__context__) is not None:
        cause = deeper
    # requests wraps urllib3, which wraps the socket's own words; the latter are the clear ones.
    if isinstance(cause, OSError) and cause.filename is None:
        return f"{uri} does not answer ({one_line(cause)})"
    return f"{uri}: {one_line(error)}"


def one_line(error: BaseException) -> str:
    """An error's message without line breaks, at most 300 characters."""
    return " ".join(str(error).split())[:300] or type(error).__name__
