"""A run's note of where its MLflow run is, in the run's own folder."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from freesolo.data.files import exists, join, read_bytes, write_atomic
from freesolo.errors import JobError
from freesolo.tracking.server import TrackingServer

RECORD_NAME = "mlflow_run.json"


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
