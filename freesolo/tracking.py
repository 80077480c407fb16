"""Where MLflow is, which of its runs is ours, and how to speak with it: bounded requests, errors in words."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from freesolo.config import TrackingSettings
from freesolo.courier import Refused
from freesolo.data.files import exists, is_local, join, read_bytes, write_atomic
from freesolo.errors import JobError, UsageError

RECORD_NAME = "mlflow_run.json"

# What MLflow says when it will not take something however often it is offered.
_REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS")


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


@dataclass(frozen=True, slots=True)
class RunRecord:
    """What `<run_url>/mlflow_run.json` says.

    Attributes:
        token: Of this run alone, and a tag of the MLflow run: finds it when the answer that gave its id was lost.
        uri: The tracking server's.
        artifact_root: As `TrackingServer`.
        experiment: Of MLflow; made where there is none of that name.
        name: Shown by MLflow.
        parent_run_url: Folder of the run that this one is a stage of.
        run_id: MLflow's; None while the server has not been reached.
        status: How the run ended; None while it has not.
    """

    token: str
    uri: str
    artifact_root: str | None
    experiment: str
    name: str
    parent_run_url: str | None
    run_id: str | None = None
    status: str | None = None

    @property
    def server(self) -> TrackingServer:
        """Where the run is."""
        return TrackingServer(self.uri, self.artifact_root)


def read_record(run_url: str) -> RunRecord | None:
    """The record of a run's MLflow run; None where it has none.

    Raises:
        UsageError, JobError: As `freesolo.data.files.read_bytes`.
        JobError: The file is not a record.
    """
    url = join(run_url, RECORD_NAME)
    if not exists(url):
        return None
    try:
        return RunRecord(**json.loads(read_bytes(url)))
    except (ValueError, TypeError) as error:
        raise JobError(f"{url}: not a record of an MLflow run; delete it to begin a new MLflow run") from error


def write_record(run_url: str, record: RunRecord) -> None:
    """Put the record of a run's MLflow run in place.

    Raises:
        UsageError, JobError: As `freesolo.data.files.write_atomic`.
    """
    write_atomic(join(run_url, RECORD_NAME), json.dumps(asdict(record), indent=1).encode())


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


def is_refusal(error: MlflowException) -> bool:
    """Whether MLflow will not take something however often it is offered."""
    return error.error_code in _REFUSALS


def experiment_id(client: MlflowClient, server: TrackingServer, name: str) -> str:
    """MLflow's id of the experiment of that name, which is made where there is none.

    Raises:
        MlflowException: The server does not answer, or refuses.
    """
    experiment = client.get_experiment_by_name(name)
    if experiment is not None:
        return str(experiment.experiment_id)
    location = None if server.artifact_root is None else join(server.artifact_root, name)
    return str(client.create_experiment(name, artifact_location=location))


def one_line(error: BaseException) -> str:
    """An error's message without line breaks, at most 300 characters."""
    return " ".join(str(error).split())[:300] or type(error).__name__
